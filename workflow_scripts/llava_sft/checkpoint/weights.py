"""The one entrance for everyone who reads the weights of a checkpoint in our own format."""

from pathlib import Path

from llava_sft.checkpoint.torch_dist import TorchDistReader


def open_weights(folder: Path) -> TorchDistReader:
    """The weights of one checkpoint folder (`iter_0000400/`, `release/`) by their Megatron keys.

    Nothing is compared with checksums here: `verify.require_whole` does that. Raises CheckpointError.
    """
    return TorchDistReader(folder)
