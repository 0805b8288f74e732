"""Checkpoints go from Hugging Face to Megatron and back bit for bit, and a damaged or foreign one is refused by name."""

import filecmp
import json
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import MODELS, ROOT
from helpers.models import MAX_PIXELS, MIN_PIXELS, old_spelling, published_names, rewrite, weights
from llava_sft.checkpoint import safetensors_io
from llava_sft.checkpoint.convert import hf2mcore, mcore2hf
from llava_sft.checkpoint.hf_folder import INDEX
from llava_sft.checkpoint.safetensors_io import write_safetensors
from llava_sft.checkpoint.start import Checkpoint, newest_checkpoint, open_start
from llava_sft.checkpoint.torch_dist import TorchDistReader, write_torch_dist
from llava_sft.model.config import load_model_config
from llava_sft.model.tensors import hf_shapes, parameter_count, tensor_rows
from llava_sft.run.layout import SIDECARS


def there_and_back(source, target, model, names="model"):
    hf2mcore(source, target / "mcore", model)
    start = newest_checkpoint(target / "mcore")
    return mcore2hf(start, target / "hf", target / "mcore" / SIDECARS, model, MIN_PIXELS, MAX_PIXELS, names)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_every_published_tensor_stands_in_one_row_and_every_shape_adds_up(size):
    model, published = load_model_config(MODELS / f"{size}.yaml"), published_names(size)
    rows = tensor_rows(model)
    assert Counter(name for row in rows for name in row.hf) == Counter(list(published))
    assert len({row.mcore for row in rows}) == len(rows)
    for row in rows:
        assert math.prod(row.shape) == sum(math.prod(published[name]) for name in row.hf), row.mcore
        joined = row.join([torch.empty(published[name], device="meta") for name in row.hf])
        assert tuple(joined.shape) == row.shape
        assert [tuple(part.shape) for part in row.split(joined)] == [published[name] for name in row.hf]


def test_joined_tensors_hold_what_megatron_expects_where_it_expects_it(small_model):
    """Each value says which tensor, head and row it comes from; heads, groups and head sizes all differ."""
    rows = {row.mcore: row for row in tensor_rows(small_model)}
    shapes = hf_shapes(small_model)

    def numbered(name, offset):
        return (torch.arange(shapes[name][0]) + offset)[:, None].expand(shapes[name]).contiguous()

    row = rows["language_model.decoder.layers.1.self_attention.linear_qkv.weight"]
    head, groups, queries = small_model.language.kv_channels, 2, 2
    joined = row.join([numbered(name, offset) for name, offset in zip(row.hf, (0, 1000, 2000), strict=True)])
    expected = []
    for group in range(groups):
        for query in range(queries):
            first = (group * queries + query) * head
            expected += range(first, first + head)
        expected += range(1000 + group * head, 1000 + (group + 1) * head)
        expected += range(2000 + group * head, 2000 + (group + 1) * head)
    assert joined[:, 0].tolist() == expected

    row = rows["vision_model.decoder.layers.0.self_attention.linear_qkv.weight"]
    heads, hidden = small_model.vision.num_attention_heads, small_model.vision.hidden_size
    head = hidden // heads
    joined = row.join([numbered(*row.hf, 0)])
    expected = [part * hidden + h * head + i for h in range(heads) for part in range(3) for i in range(head)]
    assert joined[:, 0].tolist() == expected

    row = rows["language_model.decoder.layers.0.mlp.linear_fc1.weight"]
    assert [name.split(".")[-2] for name in row.hf] == ["gate_proj", "up_proj"]
    ffn = small_model.language.ffn_hidden_size
    assert row.join([numbered(name, offset) for name, offset in zip(row.hf, (0, 5000), strict=True)])[
        :, 0
    ].tolist() == [
        *range(ffn),
        *range(5000, 5000 + ffn),
    ]


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stored", "names"), [(str, "published"), (old_spelling, "model")], ids=["published", "model"])
def test_there_and_back_gives_the_same_bits_and_the_names_asked_for(
    source, small_model, tmp_path, dtype, stored, names
):
    spelling = old_spelling if names == "published" else str
    original = {name: value.to(dtype) for name, value in weights(source).items()}
    rewrite(source, lambda w: {stored(name): value.to(dtype) for name, value in w.items()})
    marker = there_and_back(source, tmp_path, small_model, names)
    back = weights(tmp_path / "hf")
    assert back.keys() == {spelling(name) for name in original}
    for name, value in original.items():
        assert back[spelling(name)].dtype == dtype
        assert torch.equal(back[spelling(name)], value), name
    assert marker["dtype"] == str(dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == marker["dtype"]


@pytest.mark.parametrize(("of_norm", "of_the_rest"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_mixed_types_become_the_one_that_loses_nothing(source, small_model, tmp_path, of_norm, of_the_rest):
    def mixed(w):
        return {k: v.to(getattr(torch, of_norm if "norm.weight" in k else of_the_rest)) for k, v in w.items()}

    rewrite(source, mixed)
    assert there_and_back(source, tmp_path, small_model)["dtype"] == "float32"
    back = weights(tmp_path / "hf")
    assert all(torch.equal(back[name], value.float()) for name, value in weights(source).items())


def test_several_shards_are_read_and_written_with_their_index(source, small_model, tmp_path, monkeypatch):
    original = weights(source)
    (source / "model.safetensors").unlink()
    names = sorted(original)
    files = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: original[name] for name in part}, source / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in files.items() for name in part}, "metadata": {}}
    (source / INDEX).write_text(json.dumps(index))
    save_file({"stray": torch.zeros(1)}, source / "left-over.safetensors")  # not named by the index

    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", 600_000)
    there_and_back(source, tmp_path, small_model)
    written = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(written) > 2 and written[0] == f"model-00001-of-{len(written):05d}.safetensors"
    assert all((tmp_path / "hf" / name).stat().st_size < 610_000 for name in written)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in original.values())
    back = weights(tmp_path / "hf")
    assert back.keys() == index["weight_map"].keys() == original.keys()
    assert all(torch.equal(back[name], value) for name, value in original.items())


def test_written_safetensors_are_what_the_library_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    write_safetensors(tmp_path, {k: tuple(v.shape) for k, v in tensors.items()}, torch.float32, tensors.items())
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


def test_vocabulary_padding_is_cut_off_on_export(small_checkpoint, small_model, tmp_path):
    hf2mcore(small_checkpoint, tmp_path / "mcore", small_model)
    reader = TorchDistReader(tmp_path / "mcore/release")
    state = {key: reader.read(key) for key in reader.tensors()}
    for key in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        state[key] = torch.cat([state[key], torch.full((12, state[key].shape[1]), 9.0)])
    state["optimizer.state.exp_avg.language_model.output_layer.weight"] = torch.zeros(3)  # as a training leaves it
    write_torch_dist(
        tmp_path / "iter_0000004",
        {key: tuple(value.shape) for key, value in state.items()},
        {key: value.dtype for key, value in state.items()},
        state.__getitem__,
    )
    mcore2hf(tmp_path / "iter_0000004", tmp_path / "hf", tmp_path / "mcore" / SIDECARS, small_model, 3136, 3136)
    back = weights(tmp_path / "hf")
    assert all(torch.equal(back[name], value) for name, value in weights(small_checkpoint).items())


def test_what_is_not_a_weight_travels_along(source, small_model, tmp_path):
    (source / "generation_config.json").write_text('{"temperature": 0.3, "eos_token_id": [1]}')
    (source / "pytorch_model.bin").write_bytes(b"weights of another kind")
    hf2mcore(source, tmp_path / "mcore", small_model)
    sidecars = tmp_path / "mcore" / SIDECARS
    expected = {p.name for p in source.iterdir()} - {"model.safetensors", "pytorch_model.bin"}
    assert set(os.listdir(sidecars)) == expected
    mcore2hf(tmp_path / "mcore/release", tmp_path / "hf", sidecars, small_model, 6272, 12544)
    assert filecmp.cmp(source / "tokenizer.json", tmp_path / "hf/tokenizer.json", shallow=False)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["temperature"] == 0.3
    size = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())["size"]
    assert size == {"shortest_edge": 6272, "longest_edge": 12544}  # inference sees what training saw
    assert "untrained" not in json.loads((tmp_path / "hf/config.json").read_text())


def test_the_fingerprint_depends_on_the_weights_and_not_on_how_they_are_stored(source, small_model, tmp_path):
    first = hf2mcore(source, tmp_path / "a", small_model)
    rewrite(source, lambda w: {old_spelling(name): value for name, value in w.items()})
    assert hf2mcore(source, tmp_path / "b", small_model)["fingerprint"] == first["fingerprint"]
    rewrite(source, lambda w: w | {"lm_head.weight": w["lm_head.weight"] + 1e-3})
    assert hf2mcore(source, tmp_path / "c", small_model)["fingerprint"] != first["fingerprint"]
    assert first["untrained"] is True
    start = open_start(Checkpoint.of(source), tmp_path / "a", None)
    assert (start.fingerprint, start.untrained, start.folder) == (first["fingerprint"], True, tmp_path / "a/release")


def test_the_script_converts_both_ways_and_says_when_there_is_nothing_to_do(small_checkpoint, small_model, tmp_path):
    import yaml

    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_model.model_dump()))

    def script(direction, source, target, *more):
        arguments = [
            *more,
            direction,
            source,
            target,
            "--model",
            tmp_path / "small.yaml",
            "--done",
            tmp_path / "done.json",
        ]
        return subprocess.run(
            [sys.executable, ROOT / "workflow_scripts/convert_checkpoint.py", *arguments],
            capture_output=True,
            text=True,
        )

    assert script("hf2mcore", small_checkpoint, tmp_path / "mcore").returncode == 0
    again = script("hf2mcore", small_checkpoint, tmp_path / "mcore")
    assert "nothing to convert" in again.stdout
    assert script("mcore2hf", tmp_path / "mcore", tmp_path / "hf").returncode == 0
    assert json.loads((tmp_path / "done.json").read_text())["parameters"] == parameter_count(small_model)
    assert all(torch.equal(weights(tmp_path / "hf")[k], v) for k, v in weights(small_checkpoint).items())
    missing = script("hf2mcore", tmp_path / "nowhere", tmp_path / "other")
    assert missing.returncode == 1 and missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr
    for part in ("adapter", "eyes=nowhere"):
        wrong = script("hf2mcore", small_checkpoint, tmp_path / "other", "--part", part)
        assert wrong.returncode == 1 and wrong.stderr.startswith(f"error: --part {part}"), wrong.stderr
    assert not (tmp_path / "other").exists()


def test_checkpoint_can_be_read_by_the_older_torch_of_gpu_machines(small_checkpoint, small_model, tmp_path):
    """torch 2.11 expects five properties of a tensor and refuses a sixth, which newer releases write."""
    hf2mcore(small_checkpoint, tmp_path / "mcore", small_model)
    metadata = TorchDistReader(tmp_path / "mcore/release").tensors()
    assert metadata and all(stored.properties.strides is None for stored in metadata.values())
