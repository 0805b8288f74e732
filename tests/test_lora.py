"""LoRA: a training on the CPU that moves pairs alone, goes on bit for bit, and is exported merged and as PEFT's pairs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.forked_trainings import forked_trainings
from helpers.trainings import Run, same
from llava_sft.checkpoint.adapters import write_peft
from llava_sft.checkpoint.base import base_of, base_to_note, beside_its_base, lora_of, note_base
from llava_sft.checkpoint.convert import mcore2hf
from llava_sft.checkpoint.start import Checkpoint, Start, open_start
from llava_sft.checkpoint.weights import open_weights
from llava_sft.errors import CheckpointError
from llava_sft.evaluation.base import start_of
from llava_sft.files import read_json, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.run.identity import identity
from llava_sft.run.layout import CHECKSUMS, TRACKER, checkpoint_dir
from llava_sft.run.records import forget_after
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.settings.resolved import Resolved

STEPS = 6
HOW = {
    "train_iters": STEPS, "save_interval": 3, "async_save": True, "lora_rank": 8, "lora_alpha": 16.0, "lr": 1e-2,
    "lora_modules": ["language_model"], "trainable_modules": ["language_model"], "lora_dropout": 0.1,
    "lr_warmup_fraction": 0.0,
}  # fmt: skip
PIXELS = 3136, 1_000_000
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
def trainings():
    with forked_trainings() as trainings:
        yield trainings


@pytest.fixture(scope="module")
def undisturbed(base, trainings, tmp_path_factory):
    run = Run(base, tmp_path_factory.mktemp("runs") / "undisturbed", **HOW)
    trainings.train(run)
    return run


def script(*arguments) -> None:
    command = [sys.executable, ROOT / "workflow_scripts/convert_checkpoint.py", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def test_pairs_lower_the_loss_and_a_checkpoint_holds_them_alone(base, undisturbed):
    losses = [loss for _, loss, _ in undisturbed.losses()]
    assert losses[-1] < losses[0] - 0.1, losses
    model, lora = ModelConfig(**base["model"]), ResolvedSettings(experiment="x", **HOW).trained.lora
    shapes = {name: shape for row in lora.rows(model) for name, shape in lora.shapes(row).items()}
    early, late = undisturbed.weights(3), undisturbed.weights(STEPS)
    stored = {name for name in late if not name.startswith(("optimizer", "rng"))}
    assert stored == shapes.keys()
    assert all(early[name] != late[name] for name in stored)
    assert {name: len(late[name]) for name in stored} == {
        name: 4 * shape[0] * shape[1] for name, shape in shapes.items()
    }


def test_a_stopped_run_goes_on_bit_for_bit_beside_its_base_and_no_other(base, trainings, undisturbed, tmp_path):
    run = Run(base, tmp_path / "stopped", **HOW)
    shutil.copytree(undisturbed.folder, run.folder)
    shutil.rmtree(checkpoint_dir(run.folder, STEPS))
    (run.folder / TRACKER).write_text("3")
    forget_after(run.folder, 3)
    release = Path(base["start"]["folder"])
    marker = release.parent / "converted.json"
    noted = read_json(marker)

    def is_refused(match: str) -> str:
        with pytest.raises(CheckpointError, match=match) as refused:
            trainings.train(run)
        with pytest.raises(CheckpointError, match=match):
            open_weights(checkpoint_dir(run.folder, 3))
        return refused.value.fix

    release.parent.rename(release.parent.with_name("away"))
    assert f"hf2mcore {base['start']['load']} {release.parent}" in is_refused("is gone")
    release.parent.with_name("away").rename(release.parent)
    write_json(marker, noted | {"fingerprint": "another"}, sealed=True)
    is_refused("other weights")
    write_json(marker, noted, sealed=True)
    weights = max(release.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    is_refused(weights.name)
    weights.write_bytes(content)
    trainings.train(run)
    assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)


def test_a_base_that_was_trained_anew_in_its_place_is_refused(base, undisturbed, tmp_path):
    """Its names and sizes are those of before; LoRA checkpoints of before checksums were noted go on."""
    trained = shutil.copytree(Path(base["start"]["folder"]), tmp_path / "run/iter_0000400")
    (trained / CHECKSUMS).write_text("{}")
    noted = base_to_note(Start.model_validate(base["start"] | {"folder": str(trained)}))
    checkpoint = tmp_path / "iter_0000006"
    checkpoint.mkdir()
    lora = lora_of(checkpoint_dir(undisturbed.folder, STEPS))[0]
    note_base(checkpoint, lora, noted)
    assert lora_of(checkpoint) == (lora, trained)
    (trained / CHECKSUMS).write_text("[]")
    with pytest.raises(CheckpointError, match="other weights"):
        lora_of(checkpoint)
    note_base(checkpoint, lora, {name: value for name, value in noted.items() if name != "checksums"})
    assert lora_of(checkpoint) == (lora, trained)


def test_a_base_is_found_from_any_folder(base, undisturbed, tmp_path, monkeypatch):
    """It is noted as the training named it, which is from the project's folder."""
    checkpoint = shutil.copytree(
        checkpoint_dir(undisturbed.folder, STEPS), tmp_path / "project/output/run/iter_0000006"
    )
    near = shutil.copytree(Path(base["start"]["folder"]).parent, tmp_path / "project/output/checkpoints/base_mcore")
    noted = read_json(checkpoint / "lora.json")
    noted["base"]["folder"] = "output/checkpoints/base_mcore/release"
    write_json(checkpoint / "lora.json", noted, sealed=True)
    assert lora_of(checkpoint)[1] == near / "release"
    monkeypatch.chdir(tmp_path / "project")
    assert lora_of(checkpoint)[1] == lora_of(Path("output/run/iter_0000006"))[1] == Path(noted["base"]["folder"])


def test_the_merged_export_passes_parity_and_the_peft_folder_adds_up_to_it(base, undisturbed, tmp_path):
    from safetensors.torch import load_file

    source, sidecars = checkpoint_dir(undisturbed.folder, STEPS), Path(base["start"]["sidecars"])
    script("mcore2hf", source, tmp_path / "merged", "--samples", base["data"]["path"])
    assert read_json(tmp_path / "merged/parity.json")["passed"]
    write_peft(source, tmp_path / "adapter", ModelConfig(**base["model"]))
    config = read_json(tmp_path / "adapter/adapter_config.json")
    pairs = load_file(tmp_path / "adapter/adapter_model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    mcore2hf(Path(base["start"]["folder"]), tmp_path / "base", sidecars, ModelConfig(**base["model"]), *PIXELS)
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
    base, prepared_project, trainings, undisturbed, tmp_path
):
    lora = ResolvedSettings(experiment="x", **HOW).trained.lora
    pairs = checkpoint_dir(undisturbed.folder, STEPS)
    start = open_start(Checkpoint.of(pairs), None, None)
    for other in (lora._replace(rank=4), lora._replace(parts=("vision_model",)), None):
        with pytest.raises(CheckpointError, match="pairs of rank 8, alpha 16") as refused:
            beside_its_base(start, other)
        assert "lora_rank: 8" in refused.value.fix
    start = beside_its_base(start, lora._replace(dropout=0.5))  # of the next run alone
    assert start.folder == Path(base["start"]["folder"]) and start.pairs == pairs
    settings = HOW | {"train_iters": 1, "save_interval": 1}
    run = Run(base | {"start": start.model_dump(mode="json")}, tmp_path / "next", **settings)
    trainings.train(run)
    assert run.losses()[0][1] < undisturbed.losses()[0][1] - 0.1  # the same samples
    name = next(name for name in run.weights(1) if name.endswith("lora_a"))
    assert run.weights(1)[name] != undisturbed.weights(STEPS)[name]
    assert base_of(checkpoint_dir(run.folder, 1))["load"] == base["start"]["load"]
    mcore2hf(pairs, tmp_path / "merged", start.sidecars, ModelConfig(**base["model"]), *PIXELS)
    with start_of(run.folder, tmp_path).export() as exported:  # what it began with, for an evaluation
        names = "model.safetensors"
        assert (exported / names).read_bytes() == (tmp_path / "merged" / names).read_bytes()
    # As a PEFT folder they are the same start.
    write_peft(pairs, tmp_path / "adapter", ModelConfig(**base["model"]), str(prepared_project / base["start"]["load"]))
    script("hf2mcore", tmp_path / "adapter", tmp_path / "made")
    start = beside_its_base(open_start(Checkpoint.of(tmp_path / "adapter"), tmp_path / "made", None), lora)
    other = Run(base | {"start": start.model_dump(mode="json")}, tmp_path / "other", **settings)
    trainings.train(other)
    assert other.losses() == run.losses()


def test_a_run_that_is_older_than_lora_goes_on_without(base):
    now = Resolved.model_validate(base)
    older = base | {"settings": {k: v for k, v in base["settings"].items() if not k.startswith("lora_")}}
    assert identity(Resolved.model_validate(older)) == identity(now)
    with_lora = base | {"settings": base["settings"] | {"lora_rank": 8}}
    assert identity(Resolved.model_validate(with_lora)) != identity(now)
