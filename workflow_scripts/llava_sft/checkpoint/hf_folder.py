"""The files of a Hugging Face folder that hold its weights, and what is said of weights in another form. No torch."""

import glob
import json
import shlex
from fnmatch import fnmatch
from pathlib import Path

from llava_sft.errors import CheckpointError, shown
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
PICKLES = ("pytorch_model*.bin", "consolidated*.pt*", "*.ckpt", "*.pth", "*.pt", "*.bin")


def refuse_other_forms(folder: Path, said: str) -> None:
    """Raise CheckpointError, with the way on, where weights lie in `folder` in no form that is read; `said` names it."""
    names = names_in(folder)
    if any(name.endswith(".safetensors") and name != ADAPTER_WEIGHTS for name in names):
        return
    if ADAPTER in names:
        base = str(read_object(folder / ADAPTER).get("base_model_name_or_path"))
        # The code of what another's file names is not to be run by a command of ours.
        code = MERGE.replace("BASE", json.dumps(base if Path(base).is_dir() else "BASE"))
        code = code.replace("ADAPTER", json.dumps(str(folder))).replace("MERGED", json.dumps(f"{folder}-merged"))
        raise CheckpointError(
            f"{said}: a LoRA adapter of PEFT ({ADAPTER}), no whole model; its base is {shown(base)}",
            f"merge it, where peft is installed: {_command(code)}; then load {folder}-merged",
        )
    for pattern in PICKLES:
        if found := sorted(name for name in names if fnmatch(name, pattern) and name != "training_args.bin"):
            if pattern in ("*.bin", "*.pt", "*.pth"):  # others may lie beside it: an optimizer's, a scheduler's
                pattern = found[0]
            code = TO_SAFETENSORS.replace("PATTERN", json.dumps(f"{glob.escape(str(folder))}/{pattern}"))
            raise CheckpointError(
                f"{said}: its weights are in {found[0]}, a pickle: that form is not read",
                f"write them as safetensors beside it: {_command(code)}",
            )
    if found := sorted(name for name in names if name.endswith(".gguf")):
        raise CheckpointError(
            f"{said}: its weights are in {found[0]}: GGUF is a form for inference and cannot be trained on",
            "the Hugging Face folder that it was made from",
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
            raise CheckpointError(f"{index}: cannot be read: {error.strerror}", "a file that you may read") from None
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


def names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {error.strerror}", "name a folder that you may read"
        ) from None
