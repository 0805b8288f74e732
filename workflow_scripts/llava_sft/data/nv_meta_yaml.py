"""The YAML files of `.nv-meta`, taken from anybody: parsed within limits, and exactly what is known accepted.

Notable: energon builds whatever class or function such a file names, so none that says more than this is ever used as
it is. No tags, anchors or aliases; no names that lead out of the folder; patterns of one level of braces.
"""

import itertools
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from braceexpand import braceexpand

from llava_sft.data.layouts import LAYOUTS
from llava_sft.errors import shown

MOST_BYTES = 64 << 20  # of a YAML file: a million shards
MOST_NAMES = 1_000_000  # that a pattern stands for
MOST_GROUPS = 4  # {…} in a pattern
CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
BLEND = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(path: Path) -> Any:
    """Plain values from a YAML file. Errors: ValueError, OSError."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"has {size:,} bytes, at most {MOST_BYTES:,} are read")
    data = path.read_bytes()
    try:
        if any(mark in data for mark in b"&*!"):
            for event in yaml.parse(data, LOADER):
                odd = next((what for what in ("anchor", "tag") if getattr(event, what, None)), None)
                if odd and getattr(event, odd) != "!":
                    line = event.start_mark.line + 1 if event.start_mark else "?"
                    raise ValueError(f"line {line}: {odd}s are not accepted")
        return yaml.load(data, LOADER)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())[:200]}") from None


def check_dataset(config: Any) -> str | None:
    """The layout that a dataset.yaml names, None where it names none. Errors: ValueError for anything that is not known."""
    if not isinstance(config, dict):
        raise ValueError(f"{shown(config)} is no mapping")
    subflavors = config.get("subflavors") or {}
    _exactly({key: value for key, value in config.items() if key != "subflavors"}, CRUDE)
    if not isinstance(subflavors, dict) or subflavors.keys() - {"layout"}:
        raise ValueError(f"subflavors {shown(subflavors)}: only `layout` is known")
    layout = subflavors.get("layout")
    if layout is not None and not (isinstance(layout, str) and layout in LAYOUTS):
        raise ValueError(f"layout {shown(layout)}: one of {', '.join(LAYOUTS)}")
    return layout


def check_blend(config: Any) -> dict[str, dict[str, float]]:
    """The draws from each source by split, of a metadataset.yaml. Errors: ValueError for anything that is not known."""
    if not isinstance(config, dict) or not isinstance(config.get("splits"), dict):
        raise ValueError("has no mapping `splits`")
    _exactly({key: value for key, value in config.items() if key != "splits"}, BLEND)
    draws: dict[str, dict[str, float]] = {}
    for split, entry in config["splits"].items():
        if split not in ("train", "val", "test") or not isinstance(entry, dict) or entry.keys() != {"blend"}:
            raise ValueError(f"split {shown(split)}: only a blend of train, val or test is known")
        if not isinstance(entry["blend"], list):
            raise ValueError(f"the blend of {split} is no list")
        draws[split] = {}
        for source in entry["blend"]:
            name, weight = (source.get("path"), source.get("weight")) if isinstance(source, dict) else (None, None)
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
                raise ValueError(f"path {shown(name)}: the name of a folder beside the file is due")
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < 1e18:
                raise ValueError(f"{name}: weight {shown(weight)} is no number above 0")
            _exactly(source, {"path": name, "weight": weight, "subflavors": {"source": name}})
            draws[split][name] = weight
    return draws


def _exactly(config: dict, known: dict) -> None:
    for key in [*config, *known]:
        if key not in known or config.get(key) != known[key]:
            raise ValueError(f"{shown(key)}: {shown(config.get(key))} is not accepted: {shown(known.get(key))} is due")


def expand(patterns: Any) -> list[str]:
    """The names that a list of patterns stands for. Errors: ValueError beyond the limits."""
    if patterns is None:
        return []
    if not isinstance(patterns, list):
        raise ValueError(f"{shown(patterns)} is no list of names")
    return [name for pattern in patterns for name in _expanded(pattern)]


def _expanded(pattern: Any) -> list[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"{shown(pattern)} is no name")
    names = [pattern]
    if "{" in pattern:
        bare = re.sub(r"\\.", "", pattern)
        numbers = re.findall(r"(-?\d+)\.\.(-?\d+)", bare)
        if (
            len(pattern) > 4096
            or re.search(r"\{[^}]*\{", bare)
            or bare.count("{") > MOST_GROUPS
            or any(len(a) > 10 or len(b) > 10 or abs(int(b) - int(a)) >= MOST_NAMES for a, b in numbers)
        ):
            raise ValueError(f"{shown(pattern)}: at most {MOST_GROUPS} {{…}}, none within another, are expanded")
        names = list(itertools.islice(braceexpand(pattern), MOST_NAMES + 1))
        if len(names) > MOST_NAMES:
            raise ValueError(f"{shown(pattern)} stands for more than {MOST_NAMES:,} names")
    for name in names:
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(f"{shown(name)} leads out of the folder")
    return names


def literal(name: str) -> str:
    """A name as a pattern that stands for it alone."""
    return re.sub(r"([{},\\])", r"\\\1", name) if "{" in name else name
