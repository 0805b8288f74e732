"""A folder that a script is given by hand and that is not there: one message that names it, and an exit code of a failure."""

import subprocess
import sys

import pytest

from helpers import SCRIPTS


def run(folder, script, *words):
    command = [sys.executable, SCRIPTS / f"{script}.py", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words",
    [
        "list_runs gone",
        "list_runs file",
        "list_runs link",
        "compare_runs a,b --exp-dir gone",
        "report --resolved file --run-dir gone --output x.html",
        "inspect_webdataset gone",
        "inspect_webdataset tars --parts-dir gone",
        "index_webdataset gone",
        "index_webdataset gone --verify",
        "index_webdataset tars --parts-dir gone",
        "index_webdataset new --adopt gone",
        "measure_webdataset gone --dataset file --tokenizer hf --kept k --output y --seq-length 8 --min-pixels 1 --max-pixels 9",
        "stage2_sftdata2webdataset --input raw.jsonl --output-dir new --image-root gone",
        "convert_checkpoint verify gone",
        "convert_checkpoint mcore2hf gone new",
        "push_to_hub gone org/name --dry-run",
        "chat gone hello",
        "evaluate gone tars",
    ],
)
def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path, words):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "raw.jsonl").write_text(
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'
    )
    (tmp_path / "tars").mkdir()
    (tmp_path / "link").symlink_to("gone")
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, *words.split())
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n  fix: ") == 1
    assert "file: a file" in done.stderr if words.endswith("file") else "gone" in done.stderr.splitlines()[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_runs_is_no_mistake_and_neither_is_a_project_before_its_first(tmp_path):
    (tmp_path / "empty").mkdir()
    for words, said in ((["empty"], "no runs in empty/\n"), ([], "no runs in output/\n")):
        done = run(tmp_path, "list_runs", *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
