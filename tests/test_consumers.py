"""What other programs call on an export, each call by itself and without a network; tests/consumers/calls.py says which."""

import importlib
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from consumers import of_model, of_processor  # noqa: F401  their calls
from consumers.export import CALLS, Export
from helpers import SCRIPTS
from llava_sft.checkpoint.safetensors_io import old_name


def copied(export: Path, target: Path, change: Callable[[dict], dict]) -> Path:
    shutil.copytree(export, target)
    weights = change(load_file(export / "model.safetensors"))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def export(small_checkpoint, tmp_path_factory):
    """Its matrices are made larger: the shared checkpoint gives the same token over and over, whatever it is asked."""
    random = torch.Generator().manual_seed(5)

    def larger(weights: dict) -> dict:
        noise = {name: 0.15 * torch.randn(value.shape, generator=random) for name, value in weights.items()}
        return {name: value + noise[name] if value.ndim > 1 else value for name, value in weights.items()}

    return Export(copied(small_checkpoint, tmp_path_factory.mktemp("consumers") / "export", larger))


@pytest.fixture(scope="module")
def published(export, tmp_path_factory):
    """The same with the published spelling of the names."""
    target = tmp_path_factory.mktemp("consumers") / "published"
    return Export(copied(Path(export.folder), target, lambda weights: {old_name(k): v for k, v in weights.items()}))


@pytest.mark.parametrize("name", CALLS)
def test_export_answers(export, name):
    CALLS[name](export)


def test_image_limits_of_a_call_win_and_nobody_is_warned(export):
    image, processor = Image.new("RGB", (300, 200)), export.processor.image_processor
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        grids = [
            processor(image, return_tensors="pt", **limit)["image_grid_thw"].tolist()
            for limit in ({}, {"size": {"shortest_edge": 3136, "longest_edge": 30_000}}, {"max_pixels": 30_000})
        ]
    assert grids == [[[1, 12, 18]], [[1, 10, 14]], [[1, 10, 14]]]


def test_answers_of_the_export_tell_its_inputs_apart(export):
    assert len(set(export.answer)) > 4


def test_published_spelling_gives_the_same_logits(export, published):
    assert torch.equal(published.logits, export.logits)
    for name in ("AutoModel (vLLM): the base class, with its weights", "save_pretrained and load again"):
        CALLS[name](published)


def test_a_missing_weight_is_an_error_not_random(export, tmp_path):
    def without_a_norm(weights: dict) -> dict:
        return {name: value for name, value in weights.items() if not name.endswith("1.input_layernorm.weight")}

    folder = copied(Path(export.folder), tmp_path / "export", without_a_norm)
    with pytest.raises(ValueError, match=r"left random: model\.language_model\.layers\.1\.input_layernorm"):
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def test_class_embedding_is_not_initialised_again_where_its_module_lacks_another_weight(export, tmp_path):
    def without_the_angle(weights: dict) -> dict:
        return {name: value for name, value in weights.items() if "class_pos_emb" not in name}

    folder = copied(Path(export.folder), tmp_path / "export", without_the_angle)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert list(info["missing_keys"]) == ["model.visual.class_pos_emb"]
    assert torch.equal(model.visual.class_embedding, export.model.visual.class_embedding)


@pytest.mark.parametrize("file", ["configuration", "modeling", "processing"])
def test_too_old_a_version_is_told_in_one_sentence(monkeypatch, tmp_path, file):
    shutil.copytree(SCRIPTS / "llava_sft/model/hf", tmp_path / f"of_{file}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.53.3")
    with pytest.raises(ImportError, match=r"needs transformers 4\.57 or newer, and 4\.53\.3 is installed: pip install"):
        importlib.import_module(f"of_{file}.{file}_llavaonevision1_5")
    code = (tmp_path / f"of_{file}/{file}_llavaonevision1_5.py").read_text()
    before = code.split("\nfrom transformers")[0]  # names that older versions lack stand behind the check
    assert "NEEDED_TRANSFORMERS" in before or "from .configuration_llavaonevision1_5 import" in before
