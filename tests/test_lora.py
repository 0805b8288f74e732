"""LoRA: a training on the CPU that moves pairs alone, goes on bit for bit, and is exported merged and as PEFT's pairs."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.trainings import Run, same
from llava_sft.checkpoint.base import base_of, beside_its_base
from llava_sft.checkpoint.start import Checkpoint, open_start
from llava_sft.checkpoint.weights import open_weights
from llava_sft.errors import CheckpointError
from llava_sft.files import read_json
from llava_sft.model.config import ModelConfig
from llava_sft.run.identity import identity
from llava_sft.run.layout import checkpoint_dir
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.settings.resolved import Resolved

STEPS = 12
HOW = {
    "train_iters": STEPS, "save_interval": 6, "async_save": True, "lora_rank": 8, "lora_alpha": 16.0, "lr": 5e-3,
    "lora_modules": ["language_model"], "trainable_modules": ["language_model"], "lora_dropout": 0.1,
    "lr_warmup_fraction": 0.0,
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
    model, lora = ModelConfig(**base["model"]), ResolvedSettings(experiment="x", **HOW).trained.lora
    shapes = {name: shape for row in lora.rows(model) for name, shape in lora.shapes(row).items()}
    early, late = undisturbed.weights(6), undisturbed.weights(STEPS)
    stored = {name for name in late if not name.startswith(("optimizer", "rng"))}
    assert stored == shapes.keys()
    assert all(early[name] != late[name] for name in stored)
    assert {name: len(late[name]) for name in stored} == {
        name: 4 * shape[0] * shape[1] for name, shape in shapes.items()
    }


def test_a_stopped_run_goes_on_bit_for_bit(base, undisturbed, tmp_path):
    run = Run(base, tmp_path / "stopped", **HOW)
    run.interrupt(8, signal.SIGTERM)
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


def test_another_run_goes_on_from_the_pairs_where_its_settings_ask_for_the_same(
    base, prepared_project, undisturbed, tmp_path
):
    lora = ResolvedSettings(experiment="x", **HOW).trained.lora
    start = open_start(Checkpoint.of(checkpoint_dir(undisturbed.folder, STEPS)), None, None)
    with pytest.raises(CheckpointError, match="pairs of rank 8, alpha 16") as refused:
        beside_its_base(start, lora._replace(rank=4))
    assert "lora_rank: 8" in refused.value.fix
    start = beside_its_base(start, lora)
    assert start.folder == Path(base["start"]["folder"]) and start.pairs == checkpoint_dir(undisturbed.folder, STEPS)
    settings = HOW | {"train_iters": 2, "save_interval": 2}
    run = Run(base | {"start": start.model_dump(mode="json")}, tmp_path / "next", **settings)
    assert run.finish() == 0, run.said()
    assert run.losses()[0][1] < undisturbed.losses()[0][1] - 0.1  # the same samples
    name = next(name for name in run.weights(2) if name.endswith("lora_a"))
    assert run.weights(2)[name] != undisturbed.weights(STEPS)[name]
    assert base_of(checkpoint_dir(run.folder, 2))["load"] == base["start"]["load"]
    # As a PEFT folder they are the same start.
    source, adapter = checkpoint_dir(undisturbed.folder, STEPS), tmp_path / "adapter"
    script("mcore2peft", source, adapter, "--base", prepared_project / base["start"]["load"])
    script("hf2mcore", adapter, tmp_path / "made")
    start = beside_its_base(open_start(Checkpoint.of(adapter), tmp_path / "made", None), lora)
    other = Run(base | {"start": start.model_dump(mode="json")}, tmp_path / "other", **settings)
    assert other.finish() == 0, other.said()
    assert other.losses() == run.losses()


def test_a_run_that_is_older_than_lora_goes_on_without(base):
    now = Resolved.model_validate(base)
    older = base | {"settings": {k: v for k, v in base["settings"].items() if not k.startswith("lora_")}}
    assert identity(Resolved.model_validate(older)) == identity(now)
    with_lora = base | {"settings": base["settings"] | {"lora_rank": 8}}
    assert identity(Resolved.model_validate(with_lora)) != identity(now)


def test_a_base_that_changed_is_refused(base, undisturbed, tmp_path):
    """By the training that goes on from the pairs, and by their export."""
    changed = tmp_path / "base_mcore_tp1_pp1"
    shutil.copytree(base["start"]["folder"].removesuffix("/release"), changed)
    run = Run(base | {"start": base["start"] | {"folder": str(changed / "release")}}, tmp_path / "run", **HOW)
    run.change(train_iters=4, save_interval=2, lr_decay_iters=4)
    assert run.finish() == 0, run.said()
    weights = max((changed / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    run.change(train_iters=6)
    assert run.finish() != 0 and weights.name in run.said()
    with pytest.raises(CheckpointError, match=weights.name):
        open_weights(checkpoint_dir(run.folder, 4))
