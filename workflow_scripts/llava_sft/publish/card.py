"""The model card of an export: README.md, with the metadata that the Hugging Face hub reads at its top.

Notable: it says what the run's own files say, and no path of this machine. It is no part of what the export's checksums
cover, because it is written again when scores are known; a card that somebody has edited is left as it is.
"""

import contextlib
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import yaml

from llava_sft.checkpoint.start import Checkpoint, Start, split_id
from llava_sft.checkpoint.verify import MARKER
from llava_sft.data.index import leak_note
from llava_sft.data.nv_meta import read_meta
from llava_sft.errors import DamagedFileError, DataError, SftError
from llava_sft.files import read_json, read_object, write_text
from llava_sft.model.export_files import image_limits
from llava_sft.report.figures import with_scores
from llava_sft.report.html import number, percent, points
from llava_sft.run.layout import EVALUATION, ITERATION, RESOLVED, RUN_FILE
from llava_sft.settings.lora import LoraSettings
from llava_sft.settings.resolved import Resolved

CARD = "README.md"
SEAL = re.compile(r"\n<!-- card ([0-9a-f]{16}): an edited card is never overwritten -->\n$")
SETTINGS = (
    "stage", "trainable_modules", "train_iters", "epochs", "global_batch_size", "seq_length", "packing", "lr", "min_lr",
    "lr_vision", "lr_adapter", "lr_decay_style", "lr_warmup_fraction", "weight_decay", "bf16", "fp8", "min_pixels",
    "max_pixels", "seed",
)  # fmt: skip
MOST_KINDS = 20


def write_card(export: Path, model_id: str = "") -> bool:
    """Write README.md into an export, unless somebody has edited the one that is there; returns whether it was written.

    Args:
        model_id: org/name on the hub; where it is not known yet, the name of the run stands for it.

    Errors: DamagedFileError, CheckpointError for a damaged file of the run.
    """
    path = export / CARD
    if path.is_file() and not is_ours(path.read_text("utf-8", "replace")):
        print(f"{path}: edited, and left as it is")
        return False
    text = render(export, model_id)
    write_text(path, f"{text}\n<!-- card {_digest(text)}: an edited card is never overwritten -->\n")
    return True


def is_ours(text: str) -> bool:
    found = SEAL.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render(export: Path, model_id: str) -> str:
    """The card's text: metadata, then Markdown."""
    marker, results = read_object(export / MARKER), export.parent
    source = Path(str(marker.get("source", "an export/x")))
    root = project_of(export, source)
    run_dir = root / source.parent
    trained = ITERATION.fullmatch(source.name)  # a merge lies where somebody put it: beside the files of any run
    name = (trained and source.parent.name) or export.resolve().parent.name
    # The first has the newest licence, the second is there for an export by hand.
    notes = [path for path in (results / RESOLVED, run_dir / RUN_FILE) if trained and path.is_file()]
    run = Resolved.read(notes[0]) if notes else None
    if trained and not run:
        print(f"{run_dir / RUN_FILE} is not there: the model card says nothing of the training")
    base = (run and run.settings.base_model) or (run and base_model(run.start, root)) or merged_into(marker)
    started = Path(split_id(run.start.load)[0]).name if run else marker.get("base", "a checkpoint that is not recorded")
    metadata = {
        "license": run and run.settings.license,
        "language": run and list(run.settings.language),
        "base_model": base,
        "base_model_relation": base and "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava-onevision-1.5"],
    }
    head = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False, allow_unicode=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters |= {
        each.__name__: each for each in (number, percent, points, cell, with_scores, json_text, word)
    }
    body = environment.get_template("card.md.j2").render(
        title=model_id.rpartition("/")[2] or name,
        model_id=model_id or name,
        marker=marker,
        trained=run and run.settings.trained.parameters(run.architecture),
        start=f"[{base}](https://huggingface.co/{base})" if base else f"`{started}`",
        run=run,
        settings=run and {name: getattr(run.settings, name) for name in settings_of(run)},
        data=run and data_of(run, root),
        evaluation=evaluation_of(export),
        limits=image_limits(export),
    )
    return f"---\n{head}---\n\n{body.rstrip()}\n"


def settings_of(run: Resolved) -> tuple[str, ...]:
    """Names of the settings that the card names; LoRA's where a run has it, and no rate of a frozen part."""
    frozen = {"lr_vision": "vision_model", "lr_adapter": "adapter"}
    found = tuple(name for name in SETTINGS if frozen.get(name, "") in ("", *run.settings.trained.parts))
    return found + (tuple(LoraSettings.model_fields) if run.settings.trained.lora else ())


def project_of(export: Path, source: Path) -> Path:
    """The folder that the paths in a run's files start from: this one, or the one above the export that holds the run."""
    return next((top for top in (Path(), *export.resolve().parents) if (top / source).parent.is_dir()), Path())


def base_model(start: Start, root: Path = Path(), depth: int = 10) -> str | None:
    """The model on the hub that a run, or the run before it …, started from; None where it was a folder.

    Args:
        root: the folder that relative paths start from.
    """
    load = start.load
    with contextlib.suppress(SftError):
        load = Checkpoint.of(load).base.name  # that of a PEFT folder
    # A folder that is gone may look like org/name: its conversion noted the commit of an id without a revision.
    repo, revision = split_id(load)
    if revision or any(note.startswith(f"{load} ") for note in start.notes):
        return repo
    folder = root / load
    if depth:
        with contextlib.suppress(SftError, OSError):
            run_dir = folder.parent if ITERATION.fullmatch(folder.name) else folder
            return base_model(Resolved.read(run_dir / RUN_FILE).start, root, depth - 1)
    return None


def merged_into(marker: dict[str, Any]) -> str | None:
    """The model on the hub that adapters were merged into; None where it was a folder, or nothing is merged."""
    base = str(marker.get("base", ""))
    return split_id(base)[0] if "/" in base else None


def data_of(run: Resolved, root: Path) -> dict[str, Any] | None:
    """Sources by name, and counts; None where the dataset file is gone."""
    dataset = read_json(root / run.data.dataset_file, None) if run.data.dataset_file else None
    if not isinstance(dataset, dict):
        return None
    folder, weights = root / run.data.path, dataset.get("weights")
    if weights:
        sources = [{"name": name, "weight": weight, "samples": None} for name, weight in weights.items()]
        for source in sources:
            with contextlib.suppress(DataError):
                source["samples"] = read_meta(folder.parent / source["name"]).samples("train")
    else:
        sources = [{"name": run.settings.experiment, "weight": 1.0, "samples": dataset["train"]["samples"]}]
    kinds = sorted(dataset.get("kinds", {}).items(), key=lambda kind: -kind[1])
    return dataset | {"sources": sources, "kinds": dict(kinds[:MOST_KINDS]), "leak": leak_note(dataset)}


def evaluation_of(export: Path) -> dict[str, Any] | None:
    """evaluation.json beside an export, where it is of that export: of an earlier version, where it is newer."""
    path, marker = export.parent / EVALUATION, export / MARKER
    with contextlib.suppress(DamagedFileError, OSError):
        found = read_json(path)
        newer = path.stat().st_mtime >= marker.stat().st_mtime
        if found["model"] == read_object(marker).get("depends") if "model" in found else newer:
            return found
    return None


def cell(value: Any) -> str:
    """Text in a table of Markdown: no column, line or HTML of its own."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = value if isinstance(value, str) else number(value)
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def json_text(value: str) -> str:
    """A text as Python code writes it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def word(value: str) -> str:
    """A text as one word of a command line."""
    return shlex.quote(value)
