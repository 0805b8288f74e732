"""Files of settings as YAML: small, each thing said once, and nothing that YAML reads otherwise than people do."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from llava_sft.errors import MEND_LINK, READABLE, SettingsError, dead_link, shown

EXAMPLE = "config/experiments/TEMPLATE.yaml"
# A setting whose colon YAML does not see as one: 1e-4 behind it without a space, a full-width one, an equals sign.
SLIP = re.compile(r"([A-Za-z_]\w*)[ \u3000\xa0]*(:(?! |//)|[\uff1a\ufe55\ufe13]|=)[ \u3000\xa0]*(\S.*)")
OPENED = {"quoted scalar": "the quote", "flow sequence": "the [", "flow mapping": "the {"}
MAX_YAML_BYTES, MAX_NODES, MAX_DEPTH = 1 << 20, 20_000, 20


def read_yaml(path: Path) -> dict:
    """The `key: value` lines of a file of settings.

    Raises SettingsError for what is not such a file: not there, not UTF-8, not YAML, over 1 MiB, deeper or (aliases of
    aliases) larger than settings are, a key that stands twice, a number that YAML reads to another base.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise SettingsError(f"{path}: over {MAX_YAML_BYTES:,} bytes, no file of settings", "name data by its path")
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _check_nodes(path, node)
        content = None if node is None else yaml.safe_load(text)
    except FileNotFoundError:
        if dead := dead_link(path):
            raise SettingsError(f"{path}: {dead}", MEND_LINK) from None
        raise SettingsError(f"{path}: no such file", "`make` lists the experiments that there are") from None
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}", READABLE) from None
    except UnicodeDecodeError as error:
        raise SettingsError(*_of_encoding(path, error)) from None
    except yaml.YAMLError as error:
        raise SettingsError(*_of_yaml(path, text, error)) from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply", f"{EXAMPLE} shows what settings look like") from None
    except (ValueError, OverflowError) as error:  # 2026-13-01, a number of 5,000 digits
        raise SettingsError(f"{path}: {str(error)[:200]}", "mend that value, or put it in quotes") from None
    if content is None:  # comments alone, or null
        return {}
    if not isinstance(content, dict):
        lines = text.splitlines() if isinstance(content, str) else []
        what, fix = _slip(lines, 0, len(lines)) or (
            "",
            f"write `name: value` lines, without dashes before them, as {EXAMPLE} has",
        )
        raise SettingsError(f"{path}: {what or f'holds a {type(content).__name__}, not `name: value` lines'}", fix)
    for key in content:
        if not isinstance(key, str):
            raise SettingsError(f"{path}: {shown(key)} is no setting's name", "write `name: value` lines")
    return content


def as_typed(path: Path, key: str) -> Any:
    """The value of a setting as `read_yaml` returns it, but every word and number of it as the text that stands in the file;
    None where there is no such file or setting."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)[key]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def _of_encoding(path: Path, error: UnicodeDecodeError) -> tuple[str, str]:
    """What is said of a file that is not UTF-8: (problem, fix)."""
    wide = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    what = "UTF-16, not UTF-8" if wide else f"byte {error.start} is not UTF-8"
    encoding, copy = "UTF-16" if wide else "GBK (or what it is in)", shlex.quote(f"{path}.utf8")
    return f"{path}: {what}", (
        f"save it again as UTF-8, in the editor or by: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {copy} "
        f"&& mv {copy} {shlex.quote(str(path))}"
    )


def _of_yaml(path: Path, text: str, error: yaml.YAMLError) -> tuple[str, str]:
    """What is said of a file that is no YAML: (problem, fix)."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    opened, context = getattr(error, "context_mark", None), str(getattr(error, "context", None))
    lines, first, last = text.splitlines(), 0, 0
    if opened and "simple key" in context:
        first, last = opened.line, opened.line + 1
    elif mark and (problem == "mapping values are not allowed here" or "document start" in str(problem)):
        last = min(mark.line, len(lines) - 1)  # it may lie behind the last line
        first = _run_of(lines, last)
    if slip := _slip(lines, first, last) or (mark and _step_in(lines, mark.line)):
        return f"{path}: {slip[0]}", slip[1]
    if mark and "escape" in str(problem):
        return (
            f"{path}: line {mark.line + 1}: between double quotes a backslash begins an escape",
            "use single quotes there",
        )
    if opened and (what := next((name for kind, name in OPENED.items() if kind in context), None)):
        line = f"line {opened.line + 1}, column {opened.column + 1}"
        return (
            f"{path}: not valid YAML: {line}: {what} that opens here is not closed",
            "close it, or mend what stands in it",
        )
    where = f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark and problem else str(error)
    reason = " ".join(where.split())[:400]
    fix = "mend that line: one setting a line; a value with one of : # * & ! @ % ` [ { in it goes in quotes"
    return f"{path}: not valid YAML: {reason}", "indent with spaces, not with tabs" if "\\t" in reason else fix


def _run_of(lines: list[str], last: int) -> int:
    """Where the lines above line `last` begin that are no settings, as deep as it is: YAML takes them for one text with it."""
    blank = lines[last][: len(lines[last]) - len(lines[last].lstrip())]
    first = last
    while first and not re.match(r"\s*[^\s#][^#]*:\s", f"{lines[first - 1]} "):
        if lines[first - 1].strip() and not re.match(rf"{blank}[^\s]", lines[first - 1]):
            break
        first -= 1
    return first


def _step_in(lines: list[str], number: int) -> tuple[str, str] | None:
    """What is said where a setting begins elsewhere than the one above it: (problem, fix)."""
    settings = [line for line in lines[: number + 1] if re.match(r"[\s-]*[A-Za-z_]\w*:(\s|$)", line)]
    if len(settings) < 2 or number >= len(lines) or settings[-1] is not lines[number]:
        return None
    above, line = settings[-2:]
    if re.match("[ -]*", above)[0].replace("-", " ") == re.match(" *", line)[0] or above.rstrip().endswith(":"):  # type: ignore[index]
        return None
    return (
        f"line {number + 1}: {shown(line.rstrip())}: indented otherwise than {shown(above.rstrip())}, the setting above it",
        "indent them alike: settings begin at the start of a line",
    )


def _slip(lines: list[str], first: int, last: int) -> tuple[str, str] | None:
    """The first of lines [first, last) that is a setting to people alone: (problem, fix)."""
    for number, line in enumerate(lines[first:last], first + 1):
        if found := SLIP.fullmatch(line.strip()):
            name, sign, value = found.groups()
            rule = (
                "needs an ordinary colon and a space behind its name"
                if sign != ":"
                else "needs a space behind its colon"
            )
            return f"line {number}: {shown(line.strip())}: a setting {rule}", f"{name}: {shown(value)[1:-1]}"
        if re.match(r"\s*-\w", line):
            entry = line.strip()
            return (
                f"line {number}: {shown(entry)}: an entry needs a space behind its dash",
                f"- {shown(entry[1:])[1:-1]}",
            )
    return None


def _check_nodes(path: Path, root: yaml.Node) -> None:
    """Raise SettingsError for a document that is larger than it looks, or does not say what it seems to say."""
    count, nodes = 0, [(root, 0)]
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise SettingsError(
                f"{path}: nested too deeply, or more than {MAX_NODES:,} values once its aliases (*name) are filled in",
                f"write the values without aliases; see {EXAMPLE}",
            )
        line = f"{path}: line {node.start_mark.line + 1}"
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith(":int") and re.match(r"[-+]?0[0-9_]|.*:", node.value):
                raise SettingsError(
                    f"{line}: YAML reads {shown(node.value)} as another number (to base 8 or 60)",
                    "put it in quotes, or leave out its leading zeros",
                )
        elif isinstance(node, yaml.MappingNode):
            keys: dict[str, int] = {}
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise SettingsError(
                        f"{path}: {shown(key.value)} stands twice, in lines {keys[key.value]} and {key.start_mark.line + 1}",
                        "remove one of them",
                    )
                if isinstance(key, yaml.ScalarNode):
                    keys[key.value] = key.start_mark.line + 1
                nodes += [(key, depth + 1), (value, depth + 1)]
        else:
            nodes += [(item, depth + 1) for item in node.value]
