"""Token counts for packing: what the loader will make of the samples, from image headers alone, and kept."""

import json

from conftest import MAX_PIXELS, MIN_PIXELS
from llava_sft.data.index import index_webdataset
from llava_sft.data.lengths import sample_sizes
from llava_sft.data.loader import VlmTaskEncoder, train_loader, worker_config
from llava_sft.data.template import ChatTemplate
from webdataset_helpers import Raw, record


def test_lengths_equal_those_of_the_loader_and_are_counted_once(tmp_path, small_checkpoint):
    long = record(7, None)
    long["conversations"][1]["value"] = "word " * 400
    raw = Raw(tmp_path, [record(i, [None, "a.png", ["b.jpg", "a.png"]][i % 3]) for i in range(6)] + [long])
    raw.convert()
    dataset = index_webdataset(raw.wds, raw.parts)
    limits, cache = (120, MIN_PIXELS, MAX_PIXELS), tmp_path / "lengths.json"
    sizes = sample_sizes(raw.wds, dataset, small_checkpoint, limits, cache)
    assert (len(sizes.tokens), sizes.left_out) == (6, 1)

    encoder = VlmTaskEncoder(ChatTemplate(small_checkpoint), *limits)
    batches = iter(train_loader(raw.wds, encoder, worker_config(0, 1, 0, 1), micro_batch_size=1))
    seen = {}
    while len(seen) < 6:
        batch = next(batches)
        seen[batch.__key__[0]] = batch.num_tokens, [height * width for height, width in batch.grids.tolist()]
    assert sorted(seen.values()) == sorted(zip(sizes.tokens, sizes.patches, strict=True))

    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps(kept | {"tokens": [1, 2, 3]}))
    assert sample_sizes(raw.wds, dataset, small_checkpoint, limits, cache).tokens == [1, 2, 3]
    assert sample_sizes(raw.wds, dataset, small_checkpoint, (130, *limits[1:]), cache).tokens == sizes.tokens
