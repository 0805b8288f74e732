"""A model card stays valid whatever its run's files say, and says the same from whatever folder it is written."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from llava_sft.checksums import note
from llava_sft.files import write_json
from llava_sft.publish.card import CARD, write_card
from push_to_hub import metadata

TEXTS = [
    "apache-2.0", "no", "1.0", "null", "~", "2026-11-28", "a: b", "it's \"x\" # c", "中文许可证：只用于研究", "x---\ny",
    "a\n---\nb", "---", "- x", "&a *b", "!!python/object:os.system x", "{a}", "%TAG", "@x", "| x", "> y", "\ttab", "\x07", "\u2028",
]  # fmt: skip


@pytest.fixture
def export(tmp_path, small_checkpoint, resolved, monkeypatch) -> Path:
    """An export among the files of its run, whose paths are relative to the project's folder: this one."""
    project = tmp_path / "project"
    export = shutil.copytree(small_checkpoint, project / "output/stage2_sft_vqa_results/huggingface")
    (export / "converted.json").unlink(missing_ok=True)
    monkeypatch.chdir(project)
    earlier, run_dir = project / "output/stage1_align_vqa", project / "output/stage2_sft_vqa"
    for folder, load in ((earlier, "org/Base-4B@main"), (run_dir, "output/stage1_align_vqa/iter_0000100")):
        folder.mkdir()
        write_json(folder / "run.json", resolved | {"start": resolved["start"] | {"load": load}})
    marker = {
        "source": "output/stage2_sft_vqa/iter_0000100",
        "parameters": 1,
        "files": note(export, list(export.iterdir())),
    }
    write_json(export / "converted.json", marker, sealed=True)
    resolved["start"]["load"] = "output/stage1_align_vqa/iter_0000100"
    resolved["data"] |= {"dataset_file": "output/data/vqa/dataset.json", "path": "output/data/vqa"}
    write_json(project / "output/data/vqa/dataset.json", {"train": {"samples": 5000}, "heldout": {"samples": 100}})
    write_json(export.parent / "resolved.json", resolved)
    return export


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_is_valid_metadata_and_read_back(export, resolved, text):
    said = {"license": text, "base_model": text, "language": [text, "zh"]}
    resolved["settings"] |= said
    write_json(export.parent / "resolved.json", resolved)
    write_card(export, "me/x")
    written = (export / CARD).read_text()
    read = ModelCard(written).data.to_dict()  # as the hub's client reads it
    for found in (metadata(written), read):
        assert {key: found[key] for key in said} == said
    assert written.count("\n## ") == 5


def test_a_card_says_the_same_from_every_folder(export, tmp_path, monkeypatch):
    write_card(export, "me/x")
    before = (export / CARD).read_text()
    assert "5,000 training samples" in before and metadata(before)["base_model"] == "org/Base-4B"
    for folder in (export, export.parent, tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        (export / CARD).unlink()
        write_card(export, "me/x")
        assert (export / CARD).read_text() == before, folder


@pytest.mark.parametrize("to_nowhere", [False, True])
def test_a_card_that_knows_nothing_of_the_training_says_what_it_lacks(export, to_nowhere, capsys):
    (export.parent / "resolved.json").unlink()
    run_file = Path("output/stage2_sft_vqa/run.json")
    run_file.unlink()
    if to_nowhere:
        run_file.symlink_to("nowhere")
    assert write_card(export)
    assert capsys.readouterr().out == f"{run_file} is not there: the model card says nothing of the training\n"
    assert "Not recorded." in (export / CARD).read_text()


@pytest.mark.parametrize(
    "name", ["stage2_sft_x", "医学", "a'b", 'a"b', "a b", "a`b", "$(b)", "a\\nb", "<b>", "{{ a }}", "."]
)
def test_any_name_of_a_run_is_text_in_its_code(export, name):
    """An export by hand may come from a folder of any name."""
    marker = yaml.safe_load((export / "converted.json").read_text()) | {"source": f"{name}/iter_0000100"}
    del marker["seal"]
    write_json(export / "converted.json", marker)
    write_card(export)
    text = (export / CARD).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (named,) = [node.value.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assign)
                and getattr(node.targets[0], "id", "") == "model_id"]  # fmt: skip
    assert named == (name if name != "." else export.parent.name)
