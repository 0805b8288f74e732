"""What an inspection has seen so far: counts, problems, distributions, a gallery; and the report made of them."""

import heapq
import itertools
import unicodedata
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import xxhash

from llava_sft.data.image_checks import ImageInfo
from llava_sft.data.notes import Stats, counted, total
from llava_sft.data.other_forms import SYSTEM_KEYS, example, plain
from llava_sft.data.records import Sample
from llava_sft.data.rejects import read_rejects
from llava_sft.model.processing import image_tokens, patch_grid
from llava_sft.model.template import ChatTemplate, UnusableSample
from llava_sft.model.tokens import IMAGE_PAD

DECODED_IMAGES = 500  # about so many are decoded in full
PROBLEMS_KEPT, REJECTS_KEPT, GALLERY_SAMPLES = 50, 20, 12
RENDERED_SAMPLES, RENDERED_CHARS = 4, 20_000  # beside the longest; of each
MOST_BARS, MOST_KEYS = 12, 50
MOST_KEPT, OTHERS = 1000, "…"  # keys, and kinds, that are counted one by one
SEEN_KEYS = {*SYSTEM_KEYS, "kind"}  # of a sample's meta: said elsewhere

META, SHARDS, INDEX, SAMPLES, IMAGES = ".nv-meta", "shards", "index against tars", "samples", "images"
VALUES = ("tokens", "turns", "images per sample", "image width", "image height", "question length", "answer length")
SCRIPT_LETTERS = 500  # of a conversation, that its script is known by
EAST_ASIAN = {"Cjk": "Chinese", "Hiragana": "Japanese", "Katakana": "Japanese", "Hangul": "Korean"}


class TokenCounter:
    """Tokens of a sample as training would make them, before anything is cut."""

    def __init__(self, tokenizer: Path, seq_length: int, min_pixels: int, max_pixels: int):
        self.template, self.seq_length, self.limits = ChatTemplate(tokenizer), seq_length, (min_pixels, max_pixels)
        self.cut = self.left_out = 0

    def image_tokens(self, sizes: list[tuple[int, int]]) -> list[int]:
        """`sizes`: width and height of each image in pixels."""
        return [image_tokens(patch_grid(height, width, *self.limits)) for width, height in sizes]

    def count(self, messages: list[dict[str, Any]], sizes: list[tuple[int, int]]) -> int:
        images = self.image_tokens(sizes)
        length = len(self.template.encode(messages, images, 1 << 40).input_ids)
        if length > self.seq_length:
            try:
                self.template.encode(messages, images, self.seq_length)
                self.cut += 1
            except UnusableSample:
                self.left_out += 1
        return length

    def rendered(self, messages: list[dict[str, Any]], sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
        """What the model sees of a conversation, in pieces {text, counts, cut}; RENDERED_CHARS of it."""
        images, shown, left = self.image_tokens(sizes), [], RENDERED_CHARS
        count = iter(images)
        for span in self.template.spans(messages, images, self.seq_length):
            head, *pads = span.text[:left].split(IMAGE_PAD)
            text = head + "".join(f"{IMAGE_PAD} × {next(count)}{rest}" for rest in pads)
            shown.append(span._asdict() | {"text": text + "…" * (left < len(span.text))})
            left -= len(span.text)
            if left <= 0:
                break
        return shown


class Digests:
    """What has been seen, as hashes of 8 bytes, which take no more memory than that: there may be 10^8 of each."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, bool], array[int]] = defaultdict(lambda: array("Q"))  # by what, and whether held out
        self.held: list[tuple[int, list[int], str]] = []  # of each held-out sample: question, images, id

    def note(self, what: str, split: str, *contents: bytes) -> int:
        digest = xxhash.xxh3_64()
        for content in contents:
            digest.update(content)
        number = digest.intdigest()
        self.seen[what, split == "val"].append(number)
        return number

    def note_sample(self, split: str, sample: Sample[str], texts: str, images: list[int]) -> None:
        shown = [number.to_bytes(8) for number in images]
        self.note("sample", split, texts.encode("utf-8", "surrogatepass"), *shown)
        asked = self.note("question", split, sample.questions.encode("utf-8", "surrogatepass"), *shown)
        if split == "val":
            self.held.append((asked, images, str(sample.id)))

    def repeated(self, what: str) -> dict[str, int]:
        import numpy as np

        numbers = np.concatenate([np.asarray(self.seen[what, held]) for held in (False, True)])
        different = len(np.unique(numbers))
        return {"repeated": len(numbers) - different, "different": different}

    def trained_on(self) -> dict[str, Any]:
        """The held-out samples that are trained on: with the same images and question, or at least with one image."""
        asked = {question for question, _, _ in self.held}.intersection(self.seen["question", False])
        images = {image for _, of_one, _ in self.held for image in of_one}.intersection(self.seen["image", False])
        same = [name for question, _, name in self.held if question in asked]
        shared = sum(not images.isdisjoint(of_one) for _, of_one, _ in self.held)
        return {"records": len(same), "images": shared, "of": len(self.held), "first": same[:PROBLEMS_KEPT]}


class Findings:
    """What has been found so far. `looked_at` counts what each check has seen, `problems` what it found wrong."""

    def __init__(self, seed: int, tokens: TokenCounter | None):
        self.seed, self.decode_every, self.tokens = seed, 1, tokens
        self.digests = Digests()
        self.scripts: Counter[str] = Counter()
        self.excluded = 0
        self.looked_at: Counter[str] = Counter(dict.fromkeys((META, SHARDS, INDEX, SAMPLES, IMAGES), 0))
        self.problem_counts: Counter[str] = Counter()
        self.problems: list[dict[str, str]] = []
        self.notes: list[str] = []
        self.splits: dict[str, Counter[str]] = {}  # split: samples, shards, bytes
        self.kinds: dict[str, Counter[str]] = {}  # kind: samples of each split
        self.values: dict[str, Counter[int]] = {name: Counter() for name in VALUES}
        self.formats: Counter[str] = Counter()
        self.gallery: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}  # kind: heap, the luckiest samples
        self.longest: tuple[int, dict[str, Any]] | None = None
        self.kept_keys: Counter[str] = Counter()  # of the samples' meta, the first MOST_KEPT, and a value of each
        self.kept_examples: dict[str, str] = {}

    def problem(self, check: str, where: str, what: str) -> None:
        self.problem_counts[check] += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append({"check": check, "where": where, "what": what})

    def draw(self, name: str) -> int:
        """A number that looks random and is the same for the same seed and name, in whatever order one looks."""
        return xxhash.xxh3_64_intdigest(name.encode(), self.seed)

    def note_sample(
        self, split: str, kind: str, sample: Sample[str], infos: list[ImageInfo], hashes: list[int]
    ) -> None:
        """Count a sample; `infos` and `hashes` are of those of its images that can be read, and of all."""
        for info in infos:
            self.formats[info.extension] += 1
            self.values["image width"][info.width] += 1
            self.values["image height"][info.height] += 1
        kind = kind if kind in self.kinds or len(self.kinds) < MOST_KEPT else OTHERS
        self.kinds.setdefault(kind, Counter())[split] += 1
        self.values["images per sample"][len(sample.images)] += 1
        self.values["turns"][sum(message["role"] == "user" for message in sample.messages)] += 1
        for message in sample.messages:
            if message["role"] != "system":
                which = "question length" if message["role"] == "user" else "answer length"
                self.values[which][len(message["content"])] += 1
        for key, value in sample.meta.items():
            if plain(key) not in SEEN_KEYS:
                listed = key if key in self.kept_keys or len(self.kept_keys) < MOST_KEPT else OTHERS
                self.kept_keys[listed] += 1
                if listed not in self.kept_examples:
                    self.kept_examples[listed] = example(value)
        texts = "\n".join(message["content"] for message in sample.messages)
        self.digests.note_sample(split, sample, texts, hashes)
        self.scripts[script_of(texts)] += 1
        if self.tokens and len(infos) == len(sample.images):
            sizes = [(info.width, info.height) for info in infos]
            self.values["tokens"][self.tokens.count(sample.messages, sizes)] += 1

    def offer_to_gallery(
        self, kind: str, split: str, key: str, sample: Sample[str], contents: dict[str, bytes], infos: list[ImageInfo]
    ) -> None:
        """Keep the sample if it is among the luckiest of its kind, or the longest; `contents`: the bytes of its images."""
        heap = self.gallery.setdefault(kind, [])
        if len(self.gallery) > GALLERY_SAMPLES:
            del self.gallery[max(self.gallery)]  # of the first kinds one sample each is picked
        luck = self.draw(key)
        length = (
            sum(len(message["content"]) for message in sample.messages) + sum(i.width * i.height for i in infos) // 196
        )
        lucky, longest = len(heap) < GALLERY_SAMPLES or luck > heap[0][0], not self.longest or length > self.longest[0]
        if not lucky and not longest:
            return
        images = [contents[image] for image in sample.images]
        entry = {
            "key": key,
            "id": sample.id,
            "split": split,
            "kind": kind,
            "messages": sample.messages,
            "images": images,
            "sizes": [(info.width, info.height) for info in infos],
        }
        if longest:
            self.longest = (length, entry)
        if not lucky:
            return
        ranked = (luck, self.looked_at[SAMPLES], entry)  # keys of several sources may be the same
        (heapq.heappush if len(heap) < GALLERY_SAMPLES else heapq.heappushpop)(heap, ranked)

    def picked_gallery(self) -> list[dict[str, Any]]:
        """Some samples of every kind, in turn, with their images' bytes."""
        heaps = [sorted(heap, key=lambda entry: -entry[0]) for _, heap in sorted(self.gallery.items())]
        picked = [heap[turn][2] for turn in range(GALLERY_SAMPLES) for heap in heaps if turn < len(heap)]
        picked = picked[:GALLERY_SAMPLES]
        longest = [self.longest[1]] if self.longest else []
        for entry in [*picked[:RENDERED_SAMPLES], *longest]:
            if self.tokens and len(entry["sizes"]) == len(entry["images"]):
                entry["rendered"] = self.tokens.rendered(entry["messages"], entry["sizes"])
        return picked + [entry for entry in longest if all(entry is not other for other in picked)]

    def report(self, wds_dir: Path, converted: list[tuple[Path, list[Stats]]]) -> dict[str, Any]:
        """Plain JSON. `converted`: of each source, the folder of the conversion's notes and its shards' statistics."""
        length = self.tokens
        return {
            "path": str(wds_dir),
            "ok": not self.problem_counts,
            "checks": [
                {"name": name, "looked_at": count, "problems": self.problem_counts[name]}
                for name, count in self.looked_at.items()
            ],
            "problems": self.problems,
            "notes": self.notes,
            "splits": {split: dict(counts) for split, counts in sorted(self.splits.items())},  # train before val
            "kinds": {kind: dict(counts) for kind, counts in sorted(self.kinds.items())},
            "image_formats": dict(self.formats.most_common()),
            "distributions": {name: distribution(values) for name, values in self.values.items() if values},
            "duplicates": {what: self.digests.repeated(what) for what in ("sample", "image")},
            "scripts": dict(self.scripts.most_common()),
            "unread": _unread(converted),
            "kept_keys": {
                key: {"records": n, "example": self.kept_examples[key]}
                for key, n in self.kept_keys.most_common(MOST_KEYS)
            },
            "trained_on": self.digests.trained_on(),
            "sequence_length": length
            and {"seq_length": length.seq_length, "cut": length.cut, "left_out": length.left_out},
            "rejects": _rejects(converted),
        }


def _unread(converted: list[tuple[Path, list[Stats]]]) -> dict[str, Any]:
    """Keys that the conversion did not read: in how many records each is, and an example."""
    shards = [stats for _, of_source in converted for stats in of_source]
    examples: dict[str, str] = {}
    for stats in shards:
        examples = stats.get("unread_examples", {}) | examples
    counts = counted(shards, "unread").most_common(MOST_KEYS)
    return {key: {"records": n, "example": examples.get(key, "")} for key, n in counts}


def _rejects(converted: list[tuple[Path, list[Stats]]]) -> dict[str, Any] | None:
    shards = [stats for _, of_source in converted for stats in of_source]
    if not shards:
        return None
    reasons = counted(shards, "reasons")
    rows = (row for folder, of_source in converted for row in read_rejects(folder, of_source))
    return {
        "read": total(shards, "read"),
        "rejected": total(shards, "rejected"),
        "reasons": dict(reasons.most_common()),
        "first": list(itertools.islice(rows, REJECTS_KEPT)),
    }


def script_of(text: str) -> str:
    """The script that most letters are of, as Unicode names it, `other` without any: a hint at the language, no more."""
    letters = filter(str.isalpha, text.replace("<image>", "")[:SCRIPT_LETTERS])
    scripts = (unicodedata.name(letter, "other").split(" ")[0].capitalize() for letter in letters)
    counts = Counter(EAST_ASIAN.get(script, script) for script in scripts)
    if counts["Japanese"] > counts["Chinese"] / 10:  # kana tell, also where Chinese characters are more
        counts["Japanese"] += counts["Chinese"]
    return max(counts, key=counts.__getitem__) if counts.total() else "other"


def distribution(values: Counter[int]) -> dict[str, Any]:
    """Smallest, median, 95th percentile, largest and mean of counted values ≥ 0, and a histogram of at most 12 bars.

    Bars are {from, to (inclusive), count}: one a value while there are few values, else of equal width, or, when the
    largest value is over twenty times the median, growing geometrically.
    """
    ordered = sorted(values)
    seen = list(itertools.accumulate(values[value] for value in ordered))
    total = seen[-1]
    low, median, p95, high = (ordered[bisect_left(seen, share * total)] for share in (0, 0.5, 0.95, 1))
    if len(ordered) <= MOST_BARS:
        starts = ordered
    elif high > 20 * max(median, 1):
        base = max(low, 1)
        starts = sorted({low, *(int(base * (high / base) ** (bar / MOST_BARS)) for bar in range(MOST_BARS))})
    else:
        starts = sorted({low + (high + 1 - low) * bar // MOST_BARS for bar in range(MOST_BARS)})
    ends = starts if starts is ordered else [following - 1 for following in starts[1:]] + [high]
    return {
        "count": total,
        "min": low,
        "median": median,
        "p95": p95,
        "max": high,
        "mean": round(sum(value * count for value, count in values.items()) / total, 2),
        "histogram": [
            {"from": a, "to": b, "count": sum(count for value, count in values.items() if a <= value <= b)}
            for a, b in zip(starts, ends, strict=True)
        ],
    }
