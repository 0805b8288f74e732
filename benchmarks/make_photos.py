"""Photograph-sized instruction data for the training benchmarks: handwritten digits tiled into JPEGs, and questions
about them, in LLaVA form. Sizes and text lengths follow an image-heavy SFT mix; seeded, the same bytes every time.

    python benchmarks/make_photos.py --output-dir output/photos --records 2000
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from llava_sft.data.demo import load_digits

SIZES = ((896, 672), (672, 896), (1008, 756), (560, 560), (448, 336))  # width, height in pixels
CELL = 56  # pixels of a tile: an 8 × 8 digit enlarged sevenfold


def most_tokens(width: int, height: int) -> int:
    """Tokens of a picture with its questions and answers, at most."""
    return width * height // 28**2 + 3 * (40 + 8 * (width // CELL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--longest", type=int, help="every tenth sample has about so many tokens, of several pictures")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng, noise = random.Random(args.seed), np.random.default_rng(args.seed)
    labels, digits = load_digits()
    small = [Image.frombytes("L", (8, 8), pixels) for pixels in digits]
    tiles = [np.asarray(image.resize((CELL, CELL), Image.Resampling.BICUBIC)) for image in small]
    images = args.output_dir / "images"
    images.mkdir(parents=True, exist_ok=True)

    def photo(name: str, width: int, height: int) -> list[list[int]]:
        """Write a picture; the tiles that it shows, row by row."""
        shown = [[rng.randrange(len(tiles)) for _ in range(width // CELL)] for _ in range(height // CELL)]
        canvas = np.block([[tiles[tile] for tile in row] for row in shown]).astype(np.int16)
        canvas = np.repeat(canvas[..., None], 3, axis=2)
        canvas += noise.integers(-24, 25, canvas.shape, dtype=np.int16)
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(images / name, quality=85)
        return shown

    with open(args.output_dir / "train.jsonl", "w") as file:
        for number in range(args.records):
            left = args.longest if args.longest and number % 10 == 9 else 0  # tokens
            turns, names = [], []
            while not names or (fits := [size for size in SIZES if most_tokens(*size) <= left]):
                width, height = rng.choice(fits if names else SIZES)
                names.append(f"photo_{number:05d}{f'_{len(names)}' if names else ''}.jpg")
                shown = photo(names[-1], width, height)
                for turn in range(rng.randint(1, 3)):
                    row = rng.randrange(len(shown))
                    question = f"Read row {row + 1} from left to right, then say what you see in words."
                    answer = "The row shows " + ", ".join(f"a handwritten {labels[tile]}" for tile in shown[row]) + "."
                    turns.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
                    turns.append({"from": "gpt", "value": answer})
                    left -= 40 + 8 * len(shown[row])
                left -= width * height // 28**2
            file.write(
                json.dumps({"id": names[0], "image": names if len(names) > 1 else names[0], "conversations": turns})
                + "\n"
            )
    print(f"{args.output_dir}: {args.records:,} records")


if __name__ == "__main__":
    main()
