"""LoRA: a training on the CPU that moves pairs alone, goes on bit for bit, and is exported merged and as PEFT's pairs."""

import json
import os
import signal
import subprocess
import sys

import pytest

from helpers.trainings import ROOT, Run, same
from llava_sft.checkpoint.start import Checkpoint, check_load
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.errors import CheckpointError
from llava_sft.files import read_json
from llava_sft.model.config import ModelConfig
from llava_sft.model.lora import Lora
from llava_sft.model.tensors import PARTS
from llava_sft.run.identity import identity
from llava_sft.run.layout import checkpoint_dir
from llava_sft.settings.resolved import Resolved

STEPS = 20
HOW = {
    "train_iters": STEPS, "save_interval": 10, "async_save": True, "lora_rank": 8, "lora_alpha": 16.0, "lr": 5e-3,
    "lora_modules": ["language_model"], "trainable_modules": ["language_model"], "lora_dropout": 0.0,
    "lr_warmup_fraction": 0.0,
}  # fmt: skip
VALUES = {
    "seq_length": 64, "micro_batch_size": 2, "global_batch_size": 2, "seed": 42, "bf16": False, "gpus_per_node": 0,
    "trainable_modules": list(PARTS), "recompute_language": "none", "recompute_vision": "none", "fp8": "none",
    "optimizer_precision": "bf16", "pipeline_model_parallel_size": 1,
}  # fmt: skip
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def base(prepared_project):
    """Resolved settings of the embedded experiment, its data and start checkpoint made."""
    project = prepared_project
    resolved = read_json(project / "output/stage2_sft_vqa_results/resolved.json")
    for name in ("path", "sizes"):
        resolved["data"][name] = str(project / resolved["data"][name])
    resolved["start"] |= {key: str(project / resolved["start"][key]) for key in ("folder", "sidecars")}
    return resolved


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    run = Run(base, tmp_path_factory.mktemp("runs") / "undisturbed", **HOW)
    assert run.finish() == 0, run.said()
    return run


def script(*arguments) -> str:
    command = [sys.executable, ROOT / "workflow_scripts/convert_checkpoint.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_pairs_lower_the_loss_and_a_checkpoint_holds_them_alone(base, undisturbed):
    losses = [loss for _, loss, _ in undisturbed.losses()]
    assert losses[-1] < losses[0] - 0.1, losses
    model, lora = ModelConfig(**base["model"]), Lora.of(HOW)
    shapes = {name: shape for row in lora.rows(model) for name, shape in lora.shapes(row).items()}
    early, late = undisturbed.weights(10), undisturbed.weights(STEPS)
    stored = {name for name in late if not name.startswith(("optimizer", "rng"))}
    assert stored == shapes.keys()
    assert all(early[name] != late[name] for name in stored)
    assert {name: len(late[name]) for name in stored} == {
        name: 4 * shape[0] * shape[1] for name, shape in shapes.items()
    }


def test_a_stopped_run_goes_on_bit_for_bit(base, undisturbed, tmp_path):
    run = Run(base, tmp_path / "stopped", **HOW)
    run.interrupt(12, signal.SIGTERM)
    assert run.finish() == 0, run.said()
    assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)


def test_the_merged_export_passes_parity_and_the_peft_folder_adds_up_to_it(base, undisturbed, tmp_path):
    from safetensors.torch import load_file

    source = checkpoint_dir(undisturbed.folder, STEPS)
    said = script("mcore2hf", source, tmp_path / "merged", "--samples", base["data"]["path"])
    assert read_json(tmp_path / "merged/parity.json")["passed"], said
    print(said)
    script("mcore2peft", source, tmp_path / "adapter")
    config = read_json(tmp_path / "adapter/adapter_config.json")
    pairs = load_file(tmp_path / "adapter/adapter_model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    script("mcore2hf", base["start"]["folder"], tmp_path / "base", "--sidecars", base["start"]["sidecars"])
    start = load_file(tmp_path / "base/model.safetensors")
    changed = 0
    for name, weight in start.items():
        a = pairs.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is None:
            assert merged[name].equal(weight), name
            continue
        b = pairs[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        change = config["lora_alpha"] / config["r"] * b @ a
        assert change.abs().max() > 0 and (merged[name] - weight - change).abs().max() < 1e-6, name
        changed += 1
    assert len(pairs) == 2 * changed and name.rsplit(".", 2)[1] not in config["target_modules"]


def test_the_pairs_are_no_start_for_another_run_but_their_export_is(undisturbed):
    source = checkpoint_dir(undisturbed.folder, STEPS)
    with pytest.raises(CheckpointError, match="holds LoRA's pairs") as refused:
        check_load(Checkpoint.of(source), {}, None, made_here=False)
    assert "export it" in refused.value.fix


def test_a_run_that_is_older_than_lora_goes_on_without(base):
    now = Resolved.model_validate(base)
    older = base | {"settings": {k: v for k, v in base["settings"].items() if not k.startswith("lora_")}}
    assert identity(Resolved.model_validate(older)) == identity(now)
    with_lora = base | {"settings": base["settings"] | {"lora_rank": 8}}
    assert identity(Resolved.model_validate(with_lora)) != identity(now)


def test_two_pipeline_stages_train_the_pairs_of_one(base, undisturbed, tmp_path):
    sizes = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}
    run = Run(base, tmp_path / "parallel", **HOW | sizes | {"train_iters": 4, "save_interval": 2})
    run.change(lr_decay_iters=STEPS)
    assert run.finish() == 0, run.said()
    for (_, loss, norm), (_, other, other_norm) in zip(run.losses(), undisturbed.losses(), strict=False):
        assert loss == pytest.approx(other, rel=1e-6) and norm == pytest.approx(other_norm, rel=1e-5)


def test_gradients_of_all_pairs_are_the_same_with_tensor_parallelism(tmp_path):
    language = {
        "num_layers": 2,
        "hidden_size": 128,
        "ffn_hidden_size": 320,
        "num_attention_heads": 4,
        "kv_channels": 48,
    }
    language |= {"num_query_groups": 2, "vocab_size": 400, "rotary_base": 1e6, "max_position_embeddings": 2048}
    vision = {"num_layers": 2, "hidden_size": 96, "ffn_hidden_size": 160, "num_attention_heads": 4}
    model = ModelConfig.model_validate({"name": "parallel", "language": language, "vision": vision})
    values = VALUES | {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "lora_modules": list(PARTS)}
    (tmp_path / "job.json").write_text(json.dumps({"model": model.model_dump(), "values": values}))
    for tp in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp}"]
        command += [ROOT / "tests/lora_worker.py", tmp_path, str(tp)]
        paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "workflow_scripts")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-6000:]
    losses = [float((tmp_path / f"loss{tp}").read_text()) for tp in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    one, two = (TorchDistReader(tmp_path / f"tp{tp}") for tp in (1, 2))
    names = {name for row in Lora.of(values).rows(model) for name in Lora.of(values).shapes(row)}
    assert one.tensors().keys() == two.tensors().keys() == names
    for name in names:
        expected = one.read(name)
        assert (expected - two.read(name)).abs().max() <= 1e-4 * expected.abs().max() > 0, name


@pytest.mark.parametrize("trained", [False, True])
def test_the_fused_products_of_a_pair_are_those_of_autograd(trained):
    import torch

    from llava_sft.model.fused_layers import product, product_backward, trainable

    torch.manual_seed(0)
    module = torch.nn.Linear(24, 40, bias=False).double().requires_grad_(trained)
    module.lora_a, module.lora_b = (torch.nn.Parameter(torch.randn(shape).double()) for shape in ((4, 24), (40, 4)))
    module.lora_scale = 0.5
    x, grad = torch.randn(7, 24).double().requires_grad_(), torch.randn(7, 40).double()
    expected = x @ (module.weight + 0.5 * module.lora_b @ module.lora_a).t()
    needed = [x, *(parameter for parameter in trainable(module) if parameter.requires_grad)]
    gradients = torch.autograd.grad(expected, needed, grad)
    with torch.no_grad():
        out, operands = product(x, module, None)
        x_grad, of_module = product_backward(grad, operands, module, None)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close([x_grad, *(each for each in of_module if each is not None)], list(gradients))
