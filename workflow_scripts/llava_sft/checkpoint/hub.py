"""A checkpoint named by its Hugging Face hub id, `org/name` or `org/name@revision`: downloaded once into the hub's cache."""

from pathlib import Path

from llava_sft.errors import CheckpointError

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def fetch(load: str) -> tuple[Path, list[str]]:
    """The folder of a hub id, and a line that says which commit it is, unless the id does.

    Without a revision that is the newest of the main branch; from the cache alone where `HF_HUB_OFFLINE` is set or the hub cannot be reached.
    Raises CheckpointError.
    """
    if "@" in load:
        folder = download(load)
        moves = not folder.name.startswith(load.partition("@")[2])  # a branch or a tag
        return folder, [f"{load} is commit {folder.name}"] if moves else []
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    where = "in the hub's cache (HF_HUB_OFFLINE is set)"
    commit = None
    if not constants.HF_HUB_OFFLINE:
        try:
            commit, where = HfApi().model_info(load).sha, "on the hub"
        except HfHubHTTPError as error:  # the hub has answered: there is none, or not for this user
            raise _refusal(load, error) from None
        except Exception:  # its HTTP library's
            where = "in the hub's cache (the hub cannot be reached)"
    folder = download(f"{load}@{commit}") if commit else download(load)
    commit = commit or folder.name
    return folder, [f"{load} names no revision: commit {commit}, the newest {where}; to keep to it: {load}@{commit}"]


def download(load: str) -> Path:
    """The folder of this revision, of the main branch where none is named. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    repo, _, revision = load.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=FILES))
    except Exception as error:  # the client passes on those of its HTTP library
        raise _refusal(load, error) from None


def _refusal(load: str, error: Exception) -> CheckpointError:
    from huggingface_hub import constants, errors

    repo, _, revision = load.partition("@")
    folder = "" if revision else f", and {repo} is no folder here"
    known = (
        (errors.GatedRepoError, "the hub wants you to accept its terms", "accept them, and `hf auth login`"),
        (errors.RevisionNotFoundError, f"{repo} has no revision {revision}", "a commit or tag of that repository"),
        (
            errors.RepositoryNotFoundError,
            f"no {repo} on the hub, or not for you{folder}",
            "check its name, or `hf auth login`",
        ),
    )
    for kind, problem, fix in known:
        if isinstance(error, kind):
            return CheckpointError(f"load: {load}: {problem}", fix)
    unreachable = f"the hub cannot be reached ({type(error).__name__})"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable
    which = f" --revision {revision}" if revision else ""
    others = (
        f"; the cache has {', '.join(found)}: name one, {repo}@{found[0]}" if (found := cached_commits(repo)) else ""
    )
    return CheckpointError(
        f"load: {load}: not in the hub's cache, and {why}{folder}{others}",
        f"run `hf download {repo}{which}` where there is a network and copy the hub's cache, or name a folder",
    )


def cached_commits(repo: str) -> list[str]:
    """The commits of a repository in the hub's cache, newest first by the time they came."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    found = [path for path in snapshots.glob("*") if path.is_dir()]
    return [path.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]
