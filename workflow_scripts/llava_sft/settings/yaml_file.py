"""Files of settings as YAML: small, each thing said once, and nothing that YAML reads otherwise than people do."""

import re
from pathlib import Path

import yaml

from llava_sft.errors import READABLE, SettingsError, shown

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
        content = yaml.safe_load(text) or {}
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file", "`snakemake` lists the experiments there are") from None
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}", READABLE) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: byte {error.start} is not UTF-8", "save the file again as UTF-8") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark and problem else str(error)
        reason = " ".join(where.split())[:400]
        tab = "; indent with spaces, not with tabs" if "\\t" in reason else ""
        raise SettingsError(f"{path}: not valid YAML: {reason}", f"mend that line{tab}") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply", "see TEMPLATE.yaml for what settings look like") from None
    except (ValueError, OverflowError) as error:  # 2026-13-01, a number of 5,000 digits
        raise SettingsError(f"{path}: {str(error)[:200]}", "mend that value, or put it in quotes") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: holds a {type(content).__name__}, not `key: value` lines", "see TEMPLATE.yaml")
    for key in content:
        if not isinstance(key, str):
            raise SettingsError(f"{path}: {shown(key)} is no setting's name", "write `name: value` lines")
    return content


def _check_nodes(path: Path, root: yaml.Node) -> None:
    """Raise SettingsError for a document that is larger than it looks, or does not say what it seems to say."""
    count, nodes = 0, [(root, 0)]
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise SettingsError(
                f"{path}: nested too deeply, or more than {MAX_NODES:,} values once its aliases (*name) are filled in",
                "write the values without aliases; see TEMPLATE.yaml",
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
