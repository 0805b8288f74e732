"""Where everything lies: the one place that rules and scripts ask. Imported while the DAG is built: no torch.

<exp_dir>/demo/                                     the embedded data set and its start checkpoint: no output of a rule,
                                                    which Snakemake would delete; demo.done.json beside it is
<exp_dir>/data/<experiment>/webdatasets/            subtaskdata-00000.tar …, heldout-00000.tar …, .nv-meta/
<exp_dir>/data/<experiment>/webdatasets/<source>/   the same for each of several sources, and metadataset.yaml
<exp_dir>/data/<experiment>/webdatasets.parts/      statistics, rejects and index rows of each shard
<exp_dir>/data/<experiment>/{dataset,inspect}.json  what later steps depend on; what a person reads
<exp_dir>/data/<experiment>/sizes/                  tokens and patches of each shard's samples, kept for other runs
<exp_dir>/data/<experiment>/answers/                answers of start checkpoints to the held-out split, kept for other runs
<exp_dir>/checkpoints/<name>_mcore_tp1_pp1/         a Hugging Face checkpoint, converted
<exp_dir>/stage2_sft_<experiment>/                  run directory in Megatron's layout: never an output of a rule
                                                    (stage1_align_…, stage1.5_mid_… for the other stages)
<exp_dir>/stage2_sft_<experiment>_results/          sizes.json, resolved.json … train.done.json, huggingface/, report.html
"""

import os
from functools import cached_property
from pathlib import Path

from llava_sft.checkpoint.start import CONVERTED, Checkpoint, with_old_names
from llava_sft.data.nv_meta import METADATASET, is_finished
from llava_sft.data.plan import default_notes_dir
from llava_sft.embedded import EMBEDDED, is_demo
from llava_sft.evaluation.scores import function_file
from llava_sft.files import fingerprint
from llava_sft.run import layout
from llava_sft.settings.schema import Settings
from llava_sft.sources import Shard, Source, find_sources, plan_of, plan_shards

# Each path that a rule makes: as the rule's output, with wildcards, and filled in for one experiment by Paths.
DEMO_DONE = "{exp_dir}/demo.done.json"
DATA = "{exp_dir}/data/{experiment}"
WEBDATASETS = f"{DATA}/webdatasets"
SHARD = f"{WEBDATASETS}/{{shard}}"
SHARD_NOTES = f"{WEBDATASETS}.parts/{{shard}}"
DATASET = f"{DATA}/dataset.json"
INSPECTION = f"{DATA}/inspect.json"
INSPECTION_PAGE = f"{DATA}/inspect.html"
CHECKPOINT = f"{{exp_dir}}/checkpoints/{{checkpoint}}{CONVERTED}"
CHECKPOINT_DONE = (
    f"{CHECKPOINT}.done.json"  # a marker inside would be deleted by Snakemake before a rerun could read it
)
RESULTS = f"{{exp_dir}}/{{run_name}}{layout.RESULTS}"
SIZES = f"{RESULTS}/sizes.json"
RESOLVED = f"{RESULTS}/{layout.RESOLVED}"
PREDICTION = f"{RESULTS}/{layout.PREDICTION}"
TRAIN_DONE = f"{RESULTS}/train.done.json"
EXPORT = f"{RESULTS}/{layout.SIDECARS}"
EXPORT_DONE = f"{RESULTS}/export.done.json"
EVALUATION = f"{RESULTS}/{layout.EVALUATION}"
REPORT = f"{RESULTS}/report.html"


class Paths:
    """All paths of one experiment."""

    def __init__(self, settings: Settings, demo: Path | None = None, checkpoint_suffix: str = ""):
        """`demo`: the folder of the embedded data set, where another experiment reads it, too; `checkpoint_suffix`: ends
        the name of the converted checkpoint where another experiment makes another one of that name.

        Raises CheckpointError for a start checkpoint that cannot be read.
        """
        self.settings, self.checkpoint_suffix = settings, checkpoint_suffix
        self.checkpoint = Checkpoint.of(settings.load)
        exp_dir = settings.exp_dir
        self.demo = demo or (exp_dir / "demo" if settings.experiment == EMBEDDED else None)
        self.demo_done = self.demo and self.demo.with_name("demo.done.json")
        self.data = self._at(DATA)
        # A finished folder that is not ours is adopted: our folder of links to its tars, with an index of our own.
        given = settings.webdatasets
        self.adopted = given if given and not is_finished(given) else None
        self.webdatasets = given if given and not self.adopted else self._at(WEBDATASETS)
        self.dataset = self._at(DATASET)
        self.inspection = self._at(INSPECTION)
        self.run_dir = exp_dir / settings.run_name
        self.results = self._at(RESULTS)
        self.kept_sizes = self.data / "sizes"
        self.base_answers = self.data / "answers"
        self.sizes = self._at(SIZES)
        self.resolved = self._at(RESOLVED)
        self.prediction = self._at(PREDICTION)
        self.train_done = self._at(TRAIN_DONE)
        self.export = self._at(EXPORT)
        self.export_done = self._at(EXPORT_DONE)
        self.evaluation = self._at(EVALUATION)
        self.report = self._at(REPORT)

    def _at(self, pattern: str, checkpoint: str = "") -> Path:
        settings = self.settings
        names = {"experiment": settings.experiment, "run_name": settings.run_name, "checkpoint": checkpoint}
        return Path(pattern.format(exp_dir=settings.exp_dir, **names))

    # --- the start checkpoint -------------------------------------------------------------------------------------------

    @property
    def converted_stem(self) -> str | None:
        """The wildcard `checkpoint` of the folder that the start checkpoint is converted to; None where it need not be."""
        if not self.is_demo(self.checkpoint.folder) and not self.checkpoint.needs_conversion:
            return None
        name = self.checkpoint.converted_name(self.settings.load_parts)
        return name.removesuffix(CONVERTED) + self.checkpoint_suffix

    @property
    def converted(self) -> Path | None:
        return self._at(CHECKPOINT, self.converted_stem) if self.converted_stem else None

    @property
    def converted_done(self) -> Path | None:
        return self._at(CHECKPOINT_DONE, self.converted_stem) if self.converted_stem else None

    @property
    def start_names(self) -> list[str]:
        """The folders and hub ids that the start checkpoint is converted from."""
        names = [self.settings.load, self.checkpoint.base.name, *self.settings.load_parts.values()]
        return list(dict.fromkeys(names))

    @property
    def converted_from(self) -> dict[str, str]:
        """What the converted checkpoint depends on."""
        settings = self.settings
        places = {"load": settings.load, "tokenizer": str(settings.tokenizer or "")} | with_old_names(
            settings.load_parts
        )
        places = {name: os.path.abspath(place) if os.path.exists(place) else place for name, place in places.items()}
        return {"model": settings.model, **places}

    @property
    def fingerprint_suffix(self) -> str:
        """Ends the name of the converted checkpoint where another experiment would take the same name for another one."""
        return f"-{fingerprint(self.converted_from)[:8]}"

    @property
    def tokenizer(self) -> Path | None:
        """A folder with tokenizer.json for counting tokens; None when it is known only once the checkpoint is converted."""
        folder = self.settings.tokenizer or self.checkpoint.base.folder
        return folder if self.is_demo(folder) or (folder / "tokenizer.json").is_file() else None

    @property
    def sidecars(self) -> Path:
        """The folder with the start checkpoint's tokenizer, there once the checkpoint is converted."""
        return self.checkpoint.hf_files(self.converted, self.settings.tokenizer)

    # --- the evaluation -------------------------------------------------------------------------------------------------

    @property
    def evaluated_start_of(self) -> Path | None:
        """The run whose start checkpoint is evaluated too."""
        return self.run_dir if self.settings.evaluate_base else None

    @property
    def score_files(self) -> list[Path]:
        """Files of the user's own scores."""
        return [path for score in self.settings.evaluate_scores if (path := function_file(score))]

    # --- the data -------------------------------------------------------------------------------------------------------

    def is_demo(self, path: Path) -> bool:
        """Whether the demo's rule makes this path, so that it need not exist yet."""
        return is_demo(path, self.demo)

    @property
    def training_data(self) -> Path:
        """Path passed to energon: the folder, or the blend of several sources."""
        return self.webdatasets / METADATASET if len(self.sources) > 1 else self.webdatasets

    @cached_property
    def sources(self) -> list[Source]:
        """The raw data; empty for a finished webdatasets folder. Raises DataError for files that are missing."""
        return find_sources(self.settings, self.is_demo)

    @property
    def raw_files(self) -> list[Path]:
        """What the index is made from. The demo's tokenizer, too, may have to be made: the inspection counts with it."""
        files = [path for source in self.sources for paths in source.files.values() for path in paths]
        return [*files, self.tokenizer] if self.tokenizer and self.is_demo(self.tokenizer) else files

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """The plan of the conversion, see `plan_shards`."""
        return plan_shards(self.sources, self.settings, self.demo, default_notes_dir(self.webdatasets))

    def plan(self) -> list[dict]:
        return plan_of(self.sources, self.shards)
