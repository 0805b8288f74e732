"""What no tensor's shape depends on is the start checkpoint's own, not that of config/models; sizes have to agree."""

import json
import shutil
from pathlib import Path

import pytest

import convert_checkpoint
from helpers.models import MAX_PIXELS, MIN_PIXELS
from helpers.original_checkpoint import write_original
from helpers.runs import save
from llava_sft.checkpoint.architecture import check_sizes, model_of_start
from llava_sft.checkpoint.convert import hf2mcore, mcore2hf
from llava_sft.checkpoint.start import Checkpoint, Start, check_load, open_start
from llava_sft.errors import CheckpointError, RunError
from llava_sft.model.config import ModelConfig
from llava_sft.model.hf_config import model_of_config
from llava_sft.run.identity import identity, refuse_other_run
from llava_sft.settings.resolved import Resolved

OWN = {  # by our side and name: section and key of config.json, a value of its own
    ("language", "rotary_base"): ("text_config", "rope_theta", 2e6),
    ("language", "layernorm_epsilon"): ("text_config", "rms_norm_eps", 1e-5),
    ("language", "max_position_embeddings"): ("text_config", "max_position_embeddings", 4096),
    ("vision", "rotary_base"): ("vision_config", "rope_theta", 5e3),
    ("vision", "layernorm_epsilon"): ("vision_config", "layer_norm_eps", 1e-6),
}


def with_own(model: ModelConfig) -> ModelConfig:
    changes = {side: {} for side in ("language", "vision")}
    for (side, name), (_, _, value) in OWN.items():
        changes[side][name] = value
    sides = {side: getattr(model, side).model_copy(update=given) for side, given in changes.items()}
    return model.model_copy(update=sides)


def edit(folder: Path, section: str, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[section] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def own(small_checkpoint, tmp_path) -> Path:
    folder = shutil.copytree(small_checkpoint, tmp_path / "own")
    for section, key, value in OWN.values():
        edit(folder, section, **{key: value})
    return folder


def test_a_checkpoint_is_trained_and_exported_with_its_own_values(own, small_model, tmp_path, capsys):
    made = hf2mcore(own, tmp_path / "made", small_model)
    assert ModelConfig(**made["model"]) == with_own(small_model)
    told = capsys.readouterr().out
    assert told.count("the checkpoint's is used") == len(OWN)
    assert "vision layernorm_epsilon is 1e-06, config/models/small.yaml has 1e-05" in told
    start = open_start(Checkpoint.of(own), tmp_path / "made", None)
    model, said = model_of_start(start, small_model, converted_here=True)
    assert model == with_own(small_model) and len(said) == len(OWN) and f"load: {own}: language" in said[0]
    mcore2hf(tmp_path / "made/release", tmp_path / "hf", own, model, MIN_PIXELS, MAX_PIXELS)
    written = json.loads((tmp_path / "hf/config.json").read_text())
    assert all(written[section][key] == value for section, key, value in OWN.values())


def test_a_checkpoint_that_says_the_same_changes_nothing(small_checkpoint, small_model, tmp_path):
    made = hf2mcore(small_checkpoint, tmp_path / "made", small_model)
    start = open_start(Checkpoint.of(small_checkpoint), tmp_path / "made", None)
    assert made["notes"] == [] and model_of_start(start, small_model, True) == (small_model, [])


def earlier(folder: Path) -> Path:
    """As an earlier version converted it."""
    marker = json.loads((folder / "converted.json").read_text())
    for key in ("seal", "model", "notes"):
        marker.pop(key, None)
    (folder / "converted.json").write_text(json.dumps(marker))
    return folder


def test_a_folder_of_an_earlier_version_keeps_the_values_that_its_runs_have(own, small_model, tmp_path):
    hf2mcore(own, tmp_path / "made", small_model)
    folder = earlier(tmp_path / "made")
    converted = open_start(Checkpoint.of(own), folder, None)
    assert model_of_start(converted, small_model, converted_here=True) == (
        small_model,
        [],
    )  # as they were compared then
    by_hand = open_start(Checkpoint.of(folder), None, None)
    assert by_hand.notes == ()
    assert model_of_start(by_hand, small_model, converted_here=False)[0] == with_own(small_model)
    wide = small_model.model_copy(
        update={"name": "wide", "vision": small_model.vision.model_copy(update={"num_layers": 3})}
    )
    with pytest.raises(CheckpointError, match=r"parameters; config/models/wide\.yaml has"):
        model_of_start(by_hand, wide, converted_here=False)


def test_an_earlier_run_brings_what_it_was_trained_with(small_checkpoint, small_model, tmp_path):
    hf2mcore(small_checkpoint, tmp_path / "made", small_model)
    run = tmp_path / "stage2_sft_x"
    shutil.copytree(tmp_path / "made/huggingface", run / "huggingface")
    shutil.copytree(tmp_path / "made/release", run / "iter_0000004")
    (run / "run.json").write_text(json.dumps({"model": with_own(small_model).model_dump(), "start": {}}))
    start = open_start(Checkpoint.of(run / "iter_0000004"), None, None)
    assert model_of_start(start, small_model, converted_here=False)[0] == with_own(small_model)
    (run / "run.json").write_text(json.dumps({"model": {"language": 3}}))
    with pytest.raises(CheckpointError, match=r"run\.json: damaged: model"):
        model_of_start(start, small_model, converted_here=False)
    random = Start(sidecars=run / "huggingface", fingerprint="random", untrained=True)
    assert model_of_start(random, small_model, converted_here=False) == (small_model, [])


def test_the_original_projects_checkpoint_has_the_values_beside_its_tokenizer(own, small_model, tmp_path, capsys):
    legacy = write_original(tmp_path / "x", own, small_model, 1, 1)
    made = hf2mcore(legacy, tmp_path / "made", small_model, sidecars=own)
    assert ModelConfig(**made["model"]) == with_own(small_model)
    edit(own, "vision_config", depth=24)  # of another model, whose tokenizer is the same
    made = hf2mcore(legacy, tmp_path / "made", small_model, sidecars=own)
    assert ModelConfig(**made["model"]) == small_model and "not used: " in capsys.readouterr().out


def test_an_export_by_hand_has_the_values_of_the_run_whatever_model_is_named(
    own, small_model, tmp_path, monkeypatch, capsys
):
    hf2mcore(own, tmp_path / "made", small_model)
    named = tmp_path / "small.yaml"
    named.write_text(json.dumps(small_model.model_dump()))
    script = ["convert_checkpoint.py", "mcore2hf", str(tmp_path / "made"), str(tmp_path / "hf"), "--model", str(named)]
    monkeypatch.setattr("sys.argv", script)
    capsys.readouterr()
    convert_checkpoint.main.__wrapped__()
    assert json.loads((tmp_path / "hf/config.json").read_text())["text_config"]["rope_theta"] == 2e6
    assert capsys.readouterr().out.count("the checkpoint's is used") == len(OWN)
    named.write_text(
        json.dumps(small_model.model_dump() | {"vision": small_model.vision.model_dump() | {"num_layers": 3}})
    )
    with pytest.raises(CheckpointError, match="vision num_layers is 2"):
        convert_checkpoint.main.__wrapped__()


SIZES = {
    "layers": ("text_config", {"num_hidden_layers": 4}, "language num_layers is 4, config/models/small.yaml has 2"),
    "vocabulary": ("text_config", {"vocab_size": 640}, "with vocab_size: 640"),
    "heads": ("vision_config", {"num_heads": 6}, "vision num_attention_heads is 6"),
}


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_are_refused_before_anything_runs(name, own, small_checkpoint, small_model):
    section, changes, mentioned = SIZES[name]
    check_sizes(Checkpoint.of(own), {}, small_model)
    edit(own, section, **changes)
    with pytest.raises(CheckpointError) as error:
        check_sizes(Checkpoint.of(own), {}, small_model)
    assert mentioned in str(error.value) and f"load: {own}" in str(error.value)
    part = {"text_config": "language", "vision_config": "vision"}[section]
    with pytest.raises(CheckpointError, match=f"load_parts: {part}_model: "):
        check_sizes(Checkpoint.of(small_checkpoint), {part: str(own)}, small_model)
    other = {"language": "vision", "vision": "language"}[part]  # only what is taken from a folder is looked at
    check_sizes(Checkpoint.of(small_checkpoint), {other: str(own)}, small_model)


def test_a_run_is_the_same_at_another_number_of_positions_and_another_at_another_theta(resolved, run_dir):
    run = Resolved.model_validate(resolved)
    run.write(run_dir / "run.json")
    save(run_dir, 4)

    def changed(**values):
        return run.model_copy(update={"model": run.model | {"language": run.model["language"] | values}})

    assert identity(changed(max_position_embeddings=4096)) == identity(run)
    refuse_other_run(run_dir, changed(max_position_embeddings=4096))
    with pytest.raises(RunError, match=r"model tiny: language rotary_base: 1000000.0 → 2000000.0\n"):
        refuse_other_run(run_dir, changed(rotary_base=2e6))
    with pytest.raises(RunError, match="model: tiny → other\n"):
        refuse_other_run(run_dir, run.model_copy(update={"model": run.model | {"name": "other"}}))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize(("beside", "same"), [(2e6, True), (2_000_000, True), (1e6, False), (None, True)])
def test_a_base_that_is_said_twice_is_said_alike(part, beside, same, small_model):
    """transformers 4 reads the one, transformers 5 the other: two values would be two models."""
    config = small_model.to_hf_config()
    config[part] |= {"rope_theta": beside, "rope_parameters": {"rope_type": "default", "rope_theta": 2e6}}
    if same:
        read = model_of_config(config, "x")
        assert (read.language if part == "text_config" else read.vision).rotary_base == 2e6
    else:
        with pytest.raises(CheckpointError, match=f"{part}.rope_parameters.rope_theta = 2000000.0"):
            model_of_config(config, "x")


@pytest.mark.parametrize("name", ["x.gguf", "X-Q4_K_M.GGUF", "tf_model.h5", "flax_model.msgpack", "model.onnx"])
def test_weights_in_another_form_are_named_before_any_job(name, small_checkpoint, tmp_path):
    folder = shutil.copytree(
        small_checkpoint, tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors", "converted*")
    )
    (folder / name).touch()
    for parts in ({}, {"vision_model": str(folder)}):
        with pytest.raises(CheckpointError, match=f"its weights are in {name}: "):
            check_load(Checkpoint.of(folder if not parts else small_checkpoint), parts, None, made_here=False)
