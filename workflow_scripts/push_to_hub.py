"""Upload an export to the Hugging Face hub, into a private repository unless --public says otherwise.

    push_to_hub.py output/stage2_sft_vqa_results/huggingface org/name --dry-run    shows what would be uploaded
    push_to_hub.py output/stage2_sft_vqa_results/huggingface org/name

Uploaded are weights, configuration, tokenizer, code and the model card (README.md); not what tells of this machine or of
single records (converted.json, parity.json). Files are compared with their checksums first. Interrupted, the same command
goes on; weights of an earlier upload that this export does not have are deleted there.
"""

import argparse
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llava_sft  # noqa: F401 (first: it says what an unfit Python lacks)

# isort: split
import yaml

from llava_sft.checkpoint.hub import name_problem
from llava_sft.checkpoint.nearby import ADDRESS
from llava_sft.checkpoint.verify import noted, require_export, require_noted, require_whole
from llava_sft.command_line import Parser
from llava_sft.errors import CheckpointError, SettingsError, SftError, exits_cleanly, shown
from llava_sft.files import read_json
from llava_sft.publish.card import CARD, write_card
from llava_sft.run.layout import PARITY, RESULTS

KEPT_HERE = (PARITY,)  # of the files that an export's checksums name
AGAIN = "the same command goes on from here"
# Where an adapter was uploaded before, transformers would load the base that it names.
WEIGHTS = (".safetensors", ".safetensors.index.json", "adapter_config.json")


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("export", type=Path, help="exported Hugging Face folder, or a run's results")
    add("repository", help="org/name on the hub; it is made if it is not there")
    add("--public", action="store_true", help="everyone may see it (default: private)")
    add("--dry-run", action="store_true", help="show what would be uploaded, and upload nothing")
    args = parser.parse_args()
    if problem := name_problem(args.repository):
        fix = "org/name, or your user name before the slash"
        if address := ADDRESS.fullmatch(args.repository):
            fix = address[1]
        elif Path(args.repository).is_dir():
            fix = "the export comes first, then org/name"
        raise SettingsError(f"{shown(args.repository)}: no name of a repository: {problem}", fix)
    given = Path(os.path.abspath(args.export))  # the run's files are in the folder above, of `.` too
    export = require_export(given)
    require_noted(export)
    there = look(args.repository, args.public)  # before anything is written
    require_whole(export, full=True)
    write_card(export, args.repository)
    warn(export)
    push(export, args.repository, args.public, there, args.dry_run)


def warn(export: Path) -> None:
    """Say what a reader of the model card would miss."""
    if not metadata((export / CARD).read_text("utf-8", "replace")).get("license"):
        made = "set `license` in the experiment's file and run `make preflight_X`, or edit README.md"
        print(f"warning: the model card states no licence: {made}")
    if read_json(export / PARITY, {}).get("passed") is not True:
        print("warning: this export was never compared with the trained model (parity)")


def metadata(card: str) -> dict[str, Any]:
    """What stands between the two `---` of a model card. Errors: CheckpointError."""
    try:
        head = re.match(r"---\n(.*?)^---$", card, re.DOTALL | re.MULTILINE)
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        raise CheckpointError(
            f"{CARD}: its metadata, between the two ---, is no YAML", "correct it, or delete the file"
        ) from None
    return found if isinstance(found, dict) else {}


def look(repository: str, public: bool) -> list[str] | None:
    """Files of the repository; None where there is none. Errors: SettingsError without a token, or where the repository is
    not as private as was asked for; SftError for what the hub refuses."""
    from huggingface_hub import HfApi, errors, get_token

    if not get_token():
        raise SettingsError("no token of the Hugging Face hub here", "`hf auth login`, or the variable HF_TOKEN")
    with refusals_said(repository):
        try:
            found = HfApi().model_info(repository, timeout=10)
        except errors.RepositoryNotFoundError:
            return None
    if found.private == public:
        state, fix = ("private", "leave --public out") if found.private else ("public", "--public")
        raise SettingsError(f"{repository} is {state} already", f"{fix}; or change it in the repository's settings")
    return [file.rfilename for file in found.siblings or ()]


def push(export: Path, repository: str, public: bool, there: list[str] | None, dry_run: bool) -> None:
    """Show what is uploaded, and upload it; `there`: what `look` has found. Errors: SftError for what the hub refuses."""
    from huggingface_hub import HfApi, constants

    names = sorted({CARD, *noted(export)[1]} - set(KEPT_HERE))
    stale = sorted(name for name in there or () if name.endswith(WEIGHTS) and name not in names)
    print(f"{export} → {constants.ENDPOINT}/{repository}: {'public' if public else 'private'}", end="")
    print(", a new repository" if there is None else ", which is there already")
    for name in names:
        print(f"  {(export / name).stat().st_size / 1e6:12,.2f} MB  {name}")
    print("".join(f"  deleted there: {name}\n" for name in stale), end="", flush=True)
    if dry_run:
        print("nothing is uploaded (--dry-run)")
        return
    with refusals_said(repository):
        HfApi().create_repo(repository, private=not public, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository, folder_path=export, allow_patterns=names, delete_patterns=stale or None,
            commit_message=f"{export.parent.name.removesuffix(RESULTS)}, by llava-sft",
        )  # fmt: skip
    print(f"done: {constants.ENDPOINT}/{repository}")


@contextlib.contextmanager
def refusals_said(repository: str) -> Iterator[None]:
    """Errors of the client, or of its HTTP library, as SftError."""
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:
        if message := refusal(error, constants.ENDPOINT, repository):
            raise message from None
        raise


def refusal(error: BaseException, hub: str, repository: str) -> SftError | None:
    """What the hub, or the way to it, has against a request; None for an error of another kind."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and error.__cause__:  # how the client passes on what became of an upload
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        fixes = {
            401: "`hf auth login` with a valid token",
            403: f"a token that may write to {repository.partition('/')[0]}",
        }
        reason = str(error.server_message or error)[:300]
        return SftError(f"{hub} refuses the request ({status}): {reason}", fixes.get(status, AGAIN))
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):  # of the client, before anything is uploaded
        what = "`license`, `language` or `base_model` in the experiment's file, and `make preflight_X`"
        return SftError(
            f"{hub} refuses the metadata of {CARD}: {str(error).partition(chr(10))[2]}", f"{what}, or edit it"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return SftError("HF_HUB_OFFLINE is set: the hub is not asked", "the same command behind `HF_HUB_OFFLINE=0`")
    if type(error).__module__.startswith("http"):
        return SftError(f"{hub} cannot be reached: {str(error)[:200]}", AGAIN)
    return None


if __name__ == "__main__":
    main()
