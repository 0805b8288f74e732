"""Make an experiment of a training script of the original project: `sft_bench_*.sh`, `stage_2_instruct_*.sh` and their like.

The script is read, never run. Printed is what has no counterpart here and why; what would train something else than the
script does is refused.
"""

import re
import shlex
from pathlib import Path

import llava_sft  # noqa: F401 (first: it says what an unfit Python lacks)

# isort: split
import yaml

from llava_sft.command_line import Parser
from llava_sft.errors import SettingsError, exits_cleanly, many
from llava_sft.files import write_text
from llava_sft.migrate.arguments import OPTIONS, Found, translate
from llava_sft.migrate.shell import UNKNOWN, Command, Script
from llava_sft.settings.layers import CONFIG_DIR, NAME_RULE, can_name, load_settings
from llava_sft.settings.schema import Settings

FEWEST = 5  # known arguments of a command that is taken for a training
OF_NODES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "SINGLE_NODE", "NNODES")
HEAD = """\
# yaml-language-server: $schema=../schema.json
# From {script}, by import_shell_script.py. Every other setting: config/config.yaml.
"""


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("script", type=Path, help="the shell script")
    parser.add_argument("--name", help="of the experiment (default: what the script calls its run)")
    args = parser.parse_args()
    if not (CONFIG_DIR / "experiments").is_dir():
        raise SettingsError(f"{CONFIG_DIR}/experiments: no such folder here", "run this in the project's folder")

    require_text(args.script)
    script = Script(args.script)
    command = training_command(script)
    exports = {name: script.variables.values[name][0] for name in script.exported}
    try:
        found = translate(options_of(command), exports, script.variables.shown)
    except ValueError as error:
        raise SettingsError(
            f"{args.script}: line {command.line}: {error}", "a number there, then import it again"
        ) from None
    if found.refused:
        raise SettingsError(
            f"{args.script}: line {command.line}: what it trains cannot be trained here:\n    "
            + "\n    ".join(found.refused),
            "remove what you can do without from the script, and import it again",
        )
    name = args.name or found.name or re.sub(r"^(sft_bench|train)_", "", args.script.stem)
    if not can_name(name) or name == "TEMPLATE":  # before it is part of a path
        raise SettingsError(f"{name!r} cannot name an experiment", f"--name: {NAME_RULE}")
    path = CONFIG_DIR / "experiments" / f"{name}.yaml"
    if path.exists():
        raise SettingsError(f"{path} exists already", f"--name {name}_2, or remove it")
    for setting, place in (("webdatasets", f"data/{name}/webdatasets"), ("load", f"checkpoints/{name}")):
        if setting not in found.settings:
            found.settings[setting] = place, "EDIT THIS: the script does not tell"
    write(path, args.script, found, name)
    print(f"{path}: {many(len(found.settings), 'setting')}")
    for setting, (value, where) in in_order(found):
        print(f"  {setting:30} {spelled(value):40} {where}")
    report(script, found)
    print(f"next: snakemake preflight_{name} (does it fit, how long will it take), then snakemake train_{name}")


def require_text(path: Path) -> None:
    """Raise SettingsError for what is no script at all; OSError."""
    if path.is_dir():
        scripts = sorted(path.glob("*.sh"))
        raise SettingsError(f"{path}: a folder", f"name {scripts[0] if scripts else 'the script itself'}")
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SettingsError(
            f"{path} is UTF-16, not UTF-8", f"iconv -f UTF-16 -t UTF-8 {shlex.quote(str(path))} > NEW.sh"
        )
    if b"\0" in head:
        raise SettingsError(f"{path}: no text", "name the shell script")


def training_command(script: Script) -> Command:
    """Of all commands of the script the one that trains: most of its arguments are known. Raises SettingsError."""
    known = {command: len(options_of(command).keys() & OPTIONS.keys()) for command in script.commands}
    best = max(known, key=lambda command: known[command], default=None)
    if best is None or known[best] < FEWEST:
        raise SettingsError(
            f"{script.path}: no command with the arguments of the original's train.py (--seq-length, --load …)",
            "name the script that holds the torchrun command; of a script for another trainer start from "
            "config/experiments/TEMPLATE.yaml",
        )
    return best


def options_of(command: Command) -> dict[str, list[str]]:
    """Option, without dashes in front and with dashes inside, → its values; of one given twice the last counts."""
    options: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command.words:
        if word.startswith("--"):
            option, has_value, value = word[2:].partition("=")
            values = options[option.replace("_", "-")] = [value] if has_value else []
        elif word.endswith(".py"):  # of torchrun, whose own options stand before it
            values = []
        else:
            values.append(word)
    return options


def in_order(found: Found) -> list[tuple[str, tuple[object, str]]]:
    order = list(Settings.model_fields)
    return sorted(found.settings.items(), key=lambda item: order.index(item[0]))


def spelled(value: object) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    )


def write(path: Path, script: Path, found: Found, name: str) -> None:
    """Write the experiment if its settings pass the workflow's own check; else leave nothing. Raises SettingsError."""
    lines = [
        f"{f'{setting}: {spelled(value)}':50}  # {' '.join(where.split())}"
        for setting, (value, where) in in_order(found)
    ]
    lost = [f"#   {' '.join(line.split())}" for line in found.lost]
    notes = ["", "# Not taken over:", *lost] if lost else []
    write_text(path, HEAD.format(script=" ".join(script.name.split())) + "\n".join([*lines, *notes]) + "\n")
    try:
        load_settings(name)
    except SettingsError as error:
        path.unlink()
        where = f"{script} (nothing was written): "
        raise SettingsError(where + error.problem, f"{error.fix}; in the script, then import it again") from None


def report(script: Script, found: Found) -> None:
    """Print what was not taken over, and what a look at the result should check."""
    notes = list(found.lost)
    for other in script.others:
        if other.name not in OF_NODES:
            notes.append(
                f"line {other.line}: {other.name} may become {script.variables.shown(other.instead)} there (a branch); "
                f"{script.variables.shown(other.taken)} was taken"
            )
    notes += [
        f"line {command.line}: {script.variables.shown(' '.join(command.words))}: not read"
        for command in script.sourced
    ]
    if re.search(r"^#SBATCH", script.path.read_text("utf-8", "replace"), re.M):
        notes.append("#SBATCH lines: time, memory and partition are in profiles/slurm/; train with --profile slurm")
    if notes:
        print("not taken over:")
        for note in notes:
            print(f"  {note}")
    if found.ignored:
        print("needs nothing here:")
        for why, arguments in found.ignored.items():
            print(f"  {' '.join(arguments)}: {why}")
    for setting in ("webdatasets", "load", "tokenizer"):
        place = str(found.settings.get(setting, ("", ""))[0])
        if place and not Path(place).exists():
            print(f"note: {setting}: {place} is not on this machine")
    assert not any(UNKNOWN.search(str(value)) for value, _ in found.settings.values())


if __name__ == "__main__":
    main()
