"""Where everything lies: the one place that rules and scripts ask. Imported while the DAG is built: no torch.

<exp_dir>/demo/                                     the embedded data set and its start checkpoint
<exp_dir>/data/<experiment>/webdatasets/            subtaskdata-00000.tar …, heldout-00000.tar …, .nv-meta/
<exp_dir>/data/<experiment>/webdatasets.parts/      statistics, rejects and index rows of each shard
<exp_dir>/data/<experiment>/{dataset,inspect}.json  what later steps depend on; what a person reads
<exp_dir>/checkpoints/<name>_mcore_tp1_pp1/         a Hugging Face checkpoint, converted
<exp_dir>/stage2_sft_<experiment>/                  run directory in Megatron's layout: never an output of a rule
                                                    (stage1_align_…, stage1.5_mid_… for the other stages)
<exp_dir>/stage2_sft_<experiment>_results/          resolved.json … train.done.json, huggingface/, report.html
"""

from dataclasses import dataclass
from pathlib import Path

from llava_sft.checkpoint.start import check_load, converted_name, needs_conversion
from llava_sft.config import CONFIG_DIR, Settings, check_global_batch_size, data_parallel_size, gpu_count
from llava_sft.data.plan import HELDOUT_PREFIX, TRAIN_PREFIX, Range, plan_ranges, shard_name
from llava_sft.errors import DataError
from llava_sft.model.config import load_model_config

# The demo's files exist only once a rule has made them, but the conversion is planned before: their sizes are fixed.
DEMO_BYTES = {"train.jsonl": 4165660, "heldout.jsonl": 127362}
DEMO_CHECKPOINT = "LLaVA-OneVision-1.5-tiny"


@dataclass(frozen=True)
class Shard:
    """One conversion job: a range of a raw file, and the shard it writes."""

    raw: Path
    prefix: str
    range: Range

    @property
    def name(self) -> str:
        return shard_name(self.prefix, self.range.index)


class Paths:
    """All paths of one experiment."""

    def __init__(self, settings: Settings):
        self.settings = settings
        exp_dir = settings.exp_dir
        self.demo = exp_dir / "demo"
        self.data = exp_dir / "data" / settings.experiment
        self.webdatasets = settings.webdatasets or self.data / "webdatasets"
        self.parts = self.data / "webdatasets.parts"
        self.dataset = self.data / "dataset.json"
        self.inspection = self.data / "inspect.json"
        self.run_dir = exp_dir / settings.run_name
        self.results = exp_dir / f"{settings.run_name}_results"
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
            return self.settings.exp_dir / "checkpoints" / converted_name(self.settings.load, self.settings.load_parts)
        return None

    @property
    def converted_done(self) -> Path | None:
        """Beside that folder: a marker inside would be deleted by Snakemake before a rerun could read it."""
        return self.converted and self.converted.with_name(f"{self.converted.name}.done.json")

    def is_demo(self, path: Path) -> bool:
        """Whether a rule makes this path, so that it need not exist yet."""
        return self.demo in path.parents

    def shards(self) -> list[Shard]:
        """The plan of the conversion, training shards first; empty for a finished webdatasets folder.

        Raises DataError for a raw file that is missing or empty.
        """
        raw_files = ((TRAIN_PREFIX, self.settings.raw_data), (HELDOUT_PREFIX, self.settings.heldout_data))
        return [Shard(raw, prefix, part) for prefix, raw in raw_files if raw for part in self._ranges(raw)]

    def _ranges(self, raw: Path) -> list[Range]:
        if raw.parent == self.demo and not raw.is_file() and raw.name in DEMO_BYTES:
            size, step = DEMO_BYTES[raw.name], self.settings.shard_bytes
            return [Range(i, start, min(start + step, size)) for i, start in enumerate(range(0, size, step))]
        return plan_ranges(raw, self.settings.shard_bytes)

    @property
    def image_root(self) -> Path:
        return self.settings.image_root or self.settings.raw_data.parent

    def check_inputs(self) -> None:
        """Raise, with the fix, when something that the user has to bring is not there, or batches do not fit the machine."""
        settings = self.settings
        if settings.webdatasets and not (settings.webdatasets / ".nv-meta").is_dir():
            raise DataError(
                f"webdatasets: {settings.webdatasets}: no such folder with .nv-meta in it",
                "name a finished webdatasets folder, or set raw_data to convert your own records",
            )
        for key in ("raw_data", "heldout_data"):
            path = getattr(settings, key)
            if path and not path.is_file() and not self.is_demo(path):
                raise DataError(
                    f"{key}: {path}: no such file",
                    f"put the file there, or set {key} in config/experiments/{settings.experiment}.yaml",
                )
        if settings.raw_data and not self.image_root.is_dir() and not self.is_demo(self.image_root):
            raise DataError(
                f"image_root: {self.image_root}: no such folder", "set image_root to the folder of the images"
            )
        self.shards()  # an empty raw file is found here
        load_model_config(CONFIG_DIR / "models" / f"{settings.model}.yaml")
        check_load(settings.load, settings.load_parts, settings.tokenizer, made_here=self.is_demo(Path(settings.load)))
        if settings.global_batch_size != "auto":
            gpus = gpu_count() if settings.gpus_per_node == "auto" else settings.gpus_per_node
            replicas = data_parallel_size(settings, gpus)
            check_global_batch_size(settings.global_batch_size, settings.micro_batch_size, replicas)
