"""How many tokens each training sample has: what packing turns into steps. Kept beside the data, made again only when
the data, the tokenizer, `seq_length` or the image limits change. Of an image only the header is read."""

from pathlib import Path
from typing import Any

from llava_sft.data.heldout import stored_samples
from llava_sft.data.images import image_grid, image_tokens
from llava_sft.data.tars import read_at
from llava_sft.data.template import ChatTemplate, UnusableSample
from llava_sft.files import file_fingerprint, fingerprint, read_json, write_json

HEADER_BYTES = 256 << 10  # an image's size stands before that, behind its EXIF and its thumbnail


def token_lengths(
    folder: Path, dataset: dict[str, Any], tokenizer: Path, limits: tuple[int, int, int], cache: Path
) -> tuple[list[int], int]:
    """Lengths of the training samples in tokens, and the number of samples that do not fit and are left out.

    `limits`: seq_length, min_pixels, max_pixels.
    """
    depends = fingerprint([dataset["fingerprint"], file_fingerprint(tokenizer / "tokenizer.json"), limits])
    if cache.is_file() and (kept := read_json(cache))["depends"] == depends:
        return kept["lengths"], kept["left_out"]
    template, (seq_length, *pixels) = ChatTemplate(tokenizer), limits
    lengths: list[int] = []
    left_out = 0
    for sample, descriptor, members in stored_samples(folder, "train"):
        headers = (members[image] for image in sample.images)
        heads = [read_at(descriptor, (offset, min(size, HEADER_BYTES))) for offset, size in headers]
        try:
            tokens = [image_tokens(image_grid(head, *pixels)) for head in heads]
            lengths.append(len(template.encode(sample.messages, tokens, seq_length).input_ids))
        except UnusableSample:
            left_out += 1
    write_json(cache, {"depends": depends, "lengths": lengths, "left_out": left_out})
    return lengths, left_out
