"""An export is the same folder to every script that is given one: itself, or what a run's results hold, and nothing else."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import convert_checkpoint
import evaluate
import push_to_hub
from llava_sft.chat.models import find_model
from llava_sft.checksums import note
from llava_sft.errors import CheckpointError, SftError
from llava_sft.evaluation.base import exported
from llava_sft.files import write_json


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
