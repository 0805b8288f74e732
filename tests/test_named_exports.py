"""An export is the same folder to every script that is given one: itself, or what a run's results hold, and nothing else. One
of an earlier version is made anew."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import convert_checkpoint
import evaluate
import push_to_hub
from llava_sft.chat.models import find_model
from llava_sft.checkpoint.verify import require_whole
from llava_sft.checksums import note
from llava_sft.errors import CheckpointError, SftError
from llava_sft.evaluation.base import exported, start_of
from llava_sft.files import write_json
from llava_sft.model import config, export_files
from llava_sft.workflow import Workflow, to_export


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_checkpoint) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("output")
    export = shutil.copytree(small_checkpoint, top / "stage2_sft_x_results/huggingface")
    (export / "converted.json").unlink(missing_ok=True)
    marker = {
        "source": "output/stage2_sft_x/iter_0000100",
        "depends": "x",
        "files": note(export, list(export.iterdir())),
    }
    write_json(export / "converted.json", marker, sealed=True)
    converted = top / "LLaVA_mcore_tp1_pp1"
    (converted / "release").mkdir(parents=True)
    (converted / "release/.metadata").touch()
    (converted / "latest_checkpointed_iteration.txt").write_text("release")
    shutil.copytree(
        small_checkpoint, converted / "huggingface", ignore=shutil.ignore_patterns("*.safetensors", "converted*")
    )
    write_json(converted / "converted.json", {"files": note(converted, [converted / "release/.metadata"])}, sealed=True)
    no_marker = shutil.copytree(export, top / "LLaVA", ignore=shutil.ignore_patterns("converted.json"))
    no_config = shutil.copytree(export, top / "half/huggingface", ignore=shutil.ignore_patterns("config.json"))
    (top / "empty").mkdir()
    return {
        "export": export, "results": export.parent, "converted": converted, "its files": converted / "huggingface",
        "no marker": no_marker, "no config": no_config.parent, "empty": top / "empty", "none": top / "none",
        "a file": export / "config.json",
    }  # fmt: skip


def pushed(folder: Path, monkeypatch) -> Path:
    found = []
    monkeypatch.setattr(push_to_hub, "push", lambda export, *_: found.append(export))
    monkeypatch.setattr(push_to_hub, "write_card", lambda *_: None)
    monkeypatch.setattr(push_to_hub, "look", lambda *_: None)
    monkeypatch.setattr(push_to_hub, "warn", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", str(folder), "me/x"])
    push_to_hub.main.__wrapped__()
    return found[0]


def evaluated(folder: Path, monkeypatch) -> Path:
    """Where evaluate.py would write: beside the export, whichever of both folders was named."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "test.jsonl"])
    args = evaluate.parse_arguments()
    assert args.output == args.model_dir.parent / "evaluations/test/evaluation.json"
    return args.model_dir


def compared(folder: Path, monkeypatch) -> Path:
    return Path(exported(folder).name)


def verified(folder: Path, monkeypatch) -> Path:
    said = []
    monkeypatch.setattr("builtins.print", said.append)
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "verify", str(folder)])
    convert_checkpoint.main.__wrapped__()
    return Path(said[0].partition(": whole")[0])


def talked_to(folder: Path, monkeypatch) -> Path:
    return find_model(str(folder))


EVERYBODY = (pushed, evaluated, compared, verified, talked_to)
# chat.py takes any model, verify whatever has checksums
ONLY_EXPORTS = (pushed, evaluated, compared)


@pytest.mark.parametrize("name", ["export", "results"])
@pytest.mark.parametrize("asked", EVERYBODY)
def test_an_export_is_found_by_its_own_name_and_by_the_runs_results(asked: Callable, name, folders, monkeypatch):
    assert asked(folders[name], monkeypatch) == folders["export"]


@pytest.mark.parametrize("name", ["converted", "its files", "no marker", "no config", "empty", "none", "a file"])
@pytest.mark.parametrize("asked", ONLY_EXPORTS)
def test_nothing_else_is_taken_for_one(asked: Callable, name, folders, monkeypatch):
    with pytest.raises(CheckpointError, match="no export in it") as refused:
        asked(folders[name], monkeypatch)
    assert isinstance(refused.value, SftError) and str(folders[name]) in str(refused.value)


def test_a_damaged_export_is_made_again_as_its_message_says(folders, tmp_path):
    """Whoever follows it deletes the folder; the marker that Snakemake looks for stays, which alone would be `nothing to do`."""
    export, done, forced = tmp_path / "results/huggingface", tmp_path / "results/export.done.json", []
    flow = Workflow.__new__(Workflow)
    flow.of, flow.force = (
        lambda _: SimpleNamespace(export=export, export_done=done, train_done="train.done"),
        forced.extend,
    )
    assert to_export(flow)(None) == "train.done" and not forced, "never made"
    shutil.copytree(folders["export"], export)
    done.touch()
    assert to_export(flow)(None) == "train.done" and not forced
    (export / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged since it was written") as damaged:
        require_whole(export)
    assert f"delete {export} and export again" in damaged.value.fix
    shutil.rmtree(export)
    assert to_export(flow)(None) == "train.done" and forced == [str(done)]


# --- of an earlier version ----------------------------------------------------------------------------------------------

CHANGES = {
    "template": lambda m, code: edit(code / "chat_template.jinja"),
    "vision": lambda m, code: edit(code / "vision_llavaonevision1_5.py"),
    "modeling": lambda m, code: edit(code / "modeling_llavaonevision1_5.py"),
    "processing": lambda m, code: edit(code / "processing_llavaonevision1_5.py"),
    "configuration": lambda m, code: edit(code / "configuration_llavaonevision1_5.py"),
    "auto map": lambda m, code: m.setitem(export_files._AUTO_MAP, "AutoVideoProcessor", "x"),
    "model type": lambda m, code: m.setattr(config, "MODEL_TYPE", "x"),
    "key": lambda m, code: m.setitem(config.LANGUAGE_KEYS, "kv_channels", "kv_channels"),
    "fixed": lambda m, code: m.setitem(config.VISION_FIXED, "hidden_act", "gelu_pytorch_tanh"),
    "pixels": lambda m, code: m.setattr(export_files, "CLIP_MEAN", (0.5, 0.5, 0.5)),
    "end token": lambda m, code: m.setattr(export_files, "END_OF_TURN", "<|vision_end|>"),
    "by hand": lambda m, code: m.setattr(export_files, "FORM", 99),
}


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """The code of exports, to be edited."""
    copy = shutil.copytree(export_files.HF_CODE_DIR, tmp_path / "hf")
    monkeypatch.setattr(export_files, "HF_CODE_DIR", copy)
    export_files.export_form.cache_clear()
    yield copy
    export_files.export_form.cache_clear()


def test_every_change_of_what_stands_beside_the_weights_is_another_form(code):
    forms = {export_files.export_form()}
    for name, change in CHANGES.items():
        with pytest.MonkeyPatch.context() as undone:
            export_files.export_form.cache_clear()
            change(undone, code)
            found = export_files.export_form()
        assert found not in forms, name
        forms.add(found)


def test_the_form_is_of_all_files_that_are_written(small_checkpoint, small_model, tmp_path, monkeypatch):
    """A file of another kind has to be added to export_form, or noted here as one that comes from the source folder."""
    export_files.write_hf_sidecars(tmp_path, small_checkpoint, small_model, 3136, 6272)
    seen = []
    monkeypatch.setattr(export_files, "fingerprint", lambda value: seen.append(value) or "")
    export_files.export_form.__wrapped__()
    of_the_source = {*export_files.TOKENIZER_FILES, *export_files.SETTINGS_FILES}
    assert {path.name for path in tmp_path.iterdir()} - of_the_source == {*seen[0][2], *export_files.CODE_FILES}


def test_exports_and_answers_of_the_start_depend_on_the_form(folders, resolved, tmp_path, monkeypatch):
    run_dir, depends = tmp_path / "run", []
    (run_dir / "iter_0000001").mkdir(parents=True)
    (run_dir / "iter_0000001/.metadata").touch()
    start = {"folder": str(run_dir / "iter_0000001")}
    write_json(run_dir / "run.json", resolved | {"start": resolved["start"] | start})
    monkeypatch.setattr(convert_checkpoint, "made_before", lambda _, on: depends.append(on) or {"made": "before"})
    words = [
        "mcore2hf",
        "--sidecars",
        str(folders["export"]),
        "--",
        str(run_dir / "iter_0000001"),
        str(tmp_path / "export"),
    ]
    for form in ("one", "two", "two"):
        monkeypatch.setattr(convert_checkpoint, "export_form", lambda form=form: form)
        monkeypatch.setattr("llava_sft.evaluation.base.export_form", lambda form=form: form)
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
        convert_checkpoint.main.__wrapped__()
        depends.append(start_of(run_dir, tmp_path).fingerprint)
    assert len(set(depends)) == 4 and depends[2:4] == depends[4:]


@pytest.mark.parametrize("value", [1, 2, 2.0, 100, 1e-30, 0, True, "2", float("nan")])
def test_settings_of_sampling_are_numbers_that_transformers_takes(value):
    given = {"do_sample": True, "temperature": value, "top_p": value, "min_p": value, "repetition_penalty": value}
    ids = {token: number for number, token in enumerate((*export_files.TOKEN_ID_KEYS.values(), *export_files._TURNS))}
    written = export_files.complete_generation_config(given, ids, [])
    for key, made in (
        ("temperature", TemperatureLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper),
        ("repetition_penalty", RepetitionPenaltyLogitsProcessor),
    ):  # fmt: skip
        if key in written:
            scores = made(written[key])(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[30.0, 20.0, -5.0]]))
            assert not scores.isnan().any() and scores.max() < float("inf"), key


def test_without_the_runs_own_record_an_export_says_whose_image_limits_it_has(tmp_path, capsys):
    args, checkpoint, sidecars = (
        SimpleNamespace(min_pixels=None, max_pixels=None),
        tmp_path / "iter_0000004",
        tmp_path / "start",
    )
    write_json(sidecars / "preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 6272})
    write_json(tmp_path / "run.json", {"settings": {"min_pixels": 784, "max_pixels": 1568}})
    assert convert_checkpoint.limits_of(checkpoint, sidecars, args) == (784, 1568)
    assert not capsys.readouterr().out
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").symlink_to("nowhere")
    assert convert_checkpoint.limits_of(checkpoint, sidecars, args) == (3136, 6272)
    said = capsys.readouterr().out
    assert (
        said
        == f"image limits: 3,136 to 6,272 pixels, from {sidecars}: {tmp_path / 'run.json'}, the run's own, is not there\n"
    )
    assert convert_checkpoint.limits_of(tmp_path / "release", sidecars, args) == (3136, 6272)
    assert not capsys.readouterr().out, "a converted start belongs to no run"
