"""What evaluate.py refuses, with one message; and what lies in a folder that only says it is an export."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from evaluate import main
from helpers import SCRIPTS
from helpers.questions import run
from llava_sft.errors import CheckpointError, as_message
from llava_sft.evaluation import answers
from llava_sft.evaluation.export import Export
from llava_sft.evaluation.view import readable
from llava_sft.files import read_json, write_json


@pytest.mark.parametrize(
    "case",
    [
        "no export",
        "marker",
        "weights",
        "config.json",
        "tokenizer.json",
        "samples",
        "batch",
        "output",
        "base",
        "positions",
        "answers",
    ],
)
def test_what_cannot_be_evaluated_is_one_message(export, data, tmp_path, monkeypatch, capsys, case):
    folder = tmp_path / "export"
    folder.mkdir()
    for path in export.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    words = {
        "samples": ["--samples", "half"], "batch": ["--batch-size", "0"], "output": ["--output", str(tmp_path)],
        "positions": ["--max-new-tokens", "2048"],
        "base": ["--base", str(folder), "--start-of", str(tmp_path)],
    }.get(case, [])  # fmt: skip
    if case == "no export":
        (folder / "converted.json").unlink()
    elif case == "marker":
        write_json(folder / "converted.json", {"fingerprint": 1})
    elif case == "answers":
        (tmp_path / ".e.json.answers").mkdir()
        monkeypatch.setattr(answers, "generate", None)  # before a question is asked
    elif not words:
        (folder / {"weights": "model.safetensors"}.get(case, case)).write_bytes(b"\0" * 30)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, folder, data, tmp_path / "e.json", *words)
    said = capsys.readouterr().err
    assert end.value.code == 1 and "error: " in said and "Traceback" not in said
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize("form", ["stale", "no index", "other name"])
def test_the_weights_that_were_looked_at_are_those_that_answer(small_checkpoint, tmp_path, form):
    """Whatever their files are called, and whatever lies beside them: transformers goes by names of its own."""
    folder = shutil.copytree(small_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(small_checkpoint / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    if form == "other name":
        halves = {"weights.safetensors": names}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    if form == "stale":
        save_file({name: torch.zeros_like(each) for name, each in tensors.items()}, folder / "model.safetensors")
        index = {name: file for file, held in halves.items() for name in held}
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    with readable(folder) as view:
        model = AutoModelForImageTextToText.from_pretrained(view, trust_remote_code=True)
    assert (
        model.get_input_embeddings().weight.float().equal(tensors["model.language_model.embed_tokens.weight"].float())
    )


@pytest.mark.parametrize("ours", [True, False])
def test_what_transformers_cannot_load_is_named_as_the_user_knows_it(small_checkpoint, tmp_path, monkeypatch, ours):
    """Nobody is told to delete a folder that this project cannot make again."""
    left_out = () if ours else ("converted.json",)
    folder = shutil.copytree(small_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns(*left_out))

    def fails(*_: object) -> None:
        raise ValueError("unreadable")

    monkeypatch.setattr("llava_sft.evaluation.export.load_export", fails)
    with pytest.raises(CheckpointError) as refused, readable(folder) as view:
        Export(view, 1)
    assert refused.value.problem == f"{folder}: transformers cannot load this model: unreadable"
    assert ("delete" in refused.value.fix) is ours and "/model-" not in refused.value.fix


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
        assert message.startswith("/results/evaluation.json: no") and (
            "make it readable" in message or "not read-only" in message
        )
        assert "remove" not in message
    missing = str(as_message(OSError(errno.ENOENT, "no", "in.jsonl")))
    assert "check the path" in missing and "remove" not in missing
    for number in (errno.EISDIR, errno.EEXIST, errno.ENOTDIR):
        assert "name another place, or move what is there" in str(as_message(OSError(number, "no", "x")))
    assert "remove" in str(as_message(OSError(errno.EIO, "no", "x")))
