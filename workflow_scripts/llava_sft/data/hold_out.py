"""A validation split by image: records that share one, directly or over others, fall on the same side.

Notable: text-only records go by their id. The side of a group of records hangs on its smallest name and the seed, so
most records stay on their side when data is added. The chosen samples, few in each of many shards, are copied into few
`heldout-` tars; in their old place energon leaves them out by the `exclude` list of split.yaml.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import orjson
import xxhash

from llava_sft.data.plan import HELDOUT_PREFIX, shard_name
from llava_sft.data.shards import TarWriter, idx_bytes
from llava_sft.errors import DataError

HELDOUT_BYTES = 256 << 20  # of one merged tar, about


def choose_heldout(samples: Iterable[Sequence[str]], fraction: float, seed: int) -> tuple[list[bool], int]:
    """Whether each sample is held out, and the number of groups. A sample comes as the names it is bound to others by.

    A group larger than the whole held-out share is trained on. Neither side is left empty.
    Errors: DataError when all samples are one group.
    """
    node_of: dict[str, int] = {}
    parent: list[int] = []

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    firsts = []
    for names in samples:
        nodes = []
        for name in names:
            nodes.append(node_of.setdefault(name, len(parent)))
            if nodes[-1] == len(parent):
                parent.append(nodes[-1])
            parent[root(nodes[-1])] = root(nodes[0])
        firsts.append(nodes[0])
    sizes = Counter(root(node) for node in firsts)
    if len(sizes) < 2:
        raise DataError(
            f"val_fraction {fraction:g}: all {len(firsts):,} samples share images with each other, none can be held out",
            "set val_fraction: 0, or name a file of other records (heldout_data)",
        )
    smallest: dict[int, str] = {}
    for name, node in node_of.items():
        group = root(node)
        smallest[group] = min(name, smallest.get(group, name))
    draws = {group: xxhash.xxh3_64_intdigest(name.encode(), seed) / 2**64 for group, name in smallest.items()}
    most = max(1, fraction * len(firsts))
    chosen = {group for group, size in sizes.items() if draws[group] < fraction and size <= most}
    if not chosen:
        chosen = {min(sizes, key=lambda group: (sizes[group], draws[group]))}
    if len(chosen) == len(sizes):
        chosen.remove(max(sizes, key=lambda group: (sizes[group], draws[group])))
    return [root(node) in chosen for node in firsts], len(sizes)


def bound_by(row: dict[str, Any]) -> list[str]:
    """The names that a row of `.samples.jsonl` shares with the samples that must stay on its side."""
    return [image["hash"] for image in row["images"]] or [f"id {row['id']}"]


def merge_heldout(
    wds_dir: Path, folder: Path, chosen: Iterable[tuple[str, bytes]]
) -> list[tuple[str, list[dict[str, Any]], str]]:
    """Copy samples, given as (shard, row of `.samples.jsonl`), into new tars in `folder`: [name, rows, hash of the tar]."""
    merged: list[tuple[str, list[dict[str, Any]], str]] = []
    samples = _stored(wds_dir, chosen)
    for first in samples:
        name = shard_name(HELDOUT_PREFIX, len(merged))
        rows: list[dict[str, Any]] = []
        with open(folder / f"{name}.tar", "wb") as file, open(folder / f"{name}.tar.idx", "wb") as idx:
            tar = TarWriter(file)
            for source, row in itertools.chain([first], samples):
                key = f"{HELDOUT_PREFIX[0]}{len(merged):05d}_{len(rows):06d}"
                contents = ((name, os.pread(source, size, offset), None) for name, offset, size in row["parts"])
                rows.append(tar.add_sample(key, contents))
                if tar.offset >= HELDOUT_BYTES:
                    break
            idx.write(idx_bytes([row["offset"] for row in rows], tar.offset))
            merged.append((name, rows, tar.finish()))
    return merged


def _stored(wds_dir: Path, rows: Iterable[tuple[str, bytes]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the open tar that its sample lies in."""
    for shard, samples in itertools.groupby(rows, itemgetter(0)):
        with open(wds_dir / f"{shard}.tar", "rb") as file:
            for _, row in samples:
                yield file.fileno(), orjson.loads(row)
