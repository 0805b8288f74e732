"""What a run started from answers the same questions, once for all runs; and what is said where it is gone."""

import json
import platform
import shutil
from pathlib import Path

import pytest

from helpers.models import MAX_PIXELS, MIN_PIXELS
from helpers.questions import counted, run
from llava_sft.checkpoint.convert import hf2mcore
from llava_sft.files import read_json, write_json


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    return counted(monkeypatch)


@pytest.fixture(scope="module")
def started(export, small_model, shipped_settings, tmp_path_factory) -> Path:
    """A run that started from the weights of `export`."""
    folder = tmp_path_factory.mktemp("started")
    done = hf2mcore(export, folder / "start_mcore_tp1_pp1", small_model)
    start = {"load": "start", "folder": str(folder / "start_mcore_tp1_pp1/release"), "fingerprint": done["fingerprint"]}
    settings = shipped_settings | {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    content = {"settings": settings, "model": small_model.model_dump(), "data": {"fingerprint": "d"}}
    start |= {"sidecars": str(folder / "start_mcore_tp1_pp1/huggingface")}
    (folder / "run").mkdir()
    write_json(folder / "run/run.json", content | {"start": start})
    return folder / "run"


def test_the_start_checkpoint_answers_the_same_questions_once_for_all_runs(
    export, data, started, tmp_path, monkeypatch, capsys
):
    kept = tmp_path / "answers"
    (kept / f"start.{platform.node()}.4194305").mkdir(
        parents=True
    )  # of one that was killed; no process has this number
    (kept / "start.elsewhere.4194305").mkdir()  # of one on another machine, which may be running
    for name in ("one", "two"):
        options = ["--start-of", str(started), "--base-answers", str(kept)]
        run(monkeypatch, export, data, tmp_path / name / "evaluation.json", *options)
        assert {path.suffix for path in kept.iterdir()} == {".json", ".4194305"}, "answers, and no export"
        assert not (kept / f"start.{platform.node()}.4194305").exists() and (kept / "start.elsewhere.4194305").exists()
    assert capsys.readouterr().out.count("answered before") == 1
    result = read_json(tmp_path / "two/evaluation.json")
    rows = [json.loads(line) for line in (tmp_path / "two/predictions.jsonl").read_text().splitlines()]
    assert all(turn["prediction"] == turn["base"] for row in rows for turn in row["turns"]), "the same weights"
    assert result["base"] == {"name": "start checkpoint (start)", "cut": result["cut"]} and result["cut"] > 5
    assert result["scores"][0]["difference"] == 0 and result["scores"][0]["p"] == 1


@pytest.mark.parametrize("folder", ["/nope", None, "/gone"])
def test_a_start_that_was_asked_for_by_hand_and_is_not_there_is_an_error(
    export, data, started, tmp_path, monkeypatch, capsys, folder, asked
):
    content = read_json(started / "run.json")
    write_json(tmp_path / "run.json", content | {"start": content["start"] | {"folder": folder}})
    run_dir = folder if folder == "/nope" else str(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, export, data, tmp_path / "evaluation.json", "--start-of", run_dir)
    assert end.value.code == 1 and not asked, "before any question"
    assert f"error: --start-of {run_dir}: " in (said := capsys.readouterr().err) and "--skip-missing-start" in said


def test_a_start_that_is_gone_or_random_is_said_and_stops_no_workflow(
    export, data, started, tmp_path, monkeypatch, capsys, asked
):
    content, options = read_json(started / "run.json"), ["--start-of", str(tmp_path), "--skip-missing-start"]
    for folder, said in ((None, "random weights"), ("/gone", "no longer there: /gone")):
        start = content["start"] | {"folder": folder}
        write_json(tmp_path / "run.json", content | {"start": start})
        run(monkeypatch, export, data, tmp_path / "evaluation.json", *options)
        assert said in capsys.readouterr().err
        assert said in read_json(tmp_path / "evaluation.json")["base"]["missing"]
    damaged = shutil.copytree(started.parent / "start_mcore_tp1_pp1", tmp_path / "start") / "release"
    next(damaged.glob("*.distcp")).write_bytes(b"")
    write_json(tmp_path / "run.json", content | {"start": content["start"] | {"folder": str(damaged)}})
    run(monkeypatch, export, data, tmp_path / "evaluation.json", *options)
    assert "damaged" in read_json(tmp_path / "evaluation.json")["base"]["missing"] and asked == [10]
    run(monkeypatch, export, data, tmp_path / "evaluation.json", "--base", str(export))
    assert read_json(tmp_path / "evaluation.json")["base"]["name"] == str(export)
