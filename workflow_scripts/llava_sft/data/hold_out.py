"""A validation split by image: records that share one, directly or over others, fall on the same side.

Notable: text-only records go by their id. The side of a group of records hangs on its smallest name and the seed, so
most records stay on their side when data is added. The chosen samples, few in each of many shards, are copied into few
`heldout-` tars; in their old place energon leaves them out by the `exclude` list of split.yaml.
"""

import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
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
    from scipy.sparse import coo_array  # 0.3 s, which only a split needs
    from scipy.sparse.csgraph import connected_components

    names, draws, counts = array("Q"), array("Q"), array("L")  # there may be 10^8 images: 8 bytes of each name are kept
    for sample in samples:
        counts.append(len(sample))
        names.extend(map(_eight_bytes, sample))
        draws.extend(xxhash.xxh3_64_intdigest(name.encode(), seed) for name in sample)
    unique, nodes = np.unique(np.asarray(names), return_inverse=True)
    draw_of = np.empty(len(unique))
    draw_of[nodes] = np.asarray(draws) / 2**64
    ends = np.cumsum(counts)
    shared = np.ones(len(names) - 1, dtype=bool)  # whether a name and the next are of one sample
    shared[ends[:-1] - 1] = False
    edges = nodes[:-1][shared], nodes[1:][shared]
    links = coo_array((np.ones(len(edges[0]), dtype=bool), edges), shape=(len(unique), len(unique)))
    number, group_of = connected_components(links, directed=False)
    if number < 2:
        several = f"all {len(counts):,} samples share images with each other, none can be held out"
        why = "there is one sample, which cannot be held out" if len(counts) == 1 else several
        raise DataError(
            f"val_fraction {fraction:g}: {why}",
            "set val_fraction: 0, or name a file of other records (heldout_data)",
        )
    groups = group_of[nodes[ends - 1]]
    sizes = np.bincount(groups)
    drawn = np.empty(number)
    drawn[group_of[::-1]] = draw_of[::-1]  # the last one stays: that of the smallest name, since `unique` is sorted
    chosen = (drawn < fraction) & (sizes <= max(1, fraction * len(counts)))
    by_size = np.lexsort((drawn, sizes))
    if not chosen.any():
        chosen[by_size[0]] = True
    if chosen.all():
        chosen[by_size[-1]] = False
    return chosen[groups].tolist(), number


def _eight_bytes(name: str) -> int:
    """The first of a hash, in whose order names are; of another name a hash."""
    is_hash = len(name) == 32 and " " not in name
    return int(name[:16], 16) if is_hash else xxhash.xxh3_64_intdigest(name.encode())


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
