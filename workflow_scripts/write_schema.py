"""Write config/config.yaml and config/schema.json (for editors) from the settings' declarations, settings/schema.py."""

import argparse
import textwrap
from typing import Any

from llava_sft.files import write_json, write_text
from llava_sft.settings.layers import CONFIG_DIR
from llava_sft.settings.schema import DEFAULTS, SECTIONS, Settings

WIDTH, COMMENTS_FROM = 128, 27  # of config.yaml, in characters
HEAD = """\
# Every setting, its default and what it means. A stage (config/stages/) sets some of them, an experiment
# (config/experiments/X.yaml) overrides any, and the command line overrides all: `snakemake train_X --config lr=5e-6`.
# `auto` is worked out from the data and the machine; `snakemake preflight_X` shows the result and where it came from.
"""


def config_yaml() -> str:
    """Every setting with its default and its text, by sections."""
    parts = [HEAD]
    for section in SECTIONS:
        parts.append("\n" + f"# --- {section.__doc__} ".ljust(107, "-") + "\n")
        for name in section.model_fields:
            line = f"{name}: {_yaml(DEFAULTS[name])}".ljust(COMMENTS_FROM - 2) + "  # "
            text = Settings.model_fields[name].description or ""
            margin = " " * COMMENTS_FROM + "# "
            wrapped = textwrap.wrap(
                text,
                WIDTH,
                initial_indent=line,
                subsequent_indent=margin,
                break_long_words=False,
                break_on_hyphens=False,
            )
            parts.append("\n".join(wrapped) + "\n")
    return "".join(parts)


def _yaml(value: Any) -> str:
    """A default as people write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float) and "e" in repr(value):
        return f"{value:.1e}".replace("e-0", "e-")
    return str(value) or '""'


def json_schema() -> dict[str, Any]:
    """JSON schema of an experiment's file."""
    schema = Settings.model_json_schema()
    del schema["properties"]["experiment"], schema["required"]
    for name, entry in schema["properties"].items():
        entry.pop("title", None)
        del entry["about"]
        entry["default"] = DEFAULTS[name]
    return schema | {"title": "An experiment of this workflow", "description": "config/experiments/*.yaml"}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_text(CONFIG_DIR / "config.yaml", config_yaml())
    write_json(CONFIG_DIR / "schema.json", json_schema())
