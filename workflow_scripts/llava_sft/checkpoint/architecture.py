"""Which model a checkpoint says it is, beside the file of config/models that the settings name.

Its sizes have to be those of that file, for nothing can be loaded otherwise. What no tensor's shape depends on (RoPE base,
epsilon of the norms, positions) is the checkpoint's own: its weights were trained with it. No torch.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from llava_sft.checkpoint.start import Checkpoint, Start, named_parts, read_hf_config
from llava_sft.checkpoint.verify import MARKER
from llava_sft.errors import CheckpointError
from llava_sft.files import read_object
from llava_sft.model.config import ModelConfig
from llava_sft.model.hf_config import WHOLE, Parts, parts_of_config
from llava_sft.model.tensors import parameter_count
from llava_sft.run.layout import RUN_FILE, SIDECARS

OWN_VALUES = ("rotary_base", "layernorm_epsilon", "max_position_embeddings")
SIDES = {"language_model": "language", "vision_model": "vision"}  # part of the model → its half of ModelConfig


def with_own_values(model: ModelConfig, found: Parts, source: object) -> tuple[ModelConfig, list[str]]:
    """`model` with the values of a checkpoint that are its own, and a line for each that is another one.

    Raises CheckpointError when the checkpoint is of other sizes.
    """
    lines, file = [], f"config/models/{model.name}.yaml"
    for side, theirs in found.items():
        ours, said = getattr(model, side), theirs.model_dump()
        differing = {key: value for key, value in said.items() if value != getattr(ours, key)}
        sizes = {key: value for key, value in differing.items() if key not in OWN_VALUES}
        if sizes:
            key, value = next(iter(sizes.items()))
            raise CheckpointError(
                f"{source}: {side} {key} is {value}, {file} has {getattr(ours, key)}",
                "choose the `model` that fits this checkpoint, or another checkpoint; a new size: a copy of that file with "
                + ", ".join(f"{key}: {value}" for key, value in sizes.items()),
            )
        lines += [
            f"{source}: {side} {key} is {value:,.10g}, {file} has {getattr(ours, key):,.10g}: the checkpoint's is used"
            for key, value in differing.items()
        ]
        model = model.model_copy(update={side: ours.model_copy(update=differing)})
    return model, lines


def parts_of_folder(folder: Path, parts: Iterable[str], alone: bool) -> Parts:
    """What the config.json of a Hugging Face folder says of these parts of the model; nothing of a folder without one,
    unless it is to hold the model `alone`. Raises CheckpointError."""
    if not alone and not (folder / "config.json").is_file():
        return {}
    sides = [SIDES[part] for part in parts if part in SIDES]
    config = read_hf_config(folder)
    try:
        found = parts_of_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.problem}", error.fix) from None
    if missing := [side for side in sides if side not in found]:
        raise CheckpointError(
            f"{folder}: model_type {config.get('model_type')!r}: {' and '.join(found)} alone, no {' and '.join(missing)}",
            f"load_parts: {{{missing[0]}_model: a folder that has it}}",
        )
    return {side: found[side] for side in sides}


def check_sizes(checkpoint: Checkpoint, load_parts: dict[str, str], model: ModelConfig) -> None:
    """Raise CheckpointError, before anything runs, for a Hugging Face folder whose config.json is of other sizes than
    `model`, or not of the part that is taken from it."""
    parts = named_parts(load_parts.items())
    rest = [part for part in SIDES if part not in parts]
    for key, source, taken in (
        ("load", checkpoint, rest),
        *((f"load_parts: {part}", source, [part]) for part, source in parts.items()),
    ):
        if source.kind == "huggingface":
            found = parts_of_folder(source.folder, taken, alone=not parts)
            with_own_values(model, found, f"{key}: {source.name}")


def model_of_start(start: Start, model: ModelConfig, converted_here: bool) -> tuple[ModelConfig, list[str]]:
    """The model that a training from `start` trains, and lines about values that are not those of the settings' `model`.

    Args:
        converted_here: a rule has converted it, so that an earlier version has compared the values.

    Raises CheckpointError when the checkpoint is of other sizes.
    """
    if start.folder is None:
        return model, []  # random weights
    top = start.folder.parent
    marker = read_object(top / MARKER, {})
    count = marker.get("parameters")
    if isinstance(count, int) and count != parameter_count(model):
        raise CheckpointError(
            f"load: {start.load}: {count:,} parameters; config/models/{model.name}.yaml has {parameter_count(model):,}",
            "choose the `model` that fits this checkpoint, or another checkpoint",
        )
    source = f"load: {start.load}"
    for file, content in ((top / MARKER, marker), (top / RUN_FILE, read_object(top / RUN_FILE, {}))):
        if said := content.get("model"):
            return with_own_values(model, parts_of(_noted(file, said)), source)
    if converted_here or not (top / SIDECARS / "config.json").is_file():
        return model, []
    return with_values_beside(model, top / SIDECARS, source)


def parts_of(model: ModelConfig) -> Parts:
    return {"language": model.language, "vision": model.vision}


def _noted(file: Path, said: object) -> ModelConfig:
    try:
        return ModelConfig.model_validate(said)
    except ValidationError as error:
        problem = str(error).splitlines()[0]
        raise CheckpointError(f"{file}: damaged: model: {problem}", "restore it from a copy") from None


def with_values_beside(model: ModelConfig, folder: Path, source: object) -> tuple[ModelConfig, list[str]]:
    """With the values of a config.json that lies beside weights of this model, if it is of a model of these sizes."""
    config: Mapping = read_object(folder / "config.json", {})
    if config.get("model_type") not in WHOLE:
        return model, []
    try:
        return with_own_values(model, parts_of_config(config), source)
    except CheckpointError as error:  # the weights say what model it is
        return model, [f"{folder / 'config.json'}: not used: {error.problem}"]


def model_to_export(source: Path, sidecars: Path, named: ModelConfig | None) -> ModelConfig | None:
    """The model that a checkpoint folder holds: what its run or its conversion notes, whatever the model `named` by hand
    says; without a note the named one with the values of the config.json in `sidecars`. None where nothing says it.

    Raises CheckpointError when the model named is of other sizes.
    """
    for file in (source.parent / RUN_FILE, source.parent / MARKER):
        if said := read_object(file, {}).get("model"):
            known = _noted(file, said)
            model, lines = with_own_values(named, parts_of(known), file) if named else (known, [])
            print("".join(f"{line}\n" for line in lines), end="")
            return model
    if named is None:
        return None
    model, lines = with_values_beside(named, sidecars, sidecars)
    print("".join(f"{line}\n" for line in lines), end="")
    return model


def with_start_positions(model: ModelConfig, source: Path, sidecars: Path) -> ModelConfig:
    """With the number of positions in the start checkpoint's config.json, which runs of earlier versions did not note: no
    weight depends on it."""
    start = read_object(source.parent / RUN_FILE, {}).get("start")
    if not isinstance(start, dict) or "notes" in start:
        return model
    language = with_values_beside(model, sidecars, sidecars)[0].language
    if language.max_position_embeddings == model.language.max_position_embeddings:
        return model
    positions = {"max_position_embeddings": language.max_position_embeddings}
    print(f"{sidecars}: max_position_embeddings {language.max_position_embeddings:,}, as the start checkpoint has it")
    return model.model_copy(update={"language": model.language.model_copy(update=positions)})
