"""Where everything lies: the one place that rules and scripts ask. Imported while the DAG is built: no torch.

<exp_dir>/demo/                                     the embedded data set and its start checkpoint: no output of a rule,
                                                    which Snakemake would delete; demo.done.json beside it is
<exp_dir>/data/<experiment>/webdatasets/            subtaskdata-00000.tar …, heldout-00000.tar …, .nv-meta/
<exp_dir>/data/<experiment>/webdatasets/<source>/   the same for each of several sources, and metadataset.yaml
<exp_dir>/data/<experiment>/webdatasets.parts/      statistics, rejects and index rows of each shard
<exp_dir>/data/<experiment>/{dataset,inspect}.json  what later steps depend on; what a person reads
<exp_dir>/data/<experiment>/sizes/                  tokens and patches of each shard's samples, kept for other runs
<exp_dir>/checkpoints/<name>_mcore_tp1_pp1/         a Hugging Face checkpoint, converted
<exp_dir>/stage2_sft_<experiment>/                  run directory in Megatron's layout: never an output of a rule
                                                    (stage1_align_…, stage1.5_mid_… for the other stages)
<exp_dir>/stage2_sft_<experiment>_results/          sizes.json, resolved.json … train.done.json, huggingface/, report.html
"""

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from llava_sft.checkpoint.start import check_load, converted_name, needs_conversion, sidecars_of
from llava_sft.config import CONFIG_DIR, Settings, SourceSettings, check_batch, check_parallel_sizes, gpu_count
from llava_sft.data.nv_meta import METADATASET, is_finished
from llava_sft.data.plan import HELDOUT_PREFIX, TRAIN_PREFIX, Range, plan_ranges, ranges_of, shard_name
from llava_sft.data.tars import no_tar
from llava_sft.errors import DataError, SettingsError, shown
from llava_sft.files import fingerprint
from llava_sft.model.config import load_model_config

# The demo's files exist only once a rule has made them, but the conversion is planned before: their sizes are fixed.
DEMO_BYTES = {"train.jsonl": 4165660, "heldout.jsonl": 127362}
CONVERTED = "_mcore_tp1_pp1"
DEMO_CHECKPOINT = "LLaVA-OneVision-1.5-tiny"
EMBEDDED = "vqa"  # the experiment whose data is the demo


def check_demo(folder: Path) -> None:
    """Raise DataError when files stand where the demo's would be written that the demo did not make."""
    foreign = [
        folder / name for name, size in DEMO_BYTES.items() if (folder / name).exists() and _size(folder / name) != size
    ]
    images, checkpoint = folder / "images", folder / DEMO_CHECKPOINT
    if images.exists():
        names = os.listdir(images) if images.is_dir() else [""]
        foreign += [images / name for name in names if not re.fullmatch(r"digit_\d{4}(_\d)?\.png", name)]
    if checkpoint.exists() and not (checkpoint / "config.json").is_file():
        foreign.append(checkpoint)
    if foreign:
        raise DataError(
            f"{shown(str(foreign[0]))}: the demo did not make this file, and writes its own into {shown(str(folder))}",
            "move your files to another folder and name it in the settings; or --config exp_dir=ANOTHER_FOLDER",
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


@dataclass(frozen=True)
class Source:
    """Raw data with one image root and one weight; `name` is its folder, empty when it is the only one."""

    name: str
    files: dict[str, list[Path]]  # by prefix of the shards
    image_root: Path
    weight: float


@dataclass(frozen=True)
class Shard:
    """One conversion job: a range of a raw file, and the shard it writes."""

    source: Source
    raw: Path
    prefix: str
    range: Range

    @property
    def name(self) -> str:
        return str(Path(self.source.name) / shard_name(self.prefix, self.range.number))


def _renamed(sources: list[Source], entries: list[SourceSettings]) -> list[Source]:
    """Sources of equal names, named by the folders in which their patterns differ."""
    counts = Counter(source.name for source in sources)
    paths = [Path(entry.path).parts for entry in entries]
    renamed = []
    for source, entry, parts in zip(sources, entries, paths, strict=True):
        others = [set(other) for other in paths if other != parts]
        own = [part for part in parts if others and not any(part in other for other in others)]
        if counts[source.name] > 1 and not entry.name and own and glob.has_magic(Path(entry.path).parent.name):
            source = replace(source, name=re.sub(r"[^\w.-]+", "_", "_".join(own)).strip("_.") or source.name)
        renamed.append(source)
    return renamed


class Paths:
    """All paths of one experiment."""

    def __init__(self, settings: Settings, demo: Path | None = None, checkpoint_suffix: str = ""):
        """`demo`: the folder of the embedded data set, where another experiment reads it, too; `checkpoint_suffix`: see
        `Workflow.conversions`."""
        self.settings, self.checkpoint_suffix = settings, checkpoint_suffix
        exp_dir = settings.exp_dir
        self.demo = demo or (exp_dir / "demo" if settings.experiment == EMBEDDED else None)
        self.demo_done = self.demo and self.demo.with_name("demo.done.json")
        self.data = exp_dir / "data" / settings.experiment
        # A finished folder that is not ours is adopted: our folder of links to its tars, with an index of our own.
        given = settings.webdatasets
        self.adopted = given if given and not is_finished(given) else None
        self.webdatasets = given if given and not self.adopted else self.data / "webdatasets"
        self.dataset = self.data / "dataset.json"
        self.inspection = self.data / "inspect.json"
        self.run_dir = exp_dir / settings.run_name
        self.results = exp_dir / f"{settings.run_name}_results"
        self.kept_sizes = self.data / "sizes"
        self.sizes = self.results / "sizes.json"
        self.resolved = self.results / "resolved.json"
        self.prediction = self.results / "preflight.json"
        self.train_done = self.results / "train.done.json"
        self.export = self.results / "huggingface"
        self.export_done = self.results / "export.done.json"
        self.evaluation = self.results / "evaluation.json"
        self.report = self.results / "report.html"

    @property
    def converted(self) -> Path | None:
        """The Megatron folder that the start checkpoint is converted to; None when it needs no conversion."""
        if self.is_demo(Path(self.settings.load)) or needs_conversion(self.settings.load):
            name = converted_name(self.settings.load, self.settings.load_parts)
            name = name.removesuffix(CONVERTED) + self.checkpoint_suffix + CONVERTED
            return self.settings.exp_dir / "checkpoints" / name
        return None

    @property
    def converted_from(self) -> dict[str, str]:
        """What the converted checkpoint depends on."""
        settings = self.settings
        places = {"load": settings.load, "tokenizer": str(settings.tokenizer or ""), **settings.load_parts}
        places = {name: os.path.abspath(place) if os.path.exists(place) else place for name, place in places.items()}
        return {"model": settings.model, **places}

    @property
    def fingerprint_suffix(self) -> str:
        """Ends the name of the converted checkpoint where another experiment would take the same name for another one."""
        return f"-{fingerprint(self.converted_from)[:8]}"

    @property
    def converted_done(self) -> Path | None:
        """Beside that folder: a marker inside would be deleted by Snakemake before a rerun could read it."""
        return self.converted and self.converted.with_name(f"{self.converted.name}.done.json")

    def is_demo(self, path: Path) -> bool:
        """Whether the demo's rule makes this path, so that it need not exist yet."""
        if not self.demo or self.demo not in path.parents:
            return False
        return path.relative_to(self.demo).parts[0] in (*DEMO_BYTES, "images", DEMO_CHECKPOINT)

    @property
    def training_data(self) -> Path:
        """What energon opens: the folder, or the blend of several sources."""
        return self.webdatasets / METADATASET if len(self.sources) > 1 else self.webdatasets

    @property
    def tokenizer(self) -> Path | None:
        """A folder with tokenizer.json for counting tokens; None when it is known only once the checkpoint is converted."""
        folder = self.settings.tokenizer or Path(self.settings.load)
        return folder if self.is_demo(folder) or (folder / "tokenizer.json").is_file() else None

    @property
    def sidecars(self) -> Path:
        """The folder with the start checkpoint's tokenizer, there once the checkpoint is converted."""
        return sidecars_of(self.settings.load, self.converted, self.settings.tokenizer)

    @cached_property
    def sources(self) -> list[Source]:
        """The raw data; empty for a finished webdatasets folder. Raises DataError for files that are missing."""
        settings, entries = self.settings, self.settings.sources
        if settings.raw_data:
            heldout = settings.heldout_data and str(settings.heldout_data)
            entries = [SourceSettings(path=str(settings.raw_data), heldout=heldout, image_root=settings.image_root)]
        sources = []
        for entry in entries:
            files = {TRAIN_PREFIX: self._expand("sources" if settings.sources else "raw_data", entry.path)}
            if entry.heldout:
                files[HELDOUT_PREFIX] = self._expand("sources" if settings.sources else "heldout_data", entry.heldout)
            path = Path(entry.path)
            name = path.parent.name if glob.has_magic(path.name) else path.stem
            name = entry.name or re.sub(r"[^\w.-]+", "_", name)  # what the rules' wildcard takes
            root = entry.image_root or files[TRAIN_PREFIX][0].parent
            sources.append(Source(name if len(entries) > 1 else "", files, root, entry.weight))
            both = {path.resolve() for path in files[TRAIN_PREFIX]} & {
                p.resolve() for p in files.get(HELDOUT_PREFIX, [])
            }
            if both:
                raise DataError(
                    f"{shown(str(min(both)))}: is training data and held-out data at once",
                    "name another file as heldout_data (of `sources`: heldout), or leave it out and set val_fraction: 0.05",
                )
        if len(sources) > 1 and len({source.name for source in sources}) < len(sources):
            sources = _renamed(sources, entries)
        (name, count), *_ = Counter(source.name for source in sources).most_common(1) or [("", 0)]
        if count > 1:
            raise DataError(f"sources: {count} would be named {name!r}", "give each entry a `name` of its own")
        return sources

    def _expand(self, key: str, pattern: str) -> list[Path]:
        found = sorted(Path(path) for path in glob.glob(pattern, recursive=True)) or [Path(pattern)]
        for path in found:
            if not path.is_file() and not self.is_demo(path):
                raise DataError(
                    f"{key}: {path}: no such file",
                    f"put the file there, or set {key} in config/experiments/{self.settings.experiment}.yaml",
                )
        return found

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """The plan of the conversion by name of the shard, training shards first; empty for a finished folder.

        Raises DataError for a raw file that is missing or empty.
        """
        shards = [
            Shard(source, raw, prefix, part)
            for prefix in (TRAIN_PREFIX, HELDOUT_PREFIX)
            for source in self.sources
            for number, raw in enumerate(source.files.get(prefix, []))
            for part in self._ranges(raw, number, source, prefix)
        ]
        return {shard.name: shard for shard in shards}

    def _ranges(self, raw: Path, number: int, source: Source, prefix: str) -> list[Range]:
        step, cache = self.settings.shard_bytes, self.settings.exp_dir / "data" / ".plans"
        if raw.parent == self.demo and raw.name in DEMO_BYTES:
            size = DEMO_BYTES[raw.name]
            return plan_ranges(raw, step, number) if raw.is_file() else ranges_of(range(0, size, step or 8 << 20), size)
        parts = self.webdatasets.with_name(f"{self.webdatasets.name}.parts") / source.name
        return plan_ranges(raw, step, number, cache, lambda shard: parts / f"{shard_name(prefix, shard)}.stats.json")

    def plan(self) -> list[dict]:
        """For the index: of each source its name, weight and, by prefix, the number of shards of each raw file."""
        shards = Counter((shard.source.name, shard.prefix, shard.raw) for shard in self.shards.values())
        return [
            {"name": source.name, "weight": source.weight}
            | {prefix: [shards[source.name, prefix, raw] for raw in files] for prefix, files in source.files.items()}
            for source in self.sources
        ]

    def user_paths(self) -> dict[str, Path]:
        """By setting, what the user names as brought along (a glob's pattern up to its first magic folder)."""
        settings = self.settings
        given: dict[str, Path | str | None] = {
            "raw_data": settings.raw_data, "heldout_data": settings.heldout_data, "image_root": settings.image_root,
            "webdatasets": settings.webdatasets, "tokenizer": settings.tokenizer, "load": settings.load,
        }  # fmt: skip
        given |= {f"load_parts: {part}": source for part, source in settings.load_parts.items()}
        for number, entry in enumerate(settings.sources, 1):
            given |= {f"sources: entry {number}: path": entry.path, f"sources: entry {number}: heldout": entry.heldout}
            given |= {f"sources: entry {number}: image_root": entry.image_root}
        return {key: Path(value) for key, value in given.items() if value}

    def check_apart(self, made: dict[Path, str]) -> None:
        """Raise SettingsError when something that the user brings lies where a rule writes; `made`: these folders,
        resolved, and whose they are."""
        for key, path in self.user_paths().items():
            place = Path(os.path.realpath(path))
            folder = next((folder for folder in (place, *place.parents) if folder in made), None)
            if folder and not self._may_lie_there(key, path):
                raise SettingsError(
                    f"{key}: {shown(str(path))}: lies in the folder of {made[folder]}, which the workflow makes and deletes",
                    f"move it elsewhere and change {key}, or choose another exp_dir",
                )

    def _may_lie_there(self, key: str, path: Path) -> bool:
        """An export to start from, a finished WebDataset: made, but no output that a rule deletes."""
        if key == "webdatasets":
            return is_finished(path) and os.path.realpath(path) != os.path.realpath(self.data / "webdatasets")
        return (key in ("load", "tokenizer") or key.startswith("load_parts")) and not path.is_file()

    def check_inputs(self, trains: bool = True) -> None:
        """Raise, with the fix, when something that the user has to bring is not there, or batches do not fit the machine.

        Not `trains`: the data alone is asked for, which needs neither a checkpoint nor a batch size.
        """
        settings = self.settings
        if self.demo and any(self.is_demo(path) for path in self.user_paths().values()) and not self.demo_done.exists():
            check_demo(self.demo)
        if settings.webdatasets and not next(settings.webdatasets.rglob("*.tar"), None):
            raise no_tar("webdatasets: ", settings.webdatasets)
        for source in self.sources:
            if not source.image_root.is_dir() and not self.is_demo(source.image_root):
                raise DataError(
                    f"image_root: {source.image_root}: no such folder", "set image_root to the folder of the images"
                )
        _ = self.shards  # an empty raw file is found here
        if not trains:
            return
        check_parallel_sizes(settings, load_model_config(CONFIG_DIR / "models" / f"{settings.model}.yaml"))
        check_load(settings.load, settings.load_parts, settings.tokenizer, made_here=self.is_demo(Path(settings.load)))
        check_batch(settings, gpu_count() if settings.gpus_per_node == "auto" else settings.gpus_per_node)
