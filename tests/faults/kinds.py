"""Every kind of file that the chain keeps, raw data apart, and the steps that use it.

A kind's `uses` name entries of USES. A use is what a person does next with the files: the state of the project that it
begins in, what is removed first so that the step has something to do, and the rules whose scripts run.
"""

from typing import NamedTuple

from faults.project import RESULTS, RUN

DATA, EXPORT, START = "output/data/faults", f"{RESULTS}/huggingface", "output/checkpoints/start_mcore_tp1_pp1"


class Use(NamedTuple):
    """`state`: before | stopped | done. `goes_on`: a whole checkpoint is there, so that the same command has to go on."""

    state: str
    rules: tuple[str, ...]
    without: tuple[str, ...] = ()
    goes_on: bool = False


class Kind(NamedTuple):
    """`owner`: the part of the project whose rule it is. `state_file`: the program keeps it for itself, so that damage of it
    never stops a run that has a whole checkpoint."""

    name: str
    owner: str
    files: tuple[str, ...]
    uses: tuple[str, ...]
    state_file: bool = False


USES = {
    "convert": Use("before", ("convert_checkpoint_hf2mcore",), ("output/checkpoints/*",)),
    "convert again": Use("before", ("convert_checkpoint_hf2mcore",)),
    "index": Use("before", ("plan", "index_webdataset")),  # damaged shards are found while Snakemake plans
    "inspect": Use("before", ("inspect_webdataset",)),
    "measure": Use("before", ("measure_webdataset",), (f"{RESULTS}/sizes.json",)),
    "measure again": Use("before", ("measure_webdataset",), (f"{RESULTS}/sizes.json", f"{DATA}/sizes")),
    "preflight": Use("before", ("preflight",)),
    "train": Use("before", ("train",)),
    "resume": Use("stopped", ("train",), goes_on=True),
    "finish": Use("done", ("train",), (f"{RESULTS}/train.done.json",), goes_on=True),
    "export": Use("done", ("convert_checkpoint_mcore2hf",), (EXPORT, f"{RESULTS}/export.done.json")),
    "export again": Use("done", ("convert_checkpoint_mcore2hf",)),
    "evaluate": Use("done", ("evaluate",), (f"{RESULTS}/evaluation.json", f"{RESULTS}/.evaluation.json.*")),
    "evaluate again": Use("done", ("evaluate",), (f"{RESULTS}/evaluation.json",)),
    "report": Use("done", ("report",)),
    "runs": Use("done", ("runs",)),
}
READS_DATA = ("inspect", "measure again", "train", "evaluate")
RUN_STATE = ("resume", "finish")
SIDECARS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json",
            "processor_config.json", "chat_template.jinja")  # fmt: skip


def sidecars(folder: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in SIDECARS)


KINDS = [
    Kind("training tar", "index", (f"{DATA}/webdatasets/subtaskdata-*.tar",), ("index", *READS_DATA[:3], "resume")),
    Kind("held-out tar", "index", (f"{DATA}/webdatasets/heldout-*.tar",), ("index", "inspect", "train", "evaluate", "export")),
    Kind(".tar.idx", "index", (f"{DATA}/webdatasets/*.tar.idx",), ("index", *READS_DATA, "resume")),
    Kind("index.sqlite", "index", (f"{DATA}/webdatasets/.nv-meta/index.sqlite",), (*READS_DATA, "resume")),
    Kind("split.yaml", "index", (f"{DATA}/webdatasets/.nv-meta/split.yaml",), (*READS_DATA, "export")),
    Kind("dataset.yaml", "index", (f"{DATA}/webdatasets/.nv-meta/dataset.yaml",), READS_DATA),
    Kind(".info.json", "index", (f"{DATA}/webdatasets/.nv-meta/.info.json",), READS_DATA),
    Kind("stats.json", "index", (f"{DATA}/webdatasets.parts/*.stats.json",), ("index", "inspect")),
    Kind("samples.jsonl of the conversion", "index", (f"{DATA}/webdatasets.parts/*.samples.jsonl",), ("index", "inspect")),
    Kind("rejects.jsonl", "index", (f"{DATA}/webdatasets.parts/*.rejects.jsonl",), ("index", "inspect")),
    Kind("dataset.json", "index", (f"{DATA}/dataset.json",), ("inspect", "measure", "preflight", "evaluate", "report")),
    Kind("inspect.json", "forms", (f"{DATA}/inspect.json",), ("report",)),
    Kind("sizes.json", "epoch", (f"{RESULTS}/sizes.json",), ("preflight", "train", "resume")),
    Kind("cached sizes", "epoch", (f"{DATA}/sizes/*/*",), ("measure", "train")),
    Kind("resolved.json", "forms", (f"{RESULTS}/resolved.json",), ("train", *RUN_STATE, "report")),
    Kind("preflight.json", "forms", (f"{RESULTS}/preflight.json",), ("report", "runs")),
    Kind("run.json", "life", (f"{RUN}/run.json",), (*RUN_STATE, "export", "runs"), True),
    Kind("tracker", "life", (f"{RUN}/latest_checkpointed_iteration.txt",), (*RUN_STATE, "export", "report", "runs"), True),
    Kind("checkpoint shards", "ckpt", (f"{RUN}/iter_*/*.distcp",), (*RUN_STATE, "export"), True),
    Kind("checkpoint .metadata", "ckpt", (f"{RUN}/iter_*/.metadata",), (*RUN_STATE, "export"), True),
    Kind("checkpoint metadata.json, common.pt", "ckpt", (f"{RUN}/iter_*/metadata.json", f"{RUN}/iter_*/common.pt"),
         (*RUN_STATE, "export"), True),
    Kind("checksums.json", "life", (f"{RUN}/iter_*/checksums.json",), (*RUN_STATE, "export"), True),
    Kind("loader state", "epoch", (f"{RUN}/dataloader/*/*/*.pt",), RUN_STATE, True),
    Kind("run's tokenizer and config", "ckpt", sidecars(f"{RUN}/huggingface"), ("export", "resume")),
    Kind("metrics.jsonl", "life", (f"{RUN}/metrics.jsonl",), (*RUN_STATE, "report", "runs"), True),
    Kind("validation.jsonl", "life", (f"{RUN}/validation.jsonl",), (*RUN_STATE, "report"), True),
    Kind("samples of the training", "life", (f"{RUN}/samples/*.jsonl",), RUN_STATE, True),
    Kind("best.json", "life", (f"{RUN}/best.json",), (*RUN_STATE, "report"), True),
    Kind("sample_counts.json", "life", (f"{RUN}/sample_counts.json",), ("report",)),
    Kind("train.done.json", "life", (f"{RESULTS}/train.done.json",), ("report", "export")),
    Kind("export weights", "ckpt", (f"{EXPORT}/*.safetensors",), ("evaluate", "export again")),
    Kind("export config, tokenizer, preprocessor", "ckpt", sidecars(EXPORT), ("evaluate", "export again")),
    Kind("export converted.json", "ckpt", (f"{EXPORT}/converted.json",), ("evaluate", "export again")),
    Kind("parity.json", "ckpt", (f"{EXPORT}/parity.json",), ("report",)),
    Kind("start weights", "ckpt", ("small/start/*.safetensors",), ("convert",)),
    Kind("start config, tokenizer, preprocessor", "ckpt", sidecars("small/start"), ("convert", "convert again")),
    Kind("converted weights", "ckpt", (f"{START}/release/*.distcp",), ("train", "convert again")),
    Kind("converted .metadata, common.pt", "ckpt", (f"{START}/release/.metadata", f"{START}/release/*.pt",
         f"{START}/release/metadata.json"), ("train", "convert again")),
    Kind("converted config, tokenizer", "ckpt", sidecars(f"{START}/huggingface"), ("measure again", "preflight", "train")),
    Kind("converted.json, tracker", "ckpt", (f"{START}/converted.json", f"{START}/latest_checkpointed_iteration.txt"),
         ("convert again", "preflight", "train")),
    Kind("evaluation.json", "forms", (f"{RESULTS}/evaluation.json",), ("report",)),
    Kind("cached evaluation", "forms", (f"{RESULTS}/.evaluation.json.*",), ("evaluate again",)),
    Kind("answers of the start", "forms", (f"{DATA}/answers/*.json",), ("evaluate again",)),
]  # fmt: skip
