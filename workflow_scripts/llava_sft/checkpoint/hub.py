"""A checkpoint named by its Hugging Face hub id and revision, `org/name@revision`: downloaded once into the hub's cache."""

from pathlib import Path

from llava_sft.errors import CheckpointError

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def download(load: str) -> Path:
    """The folder of this revision; from the cache alone where `HF_HUB_OFFLINE` is set. Raises CheckpointError."""
    from huggingface_hub import constants, errors, snapshot_download

    repo, _, revision = load.partition("@")
    known = (
        (errors.GatedRepoError, "the hub wants you to accept its terms", "accept them, and `hf auth login`"),
        (errors.RevisionNotFoundError, f"{repo} has no revision {revision}", "a commit or tag of that repository"),
        (errors.RepositoryNotFoundError, f"no {repo} on the hub, or not for you", "check its name, or `hf auth login`"),
    )
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=FILES))
    except Exception as error:  # the client passes on those of its HTTP library
        for kind, problem, fix in known:
            if isinstance(error, kind):
                raise CheckpointError(f"load: {load}: {problem}", fix) from None
        unreachable = f"the hub cannot be reached ({type(error).__name__})"
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable
        raise CheckpointError(
            f"load: {load}: not in the hub's cache, and {why}",
            f"run `hf download {repo} --revision {revision}` where there is a network and copy the hub's cache, or name a folder",
        ) from None
