"""A checkpoint named by its Hugging Face hub id and revision, `org/name@revision`: downloaded once into the hub's cache."""

from pathlib import Path

from llava_sft.errors import CheckpointError

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def download(load: str) -> Path:
    """The folder of this revision; from the cache alone where `HF_HUB_OFFLINE` is set. Raises CheckpointError."""
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # fmt: skip
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = load.partition("@")
    by_hand = f"run `hf download {repo} --revision {revision}` where there is a network, and copy the hub's cache, or name the folder"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=FILES))
    except GatedRepoError:
        raise CheckpointError(
            f"load: {load}: the hub wants you to accept its terms", "accept them, and `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(
            f"load: {load}: {repo} has no revision {revision}", "a commit or tag of that repository"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"load: {load}: the hub has no {repo}, or you may not see it", "check its name, or `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"the hub can not be reached ({type(error).__name__})"
        )
        raise CheckpointError(f"load: {load}: not in the hub's cache, and {why}", by_hand) from None
