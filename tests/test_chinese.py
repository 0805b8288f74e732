"""What pages quote from other parts has a Chinese version, with the same values; a user's own names stay as they are."""

import ast
import re

import pytest

from helpers import SCRIPTS
from helpers.reports import EVERYTHING, ReportOfARun, text_of
from llava_sft.data import other_forms
from llava_sft.data.index import leak_note
from llava_sft.data.inspect import CHANGED
from llava_sft.evaluation.scores import explained
from llava_sft.report.inspection import inspection_page
from llava_sft.report.language import detailed, messages, quoted

# By file, the functions whose texts end on a page.
QUOTED = {
    "preflight.py": ("length_warning", "notes_of"), "llava_sft/settings/resolve.py": ("warnings",), "llava_sft/preflight/predict.py": ("needless_parallelism",),
    "llava_sft/data/index.py": ("leak_note", "unread_note"),
}  # fmt: skip
SCORES = ("exact", "normalised", "number", "choice", "anls", "f1", "regex", "regex:(a)", "mine.py:score")


def texts(node: ast.AST) -> list[str]:
    """The texts that an expression may be, with {} for its values."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)]
    return [*texts(node.body), *texts(node.orelse)] if isinstance(node, ast.IfExp) else []


def said() -> set[str]:
    found = set(other_forms.UNSUPPORTED)
    for name, functions in QUOTED.items():
        for function in ast.walk(ast.parse((SCRIPTS / name).read_text())):
            if isinstance(function, ast.FunctionDef) and function.name in functions:
                whole = [node for statement in function.body[1:] for node in ast.walk(statement)]
                parts = {
                    part
                    for node in whole
                    if isinstance(node, ast.JoinedStr | ast.IfExp)
                    for part in ast.walk(node)
                    if part is not node
                }
                found |= {text for node in whole if node not in parts for text in texts(node) if len(text) > 40}
    for path in (SCRIPTS / "llava_sft/data").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            name = getattr(call, "func", None)
            if isinstance(call, ast.Call) and getattr(name, "id", "") == "Rejected":
                found |= set(texts(call.args[0]))
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(
                ("findings.notes.append", "findings.problem")
            ):
                found |= set(texts(call.args[-1]))
    return found | {CHANGED} | {explained(score) for score in SCORES}


def test_every_quoted_message_has_a_chinese_one_with_the_same_values():
    english = [pattern.pattern.replace("(.*?)", "{}").replace("\\", "") for pattern, _ in messages()]
    for text in said():
        pattern = re.compile(re.escape(text).replace(r"\{\}", "(.*?)"), re.DOTALL)
        part_of_one = any(text in known or pattern.fullmatch(known) for known in english)
        assert part_of_one or quoted(text, "zh") != text, text
    for pattern, chinese in messages():
        assert sorted(re.findall(r"\{(\d)\}", chinese)) == [str(n) for n in range(pattern.groups)], pattern.pattern


def details() -> set[tuple[str, str]]:
    """Reason and detail of each reject, with {} for values; but for details that are values alone."""
    calls = (
        node for path in (SCRIPTS / "llava_sft/data").glob("*.py") for node in ast.walk(ast.parse(path.read_text()))
    )
    rejects = [call for call in calls if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Rejected"]
    pairs = {
        (one, two) for call in rejects if call.args[1:] for one in texts(call.args[0]) for two in texts(call.args[1])
    }
    return {(reason, detail) for reason, detail in pairs if re.search("[a-z]", detail.replace("{}", ""))}


def test_what_is_said_beside_the_reason_of_a_reject_has_a_chinese_version_with_the_same_values():
    assert len(details()) > 50
    for reason, detail in details():
        reason, detail = (text.replace("{}", "%c") for text in (reason, detail))
        reason, detail = (f"{reason}\0{detail}" % tuple("①②③④⑤⑥⑦"[: (reason + detail).count("%c")])).split("\0")
        chinese = detailed(detail, reason, "zh")
        assert chinese != detail and set(re.findall("[①-⑦]", detail)) == set(re.findall("[①-⑦]", chinese)), (
            reason,
            detail,
        )
    for pattern, chinese in messages("zh_details.yaml"):
        assert set(re.findall(r"\{(\d)\}", chinese)) <= {str(n) for n in range(pattern.groups)}, pattern.pattern


def test_a_value_of_the_record_that_is_the_whole_detail_stays_as_it_is():
    for reason, detail in (
        ("empty image", "other"),
        ("zero-byte image", "turn 3"),
        ("empty question", "answer"),
        ("not an image", "a b"),
    ):
        assert detailed(detail, reason, "zh") == detail


def test_a_chinese_report_quotes_in_chinese_and_leaves_the_users_names(tmp_path):
    run = ReportOfARun(tmp_path)
    settings = run.inputs["resolved"]["settings"] | {"report_language": "zh"}
    dataset = run.inputs["dataset"] | {
        "heldout_trained_on": {"records": 1, "images": 2, "of": 4}, "reasons": {"missing image": 3}, "kinds": {"run": 2, "language": 1},
    }  # fmt: skip
    warning = "lr 0.001 is outside 1e-6 … 5e-5, the range for trained LLM weights: 5e-6 or 1e-6 if the loss is unstable, 2e-5 or 5e-5 if it falls too slowly"
    prediction = run.inputs["prediction"] | {"warnings": [warning, leak_note(dataset)]}
    text = text_of(run(*EVERYTHING, resolved={"settings": settings}, dataset=dataset, prediction=prediction))
    for expected in (
        "4 个留出样本中有 1 个也在训练集里（25.0%，",
        "lr 0.001 不在 1e-6 … 5e-5",
        "找不到图片 3",
        "run 2",
        "language 1",
        "首尾空白不计",
    ):
        assert expected in text, expected
    assert text.count("个留出样本中有 1 个") == 1


@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_inspection_names_kinds_as_the_data_does(language):
    report = {
        "path": "x", "ok": True, "kinds": {"run": {"train": 1}, "training": {"train": 2}}, "scripts": {"Chinese": 3}, "splits": {}, "distributions": {},
        "notes": ["7 samples are excluded: training does not see them where they lie"], "checks": [], "duplicates": {},
        "problems": [{"check": "samples", "where": "0.tar", "what": "empty answer: turn 2"}],
        "rejects": {"read": 1, "rejected": 1, "reasons": {"empty answer": 1}, "first": [
            {"file": "raw.jsonl", "line": 3, "id": "r", "reason": "missing image", "detail": "跑.png is a folder"}]},
    }  # fmt: skip
    text = text_of(inspection_page(report, [], language))
    assert "run 1" in text and "training 2" in text
    wanted = (
        ("中文 3", "有 7 个样本被排除", "回答为空 1", "回答为空：第 2 轮", "跑.png 是文件夹")
        if language == "zh"
        else ("Chinese 3", "7 samples are excluded", "empty answer 1", "missing image 跑.png is a folder")
    )
    assert all(each in text for each in wanted)
