"""Which samples a run has trained on, and how often: none is lost in silence, or seen more often than another.

A pass ends before the next begins (data/order.py), so counts differ by one at most. `log_samples` notes the ids; they are
counted here when all steps are done.
"""

import sqlite3
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava_sft.data.nv_meta import folder_of
from llava_sft.data.stored import sample_ids
from llava_sft.errors import RunError, SftError, many, verb_of
from llava_sft.files import read_json, write_json
from llava_sft.run.layout import SAMPLE_COUNTS, SAMPLES
from llava_sft.run.records import read_jsonl
from llava_sft.settings.resolved import ResolvedData

NAMED = 1000  # ids of each kind, at most


def sample_counts(run_dir: Path, data: Path, train_iters: int, left_out: Collection[str] = ()) -> dict[str, Any] | None:
    """How often each training sample of `data` (the path passed to energon) was seen; None when that was not logged.

    Args:
        left_out: ids of samples that cannot be trained on.

    Besides those, the result names the samples that were seen less often than the complete epochs of their source, or more
    often than those and the epoch in progress. Errors: DataError, RunError when a step is missing from the log,
    sqlite3.Error when the index does not tell the samples apart.
    """
    seen: Counter[str] = Counter()
    for path in (run_dir / SAMPLES).glob("rank*.jsonl"):
        records = read_jsonl(path)
        if len(records) != train_iters:
            raise RunError(
                f"{path}: {len(records)} of {many(train_iters, 'step')} {verb_of(len(records), 'are')} in the log"
            )
        for record in records:
            seen.update(record["samples"])
    if not seen:
        return None
    all_ids = sample_ids(folder_of(data), "train")
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


def count_samples(run_dir: Path, data: ResolvedData, train_iters: int) -> None:
    """Write sample_counts.json of a run whose steps are all done, and print its summary; or why there is none."""
    (run_dir / SAMPLE_COUNTS).unlink(missing_ok=True)  # of a shorter run
    try:
        left_out = read_json(data.sizes, {"left_out": []})["left_out"] if data.sizes else []
        counts = sample_counts(run_dir, Path(data.path), train_iters, left_out)
    except (SftError, OSError, sqlite3.Error) as error:  # the training itself is done
        print(f"how often each sample was seen is not known: {error}")
        return
    if counts:
        write_json(run_dir / SAMPLE_COUNTS, counts, sealed=True)
        print(f"{summary(counts)} ({run_dir / SAMPLE_COUNTS})")


def summary(counts: dict[str, Any]) -> str:
    """One line for the run's log."""
    words = {"0": "not seen", "1": "seen once", "2": "seen twice"}
    often = ", ".join(
        f"{number:,} {words.get(times, f'seen {times} times')}" for times, number in counts["seen"].items()
    )
    left_out = f"; {counts['left_out_samples']:,} cannot be trained on" if counts["left_out"] else ""
    return f"{counts['epochs']:.2f} epochs of {many(counts['samples'], 'sample')}: {often}{left_out}"
