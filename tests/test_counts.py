"""What a message counts is singular where there is one: in errors, on the terminal, on pages, in English and Chinese."""

import ast
import re

import pytest

from helpers import SCRIPTS
from helpers.reports import EVERYTHING, ReportOfARun, text_of
from llava_sft.data.records import parse_record
from llava_sft.data.rejects import Rejected, too_many_rejects
from llava_sft.errors import many, verb_of
from llava_sft.report.language import detailed, quoted
from snakemake_logger_plugin_llava_sft.state import State

NOUNS = (
    "answers|cells|characters|checkpoints|columns|cores|epochs|files|folders|images|jobs|keys|layers|lines|nodes|packs|"
    "parts|pictures|placeholders|points|processes|questions|records|rows|runs|samples|sequences|settings|shards|steps|tars|"
    "tensors|times|turns|values|weights|workers"
)
COUNTED = re.compile(rf" (?:[a-z-]+ )?({NOUNS})\b")
# Counts of which there are always several, and those of which people say `1.00 epochs`.
SEVERAL = {
    "MAX_NODES", "count} checkpoints", "pp - 1} stages", "counts['epochs']", "parameter_count", "len(counts)", "len(starts)",
    "first} of", "len(found)} files", "self.node.nodes", "times} times", "len(text)", "named[name]", "sum(pieces)",
    "leak['of']", "language.num_layers", "url.hostname", "PACKS_AT_ONCE", "count} images", "number} times", "counts['train']", "COLOURS", "count} nodes",
}  # fmt: skip


def counts_by_hand(tree: ast.AST) -> list[str]:
    """Formatted values that a plural follows, but for those in an expression that asks whether it is one."""
    asked = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.IfExp) and re.search(r"[=!]= ?1\b", ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        for value, text in zip(node.values, node.values[1:], strict=False) if isinstance(node, ast.JoinedStr) else ():
            if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant) and node not in asked:
                counted = COUNTED.match(str(text.value))
                if counted and not re.match(r"many\(", ast.unparse(value.value)):
                    found.append(f"{ast.unparse(value.value)}}}{counted[0]}")
    return found


def test_messages_count_with_many():
    paths = [
        path
        for path in SCRIPTS.rglob("*.py")
        if not {"preflight", "preflight.py", "hf"} & set(path.relative_to(SCRIPTS).parts)  # hf: code of the exports
    ]
    found = {f"{path.name}: {each}" for path in paths for each in counts_by_hand(ast.parse(path.read_text()))}
    unknown = {each for each in found if not any(known in each for known in SEVERAL)}
    assert unknown == set(), "write {many(count, 'noun')}, or with a verb {many(count, 'noun', 'are')}"
    assert counts_by_hand(ast.parse("f'{done} steps'")) == ["done} steps"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (many(1, "tensor", "are"), "1 tensor is"),
        (many(0, "record"), "0 records"),
        (many(2000, "process"), "2,000 processes"),
        (many(1, "process"), "1 process"),
        (many(1, "sample", "were"), "1 sample was"),
        (many(1, "image", "repeat"), "1 image repeats"),
        (many(3, "image", "repeat"), "3 images repeat"),
        (verb_of(1, "have"), "has"),
    ],
)
def test_one_is_singular(said, expected):
    assert said == expected


def test_the_records_that_were_rejected_are_counted_as_they_should_be():
    for rejected, read, expected in (
        (1, 1, "1 of 1 record was"),
        (1, 3, "1 of 3 records was"),
        (2, 3, "2 of 3 records were"),
    ):
        assert f"{expected} rejected;" in too_many_rejects(rejected, read, 0, ["x"], "here").problem


def test_jobs_on_the_terminal():
    state = State(set())
    state.first["train"] = 0.0
    state.counts["train"] = 1
    assert state.far("train").startswith("0 of 1 job") and not state.far("train").startswith("0 of 1 jobs")
    state.counts["train"] = 4
    assert state.far("train").startswith("0 of 4 jobs")


PLACEHOLDERS = {
    "<image><image>": ("2 <image>, 1 image", "2 个 <image>，1 张图片"),
    "": ("0 <image>, 1 image:", "0 个 <image>，1 张图片："),
}


@pytest.mark.parametrize("asked", PLACEHOLDERS)
def test_one_picture_in_english_and_chinese(asked):
    turns = [{"from": "human", "value": f"{asked}a"}, {"from": "gpt", "value": "b"}]
    with pytest.raises(Rejected) as error:
        parse_record({"image": "a.png", "conversations": turns})
    english, chinese = PLACEHOLDERS[asked]
    assert error.value.detail.startswith(english)
    assert detailed(error.value.detail, error.value.reason, "zh").startswith(chinese)
    with pytest.raises(Rejected, match="3 <image>, 2 images"):
        parse_record(
            {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image>" * 3}, turns[1]]}
        )


def test_one_sample_that_is_held_out_in_chinese():
    for count, english in ((1, "1 sample is {}: training skips it"), (7, "7 samples are {}: training skips them")):
        for why in ("held out by val_fraction", "left out by the folder's own index or as unusable"):
            assert quoted(english.format(why), "zh").startswith(f"有 {count} 个样本")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_report_of_one(tmp_path, language):
    run = ReportOfARun(tmp_path)
    settings = run.inputs["resolved"]["settings"] | {"report_language": language}
    forecast = run.inputs["prediction"]["prediction"] | {"recorded_runs": 1}
    changes = {
        "resolved": {"settings": settings},
        "dataset": {"read": 1, "rejected": 1},
        "evaluation": {"samples": 1, "correct": 0, "answers": 9, "cut": 1, "max_new_tokens": 32, "clusters": 1},
        "prediction": {"prediction": forecast},
    }
    text = text_of(run(*EVERYTHING, **changes))
    english = (
        "rejected of 1 record ",
        "1 question of the split val",
        "From 1 recorded run.",
        "1 of 9 answers was cut after 32 tokens",
    )
    chinese = ("条被拒，共读取 1 条记录", "val 部分的 1 个问题", "依据 1 次实测运行。")
    for expected in english if language == "en" else chinese:
        assert expected in text, expected
    many_text = text_of(run(*EVERYTHING, resolved={"settings": settings}))
    assert language == "zh" or ("rejected of 11 records" in many_text and "From 10 recorded runs." in many_text)
