"""What other programs call on an export, each call by itself and without a network; tests/consumers/calls.py says which."""

import importlib
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from consumers import of_model, of_processor  # noqa: F401  their calls
from consumers.export import CALLS, Export
from helpers import SCRIPTS
from llava_sft.checkpoint.safetensors_io import old_name


@pytest.fixture(scope="module")
def export(small_checkpoint):
    return Export(small_checkpoint)


@pytest.fixture(scope="module")
def published(small_checkpoint, tmp_path_factory):
    """The same with the published spelling of the names."""
    folder = shutil.copytree(small_checkpoint, tmp_path_factory.mktemp("published") / "export")
    weights = load_file(folder / "model.safetensors")
    spelled = {old_name(name): tensor for name, tensor in weights.items()}
    save_file(spelled, folder / "model.safetensors", metadata={"format": "pt"})
    return Export(folder)


@pytest.mark.parametrize("name", CALLS)
def test_export_answers(export, name):
    CALLS[name](export)


def test_published_spelling_gives_the_same_logits(export, published):
    assert torch.equal(published.logits, export.logits)
    for name in ("AutoModel (vLLM): the base class, with its weights", "save_pretrained and load again"):
        CALLS[name](published)


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
