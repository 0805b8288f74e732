"""The files of a Hugging Face folder that hold its weights, and what is said of weights in another form. No torch."""

import errno
import glob
import json
import os
import re
import shlex
import struct
from fnmatch import fnmatch
from pathlib import Path

from llava_sft.errors import READABLE, CheckpointError, dead_link, shown
from llava_sft.files import read_object

INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of PEFT

# Without the classes of the model: a base class would leave out its lm_head.
TO_SAFETENSORS = (
    "import glob, torch; from safetensors.torch import save_file; "
    'load = lambda file: torch.load(file, map_location="cpu", weights_only=True); '
    '[save_file({k: v.clone() for k, v in (s.get("state_dict") or s.get("model") or s).items()}, '
    'f.rpartition(".")[0] + ".safetensors") for f in glob.glob(PATTERN) for s in [load(f)]]'
)
MERGE = (
    "from peft import PeftModel; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P; "
    "base, own = BASE, dict(trust_remote_code=True); "
    "PeftModel.from_pretrained(M.from_pretrained(base, **own), ADAPTER).merge_and_unload().save_pretrained(MERGED); "
    "P.from_pretrained(base, **own).save_pretrained(MERGED)"
)
MERGE_HERE = ".venv/bin/python workflow_scripts/convert_checkpoint.py merge"
OTHER_FORMS = {
    ".gguf": "GGUF is a form for inference and cannot be trained on", ".onnx": "ONNX is a form for inference",
    ".h5": "weights of TensorFlow, which are not read", ".msgpack": "weights of Flax, which are not read",
}  # fmt: skip
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PICKLES = ("pytorch_model*.bin", "consolidated*.pt*", "*.ckpt", "*.pth", "*.pt", "*.bin")
# As the native class of transformers names the merger's layers, and as MLCD is named without the name of its part.
NATIVE_MERGER = {".merger.linear_fc1.": ".merger.mlp.0.", ".merger.linear_fc2.": ".merger.mlp.2."}
BARE_MLCD = re.compile(r"(embeddings|encoder|pre_layrnorm|post_layernorm)\.|class_pos_emb$")


def refuse_other_forms(folder: Path, said: str, adapter: str = "") -> None:
    """Raise CheckpointError, with the way on, where weights lie in `folder` in no form that is read.

    Args:
        said: names the folder.
        adapter: stands before the way on of an adapter.
    """
    names = names_in(folder)
    if _whole(names):
        return
    if ADAPTER in names:
        base = str(read_object(folder / ADAPTER).get("base_model_name_or_path") or "")
        raise CheckpointError(
            f"{said}: a PEFT adapter ({ADAPTER}), not a whole model; its base is {shown(base)}",
            adapter + merging(folder, base),
        )
    refuse_pickles(folder, said)
    for suffix, form in OTHER_FORMS.items():
        if found := sorted(name for name in names if name.lower().endswith(suffix)):
            raise CheckpointError(
                f"{said}: its weights are in {found[0]}: {form}", "the Hugging Face folder that it was made from"
            )


def _whole(names: list[str]) -> bool:
    return any(name.endswith(".safetensors") and name != ADAPTER_WEIGHTS for name in names)


def is_adapter(folder: Path) -> bool:
    """Whether it is a PEFT folder, with no whole model beside the adapter."""
    return (folder / ADAPTER).is_file() and not _whole(names_in(folder))


def merging(folder: Path, base: str, by_peft: bool = False) -> str:
    """How an adapter is merged into its base; `by_peft` one of a kind that is not read here."""
    # PEFT runs the base's code, and that of what another's file names is not to be run by a command of ours.
    known = base and Path(base).is_dir() and not by_peft
    base, merged = base if known else "BASE", f"{folder}-merged"
    if not by_peft:
        return f"merge it: {MERGE_HERE} {shlex.join([base, str(folder), merged])}, and name {merged}"
    paths = {"BASE": base, "ADAPTER": str(folder), "MERGED": merged}
    code = re.sub("|".join(paths), lambda word: json.dumps(paths[word[0]]), MERGE)
    return f"merge it, where peft is installed: {_command(code)}; then load {merged}"


def refuse_pickles(folder: Path, said: str) -> None:
    """Raise CheckpointError, with a command that converts them, where the weights in `folder` are pickles."""
    names = names_in(folder)
    for pattern in PICKLES:
        if found := sorted(name for name in names if fnmatch(name, pattern) and name != "training_args.bin"):
            if pattern in ("*.bin", "*.pt", "*.pth"):  # others may lie beside it: an optimizer's, a scheduler's
                pattern = found[0]
            code = TO_SAFETENSORS.replace("PATTERN", json.dumps(f"{glob.escape(str(folder))}/{pattern}"))
            raise CheckpointError(
                f"{said}: its weights are in {found[0]}, a pickle: that form is not read",
                f"write them as safetensors beside it: {_command(code)}",
            )


def _command(code: str) -> str:
    return f".venv/bin/python -c {shlex.quote(code)}"


def weight_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder that hold its tensors; CheckpointError where there is none, or one is missing."""
    names = names_in(folder)
    refuse_other_forms(folder, str(folder))
    files = [folder / name for name in names if name.endswith(".safetensors") and name != ADAPTER_WEIGHTS]
    index = folder / INDEX
    if INDEX in names:
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
        except OSError as error:
            raise CheckpointError(f"{index}: cannot be read: {error.strerror}", READABLE) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index}: damaged or cut off ({str(error)[:200]})", "copy the file again") from None
        if strange := [name for name in named if not isinstance(name, str) or Path(name).name != name]:
            raise CheckpointError(f"{index}: {shown(strange[0])} is no file of this folder", "copy the file again")
        if missing := sorted(named - set(names)):
            raise CheckpointError(f"{folder}: {missing[0]} is missing, {INDEX} names it", "copy the folder again")
        files = [folder / name for name in sorted(named)]
    if not files:
        raise CheckpointError(
            f"{folder}: no *.safetensors file in it",
            "name a complete Hugging Face folder; of a repository that has only .bin files, `hf download` a copy",
        )
    return files


def require_weights(folder: Path) -> None:
    """Raise CheckpointError unless all files of weights are there and as long as their headers say; no weight is read."""
    for path in weight_files(folder):
        read_header(path)


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError for what `git clone` leaves in the place of a large file where Git LFS is not installed."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return  # whoever reads it says why it cannot be read
    if is_pointer:
        raise CheckpointError(
            f"{path}: a pointer of Git LFS, not the file itself",
            f"install git-lfs, then: git -C {shlex.quote(str(path.parent))} lfs pull; or get the folder by `hf download`",
        )


def names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        what = f"a file; checkpoints are folders (name {folder.parent})" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {what}", dead_link(folder) or "correct the path") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}", READABLE) from None


def canonical(name: str) -> str:
    """The in-memory name of a tensor; older checkpoints spell the parts without `model.` in front. Those of MLCD stay."""
    if BARE_MLCD.match(name):
        return f"vision_model.{name}"
    for theirs, ours in NATIVE_MERGER.items():
        name = name.replace(theirs, ours)
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return name.replace("model.", "model.language_model.", 1)
    return name


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Per tensor of a safetensors file `dtype`, `shape` and `start`, its first byte in the file; and what is noted in it.

    Raises CheckpointError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass  # the library looks at the header, the offsets and the file's size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except OSError as error:
        reason = error.strerror or os.strerror(errno.EACCES if path.exists() else errno.ENOENT)
        raise CheckpointError(f"{path}: cannot be read: {reason}", READABLE) from None
    except (SafetensorError, struct.error, ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise CheckpointError(f"{path}: damaged or cut off ({str(error)[:200]})", "copy the file again") from None
    about = header.pop("__metadata__", None) or {}
    return {name: entry | {"start": 8 + length + entry["data_offsets"][0]} for name, entry in header.items()}, about
