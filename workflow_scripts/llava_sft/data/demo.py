"""The embedded data set: scikit-learn's 1,797 handwritten digits as visual questions.

Notable: the split is by source image (36 of each digit are held out, 360 in all), so no held-out picture was seen in
training. No held-out text-only question stands in training in the same words. One PNG file a digit, shared by its
questions. Same seed, same bytes.
"""

import gzip
import importlib.util
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from llava_sft.data.other_forms import ROLES
from llava_sft.files import atomic_dir, write_text
from llava_sft.model.tokens import IMAGE, SYSTEM_PROMPT
from llava_sft.progress import tracked

SEED = 20
SCALE = 7  # 8 × 8 → 56 × 56 pixels: 16 patches of 14, the least that the 2 × 2 merger makes a grid of
SIDE = 8 * SCALE
VARIANTS = 4  # pictures of a training digit
HELDOUT_PER_DIGIT = 36

# 'larger_of_two' is learnt last (it needs two images read and compared), so training shows it most.
TRAIN_RECORDS = {"which_digit": 3600, "larger_of_two": 9000, "even_or_odd": 2800, "two_turns": 2800, "text_only": 1000}
HELDOUT_RECORDS = {"which_digit": 120, "larger_of_two": 180, "even_or_odd": 120, "two_turns": 120, "text_only": 60}

WHICH_DIGIT = ("<image>\nWhich digit is this?", "<image>\nRead the handwritten digit.", "What digit does <image> show?")
EVEN_OR_ODD = ("<image>\nIs this digit even or odd?", "<image>\nEven or odd?")
WHAT_FOLLOWS = ("Which number comes after it?", "Add one to it.")
LARGER_IMAGE = (
    "<image>\n<image>\nWhich of the two digits is larger?",
    "<image>\n<image>\nName the larger digit.",
    "First digit: <image>\nSecond digit: <image>\nWhich is larger?",
)
LARGER_NUMBER = ("Which is larger, {} or {}?", "Name the larger number: {} or {}.", "Larger of {} and {}?")


def write_demo(output_dir: Path) -> dict[str, int]:
    """Write `train.jsonl`, `heldout.jsonl` and `images/digit_NNNN.png` under `output_dir`.

    Images are 8-bit grey PNG of 56 × 56 pixels; records are LLaVA JSONL whose `image` is relative to `images/`. A
    training digit has several pictures, turned and moved a little: 1,437 digits alone would be learned by heart.
    Source: `sklearn.datasets.load_digits` (UCI optical recognition of handwritten digits, test part).
    Returns the number of records of each file.
    """
    labels, images = load_digits()
    rng = random.Random(SEED)
    heldout = _heldout_numbers(labels, rng)
    train = [number for number in range(len(labels)) if number not in heldout]
    with atomic_dir(output_dir / "images") as folder:
        for number, pixels in enumerate(tracked(images, len(images), "digits")):
            image = Image.frombytes("L", (8, 8), pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.save(folder / _file_name(number))
            for variant in range(1, 1 if number in heldout else VARIANTS):
                _varied(image, rng).save(folder / _file_name(number, variant))

    pairs = list(itertools.permutations(range(10), 2))
    number_questions = [(template.format(a, b), str(max(a, b))) for template in LARGER_NUMBER for a, b in pairs]
    rng.shuffle(number_questions)
    cut = HELDOUT_RECORDS["text_only"]
    splits = {
        "train": (TRAIN_RECORDS, train, number_questions[cut:], VARIANTS),
        "heldout": (HELDOUT_RECORDS, sorted(heldout), number_questions[:cut], 1),
    }
    for split, (counts, numbers, questions, variants) in splits.items():
        records = list(_records(counts, numbers, labels, questions, variants, rng))
        rng.shuffle(records)
        lines = [json.dumps({"id": f"{split}_{row:05d}", **record}) + "\n" for row, record in enumerate(records)]
        write_text(output_dir / f"{split}.jsonl", "".join(lines))
    return {split: sum(counts.values()) for split, (counts, *_) in splits.items()}


def chat_texts(path: Path) -> Iterator[str]:
    """All that the chat template shows of the records, without its control tokens: what the tokenizer learns from."""
    for line in path.read_text("utf-8").splitlines():
        yield f"system\n{SYSTEM_PROMPT}"
        for turn in json.loads(line)["conversations"]:
            yield f"{ROLES[turn['from']]}\n{turn['value'].replace(IMAGE, '')}"


def load_digits() -> tuple[list[int], list[bytes]]:
    """Labels and 8 × 8 grey bytes, from the file behind `load_digits`: importing scikit-learn takes 4 s, this 0.1 s."""
    package = importlib.util.find_spec("sklearn")
    assert package and package.origin
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz") as file:
        rows = [[int(float(value)) for value in line.split(b",")] for line in file]
    return [row[-1] for row in rows], [bytes(round(value * 255 / 16) for value in row[:-1]) for row in rows]


def _file_name(number: int, variant: int = 0) -> str:
    return f"digit_{number:04d}_{variant}.png" if variant else f"digit_{number:04d}.png"


def _varied(image: Image.Image, rng: random.Random) -> Image.Image:
    """The digit turned by up to 12°, scaled by up to 10 % and moved by up to half a source pixel in each direction."""
    angle, scale = math.radians(rng.uniform(-12, 12)), 1 / rng.uniform(0.9, 1.1)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    middle = SIDE / 2
    dx, dy = (middle + rng.uniform(-SCALE, SCALE) / 2 for _ in range(2))
    back = (cos, sin, middle - cos * dx - sin * dy, -sin, cos, middle + sin * dx - cos * dy)
    return image.transform(image.size, Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)


def _heldout_numbers(labels: list[int], rng: random.Random) -> set[int]:
    heldout: set[int] = set()
    for digit in range(10):
        heldout.update(rng.sample([n for n, label in enumerate(labels) if label == digit], HELDOUT_PER_DIGIT))
    return heldout


def _records(
    counts: dict[str, int], numbers: list[int], labels: list[int], questions: list[tuple[str, str]], variants: int,
    rng: random.Random,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    def record(kind: str, shown: list[int], *turns: str) -> dict[str, Any]:
        files = [_file_name(number, rng.randrange(variants)) for number in shown]
        image = {"image": files[0] if len(files) == 1 else files} if files else {}
        conversation = zip(itertools.cycle(("human", "gpt")), turns)
        said = [{"from": speaker, "value": turn} for speaker, turn in conversation]
        return {**image, "conversations": said, "kind": kind}

    # One endless walk over the shuffled digits for all single-image kinds: every digit is asked about.
    walk = itertools.cycle(rng.sample(numbers, len(numbers)))
    for number in itertools.islice(walk, counts["which_digit"]):
        yield record("which_digit", [number], rng.choice(WHICH_DIGIT), str(labels[number]))
    for number in itertools.islice(walk, counts["even_or_odd"]):
        yield record("even_or_odd", [number], rng.choice(EVEN_OR_ODD), ("even", "odd")[labels[number] % 2])
    for number in itertools.islice(walk, counts["two_turns"]):
        digit = labels[number]
        turns = rng.choice(WHICH_DIGIT), str(digit), rng.choice(WHAT_FOLLOWS), str(digit + 1)
        yield record("two_turns", [number], *turns)
    for _ in range(counts["larger_of_two"]):
        pair = rng.sample(numbers, 2)
        while labels[pair[0]] == labels[pair[1]]:
            pair = rng.sample(numbers, 2)
        yield record("larger_of_two", pair, rng.choice(LARGER_IMAGE), str(max(labels[number] for number in pair)))
    for question, answer in itertools.islice(itertools.cycle(questions), counts["text_only"]):
        yield record("text_only", [], question, answer)
