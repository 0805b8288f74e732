"""Checkpoints of the original project (`torch` format, any TP and PP) give the same bits, and nothing in them is executed."""

import argparse
import io
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch

from helpers.models import MAX_PIXELS, MIN_PIXELS, TEXTS
from helpers.original_checkpoint import write_original
from llava_sft.checkpoint.convert import hf2mcore
from llava_sft.checkpoint.start import Checkpoint, check_load, is_legacy
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.errors import CheckpointError
from llava_sft.model.tensors import hf_shapes
from llava_sft.model.tiny import write_tiny_checkpoint

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def deep(small_model):
    """Three layers: over two stages they stand 2 + 1."""
    return small_model.model_copy(update={"language": small_model.language.model_copy(update={"num_layers": 3})})


@pytest.fixture(scope="module")
def deep_checkpoint(deep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "deep"
    write_tiny_checkpoint(folder, TEXTS, deep, 3, MIN_PIXELS, MAX_PIXELS)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(folder)
    return {key: reader.read(key) for key in reader.tensors()}


@pytest.mark.parametrize("trained", [False, True], ids=["release", "iter"])
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_the_originals_checkpoint_gives_the_bits_of_the_hugging_face_folder(
    deep, deep_checkpoint, tmp_path, tp, pp, trained
):
    folder = write_original(tmp_path / "x_mcore_tp1_pp1", deep_checkpoint, deep, tp, pp, trained)
    expected = hf2mcore(deep_checkpoint, tmp_path / "from_hf", deep)
    for name, source in (("top", folder.parent), ("itself", folder)):
        made = hf2mcore(source, tmp_path / name, deep, sidecars=deep_checkpoint)
        assert (made["fingerprint"], made["dtype"]) == (expected["fingerprint"], expected["dtype"])
        assert (tmp_path / name / "huggingface/tokenizer.json").is_file()
    wanted = tensors(tmp_path / "from_hf/release")
    assert all(torch.equal(value, wanted[key]) for key, value in tensors(tmp_path / "top/release").items())


def test_load_takes_the_folder_above_or_the_checkpoint_itself_and_asks_for_a_tokenizer(deep, deep_checkpoint, tmp_path):
    release = write_original(tmp_path / "LLaVA-4B-stage0_mcore_tp2_pp1", deep_checkpoint, deep, 2, 1)
    trained = write_original(tmp_path / "stage1_run", deep_checkpoint, deep, 1, 1, trained=True)
    for folder, name in (
        (release, "LLaVA-4B-stage0"),
        (release.parent, "LLaVA-4B-stage0"),
        (trained, "stage1_run_iter_0000400"),
    ):
        assert is_legacy(folder) and Checkpoint.of(folder).needs_conversion
        assert Checkpoint.of(folder).converted_name({}) == f"{name}_mcore_tp1_pp1"
        check_load(Checkpoint.of(folder), {}, deep_checkpoint, made_here=False)
        with pytest.raises(CheckpointError, match="no tokenizer"):
            check_load(Checkpoint.of(folder), {}, None, made_here=False)


class Evil:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


@pytest.mark.parametrize("place", ["args", "model"])
def test_nothing_in_a_file_is_executed(deep, deep_checkpoint, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    file = write_original(tmp_path / "x", deep_checkpoint, deep, 1, 1) / "mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    torch.save(
        {**content, **({"args": Evil()} if place == "args" else {"model": {**content["model"], "x": Evil()}})}, file
    )
    with pytest.raises(CheckpointError, match=r"model_optim_rng\.pt: it asks for posix\.system") as error:
        hf2mcore(tmp_path / "x", tmp_path / "out", deep, sidecars=deep_checkpoint)
    assert error.value.fix
    assert not (tmp_path / "EXECUTED").exists() and not (tmp_path / "out").exists()


def test_objects_of_packages_that_are_not_here_and_plain_builtins_do_no_harm(
    deep, deep_checkpoint, tmp_path, monkeypatch
):
    """A training stores enums and the like of its own packages; they are read as nothing."""
    file = write_original(tmp_path / "x", deep_checkpoint, deep, 1, 1) / "mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    gone = types.ModuleType("aiak_training_llm")
    exec("class Backend:\n    pass", gone.__dict__)
    monkeypatch.setitem(sys.modules, gone.__name__, gone)
    harmless = argparse.Namespace(backend=gone.Backend, made=gone.Backend(), groups={1, frozenset([2])}, raw=b"x" * 9)
    torch.save({**content, "args": harmless, "buffer": io.BytesIO(b"scales")}, file, pickle_protocol=2)
    monkeypatch.delitem(sys.modules, gone.__name__)
    marker = hf2mcore(tmp_path / "x", tmp_path / "out", deep, sidecars=deep_checkpoint)
    assert marker["tensors"] == len(hf_shapes(deep))


def lost_rank(folder):
    (folder / "mp_rank_00").rename(folder / "elsewhere")


def changed(change):
    def spoil(folder):
        file = sorted(folder.glob("mp_rank_*"))[0] / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        change(content)
        torch.save(content, file)

    return spoil


FC2 = "language_model.decoder.layers.1.mlp.linear_fc2.weight"
SPOILED = {
    "rank missing": (lost_rank, ["tensor rank 0", "release"]),
    "cut off": (lambda folder: os.truncate(next(folder.glob("*/*.pt")), 5000), ["model_optim_rng.pt", "damaged"]),
    "plain pickle": (lambda folder: [p.write_bytes(pickle.dumps({})) for p in folder.glob("*/*.pt")], ["model_optim_rng.pt", "bare pickle"]),
    "tensor missing": (changed(lambda c: c["model"].pop(FC2)), [FC2, "missing"]),
    "tensor left over": (changed(lambda c: c["model"].update({"language_model.x": torch.zeros(3)})), ["language_model.x"]),
    "tensor misshapen": (changed(lambda c: c["model"].update({"adapter.linear_fc2.bias": torch.zeros(3)})), ["adapter.linear_fc2.bias", "(3,)", "(128,)"]),
    "virtual stages": (changed(lambda c: c.update(model0=c.pop("model"))), ["virtual pipeline"]),
    "no tensor": (changed(lambda c: c["model"].update({FC2: 3})), [FC2, "no tensor"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_checkpoint_of_the_original_is_refused_by_name(deep, deep_checkpoint, tmp_path, name):
    spoil, mentioned = SPOILED[name]
    folder = write_original(tmp_path / "x", deep_checkpoint, deep, 1 if "left" in name or "tensor m" in name else 2, 1)
    spoil(folder)
    with pytest.raises(CheckpointError) as error:
        hf2mcore(tmp_path / "x", tmp_path / "out", deep, sidecars=deep_checkpoint)
    for text in mentioned:
        assert text in str(error.value)
    assert error.value.fix and not (tmp_path / "out").exists()
