"""A checkpoint named by its Hugging Face hub id, `org/name` or `org/name@revision`: downloaded once into the hub's cache."""

import shutil
from pathlib import Path

from llava_sft.errors import CheckpointError, existing_folder, full_disk, shown, size_in_words
from llava_sft.progress import Progress

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def split_id(load: str) -> tuple[str, str]:
    """(`org/name`, `revision`) of a hub id; the revision is empty where it names none."""
    repo, _, revision = load.partition("@")
    return repo, revision


def fetch(load: str) -> tuple[Path, list[str]]:
    """The folder of a hub id, and a line that says which commit it is, unless the id does.

    Without a revision that is the newest of the main branch; of the cache alone where `HF_HUB_OFFLINE` is set, the hub cannot
    be reached or has no answer (429, 5xx). Raises CheckpointError.
    """
    repo, revision = split_id(load)
    if problem := name_problem(repo):
        raise CheckpointError(
            f"load: {load}: no folder here, and no name on the hub: {problem}", "a folder, or org/name"
        )
    if revision:
        folder = download(load)
        moves = not folder.name.startswith(revision)  # a branch or a tag
        return folder, [f"{load} is commit {folder.name}"] if moves else []
    commit, why = newest_on_hub(load)
    if commit:
        folder = download(load)  # not by its commit: the cache would not know afterwards what main was
    else:
        cached = newest_cached(load)
        folder = download(f"{load}@{cached}" if cached else load)
    where = "on the hub" if folder.name == commit else f"in the hub's cache{why}"
    return folder, [
        f"{load} names no revision: commit {folder.name}, the newest {where}; to keep to it: {load}@{folder.name}"
    ]


def newest_on_hub(repo: str) -> tuple[str | None, str]:
    """The commit of main; or None, and why the hub does not say. Raises CheckpointError where there is no such repository."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return None, " (HF_HUB_OFFLINE is set)"
    try:
        return HfApi().model_info(repo, timeout=10).sha, ""
    except Exception as error:  # the client passes on those of its HTTP library
        if isinstance(error, HfHubHTTPError) and not is_busy(error):  # there is none, or not for this user
            raise _refusal(repo, error) from None
        return None, f" ({_why(error)})"


def download(load: str) -> Path:
    """The folder of this revision, of the main branch where none is named. Raises CheckpointError."""
    from huggingface_hub import constants, snapshot_download
    from tqdm.auto import tqdm

    class Bar(tqdm):
        """The hub's bars in lines of this project: of the two that count bytes, the one of bytes on this disk."""

        def __init__(self, *args, **options):
            self.lines = Progress(0, "MB")
            super().__init__(*args, **options)

        def display(self, *args, **options) -> None:
            if self.unit == "B" and self.total and str(self.desc).startswith("Reconstructing"):
                self.lines.total = self.total / 1e6
                self.lines.add(self.n / 1e6 - self.lines.done)

    repo, revision = split_id(load)
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=FILES, tqdm_class=Bar))
    except Exception as error:  # the client passes on those of its HTTP library
        if full_disk(error):
            place = Path(constants.HF_HUB_CACHE)
            free = shutil.disk_usage(existing_folder(place)).free
            raise CheckpointError(
                f"load: {load}: no room in the hub's cache {place}: {size_in_words(free)} are free",
                "free some there, or: export HF_HOME=FOLDER on a disk with room; then the same command",
            ) from None
        raise _refusal(load, error) from None


def name_problem(repository: str) -> str:
    """Why the hub can have no `repository`; empty where it may."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owner, _, name = repository.partition("/")
    if not (owner and name) or {owner[0], owner[-1]} & set("-."):
        return "not of the form org/name"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        return str(error).rpartition(": ")[0]  # what follows repeats the name
    return ""


def status_of(error: BaseException) -> int:
    """The HTTP status that the hub has answered with; 0 where it has not."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", 0)


def is_busy(error: BaseException) -> bool:
    """Whether the hub only has no answer now."""
    return status_of(error) == 429 or status_of(error) >= 500


def _why(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    status = status_of(error)
    return f"the hub answers {status}" if status else f"the hub cannot be reached: {type(error).__name__}"


def _refusal(load: str, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    repo, revision = split_id(load)
    folder = "" if revision else f", and {repo} is no folder here"
    as_folder = "" if revision else "if a folder is meant, correct the path or put it there; if the hub is meant, "
    known = (
        (errors.GatedRepoError, "the hub wants you to accept its terms", "accept them, and `hf auth login`"),
        (errors.RevisionNotFoundError, f"{repo} has no revision {revision}", "a commit or tag of that repository"),
        (
            errors.RepositoryNotFoundError,
            f"no {repo} on the hub, or you have no access to it{folder}",
            f"{as_folder}check its name, or `hf auth login`",
        ),
    )
    for kind, problem, fix in known:
        if isinstance(error, kind):
            return CheckpointError(f"load: {load}: {problem}", fix)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if status_of(error) and not is_busy(error):
        reason = getattr(error, "server_message", None) or str(error)
        return CheckpointError(
            f"load: {load}: the hub refuses it ({status_of(error)}): {shown(reason, 200)}",
            "`hf auth login` with a token that may read it, or HF_HUB_OFFLINE=1 for what the hub's cache has",
        )
    commits, tried = cached_commits(repo), _commit_of(repo, revision)
    others = [commit for commit in commits if commit != tried]
    more = f"; the cache has {', '.join(others)}: name one, {repo}@{others[0]}" if others else ""
    which = f" --revision {revision}" if revision else ""
    return CheckpointError(
        f"load: {load}: not {'whole ' if tried in commits else ''}in the hub's cache, and {_why(error)}{folder}{more}",
        f"{as_folder}run `hf download {repo}{which}` where there is a network and copy the hub's cache, or name a folder",
    )


def _cache_of(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def cached_commits(repo: str) -> list[str]:
    """The commits of a repository in the hub's cache, newest first by the time they came."""
    names = "[0-9a-f]" * 40  # not what somebody has put beside them
    found = [path for path in (_cache_of(repo) / "snapshots").glob(names) if path.is_dir()]
    return [path.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]


def newest_cached(repo: str) -> str | None:
    """What was main when the hub last said so, else the commit that came last; None where the cache has none."""
    commits, main = cached_commits(repo), _commit_of(repo, "main")
    return main if main in commits else next(iter(commits), None)


def _commit_of(repo: str, revision: str) -> str:
    """The commit that a branch or a tag was when the hub last said so; a commit is itself."""
    noted = _cache_of(repo) / "refs" / (revision or "main")
    return noted.read_text("utf-8", "replace").strip() if noted.is_file() else revision
