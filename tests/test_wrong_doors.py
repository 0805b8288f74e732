"""What people name, in the commands that follow a training, in the place of what was asked: one message with what to name
instead, and no file of theirs replaced."""

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import chat
import compare_runs
import convert_checkpoint
import evaluate
import import_shell_script
import index_webdataset
import list_runs
import push_to_hub
import report
from helpers import ROOT, SCRIPTS
from helpers.adapters import write_adapter
from helpers.questions import counted
from llava_sft.errors import of_file
from llava_sft.files import read_json, write_json
from llava_sft.model.config import load_model_config


@pytest.fixture
def said(monkeypatch, capsys) -> Callable:
    """Runs a script's `main`; returns what it says on stderr, which must be of a mistake."""

    def run(script, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            script.main()
        text = capsys.readouterr().err
        assert end.value.code in (1, 2) and text.count("error: ") == 1 and "\n  fix: " in text, text
        assert "usage:" not in text and len(text.splitlines()) < 5
        return text

    return run


@pytest.fixture
def place(tmp_path, small_checkpoint) -> Path:
    """output/ with a run, its results and a checkpoint; a Hugging Face folder beside it."""
    run = tmp_path / "stage2_sft_x"
    for folder in ("iter_0000200", "iter_0000400", "huggingface"):
        (run / folder).mkdir(parents=True)
        (run / folder / ".metadata").write_bytes(b"metadata")
    (run / "huggingface/.metadata").unlink()
    write_json(run / "run.json", {"settings": {}}, sealed=True)
    (run / "latest_checkpointed_iteration.txt").write_text("400")
    export = shutil.copytree(small_checkpoint, tmp_path / "stage2_sft_x_results/huggingface")
    write_json(export / "converted.json", {"depends": "x"}, sealed=True)
    shutil.copytree(small_checkpoint, tmp_path / "theirs")
    (tmp_path / "theirs/converted.json").unlink(missing_ok=True)
    converted = tmp_path / "theirs_mcore_tp1_pp1"
    (converted / "release").mkdir(parents=True)
    write_json(converted / "converted.json", {"depends": "y"}, sealed=True)
    (tmp_path / "test.jsonl").write_text('{"id": "a", "conversations": []}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("script", "words", "fix"),
    [
        (evaluate, "x y --limit 8", "--limit is called --samples here"),
        (evaluate, "x y --batch_size 4", "--batch_size: perhaps --batch-size is meant"),
        (evaluate, "x y --max-tokens 9", "--max-tokens is called --max-new-tokens here"),
        (evaluate, "x y --batch-size auto", "`--batch-size 64`"),
        (evaluate, "x y --split test", "did you mean val?"),
        (evaluate, "--model x --tasks y", "evaluate.py EXPORT DATA"),
        (evaluate, "x", "evaluate.py EXPORT DATA"),
        (chat, "x q --max_length 8", "--max_length is called --max-new-tokens here"),
        (chat, "x q --dtype bf16", "did you mean bfloat16?"),
        (chat, "x q --temperature low", "a number in digits alone, as in `--temperature 0.5`"),
        (compare_runs, "a b", "compare_runs.py A,B"),
        (list_runs, "--output_dir o", "list_runs.py --help"),
        (push_to_hub, "x --repo-id org/name", "--repo-id has no option here: push_to_hub.py export repository"),
        (convert_checkpoint, "mcore2hf --load x --save y", "--load has no option here: convert_checkpoint.py direction source target"),
        (convert_checkpoint, "megatron2hf x y", "did you mean mcore2hf?"),
        (convert_checkpoint, "mcore2hf x y --max-pixel 1M", "`--max-pixels 64`"),
        (convert_checkpoint, "merge x y", "convert_checkpoint.py direction source adapter[:number] target"),
        (report, "--run_dir x", "--run_dir: perhaps --run-dir is meant"),
        (index_webdataset, "x --num-fewshot 4", "index_webdataset.py --help"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_one_message_with_the_one_that_was_meant(said, script, words, fix, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert fix in said(script, *words.split())


def test_a_home_folder_that_no_shell_has_filled_in(monkeypatch, place, said):
    monkeypatch.setenv("HOME", str(place))
    text = said(evaluate, "~/stage2_sft_x_results", "~/none.jsonl", "--output=~/test.jsonl")
    assert f"{place}/test.jsonl: exists already" in text
    assert f"{place}/iter" in said(convert_checkpoint, "mcore2hf", "~/stage2_sft_x/iter_0000200", "~/iter_0000001/x")


@pytest.mark.parametrize(
    ("named", "fix"),
    [
        ("stage2_sft_x", "name {0}/stage2_sft_x_results\n"),
        ("stage2_sft_x_results/huggingface/config.json", "name {0}/stage2_sft_x_results/huggingface\n"),
        ("stage2_sft_x/iter_0000200", "mcore2hf {0}/stage2_sft_x/iter_0000200 FOLDER"),
        ("theirs", "hf2mcore {0}/theirs output/theirs_mcore_tp1_pp1"),
        ("nothing", "make export_X"),
    ],
)
def test_where_an_export_is_asked_the_one_near_is_named(said, place, named, fix):
    for script, words in ((evaluate, [place / "test.jsonl"]), (push_to_hub, ["org/name"])):
        assert fix.format(place) in said(script, place / named, *words)


@pytest.mark.parametrize(
    "named", ["stage2_sft_x_results", "stage2_sft_x_results/huggingface", "stage2_sft_x/iter_0000400"]
)
def test_where_a_run_is_asked_the_one_near_is_named(said, place, named, export, monkeypatch):
    run = f"{place}/stage2_sft_x"
    assert f"name {run}\n" in said(compare_runs, f"{place / named},b", "--exp-dir", place)
    assert f"name {run}, or" in said(evaluate, export, place / "test.jsonl", "--start-of", place / named)
    words = ["--resolved", "x", "--output", place / "r.html"]
    assert f"fix: --run-dir {run}\n" in said(report, "--run-dir", place / named, *words)
    if "results" in named:
        assert f"fix: name {run}\n" in said(convert_checkpoint, "mcore2hf", place / named, place / "new")
        assert f"fix: name {run}\n" in said(convert_checkpoint, "mcore2peft", place / named, place / "new")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["hf2mcore", "stage2_sft_x", "new"], "a Megatron checkpoint already"),
        (["hf2mcore", "stage2_sft_x/iter_0000200", "new"], "mcore2hf {0}/stage2_sft_x/iter_0000200 FOLDER"),
        (["hf2mcore", "theirs/model.safetensors", "new"], "name {0}/theirs\n"),
        (["mcore2hf", "stage2_sft_x/run.json", "new"], "name {0}/stage2_sft_x, or"),
        (["mcore2hf", "stage2_sft_x/iter_0000201", "new"], "name {0}/stage2_sft_x/iter_0000400\n"),
        (["verify", "theirs", "stage2_sft_x"], "one folder at a time"),
        (["verify", "theirs", "--done=x"], "--done: verify has no use for it"),
        (["hf2mcore", "theirs", "new", "--samples=x"], "--samples: hf2mcore has no use for it"),
        (["hf2mcore", "theirs", "new", "--parity=skip"], "it is of mcore2hf"),
        (["mcore2peft", "stage2_sft_x", "new", "--max-pixels=5"], "it is of mcore2hf and merge"),
        (["merge", "stage2_sft_x", "theirs", "new"], "convert_checkpoint.py mcore2hf {0}/stage2_sft_x FOLDER"),
        (["merge", "adapter", "theirs", "new"], "the base comes first"),
        (["merge", "theirs", "adapter", "theirs"], "exists already"),
        (["mcore2hf", "stage2_sft_x", "new", "--samples=nowhere"], "nowhere: no WebDataset in it"),
        (["mcore2hf", "stage2_sft_x", "new", "--done=test.jsonl"], "exists already"),
        (["mcore2hf", "stage2_sft_x", "new"], "--sidecars with the Hugging Face folder"),
        (["hf2mcore", "theirs", "stage2_sft_x_results/huggingface"], "not what hf2mcore wrote"),
        (["mcore2hf", "stage2_sft_x", "theirs_mcore_tp1_pp1"], "not what mcore2hf wrote"),
        (["mcore2hf", "stage2_sft_x", "stage2_sft_x/iter_0000200/new"], "a folder outside, as {0}/stage2_sft_x/new\n"),
        (["mcore2hf", "stage2_sft_x", "theirs_mcore_tp1_pp1/release/new"], "a folder outside, as {0}/new\n"),
        (["mcore2peft", "stage2_sft_x", "stage2_sft_x_results/huggingface/new"], "as {0}/stage2_sft_x_results/new\n"),
    ],
)
def test_a_conversion_that_cannot_be_meant_ends_before_anything_is_read(said, place, monkeypatch, words, told):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "llava_sft.checkpoint.convert", None)
    write_adapter(place / "adapter", "org/name", load_model_config(ROOT / "config/models/tiny.yaml"))
    before = sorted(place.rglob("*"))
    given = [place / each if (place / each).exists() or each == "stage2_sft_x/iter_0000201" else each for each in words]
    assert told.format(place) in said(convert_checkpoint, *given)
    assert sorted(place.rglob("*")) == before


def test_an_adapter_that_peft_has_trained_is_not_replaced(said, place):
    model = load_model_config(ROOT / "config/models/tiny.yaml")
    adapter = write_adapter(place / "adapter", "org/name", model, auto_mapping=None)
    assert "not what mcore2peft wrote" in said(convert_checkpoint, "mcore2peft", place / "stage2_sft_x", adapter)


def test_what_is_asked_and_files_of_others_are_never_replaced_by_a_result(said, place, export, monkeypatch):
    made = counted(monkeypatch)
    theirs = shutil.copy(place / "test.jsonl", place / "predictions.jsonl")
    config = export / "config.json"
    before = [path.read_bytes() for path in (place / "test.jsonl", theirs, config)]
    for data, output in (
        ("test.jsonl", place / "test.jsonl"),
        ("test.jsonl", place / "e.json"),  # predictions.jsonl comes beside it
        ("predictions.jsonl", place / "e.json"),
        ("test.jsonl", config),
    ):
        assert "would be lost" in said(evaluate, export, place / data, "--output", output)
    assert [path.read_bytes() for path in (place / "test.jsonl", theirs, config)] == before and not made


def test_an_evaluation_may_replace_its_own(export, data, tmp_path, monkeypatch):
    """Also one of an earlier version, which was not sealed, and answers whose result Snakemake has deleted."""
    made, output = counted(monkeypatch), tmp_path / "e.json"
    words = ["evaluate.py", str(export), str(data / "wds"), "--output", str(output)]
    for samples in ("2", "3"):
        monkeypatch.setattr(sys, "argv", [*words, "--samples", samples])
        evaluate.main()
    output.write_text(json.dumps(read_json(output)))
    monkeypatch.setattr(sys, "argv", [*words, "--samples", "4"])
    evaluate.main()
    for path in (output, tmp_path / ".e.json.kept"):
        path.unlink()
    evaluate.main()
    assert read_json(output)["samples"] == 4 and len(made) == 3


@pytest.mark.parametrize("name", ["test.jsonl", "notes"])
def test_no_page_takes_the_place_of_another_file(said, place, monkeypatch, name):
    (place / "notes").write_text("mine")
    monkeypatch.setattr(compare_runs, "read", lambda folder: None)
    words = ["a,b", "--exp-dir", place, "--output", place / name, "--language", "en"]
    assert f"--output {(place / name).with_suffix('.html')}\n" in said(compare_runs, *words)
    words = ["--run-dir", place / "stage2_sft_x", "--resolved", "x", "--output", place / name]
    assert "would be lost" in said(report, *words)


@pytest.mark.parametrize(
    "head", [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n", b"GIF89a", b"%PDF-1.7", b"\x30\0\0\0", b"a.tar" + bytes(95)]
)
def test_a_picture_in_the_place_of_the_records_is_not_text_of_another_encoding(said, tmp_path, export, head):
    (tmp_path / "a.jpg").write_bytes(head + bytes(range(256)))
    text = said(evaluate, export, tmp_path / "a.jpg", "--output", tmp_path / "e.json")
    assert "name the file of the records" in text and "iconv" not in text


def test_columns_that_are_no_json_are_shown_how(said):
    assert """JSON in quotes, as in --columns '{"question": "q"}'""" in said(
        evaluate, "x", "y", "--columns", "question"
    )


@pytest.mark.parametrize("name", ["/mnt/.e.json.77.tmp", ".e.json.77.tmp", "/mnt/.x/.e.json.7.tmp"])
def test_what_could_not_be_written_has_the_name_it_was_to_have(name):
    said = of_file(OSError(errno.EROFS, "Read-only", name)).problem
    assert said == f"{name.replace('.e.json', 'e.json').partition('.7')[0]}: Read-only"


@pytest.mark.parametrize("inside", [".nv-meta", "raw", "nothing"])
def test_data_one_folder_too_high_is_named(said, tmp_path, export, inside):
    (tmp_path / "x/webdatasets").mkdir(parents=True)
    if inside == ".nv-meta":
        (tmp_path / "x/webdatasets/.nv-meta").mkdir()
    if inside == "raw":
        (tmp_path / "x/own.csv").write_text("image,question,answer\n")
    wanted = {".nv-meta": f"name {tmp_path}/x/webdatasets\n", "raw": f"name {tmp_path}/x/own.csv\n"}
    text = said(evaluate, export, tmp_path / "x", "--output", tmp_path / "e.json")
    assert wanted.get(inside, "a webdatasets folder, or a file") in text and "index_webdataset" not in text


@pytest.mark.parametrize(
    ("named", "fix"),
    [
        ("stage2_sft_x/iter_0000201", "one of {0}/stage2_sft_x/iter_0000200, {0}/stage2_sft_x/iter_0000400\n"),
        ("stage2_sft_x_results/huggingface/config.json", "name {0}/stage2_sft_x_results/huggingface\n"),
        ("stage2_sft_x_result", "name {0}/stage2_sft_x_results\n"),
        (".", "name {0}/stage2_sft_x_results\n"),
        ("test.jsonl", "an export, a run's folder"),
    ],
)
def test_whom_to_talk_to_is_named(said, place, named, fix):
    assert fix.format(place) in said(chat, place / named, "a question")


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "a folder"), (b"\xff\xfe#\0!\0", "is UTF-16"), (b"\x89PNG\0\0'", "no text")],
)
def test_what_is_no_script_is_not_read_as_one(said, tmp_path, monkeypatch, content, told):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "train.sh"
    path.mkdir() if content is None else path.write_bytes(content)
    assert told in said(import_shell_script, path)


@pytest.mark.parametrize("name", ["../new", "a b", "TEMPLATE", ".x"])
def test_nothing_is_written_for_a_name_that_no_experiment_can_have(said, tmp_path, monkeypatch, name):
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    words = "--seq-length 8192 --load x --lr 1e-5 --train-iters 10 --micro-batch-size 1 --global-batch-size 8"
    (tmp_path / "train.sh").write_text(f"torchrun train.py {words}\n")
    monkeypatch.setattr(import_shell_script, "write", None)
    text = said(import_shell_script, "train.sh", "--name", name)
    assert "cannot name an experiment" in text and "in the script" not in text


def test_the_doctor_is_asked_from_anywhere(tmp_path):
    done = subprocess.run([sys.executable, SCRIPTS / "doctor.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "requirements.lock" not in done.stderr and " Slurm" in done.stdout


def test_an_address_on_the_hub_is_read_and_swapped_names_are_seen(said, place):
    export = place / "stage2_sft_x_results/huggingface"
    assert "fix: org/name\n" in said(push_to_hub, export, "https://huggingface.co/org/name/tree/main")
    assert "the export comes first" in said(push_to_hub, "org/name", export)


def test_files_are_utf_8_whatever_the_locale_says():
    """As zh_CN.GB18030, in which Python 3.12 would read them: a page in Chinese is the same."""
    for path in SCRIPTS.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
        bare = [each for each in calls if ast.unparse(each.func).endswith(".read_text")]
        assert all(ast.unparse(each).count("utf-8") for each in bare), path
    asks = "from llava_sft.report.language import sayer; print(ascii(sayer('zh')('report: %(path)s', path='x')))"
    locale = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", asks], env=os.environ | locale, capture_output=True, text=True)
    assert "\\u62a5\\u544a" in done.stdout, done.stderr
