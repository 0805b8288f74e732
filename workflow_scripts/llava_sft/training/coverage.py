"""Which samples a run has trained on, and how often: no sample is lost in silence, or seen more often than another.

A pass ends before the next begins (data/order.py), so counts differ by one at most. `log_samples` notes the ids; here they
are counted when all steps are done.
"""

import sqlite3
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava_sft.data.nv_meta import METADATASET
from llava_sft.data.stored import sample_ids
from llava_sft.errors import RunError, SftError
from llava_sft.files import read_json, write_json
from llava_sft.training.watch import read_jsonl

SAMPLE_COUNTS = "sample_counts.json"
NAMED = 1000  # ids at most, of each kind


def sample_counts(run_dir: Path, data: Path, train_iters: int, left_out: Collection[str] = ()) -> dict[str, Any] | None:
    """How often each training sample of `data` (what energon opened) was seen; None when it was not noted.

    `left_out`: ids of samples that can not be trained on. Named are those, and after a whole epoch of their source the
    samples that were seen less often than its whole epochs, or more often than those and a begun one. Errors: DataError,
    RunError when not every step noted it, sqlite3.Error when the index does not tell the samples apart.
    """
    seen: Counter[str] = Counter()
    for path in (run_dir / "samples").glob("rank*.jsonl"):
        records = read_jsonl(path)
        if len(records) != train_iters:
            raise RunError(f"{path}: {len(records)} of {train_iters} steps are noted there")
        for record in records:
            seen.update(record["samples"])
    if not seen:
        return None
    all_ids = sample_ids(data.parent if data.name == METADATASET else data, "train")
    named: dict[str, list[str]] = {"left_out": [], "left_over": [], "repeated": []}
    times: Counter[int] = Counter()
    for ids in all_ids.values():  # one after the other: a source's weight makes epochs of its own
        named["left_out"] += sorted(ids.intersection(left_out))
        usable = ids.difference(left_out)
        times.update(seen[name] for name in usable)
        epochs = sum(seen[name] for name in usable) / max(1, len(usable))
        if epochs >= 1:
            named["left_over"] += sorted(name for name in usable if seen[name] < int(epochs))
            named["repeated"] += sorted(name for name in usable if seen[name] > int(epochs) + 1)
    return {
        "samples": sum(map(len, all_ids.values())),
        "epochs": sum(count * number for count, number in times.items()) / max(1, times.total()),
        "seen": {str(count): times[count] for count in sorted(times)},
        **{f"{what}_samples": len(ids) for what, ids in named.items()},
        **{what: ids[:NAMED] for what, ids in named.items()},
    }


def count_samples(run_dir: Path, resolved: dict[str, Any]) -> None:
    """Write SAMPLE_COUNTS of a run whose steps are all done, and say what is in it; or why it is not known."""
    (run_dir / SAMPLE_COUNTS).unlink(missing_ok=True)  # of a shorter run
    data = resolved["data"]
    try:
        left_out = read_json(data["sizes"], {"left_out": []})["left_out"] if "sizes" in data else []
        counts = sample_counts(run_dir, Path(data["path"]), resolved["settings"]["train_iters"], left_out)
    except (SftError, OSError, sqlite3.Error) as error:  # the training itself is done
        print(f"how often samples were seen is not known: {error}")
        return
    if counts:
        write_json(run_dir / SAMPLE_COUNTS, counts, sealed=True)
        print(f"{told(counts)} ({run_dir / SAMPLE_COUNTS})")


def told(counts: dict[str, Any]) -> str:
    """A line for the run's log."""
    words = {"0": "not seen", "1": "seen once", "2": "seen twice"}
    often = ", ".join(
        f"{number:,} {words.get(times, f'seen {times} times')}" for times, number in counts["seen"].items()
    )
    left_out = f"; {counts['left_out_samples']:,} can not be trained on" if counts["left_out"] else ""
    return f"{counts['epochs']:.2f} epochs of {counts['samples']:,} samples: {often}{left_out}"
