"""What each score counts as right, a user's own function, the intervals, and what is said of samples with several turns."""

import random
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest, permutation_test

from helpers import ROOT
from llava_sft.data.records import Sample
from llava_sft.errors import SettingsError, SftError
from llava_sft.evaluation.intervals import compare, design_effect, mean_interval, wilson_interval
from llava_sft.evaluation.judge import (
    Answer,
    group_summaries,
    judge,
    picture_clusters,
    summary,
)
from llava_sft.evaluation.scores import load_score, parse_score
from llava_sft.experiments import Experiments
from llava_sft.inputs import check_inputs
from llava_sft.machine import vllm_interpreter
from llava_sft.settings.layers import load_settings
from llava_sft.workflow import as_words

OPTIONS = {"id": "r1", "question": "What is on the picture, Mr. A. Smith?\nA. a cat\nB. a dog\n(C) neither"}


@pytest.mark.parametrize(
    ("score", "truth", "prediction", "value"),
    [
        ("exact", "Temple", "Temple", True), ("exact", "Temple", "Temple.", False), ("exact", "Temple", "temple", False),
        ("exact", "a  b", "a b", False), ("exact", "3", "", False), ("exact", "3", "13", False),
        ("normalised", "temple", "The Temple.", True), ("normalised", "two", "2", True), ("normalised", "1000", "1,000", True),
        ("normalised", "black white", "black/white", True), ("normalised", "don't", "dont", True), ("normalised", "3", "13", False),
        ("normalised", "0.5", "5", False),
        ("number", "100", "105", True), ("number", "100", "94.9", False), ("number", "0", "0.001", False), ("number", "-3", "3", False),
        ("number:0", "1000", "It is 1,000.", True), ("number", "3", "3 or 4", False), ("number", "0.05", "5 %", True),
        ("number", "5", "The x-axis says 5", True), ("number", "5", "-", False), ("number", "-", "5", False),
        ("number", "-.5", "-0.5", True), ("number", "Paris", "paris", True), ("number", "Route 66", "Highway 66", False),
        ("choice", "B", "(B)", True), ("choice", "a dog", "B", True), ("choice", "B.", "The answer is B, as one sees", True),
        ("choice", "B", "A dog!", True), ("choice", "C", "b", False), ("choice", "A", "a cat or a dog", False),
        ("choice", "D", "D", True), ("choice", "A", "A dog", False),
        ("choice", "B", "**B**", True), ("choice", "B", "B, because it barks", True), ("choice", "B", "I think it is B", True),
        ("choice", "B", "\\boxed{B}", True), ("choice", "C", "**B**", False), ("choice", "B", "It is A dog", True),
        ("anls", "hallo", "Hello", 0.8), ("anls", "abcd", "abyz", 0.5), ("anls:0.6", "abcd", "abyz", 0.0), ("anls", "", "", 1.0),
        ("f1", "A cat", "the cat sat", 2 / 3), ("f1", "我喜欢猫。", "我喜欢狗", 0.75), ("f1", "x", "", 0.0), ("f1", "the", "a", 1.0),
        ("regex", "a.c|d", "abc", True), ("regex", "a.c|d", "abcd", False), ("regex", ".*", "two\nlines", True),
        ("regex:[Aa]nswer: (.*)", "4", "So\nanswer: 4", True), ("regex:[Aa]nswer: (.*)", "4", "4", False),
        ("regex:[Aa]nswer: (.*)", "Answer: 4", "answer: 4", True), ("regex:\\d+", "7 cats", "about 7", True),
    ],
)  # fmt: skip
def test_a_score_is_what_its_definition_says(score, truth, prediction, value):
    found = parse_score(score).rate(prediction, truth, OPTIONS)
    assert found == pytest.approx(value) and isinstance(found, bool) == isinstance(value, bool)


def test_a_question_without_options_has_none_to_choose():
    rate, record = parse_score("choice").rate, {"id": "r1", "question": "What is on the picture?"}
    assert rate("A cat.", "a cat", record) and rate("(b)", "B", record) and not rate("a dog", "a cat", record)


@pytest.mark.parametrize("spelled", ["exakt", "exact:1", "number:5", "anls:", "regex:(", "f1:0.5", "a.txt:f", ""])
def test_a_score_that_there_is_not_is_refused_with_its_rule(spelled):
    with pytest.raises(ValueError, match=r"is none of exact \||a number from 0 to 1|no regular expression"):
        parse_score(spelled)


def own(folder, text: str, name: str = "score") -> str:
    (folder / "own.py").write_text(text)
    return f"{folder}/own.py:{name}"


def test_a_users_function_gets_the_answers_and_if_it_wants_the_record(tmp_path):
    two = load_score(own(tmp_path, "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\n"
                         "def score(prediction, answer):\n    return prediction in answer"))  # fmt: skip
    assert two.rate("a", "cat", OPTIONS) is True
    three = load_score(own(tmp_path, "score = lambda prediction, answer, record: record['weight'] / 2"))
    assert three.rate("a", "cat", OPTIONS | {"weight": 1}) == 0.5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other(a, b): pass", "there is no function score in it"), ("score = 3", "there is no function score in it"),
        ("def score(a): pass", r"does not take \(prediction, answer\)"), ("def score(a, b, *, c): pass", "does not take"),
        ("def score(a, b:", "the file cannot be run: SyntaxError: .* line 1"), ("import nothing_like_it", "No module named"),
        ("raise SystemExit(1)", "the file cannot be run: SystemExit"),
        ("def score(a, b): return 'yes'", "to sample 'r1': ValueError"), ("def score(a, b): return 2", "it returned 2"),
        ("def score(a, b): raise SystemExit(0)", "to sample 'r1': SystemExit: 0"),
        ("def score(a, b): return 1 / 0", "answer 'a' to sample 'r1': ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_users_function_that_does_not_work_is_one_message(tmp_path, text, said):
    with pytest.raises(SftError, match=f"(?s)^evaluate_scores .--scores.: .*own.py:score: .*{said}.*fix: "):
        load_score(own(tmp_path, text)).rate("a", "b", OPTIONS)


def test_an_answer_that_is_no_regular_expression_is_named():
    with pytest.raises(SftError, match="sample r1: its answer is no regular expression: 'a\\('"):
        parse_score("regex").rate("a", "a(", OPTIONS)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_of_a_share_is_that_of_wilson():
    low, high = wilson_interval(81, 263)  # the example of Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 20)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(15, 15)[1] == pytest.approx(1)


def test_difference_of_right_and_wrong_is_paired():
    # Altman et al. 2000, Statistics with Confidence, table 6.2: 14 both, 5 and 0 one alone, 22 neither: 0.011 to 0.226
    found = compare([1] * 14 + [0] * 27, [1] * 19 + [0] * 22)
    assert [round(end, 3) for end in found["interval_of_difference"]] == [0.011, 0.226]
    assert found["difference"] == pytest.approx(5 / 41) and (found["gained"], found["lost"]) == (5, 0)
    assert found["p"] == pytest.approx(2 * 0.5**5)  # McNemar: five of five on one side
    back = compare([1] * 19 + [0] * 22, [1] * 14 + [0] * 27)
    assert [round(end, 3) for end in back["interval_of_difference"]] == [-0.226, -0.011]
    every = compare([0] * 40, [1] * 40)
    assert 0.85 < every["interval_of_difference"][0] < 0.9 and every["interval_of_difference"][1] == 1
    assert compare([1, 0], [1, 0])["p"] == 1


def test_difference_of_other_scores_is_that_of_the_paired_bootstrap():
    rng = random.Random(0)
    before = [rng.random() for _ in range(400)]
    after = [min(1.0, value + rng.random() / 10) for value in before]
    found = compare(before, after)
    assert found == compare(before, after), "the seed is fixed"
    low, high = found["interval_of_difference"]
    error = 1.96 * 0.1 / 12**0.5 / 400**0.5  # of the mean of a uniform variable
    assert low < found["difference"] < high and high - low == pytest.approx(2 * error, rel=0.1) and found["p"] is None
    low, high = mean_interval(before)
    assert high - low == pytest.approx(2 * 1.96 / 12**0.5 / 400**0.5, rel=0.1), "far wider than that of the difference"


def test_values_that_are_all_alike_leave_room_for_those_that_are_not_seen():
    assert mean_interval([0.5] * 60) == pytest.approx(
        (0.5 - 0.5 * 0.0487, 0.5 + 0.5 * 0.0487), abs=1e-4
    )  # 3/60, nearly
    pairs = mean_interval([0.2, 0.8] * 30, [n // 2 for n in range(60)])  # means of the pictures that are all alike
    assert pairs == pytest.approx(mean_interval([0.5] * 30))
    assert mean_interval([0.2, 0.4], [7, 7]) == (0, 1), "one picture says nothing of others"
    low, high = compare([0.5] * 60, [0.4] * 60)["interval_of_difference"]
    assert (low, high) == pytest.approx((-0.1 - 0.9 * 0.0487, -0.1 + 1.1 * 0.0487), abs=1e-4)
    assert compare([0.5] * 6, [0.4] * 6, [1] * 6)["interval_of_difference"] == (-1, 1)


def in_litters(rats: str) -> tuple[list[int], list[int]]:
    values, litters = [], []
    for litter, (alive, size) in enumerate(map(int, pair.split("/")) for pair in rats.split()):
        values += [1] * alive + [0] * (size - alive)
        litters += [litter] * size
    return values, litters


# Weil 1970: rats of each litter that lived, without and with a treatment; table 1 of Rao and Scott 1992.
CONTROL = in_litters("13/13 12/12 9/9 9/9 8/8 8/8 12/13 11/12 9/10 9/10 8/9 11/13 4/5 5/7 7/10 7/10")
TREATED = in_litters("12/12 11/11 10/10 9/9 10/11 9/10 9/10 8/9 8/9 4/5 7/9 4/7 5/10 3/6 3/10 0/7")


def test_samples_that_share_a_picture_make_intervals_wider():
    assert design_effect(*CONTROL) == pytest.approx(1.232495, abs=1e-6)  # as R's PF::rsb says of these rats
    assert design_effect(*TREATED) == pytest.approx(3.952861, abs=1e-6)
    values, litters = TREATED
    low, high = mean_interval(values, litters)
    assert (low, high) == pytest.approx(wilson_interval(112 / 3.952861, 145 / 3.952861), abs=1e-6)
    others = mean_interval([0.01 + 0.98 * value for value in values], litters)  # no longer binary: the bootstrap
    assert others[1] - others[0] == pytest.approx(high - low, rel=0.15)
    assert mean_interval(values, range(145)) == mean_interval(values) == wilson_interval(112, 145)
    assert mean_interval([1] * 30, [n // 10 for n in range(30)]) == pytest.approx(wilson_interval(3, 3))
    assert mean_interval([1, 0], [0, 0])[1] > 0.9, "one picture says next to nothing"


def test_questions_about_one_picture_are_compared_together():
    pictures = [n // 5 for n in range(100)]
    changes = [(0, 1)] * 8 + [(1, 0)] * 2 + [(0, 0)] * 5 + [(1, 1)] * 5  # each picture's five questions alike
    before, after = ([changes[picture][which] for picture in pictures] for which in (0, 1))
    after[:3] = [0, 0, 0]
    alone, together = compare(before, after), compare(before, after, pictures)
    assert together["p"] > alone["p"] > 0
    width, alone_width = (c["interval_of_difference"][1] - c["interval_of_difference"][0] for c in (together, alone))
    assert width > 1.8 * alone_width
    sums = [[sum(v[p * 5 : p * 5 + 5]) for p in range(20)] for v in (before, after)]
    exact = permutation_test(
        sums, lambda a, b, axis: (b - a).sum(axis), permutation_type="samples", n_resamples=2**20, vectorized=True
    )
    assert together["p"] == pytest.approx(exact.pvalue, abs=0.002)
    for d in ((3, 1), (0, 0), (1, 9)):
        pair = [0] * d[0] + [1] * d[1], [1] * d[0] + [0] * d[1]
        mcnemar = binomtest(d[0], sum(d)).pvalue if sum(d) else 1
        assert compare([*pair[0], 1], [*pair[1], 1])["p"] == pytest.approx(mcnemar)


def test_pictures_that_are_linked_by_samples_of_several_are_one_cluster():
    a, b, c, d = b"a", b"b", b"c", b"d"
    asked = [sample("", "x", images=images) for images in ([a], [b], [], [c, b], [d], [c, a], [], [d, d])]
    found = picture_clusters(asked)
    assert [found.index(cluster) for cluster in found] == [0, 0, 2, 0, 4, 0, 6, 4]
    rows = judge(asked, said(*["x"] * 8), [EXACT], "kind")
    assert [row["cluster"] for row in rows] == found and summary(rows, ["exact"])["clusters"] == 4


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(name: str, *answers: str, kind: str | None = None, images: list[bytes] | None = None) -> Sample:
    messages = []
    for number, text in enumerate(answers):
        messages += [{"role": "user", "content": f"{name} {number}?"}, {"role": "assistant", "content": f" {text}\n"}]
    return Sample(name, messages, images or [], {"kind": kind} if kind else {})


def said(*texts: str) -> list[Answer]:
    return [Answer(text, text == "cut") for text in texts]


EXACT, F1 = parse_score("exact"), parse_score("f1")


def test_a_sample_of_several_turns_is_right_when_every_answer_is_and_has_the_mean_of_other_scores():
    asked = [sample("a", "1", "2"), sample("b", "3"), sample("c", "4", "5")]
    rows = judge(asked, said("1", "2", "3", "4", "wrong"), [EXACT, F1], "kind")
    assert [row["correct"] for row in rows] == [True, True, False]
    assert [turn["prediction"] for turn in rows[2]["turns"]] == ["4", "wrong"]
    assert [row["scores"] for row in rows][2] == {"exact": 0, "f1": 0.5}
    assert [turn["question"] for turn in rows[2]["turns"]] == ["c 0?", "c 1?"]
    assert [row["correct"] for row in judge(asked, said("x", "2", "3", "4", "5"), [EXACT], "kind")] == [
        False,
        True,
        True,
    ]


def test_both_models_stand_in_one_row_and_are_compared_by_group():
    asked = [sample(str(n), "x", kind=f"k{n % 2}") for n in range(20)]
    rows = judge(asked, said(*["x"] * 20), [EXACT, F1], "kind", said(*(["x"] * 5 + ["cut"] * 15)))
    assert rows[5]["turns"] == [
        {"question": "5 0?", "answer": "x", "prediction": "x", "cut": False, "base": "cut", "base_cut": True}
    ]
    assert (rows[5]["correct"], rows[5]["base_correct"], rows[5]["base_scores"]) == (True, False, {"exact": 0, "f1": 0})
    exact, f1 = summary(rows, ["exact", "f1"])["scores"]
    assert (exact["mean"], exact["base"], exact["difference"], exact["gained"]) == (1, 0.25, 0.75, 15)
    assert f1["name"] == "f1" and f1["interval"][1] == 1
    groups = group_summaries(rows, ["exact"])
    assert [(name, group["samples"], group["scores"][0]["base"]) for name, group in groups.items()] == [
        ("k0", 10, 0.3), ("k1", 10, 0.2),
    ]  # fmt: skip
    assert summary([], ["exact"]) == {"samples": 0, "correct": 0, "scores": [], "clusters": 0}


# --- the settings -----------------------------------------------------------------------------------------------------


def test_scores_and_vllm_are_checked_before_any_job_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("llava_sft.machine.gpu_count", lambda: 0)
    assert load_settings("vqa", {"evaluate_scores": "anls"}).evaluate_scores == ("anls",)
    with pytest.raises(
        SettingsError, match=r"--config: evaluate_scores: 'exakt': 'exakt' is none of exact \| normalised"
    ):
        load_settings("vqa", {"evaluate_scores": "exakt"})

    def check(**overrides) -> None:
        check_inputs(Experiments(overrides, {}).paths("vqa"))

    good, vllm = own(tmp_path, "def score(a, b): return True"), tmp_path / "python"
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    check(evaluate_scores=["exact", good], evaluate_with="transformers")
    for overrides, said in (
        ({"evaluate_scores": ["exact", f"{tmp_path}/none.py:score"]}, "none.py:score: no such file"),
        ({"evaluate_scores": good.replace(":score", ":rate")}, "there is no function rate"),
        ({"vllm_python": str(vllm)}, "vllm_python: .*/python: no such program"),
        ({"evaluate_with": "vllm", "vllm_python": sys.executable}, "has no vLLM"),
        ({"evaluate_with": "vllm", "vllm_python": "/bin/true"}, "has no vLLM"),
        ({"evaluate_with": "vllm", "vllm_python": str(tmp_path)}, "no such program"),
        ({"evaluate_with": "vllm", "vllm_python": str(broken)}, "cannot be run: Exec format error"),
        ({"evaluate_scores": {"a": 1}}, "input should be a valid list"),
    ):
        with pytest.raises(SettingsError, match=said):
            check(**overrides)
    vllm.write_text("#!/bin/sh\necho vLLM\n")
    vllm.chmod(0o755)
    check(evaluate_with="vllm", vllm_python=str(vllm))
    assert vllm_interpreter(None, vllm) is None, "no GPU"
    monkeypatch.setattr("llava_sft.machine.gpu_count", lambda: 1)
    assert vllm_interpreter(None, vllm) == vllm and vllm_interpreter("transformers", vllm) is None
    with pytest.raises(SettingsError, match="has no vLLM"):
        vllm_interpreter(None, Path(sys.executable))  # whoever names one wants its vLLM
    assert vllm_interpreter(None, None) is None, "not installed here"


def test_a_setting_of_several_values_is_an_option_several_times():
    assert as_words("scores", ("exact", "regex:a (.*)")) == ["--scores=exact", "--scores='regex:a (.*)'"]
    assert as_words("vllm-python", None) == [] and as_words("by", "kind") == ["--by=kind"]
