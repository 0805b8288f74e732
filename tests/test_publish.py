"""The model card says what the run's files say and runs as it stands; what is pushed to the hub, and what is refused."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import push_to_hub
from helpers import ROOT, SCRIPTS
from helpers.hub import serving
from llava_sft.checkpoint.start import Start
from llava_sft.checkpoint.verify import verify
from llava_sft.checksums import note
from llava_sft.files import write_json
from llava_sft.publish import card
from llava_sft.publish.card import CARD, is_ours, write_card


@pytest.fixture
def export(tmp_path, small_checkpoint, resolved, monkeypatch) -> Path:
    """An export among the files of its run: two sources, and an evaluation."""
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "output/stage2_sft_vqa_results"
    export = shutil.copytree(
        small_checkpoint, results / "huggingface", ignore=shutil.ignore_patterns(".*", "converted.json")
    )
    write_json(export / "parity.json", {"passed": True, "samples": [{"sample": "patient 7"}]})
    marker = {"source": "output/stage2_sft_vqa/iter_0000100", "parameters": 1_234_567, "depends": "this export"}
    write_json(
        export / "converted.json",
        marker | {"files": note(export, list(export.iterdir()))},
        sealed=True,
    )
    resolved["settings"] |= {"license": "cc-by-4.0", "language": ["en", "zh"]}
    resolved["start"]["load"] = "org/Base-4B@main"
    resolved["data"] |= {"dataset_file": "dataset.json", "path": "wds/metadataset.yaml"}
    write_json(results / "resolved.json", resolved)
    dataset = {
        "train": {"samples": 5000}, "heldout": {"samples": 100}, "images": 7000, "read": 5110, "rejected": 10,
        "weights": {"plants": 2.0, "a|b": 1.0}, "kinds": {"<b>x": 5, "y": 7},
    }  # fmt: skip
    write_json(tmp_path / "dataset.json", dataset)
    score = {
        "name": "/home/me/own.py:rate", "mean": 0.8, "interval": [0.7, 0.9], "base": 0.1, "difference": 0.7,
        "interval_of_difference": [0.6, 0.8],
    }  # fmt: skip
    groups = {name: {"correct": 1, "samples": 50, "scores": [score | {"mean": 0.5}]} for name in ("y", "<b>x")}
    evaluation = {
        "samples": 100,
        "correct": 80,
        "scores": [score],
        "groups": groups,
        "max_new_tokens": 32,
        "cut": 7,
        "answers": 90,
    }
    evaluation["model"] = "this export"
    write_json(results / "evaluation.json", evaluation)
    return export


def metadata(export: Path) -> dict:
    return yaml.safe_load((export / CARD).read_text().split("---\n")[1])


def test_the_card_says_what_the_runs_files_say(export):
    assert write_card(export, "me/plants-4b")
    text = (export / CARD).read_text()
    assert metadata(export) == {
        "license": "cc-by-4.0", "language": ["en", "zh"], "base_model": "org/Base-4B", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["llava-onevision-1.5"],
    }  # fmt: skip
    for said in (
        "# plants-4b", "1,234,567 parameters", "[org/Base-4B](https://huggingface.co/org/Base-4B)", "| plants | 2 | – |",
        r"| a\|b | 1 | – |", "5,000 training samples; 100 held out. 7,000 pictures. 10 of 5,110 records were rejected.",
        "y (7), &lt;b>x (5)", "| lr | 0.0001 |", "| trainable_modules | vision_model, language_model, adapter |",
        "| all | own.py:rate | 100 | 80.0 % (70.0 % to 90.0 %) | 10.0 % | +70.0 (+60.0 to +80.0) |\n| &lt;b>x |",
        "| &lt;b>x | own.py:rate | 50 | 50.0 %", "7 of 90 answers were cut", "between 3,136 and 50,000 pixels",
        "vllm serve me/plants-4b", "chat.py me/plants-4b",
    ):  # fmt: skip
        assert said in text, said
    assert "No licence" not in text and str(Path.cwd()) not in text and "patient" not in text


def test_the_card_of_a_run_with_lora_says_that_its_pairs_are_merged(export, resolved):
    parts = {"trainable_modules": ["language_model"], "lora_rank": 8, "lora_modules": ["language_model"]}
    write_json(export.parent / "resolved.json", resolved | {"settings": resolved["settings"] | parts})
    assert write_card(export)
    text = (export / CARD).read_text()
    assert re.search(
        r"\. It was trained by LoRA of rank 8 \([\d,]+ parameters\), which is merged into these weights\.", text
    )
    assert "| lora_rank | 8 |" in text and "| lr_vision" not in text and "| lr_adapter" not in text


def test_its_code_runs_as_it_stands(export, capsys):
    write_card(export, str(export))
    (needed,) = re.findall(r'NEEDED_TRANSFORMERS = "(.*)"', (export / "configuration_llavaonevision1_5.py").read_text())
    assert f"needs transformers {needed} or newer" in (export / CARD).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", (export / CARD).read_text(), re.DOTALL)
    Image.linear_gradient("L").resize((56, 56)).save("picture.png")
    exec(code.replace("256", "3"), {})
    assert capsys.readouterr().out.strip()


def test_the_guide_has_the_same_code_and_options_that_there_are(export):
    write_card(export, "output/stage2_sft_vqa_results/huggingface")
    (code,) = re.findall(r"```python\n(.*?)```", (export / CARD).read_text(), re.DOTALL)
    code = code.replace("What is in this picture?", "Which digit is this?").replace(
        "picture.png", "output/demo/images/digit_0003.png"
    )
    blocks = []
    for name in ("use.md", "use_zh.md"):
        text = (ROOT / "docs" / name).read_text()
        assert code in text
        blocks.append(
            [re.sub(r" *#.*|…[^…]*…", "", block) for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)]
        )
        for script, line in re.findall(r"workflow_scripts/(\w+\.py)(.*)", text):
            options = set(re.findall(r" (--[a-z-]+)", line.partition("#")[0]))
            assert options <= set(re.findall(r'"(--[a-z-]+)"', (SCRIPTS / script).read_text())), line
    assert blocks[0] == blocks[1]


def test_what_is_not_known_is_not_made_up(export, capsys):
    for name in ("resolved.json", "evaluation.json"):
        (export.parent / name).unlink()
    write_card(export)
    text = (export / CARD).read_text()
    assert metadata(export).keys() == {"library_name", "pipeline_tag", "tags"}
    assert text.count("Not recorded.") == 2 and "Not evaluated" in text and "No licence is stated" in text
    assert "`a checkpoint that is not recorded`" in text


def test_a_merge_among_the_files_of_a_run_is_not_of_that_run(export):
    marker = json.loads((export / "converted.json").read_text()) | {"source": "models/Base-4B"}
    write_json(export / "converted.json", marker, sealed=True)
    write_card(export)
    assert metadata(export).keys() == {"library_name", "pipeline_tag", "tags"}
    text = (export / CARD).read_text()
    assert text.count("Not recorded.") == 2 and "`a checkpoint that is not recorded`" in text


def test_scores_of_another_export_are_not_the_cards(export):
    path = export.parent / "evaluation.json"
    evaluation = json.loads(path.read_text())
    earlier = {
        key: value for key, value in evaluation.items() if key not in ("model", "scores")
    }  # of an earlier version
    for content, old, shown in (
        (evaluation | {"model": "x"}, False, False),
        (earlier, False, True),
        (earlier, True, False),
    ):
        write_json(path, content)
        if old:
            os.utime(path, (0, 0))
        write_card(export)
        text = (export / CARD).read_text()
        assert ("Not evaluated" not in text) is ("| all | exact | 100 | 80.0 % (71.1 % to 86.7 %) |" in text) is shown


def test_an_edited_card_stays_and_ours_is_written_again(export, capsys):
    write_card(export)
    assert is_ours((export / CARD).read_text()) and write_card(export, "me/x")
    assert "whole" in verify(export), "the card is no part of what the checksums cover"
    edited = (export / CARD).read_text().replace("## Limits", "## Limits\n\nOnly for plants.")
    (export / CARD).write_text(edited)
    assert not write_card(export) and (export / CARD).read_text() == edited
    assert "edited, and left as it is" in capsys.readouterr().out


def test_the_origin_is_found_through_earlier_runs(tmp_path, resolved):
    def origin(load: object, *notes: str) -> str | None:
        return card.base_model(Start.model_validate(resolved["start"] | {"load": str(load), "notes": notes}))

    assert origin("org/name@rev") == origin("org/name", "org/name names no revision: commit 1") == "org/name"
    assert origin("some/folder") is None, "gone, and no id on the hub"
    assert origin("/data/me@site/Base-4B") is None, "an @ in a path is no revision"
    first, second = tmp_path / "stage1_align_x", tmp_path / "stage2_sft_x"
    for run_dir, load in ((first, "org/name@rev"), (second, first / "iter_0000100")):
        run_dir.mkdir()
        write_json(run_dir / "run.json", resolved | {"start": resolved["start"] | {"load": str(load)}})
    assert origin(second) == "org/name"
    write_json(first / "run.json", resolved | {"start": resolved["start"] | {"load": str(second)}})
    assert origin(second) is None, "a circle ends"


# --- push_to_hub.py -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


def push(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *map(str, words)])
    try:
        push_to_hub.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_what_is_shown_is_uploaded_privately_and_again_without_the_weights(export, hub, monkeypatch, capsys):
    assert push(monkeypatch, export.parent, "me/plants", "--dry-run") == 0
    shown = re.findall(r"MB  (\S+)", capsys.readouterr().out)
    assert hub.repositories == {} and {"README.md", "model.safetensors", "config.json", "chat_template.jinja"} <= set(
        shown
    )
    assert not {"converted.json", "parity.json"} & set(shown)
    monkeypatch.chdir(export)  # the files of its run are found from there
    assert push(monkeypatch, ".", "me/plants") == 0
    monkeypatch.chdir(export.parents[2])
    said = capsys.readouterr()
    assert "private, a new repository" in said.out and "warning" not in said.out + said.err
    found = hub.repositories["me/plants"]
    assert found["private"] and sorted(found["files"]) == sorted(shown)
    assert found["files"]["model.safetensors"] == (export / "model.safetensors").read_bytes()
    assert "# plants" in found["files"]["README.md"].decode()
    found["files"]["model-00001-of-00002.safetensors"] = b"of an earlier, larger model"
    found["files"] |= {"adapter_config.json": b"{}", "adapter_model.safetensors": b"of an earlier adapter"}
    assert push(monkeypatch, export, "me/plants") == 0
    said = capsys.readouterr().out
    for stale in ("model-00001-of-00002.safetensors", "adapter_config.json", "adapter_model.safetensors"):
        assert f"deleted there: {stale}" in said
    assert sorted(found["files"]) == sorted(shown) and len(hub.uploaded) == 1


def test_an_interrupted_upload_goes_on_with_the_same_command(export, hub, monkeypatch, capsys):
    hub.break_after = 0
    assert push(monkeypatch, export, "me/plants") == 1
    said = capsys.readouterr().err
    assert "the same command goes on" in said and "Traceback" not in said
    hub.break_after = None
    assert push(monkeypatch, export, "me/plants") == 0
    assert "model.safetensors" in hub.repositories["me/plants"]["files"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no export", "no export in it"), ("damaged", "damaged since it was written"), ("name", "no name of a repository"),
        ("dots", "no name of a repository"), ("dash", "no name of a repository"),
        ("no token", "no token"), ("wrong token", "401"), ("not mine", "403"), ("public already", "is public already"),
        ("private already", "is private already"), ("unreachable", "cannot be reached"), ("metadata", "is no YAML"),
        ("offline", "HF_HUB_OFFLINE=0"), ("no checksums", "no checksums are noted"), ("refused card", "the metadata of README.md: - license is not allowed"), ("hub down", "(503): not now"),
        ("too many", "(429): not now"),
    ],
)  # fmt: skip
def test_what_cannot_be_pushed_is_one_message(export, hub, monkeypatch, capsys, tmp_path, case, message):
    words = {
        "no export": [tmp_path, "me/x"],
        "name": [export, "plants"],
        "dots": [export, "me/a..b"],
        "dash": [export, "me/-b"],
        "not mine": [export, "others/x"],
    }.get(case, [export, "me/x"])
    hub.repositories["me/x"] = {"private": case == "private already", "files": {}}
    if not case.endswith("already"):
        hub.repositories.clear()
    if case == "damaged":
        (export / "config.json").write_text("{}")
    if case == "no token":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    if case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    if case == "unreachable":
        hub.close()
    if case == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if case == "refused card":
        hub.card_errors = ["license is not allowed"]
    if case == "no checksums":
        write_json(export / "converted.json", {"source": "x"})
    if case in ("hub down", "too many"):
        hub.refuses = lambda request: 503 if case == "hub down" else 429
    if case == "metadata":
        (export / CARD).write_text("---\na: [\n---\n")
    before = {path: path.read_bytes() for path in export.iterdir()}
    assert push(monkeypatch, *words, *(["--public"] if case == "private already" else [])) == 1
    said = capsys.readouterr().err
    if case not in ("not mine", "metadata", "refused card"):  # which the hub says last
        assert before == {path: path.read_bytes() for path in export.iterdir()}
    assert message in said and "\n  fix: " in said and "Traceback" not in said
    assert not any(repository["files"] for repository in hub.repositories.values())


def test_a_missing_licence_and_a_missing_comparison_are_warnings(export, hub, monkeypatch, capsys):
    resolved = json.loads((export.parent / "resolved.json").read_text())
    del resolved["settings"]["license"]
    write_json(export.parent / "resolved.json", resolved)
    write_json(export / "parity.json", {"passed": None})
    marker = json.loads((export / "converted.json").read_text())
    write_json(
        export / "converted.json",
        {
            "source": marker["source"],
            "parameters": 1,
            "files": note(export, [export / "parity.json", export / "config.json"]),
        },
    )
    assert push(monkeypatch, export, "me/plants", "--public") == 0
    said = capsys.readouterr().out
    assert said.count("warning: ") == 2 and "states no licence" in said and not hub.repositories["me/plants"]["private"]
