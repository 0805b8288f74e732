"""A damaged or foreign checkpoint is refused by name, and nothing is written."""

import json
import os
import shutil

import pytest
import torch

from helpers.models import MAX_PIXELS, MIN_PIXELS, rewrite, weights
from llava_sft.checkpoint.convert import hf2mcore, mcore2hf
from llava_sft.checkpoint.safetensors_io import INDEX
from llava_sft.checkpoint.start import Checkpoint, open_start
from llava_sft.errors import CheckpointError
from llava_sft.run.layout import SIDECARS


def spoil_weights(change):
    return lambda folder: rewrite(folder, change)


def without(name):
    return spoil_weights(lambda w: {key: value for key, value in w.items() if key != name})


def cut_off(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def header_only(folder):
    os.truncate(folder / "model.safetensors", 100)


def one_shard_gone(folder):
    w = weights(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    files = dict.fromkeys(w, "model-00001-of-00002.safetensors") | {"x": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def index_cut_off(folder):
    (folder / INDEX).write_text('{"weight_map": {"lm_hea')


def two_checkpoints_in_one_folder(folder):
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")


def another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def gone(name):
    return lambda folder: (folder / name).unlink()


def half_written(name):
    return lambda folder: os.truncate(folder / name, 50)


def misshapen(w):
    return w | {"lm_head.weight": torch.zeros(500, 96)}


FC1 = "model.language_model.layers.1.mlp.up_proj.weight"
SPOILED = {
    "tensor missing": (without(FC1), [FC1, "missing", "(320, 128)"]),
    "norm missing": (without("model.language_model.norm.weight"), ["model.language_model.norm.weight", "missing"]),
    "tensor left over": (spoil_weights(lambda w: w | {"model.extra": torch.zeros(7)}), ["extra", "(7,)"]),
    "tensor misshapen": (spoil_weights(misshapen), ["lm_head.weight", "(500, 96)", "(500, 128)"]),
    "safetensors cut off": (cut_off, ["model.safetensors", "cut off"]),
    "safetensors without an end of its header": (header_only, ["model.safetensors", "cut off"]),
    "shard missing": (one_shard_gone, ["model-00002-of-00002.safetensors", INDEX]),
    "index cut off": (index_cut_off, [INDEX, "cut off"]),
    "two checkpoints in one folder": (
        two_checkpoints_in_one_folder,
        ["other.safetensors", "also in model.safetensors"],
    ),
    "no weights": (gone("model.safetensors"), ["no *.safetensors"]),
    "other model size": (another_size, ["num_layers is 3", "small.yaml has 2"]),
    "no config": (gone("config.json"), ["config.json"]),
    "config half written": (half_written("config.json"), ["config.json"]),
    "weights of another kind": (spoil_weights(lambda w: w | {FC1: w[FC1].long()}), [FC1, "I64", "BF16"]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_checkpoint_is_refused_by_name_and_nothing_is_written(source, small_model, tmp_path, name):
    spoil, mentioned = SPOILED[name]
    spoil(source)
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as error:
        hf2mcore(source, tmp_path / "mcore", small_model)
    for text in [str(source), *mentioned]:
        assert text in str(error.value)
    assert error.value.fix
    assert set(tmp_path.iterdir()) == before


def test_a_spoiled_megatron_checkpoint_is_refused_by_name_and_nothing_is_exported(
    small_checkpoint, small_model, tmp_path
):
    hf2mcore(small_checkpoint, tmp_path / "mcore", small_model)
    release, sidecars = tmp_path / "mcore/release", tmp_path / "mcore" / SIDECARS
    deeper = small_model.model_copy(update={"language": small_model.language.model_copy(update={"num_layers": 3})})

    def refused(model, mentioned):
        with pytest.raises(CheckpointError) as error:
            mcore2hf(release, tmp_path / "hf", sidecars, model, MIN_PIXELS, MAX_PIXELS)
        for text in [str(release), *mentioned]:
            assert text in str(error.value)
        assert os.listdir(tmp_path) == ["mcore"]

    refused(deeper, ["language_model.decoder.layers.2", "missing"])
    (data,) = release.glob("*.distcp")
    os.truncate(data, data.stat().st_size // 2)
    refused(small_model, [data.name, "were written"])
    data.unlink()
    refused(small_model, [data.name, "missing"])
    (release / ".metadata").unlink()
    refused(small_model, [".metadata"])


def test_an_export_without_a_tokenizer_is_refused(small_checkpoint, small_model, tmp_path):
    hf2mcore(small_checkpoint, tmp_path / "mcore", small_model)
    (tmp_path / "mcore" / SIDECARS / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        there = tmp_path / "mcore"
        mcore2hf(there / "release", tmp_path / "hf", there / SIDECARS, small_model, MIN_PIXELS, MAX_PIXELS)
    with pytest.raises(CheckpointError, match="tokenizer"):
        (tmp_path / "mcore/converted.json").unlink()
        open_start(Checkpoint.of(tmp_path / "mcore"), None, None)
    assert os.listdir(tmp_path) == ["mcore"]
