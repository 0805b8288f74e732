"""Token and patch counts of every training sample, and how fast one loader process prepares samples.

Notable: counted shard by shard and cached, so that new records, or another tokenizer, `seq_length` or image limits, cost
what they change and no conversion. Of an image only the header is parsed.
"""

import functools
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from llava_sft.data.images import decode_rgb, image_grid
from llava_sft.data.notes import without_images_like_it
from llava_sft.data.nv_meta import Dataset
from llava_sft.data.order import GlobalOrder, SourceLengths
from llava_sft.data.records import Sample
from llava_sft.data.stored import StoredShard, source_weights, stored_shards
from llava_sft.errors import shown
from llava_sft.files import file_fingerprint, fingerprint, read_json, write_json
from llava_sft.machine import end_with_parent
from llava_sft.model.processing import MERGE_SIZE, image_tokens, to_patches
from llava_sft.model.template import TEMPLATE_VERSION, ChatTemplate, EncodedConversation, UnusableSample
from llava_sft.progress import tracked

SIZES_VERSION = 2  # of what is kept; 2: with each sample's place
TIMED_S, TIMED_SHARDS = 2.0, 4  # for so long samples of so many shards are prepared, for the speed of a loader process


class SampleSizes(NamedTuple):
    """Of each training sample that fits: its tokens, the patches of each of its images, and its place in its tar.

    `shards`: [source and name of a tar, number of its samples here], in order. `left_out`: ids of those that cannot be
    trained on, too long to their first answer, or with control tokens in the text.
    """

    tokens: list[int]
    patches: list[list[int]]
    rows: list[int]
    shards: list[tuple[str, int]]
    left_out: list[str]

    @classmethod
    def of(cls, content: dict[str, Any]) -> "SampleSizes":
        """What sizes.json holds."""
        return cls(*(content[name] for name in cls._fields))


def read_sizes(path: str | None, depends: str | None) -> SampleSizes | None:
    """The sizes that a run was resolved with. None where there is no such file, or it is damaged or of other data or
    settings: they have to be counted again."""
    try:
        content = read_json(path) if path else {}
        return SampleSizes.of(content) if content["depends"] == depends else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Limits(NamedTuple):
    """Settings that decide how many tokens a sample has."""

    seq_length: int
    min_pixels: int
    max_pixels: int


def measure(
    folder: Path, dataset: Dataset, tokenizer: Path, limits: Limits, cache: Path, processes: int
) -> dict[str, Any]:
    """What sizes.json holds: the sizes of the training samples, and the speed of a loader process on this machine."""
    sizes = sample_sizes(folder, tokenizer, limits, cache, processes)
    speed = prepared_tokens_per_s(folder, tokenizer, limits)
    return {"depends": depends_on(dataset, tokenizer, limits), **sizes._asdict(), "prepared_tokens_per_s": speed}


def global_order(folder: Path, sizes: SampleSizes, capacity: int | None, window: int, seed: int) -> GlobalOrder:
    """The order of the samples that `sizes` counts, by sources."""
    weights = source_weights(folder)
    names = ["" if "" in weights else name.partition("/")[0] for name, _ in sizes.shards]
    sources: list[SourceLengths] = []
    start = 0
    for source, weight in weights.items():
        count = sum(n for name, (_, n) in zip(names, sizes.shards, strict=True) if name == source)
        sources.append(SourceLengths(sizes.tokens[start : start + count], weight))
        start += count
    return GlobalOrder(sources, capacity, window, seed)


def depends_on(dataset: Dataset, tokenizer: Path, limits: Limits) -> str:
    """What sizes.json was made from; `dataset`: the content of dataset.json."""
    return fingerprint([dataset["fingerprint"], *_counted_with(tokenizer, limits)])


def _counted_with(tokenizer: Path, limits: Limits) -> list[Any]:
    return [file_fingerprint(tokenizer / "tokenizer.json"), limits, TEMPLATE_VERSION, SIZES_VERSION]


def sample_sizes(
    folder: Path, tokenizer: Path, limits: Limits, cache: Path | None = None, processes: int = 1
) -> SampleSizes:
    """The sizes of the training samples in the order of the shards.

    `tokenizer`: folder with tokenizer.json. `cache`: folder for the counts of each shard; those that still hold are not
    counted again. `processes` count shards side by side.
    """
    shards = list(stored_shards(folder, "train"))
    count = functools.partial(
        _shard_sizes, tokenizer, limits, cache and cache / fingerprint(_counted_with(tokenizer, limits))
    )
    if processes > 1 and len(shards) > 1:
        with ProcessPoolExecutor(min(processes, len(shards)), initializer=end_with_parent) as pool:
            counted = list(tracked(pool.map(count, shards), len(shards), "shards"))
    else:
        counted = [count(shard) for shard in tracked(shards, len(shards), "shards")]
    return SampleSizes(*(list(chain.from_iterable(columns)) for columns in zip(*counted, strict=True)))


def _shard_sizes(tokenizer: Path, limits: Limits, cache: Path | None, shard: StoredShard) -> SampleSizes:
    tar = shard.folder / shard.name
    status = tar.stat()
    content = [status.st_size, status.st_mtime_ns, file_fingerprint(f"{tar}.idx"), shard.layout, sorted(shard.excluded)]
    depends = fingerprint(content)
    cached = cache and cache / f"{shard.source}{shard.name}.json"
    if cached and (known := read_json(cached, {"depends": None})).pop("depends") == depends:
        return SampleSizes(**known)
    template, sizes = _template(tokenizer), SampleSizes([], [], [], [], [])
    for row, key, sample in shard.read():
        try:
            encoded, tokens = _encoded(template, sample, limits)
        except UnusableSample:
            sizes.left_out.append(key)
            continue
        except OSError as error:  # Pillow's
            where = f"sample {key} ({shown(sample.id)})"
            raise shard.damage(where, f"an image cannot be read: {error}", without_images_like_it) from None
        sizes.tokens.append(len(encoded.input_ids))
        sizes.patches.append([count * MERGE_SIZE**2 for count in tokens[: encoded.num_images]])
        sizes.rows.append(row)
    sizes.shards.append((shard.source + shard.name, len(sizes.tokens)))
    if cached:
        write_json(cached, {"depends": depends, **sizes._asdict()}, indent=None, sealed=True)
    return sizes


def _encoded(template: ChatTemplate, sample: Sample[bytes], limits: Limits) -> tuple[EncodedConversation, list[int]]:
    """The sample as the training would make it, and the tokens of each of its images. Errors: UnusableSample."""
    grids = (image_grid(image, limits.min_pixels, limits.max_pixels) for image in sample.images)
    tokens = list(map(image_tokens, grids))
    return template.encode(sample.messages, tokens, limits.seq_length), tokens


@functools.cache
def _template(tokenizer: Path) -> ChatTemplate:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # shards are counted side by side already
    return ChatTemplate(tokenizer)


def prepared_tokens_per_s(folder: Path, tokenizer: Path, limits: Limits) -> float:
    """Tokens a second that one loader process prepares on this machine, of samples from a few shards."""
    template, tokens, began = _template(tokenizer), 0, 0.0
    shards = list(stored_shards(folder, "train"))
    spread = zip_longest(*(shard.read() for shard in shards[:: len(shards) // TIMED_SHARDS or 1][:TIMED_SHARDS]))
    for _, _, sample in filter(None, chain.from_iterable(spread)):
        began = began or time.perf_counter()  # not the time to find the first one
        try:
            encoded, _ = _encoded(template, sample, limits)
        except UnusableSample:
            continue
        for image in sample.images[: encoded.num_images]:
            to_patches(decode_rgb(image), limits.min_pixels, limits.max_pixels)
        tokens += len(encoded.input_ids)
        if time.perf_counter() - began > TIMED_S:
            break
    return tokens / (time.perf_counter() - began) if tokens else 0.0
