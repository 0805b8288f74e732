"""What a script of this folder is given and gives back. It runs in the environment of its program, so nothing is imported
here but the standard library and, for pictures, Pillow."""

import argparse
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# The code of one export shall not meet that of another of the same name.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="programs-"))


class Job:
    """An exported folder and questions about it: each a list of messages, {role, content}, whose content is a list of
    {type: text, text} and {type: image, path}."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument(
            "job",
            type=Path,
            help="JSON: export, adapter and merged (a PEFT folder, the export with it; or empty), dtype, calls, max_new_tokens, questions",
        )
        parser.add_argument("output", type=Path, help="JSON: versions, called, answers, checks")
        args = parser.parse_args()
        given = json.loads(args.job.read_text())
        self.output = args.output
        self.export: str = given["export"]
        self.adapter: str = given["adapter"]
        self.merged: str = given["merged"]
        self.dtype: str = given["dtype"]
        self.calls: bool = given["calls"]
        self.max_new_tokens: int = given["max_new_tokens"]
        self.questions: list[list[dict[str, Any]]] = given["questions"]

    def pictures(self, messages: list[dict[str, Any]]) -> list[Any]:
        from PIL import Image

        paths = [part["path"] for message in messages for part in message["content"] if part["type"] == "image"]
        return [Image.open(path).convert("RGB") for path in paths]

    def give(self, called: str, answers: list[str | None], versions: list[str], checks: dict[str, str] = {}) -> None:  # noqa: B006
        """Args:
        called: the calls, as a reader would look for them in the program.
        answers: one a question; None where the program has no form for it.
        versions: names of packages.
        checks: what else was looked at, and what was wrong with it: "" where nothing was.
        """
        installed = {name: importlib.metadata.version(name) for name in versions}
        result = {"called": called, "answers": answers, "versions": installed, "checks": checks}
        self.output.write_text(json.dumps(result, ensure_ascii=False))


def with_pictures(messages: list[dict[str, Any]], kind: str, convert: Any) -> list[dict[str, Any]]:
    """The messages with {type: kind, kind: convert(path)} in the place of each picture."""
    return [
        {
            "role": message["role"],
            "content": [
                part if part["type"] == "text" else {"type": kind, kind: convert(part["path"])}
                for part in message["content"]
            ],
        }
        for message in messages
    ]
