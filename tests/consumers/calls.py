"""What other programs call on an exported folder, without those programs: one JSON with every call and its outcome.

    python tests/consumers/calls.py EXPORT [--image FILE] [--question TEXT]

Stands alone: this folder imports transformers, torch and Pillow, in whatever versions are installed, and nothing of this
project.
Each call is named after the program whose source asks it. `answer` is the greedy answer about one picture, `logits` the
figures to compare two versions by.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if __name__ == "__main__":  # the code of one export shall not meet that of another of the same name
    code_cache = tempfile.TemporaryDirectory(prefix="calls-")
    os.environ["HF_MODULES_CACHE"] = code_cache.name
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from PIL import Image

from consumers import of_model, of_processor  # noqa: F401  their calls
from consumers.export import CALLS, Export


def outcome(function: Callable[[Export], Any], export: Export) -> dict[str, Any]:
    try:
        value = function(export)
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"ok": True} if value is None else {"ok": True, "value": value}


def figures(export: Export) -> dict[str, Any]:
    """Answer and logits of the question about the picture: what two versions are compared by."""
    logits = export.logits
    spread = torch.linspace(0, logits.numel() - 1, 16).long()
    return {
        "answer": export.processor.decode(export.answer),
        "answer_ids": export.answer,
        "input_ids_sha256": _sha256(export.inputs["input_ids"]),
        "pixel_values_sha256": _sha256(export.inputs["pixel_values"]),
        "logits": {
            "shape": list(logits.shape),
            "largest": float(logits.abs().max()),
            "spread": [round(x, 6) for x in logits.flatten()[spread].tolist()],  # 16 of them, evenly
            "sha256": _sha256(logits),
        },
    }


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def run(export: Export) -> dict[str, Any]:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    calls = {name: outcome(function, export) for name, function in CALLS.items()}
    try:
        found = figures(export)
    except Exception:  # told by the first call
        found = {"answer": None}
    return {**versions, "all_ok": all(x["ok"] for x in calls.values()), **found, "calls": calls}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", help="folder")
    parser.add_argument("--image", help="a picture; default: a made one")
    parser.add_argument("--question", default="What is this?")
    args = parser.parse_args()
    image = Image.open(args.image).convert("RGB") if args.image else None
    result = run(Export(args.export, image, args.question))
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 0 if result["all_ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
