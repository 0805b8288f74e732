"""How many tokens and image patches each training sample has: what packing turns into steps, and preflight into memory
and time. Kept beside the data, made again only when the data, the tokenizer, `seq_length` or the image limits change. Of an
image only the header is read."""

from pathlib import Path
from typing import Any, NamedTuple

from llava_sft.data.heldout import stored_samples
from llava_sft.data.images import MERGE_SIZE, image_grid, image_tokens
from llava_sft.data.tars import read_at
from llava_sft.data.template import ChatTemplate, UnusableSample
from llava_sft.files import file_fingerprint, fingerprint, read_json, write_json

HEADER_BYTES = 256 << 10  # an image's size stands before that, behind its EXIF and its thumbnail


class SampleSizes(NamedTuple):
    """Of each training sample that fits: its tokens, and the patches of each of its images."""

    tokens: list[int]
    patches: list[list[int]]
    left_out: int  # samples whose first answer ends beyond seq_length


def sample_sizes(
    folder: Path, dataset: dict[str, Any], tokenizer: Path, limits: tuple[int, int, int], cache: Path
) -> SampleSizes:
    """The sizes of the training samples in the order of the shards. `limits`: seq_length, min_pixels, max_pixels."""
    depends = fingerprint([dataset["fingerprint"], file_fingerprint(tokenizer / "tokenizer.json"), limits])
    if cache.is_file() and (kept := read_json(cache))["depends"] == depends:
        return SampleSizes(kept["tokens"], kept["patches"], kept["left_out"])
    template, (seq_length, *pixels) = ChatTemplate(tokenizer), limits
    sizes = SampleSizes([], [], 0)
    left_out = 0
    for sample, descriptor, members in stored_samples(folder, "train"):
        headers = (members[image] for image in sample.images)
        heads = [read_at(descriptor, (offset, min(size, HEADER_BYTES))) for offset, size in headers]
        try:
            tokens = [image_tokens(image_grid(head, *pixels)) for head in heads]
            encoded = template.encode(sample.messages, tokens, seq_length)
        except UnusableSample:
            left_out += 1
            continue
        sizes.tokens.append(len(encoded.input_ids))
        sizes.patches.append([count * MERGE_SIZE**2 for count in tokens[: encoded.num_images]])
    write_json(cache, {"depends": depends, **sizes._asdict(), "left_out": left_out})
    return sizes._replace(left_out=left_out)
