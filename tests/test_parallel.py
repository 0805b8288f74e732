"""Tensor, pipeline and data parallelism on CPU processes: one checkpoint for all layouts, the same losses and gradients.

The layouts are run one after the other in four processes, the layers of GPUs in two (parallel_worker.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT, SCRIPTS
from helpers.models import MAX_PIXELS, MIN_PIXELS, TEXTS
from llava_sft.checkpoint.convert import hf2mcore
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.model.config import LanguageConfig, ModelConfig, VisionConfig
from llava_sft.model.tiny import write_tiny_checkpoint

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(torch.cuda.is_available(), reason="gloo on CPUs")]

RANKS = int(os.environ.get("PARALLEL_TEST_RANKS", "4"))  # 8 also runs TP4 × PP2; too heavy for two cores
LAYOUTS = {
    f"TP{tp} PP{pp}": (tp, pp) for tp, pp in [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)] if tp * pp <= RANKS
}
UNEVEN = {"TP2 PP2": {"first_stage_layers": 1}}
IN_BF16 = ("TP1 PP1", "TP2 PP2")
WITH_LORA = ("TP2 PP1", "TP4 PP1", "TP2 PP2")
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_modules": ["language_model", "vision_model", "adapter"]}
ONE = "one process"  # where TP × PP < 4 the rest of the four ranks is data parallel

ALL, IMAGE_PARTS = ["language_model", "adapter", "vision_model"], ["adapter", "vision_model"]
TWO_REPLICAS = {  # the sums of two ranks' gradients do not depend on how they are cut into buckets: equal bit for bit
    "tensor parallel": (RANKS // 2, 1, ALL),
    "pipeline parallel": (1, RANKS // 2, ALL),
    "language model frozen": (RANKS // 2, 1, IMAGE_PARTS),
}
PACKS = [("a pack", 1, False), ("a pack, TP2, fused", 2, True)]
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 20_000}


def written(folder: Path, language: LanguageConfig, vision: VisionConfig, **job: list) -> None:
    """A job of parallel_worker.py: a checkpoint of such a model, and what is done with it."""
    model = ModelConfig(name="parallel", language=language, vision=vision)
    write_tiny_checkpoint(folder / "hf", TEXTS, model, 1, MIN_PIXELS, MAX_PIXELS)
    hf2mcore(folder / "hf", folder / "hf_mcore_tp1_pp1", model)
    job |= {"model": model.model_dump(), "source": str(folder / "hf"), "release": str(folder / "hf_mcore_tp1_pp1/release"), "folder": str(folder)}  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    language = LanguageConfig(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=320,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=48,
        vocab_size=500,
        rotary_base=1e6,
        max_position_embeddings=2048,
    )
    vision = VisionConfig(num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=4)
    folder, of_packs = tmp_path_factory.mktemp("parallel"), tmp_path_factory.mktemp("packs")
    runs = [(ONE, 1, 1, 4, {}, True)]
    runs += [(name, tp, pp, 1, UNEVEN.get(name, {}), True) for name, (tp, pp) in LAYOUTS.items()]
    runs += [(f"{name} bf16", *LAYOUTS[name], 1, {"bf16": True}, False) for name in IN_BF16]
    runs += [(f"{ONE} LoRA", 1, 1, 4, LORA, True)]
    runs += [(f"{name} LoRA", *LAYOUTS[name], 1, LORA, True) for name in WITH_LORA]
    steps = [(name, *how, {}) for name, how in TWO_REPLICAS.items()]
    steps += [(f"{name}, overlap", *how, OVERLAP) for name, how in TWO_REPLICAS.items()]
    written(folder, language, vision, runs=runs, steps=steps, packs=[])
    one_layer = (sizes.model_copy(update={"num_layers": 1}) for sizes in (language, vision))
    written(of_packs, *one_layer, runs=[], steps=[], packs=PACKS)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(SCRIPTS)]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONDONTWRITEBYTECODE": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    run = subprocess.run(
        [sys.executable, ROOT / "tests/helpers/parallel_worker.py", folder, str(RANKS), of_packs, "2"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:]
    read = {path: json.loads((path / "losses.json").read_text()) for path in (folder, of_packs)}
    steps = [json.loads((folder / f"steps_{rank}.json").read_text()) for rank in range(RANKS)]
    return SimpleNamespace(folder=folder, of_packs=of_packs, losses=read[folder] | read[of_packs], steps=steps)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(folder)
    return {key: reader.read(key) for key in reader.tensors()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_loaded_and_saved_at_every_layout_with_the_same_bits(results, layout):
    before, after = stored(results.folder / "hf_mcore_tp1_pp1/release"), stored(results.folder / layout / "weights")
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize(
    ("layout", "one"),
    [(layout, ONE) for layout in LAYOUTS] + [(f"{layout} LoRA", f"{ONE} LoRA") for layout in WITH_LORA],
)
def test_loss_and_every_gradient_equal_those_of_one_process(results, layout, one):
    """One process has all samples in one micro-batch, the others one at a time: MBS 1 and 4 are compared too."""
    assert results.losses[layout] == pytest.approx(results.losses[one], rel=1e-6)
    before, after = (stored(results.folder / name / "gradients") for name in (one, layout))
    assert after.keys() == before.keys() and any(key.startswith("vision_model.") for key in before)
    assert ("LoRA" in layout) == all("lora_" in key for key in before)
    worst = {key: float((after[key] - value).abs().max() / value.abs().max()) for key, value in before.items()}
    key = max(worst, key=worst.get)
    print(f"{layout}: loss {results.losses[layout]:.7f}, worst gradient {key} {worst[key]:.1e}")
    assert worst[key] <= 1e-4


def test_the_layers_of_gpus_shared_by_two_ranks_have_the_loss_and_gradients_of_one_process(results):
    one, two = (name for name, *_ in PACKS)
    assert results.losses[two] == pytest.approx(results.losses[one], rel=1e-6)
    before, after = (stored(results.of_packs / name / "gradients") for name in (one, two))
    assert after.keys() == before.keys() and any(key.startswith("vision_model.") for key in before)
    worst = {key: float((after[key] - value).abs().max() / value.abs().max()) for key, value in before.items()}
    assert max(worst.values()) <= 1e-5, max(worst, key=worst.get)


@pytest.mark.parametrize("layout", IN_BF16)
def test_bf16_loss_differs_by_its_rounding_only(results, layout):
    """bf16 keeps 8 bits (relative rounding 4e-3); over the layers and the mean of the tokens 1e-2 is generous."""
    assert results.losses[f"{layout} bf16"] == pytest.approx(results.losses[ONE], rel=1e-2)


@pytest.mark.parametrize("name", TWO_REPLICAS)
def test_gradients_reduced_during_the_backward_pass_are_the_same_also_of_texts_and_of_packs_in_chunks(results, name):
    """A replica whose last chunk has no image must reduce the same buckets in the same order as one that has."""
    for rank in results.steps:
        after, during = rank[name], rank[f"{name}, overlap"]
        assert during["steps"] == after["steps"] and len({gradients for _, gradients in after["steps"]}) > 1
        assert after["buckets"] == 1
    assert results.steps[0][f"{name}, overlap"]["buckets"] >= 4
