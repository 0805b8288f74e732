"""Whether what the user brings along is there, and does not lie where the workflow writes. No torch."""

import os
from pathlib import Path

from llava_sft.checkpoint.architecture import check_sizes
from llava_sft.checkpoint.base import check_pairs, require_wanted
from llava_sft.checkpoint.hf_folder import merging
from llava_sft.checkpoint.peft import Adapter
from llava_sft.checkpoint.start import check_load, existing_checkpoint
from llava_sft.data.nv_meta import is_finished
from llava_sft.data.tars import first_layout, no_tar
from llava_sft.embedded import check_demo
from llava_sft.errors import MEND_LINK, DataError, SettingsError, dead_link, shown
from llava_sft.evaluation.scores import load_score
from llava_sft.machine import (
    gpu_count,
    require_gpus,
    require_shared_memory,
    require_temporary_folder,
    vllm_interpreter,
)
from llava_sft.paths import Paths
from llava_sft.settings.conflicts import FOR_ALL, check_fp8, check_parallel_sizes, no_record
from llava_sft.settings.layers import check_batch, load_model
from llava_sft.settings.schema import DEFAULTS, AllSettings, Settings
from llava_sft.training.trackers import require_packages


def user_paths(settings: Settings) -> dict[str, Path]:
    """By setting, what the user names as brought along (a glob's pattern up to its first magic folder)."""
    given: dict[str, Path | str | None] = {
        "raw_data": settings.raw_data, "heldout_data": settings.heldout_data, "image_root": settings.image_root,
        "webdatasets": settings.webdatasets, "tokenizer": settings.tokenizer, "load": settings.load,
    }  # fmt: skip
    given |= {f"load_parts: {part}": source for part, source in settings.load_parts.items()}
    for number, entry in enumerate(settings.sources, 1):
        given |= {f"sources: entry {number}: path": entry.path, f"sources: entry {number}: heldout": entry.heldout}
        given |= {f"sources: entry {number}: image_root": entry.image_root}
    return {key: Path(value) for key, value in given.items() if value}


def check_apart(paths: Paths, made: dict[Path, str]) -> None:
    """Raise SettingsError when something that the user brings lies where a rule writes; `made`: these folders,
    resolved, and whose they are."""
    for key, path in user_paths(paths.settings).items():
        place = Path(os.path.realpath(path))
        folder = next((folder for folder in (place, *place.parents) if folder in made), None)
        if folder and not _may_lie_there(paths, key, path):
            raise SettingsError(
                f"{key}: {shown(str(path))}: lies in the folder of {made[folder]}, which the workflow makes and deletes",
                f"move it elsewhere and change {key}, or choose another exp_dir",
            )


def _may_lie_there(paths: Paths, key: str, path: Path) -> bool:
    """An export to start from, a finished WebDataset: made, but no output that a rule deletes."""
    if key == "webdatasets":
        return is_finished(path) and os.path.realpath(path) != os.path.realpath(paths.data / "webdatasets")
    return (key in ("load", "tokenizer") or key.startswith("load_parts")) and not path.is_file()


def check_inputs(paths: Paths, trains: bool = True, of_start: bool = True, elsewhere: bool = True) -> None:
    """Raise, with the fix, when something that the user has to bring is not there, or batches do not fit the machine.

    Not `trains`: the data alone is asked for, which needs neither a checkpoint nor a batch size. Not `of_start`: the model
    need not be that of the start checkpoint. Not `elsewhere`: this machine is to train, and has to be able to.
    """
    settings = paths.settings
    require_temporary_folder()
    for key, path in ({"exp_dir": settings.exp_dir} | user_paths(settings)).items():
        if (trains or not key.startswith(("load", "tokenizer"))) and (dead := dead_link(path)):
            raise SettingsError(f"{key}: {shown(str(path))}: {dead}", MEND_LINK)
    reads_demo = any(paths.is_demo(path) for path in user_paths(settings).values())
    if paths.demo and paths.demo_done and reads_demo and not paths.demo_done.exists():
        check_demo(paths.demo)
    if settings.webdatasets:
        if (tar := next(settings.webdatasets.rglob("*.tar"), None)) is None:
            raise no_tar("webdatasets: ", settings.webdatasets)
        if settings.caption_prompt != DEFAULTS["caption_prompt"] and first_layout(tar) == "caption":
            mistake = no_record("caption_prompt")
            raise SettingsError(f"{FOR_ALL}: {mistake.problem}", mistake.fix)
    for source in paths.sources:
        if not source.image_root.is_dir() and not paths.is_demo(source.image_root):
            raise DataError(
                f"image_root: {source.image_root}: no such folder", "set image_root to the folder of the images"
            )
    _ = paths.shards  # an empty raw file is found here
    if not trains:
        return
    model = load_model(settings.model)
    check_parallel_sizes(settings, model)
    for score in settings.evaluate_scores:
        load_score(score)
    vllm_interpreter(settings.evaluate_with, settings.vllm_python)
    folder = paths.checkpoint.folder
    made_here = paths.is_demo(folder) and not (paths.demo_done and paths.demo_done.exists() and folder.is_dir())
    check_load(paths.checkpoint, settings.load_parts, settings.tokenizer, made_here)
    if of_start and not made_here:
        check_sizes(paths.checkpoint.base, settings.load_parts, model)
    if of_start and paths.checkpoint.kind == "peft":
        adapter = Adapter.of(paths.checkpoint.folder)
        require_wanted(settings.load, adapter.lora(model), settings.trained.lora, merging(adapter.folder, adapter.base))
    if of_start and paths.checkpoint.kind in ("megatron", "iteration") and not paths.train_done.exists():
        check_pairs(existing_checkpoint(folder), settings.load, settings.trained.lora)
    gpus = gpu_count() if settings.gpus_per_node == "auto" else settings.gpus_per_node
    check_batch(settings, gpus)
    if not elsewhere:
        check_machine(paths, gpus)


def check_machine(paths: Paths, gpus: int) -> None:
    """Raise SettingsError, before any job, when what is still to be done cannot be done on this machine as asked."""
    if not paths.train_done.exists():
        check_gpus(paths.settings, gpus, cluster=False)
        require_shared_memory()
    if paths.settings.parity == "gpu" and not paths.export_done.exists() and not gpu_count():
        raise SettingsError(
            "parity: gpu needs a GPU, and there is none here", "parity: cpu, or export on a machine with a GPU"
        )


def check_gpus(settings: AllSettings, gpus: int, cluster: bool) -> None:
    """Raise SettingsError for `gpus` a node that cannot train as asked, or that this machine, which is to train, does not
    have."""
    if not cluster and settings.gpus_per_node:
        require_gpus(gpus, settings.fp8, settings.attention)
    check_fp8(settings, gpus)
    if gpus and settings.bf16 is False:
        raise SettingsError(
            f"bf16 is false and gpus_per_node is {gpus}: on GPUs, attention and the matrix units compute in bf16",
            "bf16: true, or gpus_per_node: 0 to train on the CPU in float32",
        )
    require_packages(settings.trackers)
