"""Which samples a run has trained on, and how often: no sample is lost in silence, or seen far more often than asked.

The loader deals out shuffled pieces of an endless stream, so an epoch's end is not sharp: some samples of the next come
early, and some wait. `log_samples` notes the ids; here they are counted when all steps are done.
"""

from collections import Counter
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any

from llava_sft.data.heldout import sample_ids
from llava_sft.data.tars import METADATASET
from llava_sft.training.watch import read_jsonl

SAMPLE_COUNTS = "sample_counts.json"


def sample_counts(run_dir: Path, data: Path, train_iters: int, left_out: Collection[str] = ()) -> dict[str, Any] | None:
    """How often each training sample of `data` (what energon opened) was seen; None when not every step noted it.

    `left_out`: ids of samples that can not be trained on. The result names them, and the samples that were seen less often
    than the whole epochs of their source (once at least), or more often than those and a begun one.
    """
    seen: Counter[str] = Counter()
    for path in (run_dir / "samples").glob("rank*.jsonl"):
        records = read_jsonl(path)
        if len(records) != train_iters:
            return None
        for names in chain.from_iterable(record["samples"] for record in records):
            seen.update(names.split(","))  # of a packed sequence
    if not seen:
        return None
    all_ids = sample_ids(data.parent if data.name == METADATASET else data, "train")
    left_over, repeated = [], []
    for ids in all_ids.values():  # one after the other: a source's weight makes epochs of its own
        usable = ids.difference(left_out)
        times = {name: seen[name] for name in usable}
        epochs = sum(times.values()) / max(1, len(usable))
        left_over += [name for name, count in times.items() if count < max(1, int(epochs))]
        repeated += [name for name, count in times.items() if count > int(epochs) + 1]
    total = sum(map(len, all_ids.values()))
    unseen = total - len(left_out) - len(seen)
    counts = Counter(seen.values()) + Counter({0: unseen})
    return {
        "samples": total,
        "epochs": seen.total() / (total - len(left_out)),
        "seen": {str(times): counts[times] for times in sorted(counts)},
        "left_out": sorted(left_out),
        "left_over": sorted(left_over),
        "repeated": sorted(repeated),
    }


def told(counts: dict[str, Any]) -> str:
    """A line for the run's log."""
    words = {"0": "not seen", "1": "seen once", "2": "seen twice"}
    often = ", ".join(
        f"{number:,} {words.get(times, f'seen {times} times')}" for times, number in counts["seen"].items()
    )
    left_out = f"; {len(counts['left_out']):,} can not be trained on" if counts["left_out"] else ""
    return f"{counts['epochs']:.2f} epochs of {counts['samples']:,} samples: {often}{left_out}"
