"""A run directory as a training leaves it, in small."""

from pathlib import Path

from llava_sft.run import identity
from llava_sft.run.checkpoints import seal
from llava_sft.run.layout import checkpoint_dir
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.settings.resolved import Resolved

VALUES = ResolvedSettings(
    experiment="x", log_samples=False, log_interval=1000, train_iters=1000, max_bad_steps=3, nproc_per_node=1, gpus_per_node=1,
    micro_batch_size=4, global_batch_size=8, max_pixels=1_000_000, seq_length=8192, packing=False, optimizer_precision="fp32",
)  # fmt: skip


def open_run(run_dir: Path, values: dict) -> int:
    return identity.open_run(run_dir, Resolved.model_validate(values))


def same_run(run_dir: Path, values: dict):
    return identity.same_run(run_dir, Resolved.model_validate(values))


def save(run_dir: Path, iteration: int, sealed: bool = True) -> Path:
    """What Megatron leaves at a save, in small."""
    folder, data = checkpoint_dir(run_dir, iteration), run_dir / f"dataloader/iter_{iteration:07d}"
    folder.mkdir(parents=True)
    data.mkdir(parents=True, exist_ok=True)
    (folder / "__0_0.distcp").write_bytes(bytes([iteration]) * 1000)
    (folder / ".metadata").write_bytes(b"metadata")
    (data / "train_dataloader_dprank000.pt").write_bytes(b"position")
    (run_dir / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    if sealed:
        seal(run_dir, iteration)
    return folder
