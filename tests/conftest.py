"""What several test files share: a small checkpoint whose sizes are all different, so that no mix-up goes unnoticed."""

import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidia0").exists():  # the kernels of the GPU's layers, run by Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

from llava_sft.model.config import LanguageConfig, ModelConfig, VisionConfig
from project_runs import copy_project, snakemake

# nohup, and a shell that starts us in the background, have us ignore what a terminal sends; tests send it.
for number, default in {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGQUIT: signal.SIG_DFL,
}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
MODELS = Path(__file__).parent.parent / "config/models"
TEXTS = [f"Which digit is this? It is {i % 10}. The larger of the two digits is {i % 7}." for i in range(50)]
MIN_PIXELS, MAX_PIXELS = 3136, 50_000


@pytest.fixture(scope="session")
def small_model() -> ModelConfig:
    """As small as `tiny`, but: heads wider than the hidden size, another ViT width, a vocabulary that is no multiple of 128."""
    language = LanguageConfig(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=320,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=48,
        vocab_size=500,
        rotary_base=1e6,
        max_position_embeddings=2048,
    )
    vision = VisionConfig(num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=3)
    return ModelConfig(name="small", language=language, vision=vision)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, small_model) -> Path:
    """A Hugging Face folder of `small_model`; norms and biases are random too, so that none can be forgotten."""
    import torch
    from safetensors.torch import load_file, save_file

    from llava_sft.model.tiny import write_tiny_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    write_tiny_checkpoint(folder, TEXTS, small_model, 1, MIN_PIXELS, MAX_PIXELS)
    generator = torch.Generator().manual_seed(2)
    weights = load_file(folder / "model.safetensors")
    weights = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project as git sees it, with nothing made in it yet."""
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A project in which the embedded experiment has got as far as preflight."""
    project = copy_project(tmp_path_factory.mktemp("prepared"))
    made = snakemake(project, "preflight_vqa")
    assert made.returncode == 0, made.stdout
    return project


@pytest.fixture(scope="module")
def prepared_project(prepared, tmp_path_factory) -> Path:
    """A copy of it, to be changed; the demo's many pictures are linked."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".png") else shutil.copy2)(source, target)

    return shutil.copytree(prepared, tmp_path_factory.mktemp("project") / "copy", copy_function=copy, symlinks=True)
