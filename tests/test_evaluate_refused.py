"""What evaluate.py refuses, with one message; and what lies in a folder that only says it is an export."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluate import main
from helpers import SCRIPTS
from helpers.questions import run, write_test_set
from llava_sft.errors import as_message
from llava_sft.files import read_json, write_json


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_test_set(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def export(small_checkpoint) -> Path:
    write_json(small_checkpoint / "converted.json", {"depends": "this export"})
    return small_checkpoint


@pytest.mark.parametrize(
    "case",
    ["no export", "marker", "weights", "config.json", "tokenizer.json", "samples", "batch", "output", "base"],
)
def test_what_cannot_be_evaluated_is_one_message(export, data, tmp_path, monkeypatch, capsys, case):
    folder = tmp_path / "export"
    folder.mkdir()
    for path in export.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    words = {
        "samples": ["--samples", "half"], "batch": ["--batch-size", "0"], "output": ["--output", str(tmp_path)],
        "base": ["--base", str(folder), "--start-of", str(tmp_path)],
    }.get(case, [])  # fmt: skip
    if case == "no export":
        (folder / "converted.json").unlink()
    elif case == "marker":
        write_json(folder / "converted.json", {"fingerprint": 1})
    elif not words:
        (folder / {"weights": "model.safetensors"}.get(case, case)).write_bytes(b"\0" * 30)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, folder, data, tmp_path / "e.json", *words)
    said = capsys.readouterr().err
    assert end.value.code == 1 and "error: " in said and "Traceback" not in said
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize("spoiled", ["code", "other code in config.json", "processor"])
def test_code_of_a_folder_that_says_it_is_an_export_is_not_run(export, data, tmp_path, monkeypatch, spoiled):
    folder, ran = shutil.copytree(export, tmp_path / "export"), tmp_path / "ran"
    forged = f"open({str(ran)!r}, 'w')\n"
    name = "processing" if spoiled == "processor" else "modeling"
    if spoiled == "other code in config.json":
        config = read_json(folder / "config.json")
        (folder / "other.py").write_text(forged + "class Config: pass\n")
        config["auto_map"] = dict.fromkeys(config["auto_map"], "other.Config")
        write_json(folder / "config.json", config)
    else:
        path = folder / f"{name}_llavaonevision1_5.py"
        path.write_text(forged + path.read_text())
    write_json(folder / "converted.json", {"depends": f"forged {spoiled}"})
    run(monkeypatch, folder, data, tmp_path / "e.json", "--samples", "2", "--base", str(folder))
    result = read_json(tmp_path / "e.json")
    assert not ran.exists() and result["scores"][0]["difference"] == 0 and result["base"]["name"] == str(folder)


def test_a_raw_file_without_records_is_a_mistake(export, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    words = [str(export), str(tmp_path / "empty.jsonl"), "--output", str(tmp_path / "e.json")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1 and "empty.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("script", ["evaluate.py", "list_runs.py"])
def test_a_reader_that_ends_early_is_no_traceback(script, unbuffered, export, data, tmp_path):
    """As of `| head -1`: the pipe is closed before anything is written."""
    words = {
        "evaluate.py": [export, data / "wds", "--samples", "1", "--output", tmp_path / "e.json"],
        "list_runs.py": [],
    }
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *words[script]],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writing)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr and done.returncode in (0, 1)


def test_what_may_not_be_written_is_no_reason_to_remove_it():
    for number in (errno.EROFS, errno.EACCES):
        message = str(as_message(OSError(number, "no", "/results/evaluation.json")))
        assert message.startswith("/results/evaluation.json: no") and "make it readable" in message
        assert "remove" not in message
    assert "remove" in str(as_message(OSError(errno.EISDIR, "no", "x")))
