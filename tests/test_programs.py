"""`make test-consumers` itself, without a program: what counts as equal, what fails, and that the pins are pins."""

import json
import sys
from pathlib import Path

import pytest

from programs.__main__ import Exam, Outcome, ask, judge, rows_of
from programs.environments import HERE, PROGRAMS, Program, environment

EXAM = Exam("embedded", Path("export"), [[], [], []], ["4", "even", "12"], ["4", "odd", "12"])


def found(*answers, **checks):
    return {"answers": list(answers), "called": "f()", "versions": {"vllm": "1"}, "checks": checks}


def test_another_answer_fails_in_float32_and_lowers_the_share_in_bfloat16():
    exact = judge(EXAM, "float32", found("4<|im_end|>", "odd", "12"))
    assert (exact.equal, exact.asked, exact.problems) == (2, 3, ["'odd' for 'even'"])
    rounded = judge(EXAM, "bfloat16", found("4", "odd", "12"))
    assert rounded.problems == [] and rounded.score == pytest.approx(1 / 3)
    share = rows_of({"vLLM": [rounded]}, {})[2]
    assert share["value"] == pytest.approx(2 / 3, abs=1e-3) and share["goal"] is None


def test_questions_that_a_program_has_no_form_for_are_not_counted_and_wrong_calls_are():
    outcome = judge(EXAM, "float32", found("4", None, "12", merged="logits differ", layers=""))
    assert (outcome.equal, outcome.asked, outcome.score) == (2, 2, 0)
    assert outcome.problems == ["merged: logits differ"] and "1 of 2 other calls right" in outcome.notes


def test_what_cannot_be_installed_is_counted_apart():
    good, bad = (Outcome("tiny", "float32", n, 3, None, "f()", ["x"] * (3 - n), []) for n in (3, 2))
    passed, missing, *_ = rows_of({"A 1": [good], "B 2": [bad]}, {"C 3": "no such package"})
    assert passed["value"] == 0.5 and "not: B 2" in passed["note"]
    assert missing["value"] == 1 and missing["note"] == "C 3: no such package"


def test_a_program_that_dies_has_its_last_error_as_the_problem_and_an_answer_is_kept(tmp_path):
    (tmp_path / "export").mkdir()
    exam = EXAM._replace(export=tmp_path / "export")
    script, job = tmp_path / "script.py", (Path(sys.executable), exam, "float32", tmp_path)
    script.write_text("print('loading')\nraise KeyError('visual')\n")
    program = Program("dies", str(script), ())
    assert ask(program, *job).problems == ["KeyError: 'visual'"]
    answer = f"import sys; open(sys.argv[2], 'w').write({json.dumps(found('4', 'even', '12'))!r}); open('asked', 'a').write('x')"
    script.write_text(answer)
    assert [ask(program, *job).equal for _ in range(2)] == [3, 3]
    assert (tmp_path / "asked").read_text() == "x"
    (tmp_path / "export/config.json").write_text("another export")
    assert ask(program, *job).equal == 3 and (tmp_path / "asked").read_text() == "xx"


def test_an_environment_is_used_again_while_its_pins_stay(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "programs.environments._uv",
        lambda *args: (calls.append(args), args[-1].mkdir(parents=True) if args[0] == "venv" else None),
    )
    assert environment(tmp_path, ("a==1",)) == environment(tmp_path, ("a==1",)) != environment(tmp_path, ("a==2",))
    assert [call[0] for call in calls] == ["venv", "pip"] * 2


def test_every_program_has_a_script_and_pins():
    for program in PROGRAMS:
        assert (HERE / program.script).is_file()
        assert "==" in program.pins[0] and program.pins[0].split("==")[1] in program.name
