"""The pages in a real browser, English and Chinese: what moves on them, and no error, no request, nothing wider than a phone.

LLAVA_SFT_SCREENSHOTS=FOLDER keeps pictures of what the browser showed.
"""

import ast
import asyncio
import os
import re
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import compare_runs
import list_runs
import report
from helpers import SCRIPTS
from helpers.browser import Browser
from helpers.reports import ReportOfARun, answer, step, text_of, validation, write_lines
from helpers.webdatasets import picture
from llava_sft.data.findings import IMAGES, INDEX, SAMPLES, SHARDS, VALUES
from llava_sft.data.records import Sample
from llava_sft.files import file_fingerprint, read_json, write_json
from llava_sft.report.charts import CHARTS
from llava_sft.report.html import make_environment
from llava_sft.report.language import chinese, spoken

PAGES = SCRIPTS / "llava_sft/report"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
BETTER = {"base": 0.1, "difference": 0.6, "interval_of_difference": [0.4, 0.7], "p": 0.0, "gained": 40, "lost": 4}


def messages() -> set[str]:
    """Every text that a template or a script says."""
    found = {*VALUES, INDEX, SHARDS, SAMPLES, IMAGES, *(title for _, title, *_ in CHARTS)}
    for path in PAGES.glob("*.j2"):
        for _, _, texts in make_environment("en").extract_translations(path.read_text(), ("_", "gettext", "ngettext")):
            found |= {text for text in ((texts,) if isinstance(texts, str) else texts) if text}
    for path in SCRIPTS.rglob("*.py"):
        text = path.read_text()
        for call in ast.walk(ast.parse(text)) if "report.language import" in text else ():
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "say":
                found |= {each.value for each in call.args[:1] if isinstance(each, ast.Constant)}
    return found


def test_every_message_has_a_chinese_one_with_the_same_values():
    table = chinese()
    assert messages() - table.keys() == set()
    placeholders = re.compile(r"%\(\w+\)s|%%|\{\w+\}|</?(?!i>)\w+>|`[^`]+`")
    for english, translated in table.items():
        assert sorted(placeholders.findall(english)) == sorted(placeholders.findall(translated)), english


def test_the_language_is_the_one_asked_for_or_that_of_the_locale():
    assert spoken("auto", {"LANG": "zh_CN.UTF-8"}) == spoken("zh", {}) == "zh"
    assert (
        spoken("auto", {"LC_ALL": "C", "LANG": "zh_CN.UTF-8"})
        == spoken("en", {"LANG": "zh_CN"})
        == spoken("auto", {})
        == "en"
    )


@pytest.fixture
def run(tmp_path, monkeypatch) -> ReportOfARun:
    samples = [Sample(str(n), [], [picture(size=(56, 56))], {}) for n in range(60)]
    monkeypatch.setattr(report, "read_split", lambda data, split: samples)
    monkeypatch.setenv("LC_ALL", "C")
    made = ReportOfARun(tmp_path)
    write_lines(made.run_dir / "metrics.jsonl", [step(5 * n, 30 / n + n % 3) for n in range(1, 9)])
    write_lines(made.run_dir / "validation.jsonl", [validation(10 * n, 20 / n) for n in range(1, 5)])
    return made


def page_of(run: ReportOfARun, language: str = "auto") -> str:
    answers = [
        answer(n >= 10, base="3" if n < 4 else "7", id=str(n), question=f"<image>\nWhich number is {n}?")
        for n in range(60)
    ]
    scores = [{"name": "exact", "mean": 50 / 60, "interval": [0.7, 0.9], **BETTER}]
    found = {"samples": 60, "correct": 50, "scores": scores, "base": {"name": "start", "cut": 0}}
    asked = {
        "data": {"path": "webdatasets"},
        "settings": run.inputs["resolved"]["settings"] | {"report_language": language},
    }
    page = run("prediction", "dataset", "train-done", "evaluation", answers=answers, evaluation=found, resolved=asked)
    (run.folder / "report.html").write_text(page)
    return (run.folder / "report.html").as_uri()


def browse(folder: Path, url: str, story: Callable[[Browser], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with Browser(CHROMIUM, folder / "profile") as browser:
            await browser.screen(1100, 900)
            await browser.do("Page.navigate", url=url)
            drawn, boxes = (f"document.querySelectorAll('{what}').length" for what in (".plot svg", "[data-curve]"))
            await browser.until(f"{boxes} && {drawn} == {boxes}")
            await story(browser)
            assert browser.errors == []
            assert {address for address in browser.requested if not address.startswith("data:")} == {url}

    asyncio.run(whole())


async def keep(browser: Browser, name: str) -> None:
    if folder := os.environ.get("LLAVA_SFT_SCREENSHOTS"):
        await browser.screenshot(Path(folder) / f"{name}.png")


@in_a_browser
def test_curves_are_read_smoothed_and_rescaled_and_answers_filtered_and_searched(run, tmp_path):
    async def story(browser: Browser) -> None:
        facts = "document.querySelector('[data-curve] .facts').textContent"
        assert (
            await browser.value("document.querySelectorAll('.plot')[0].querySelectorAll('.mark-symbol path').length")
            > 8
        ), "few points: each is drawn"
        before = await browser.value(facts)
        await browser.value("document.querySelector('.plot').focus()")
        await browser.key("End")
        assert await browser.value(facts) == "step 40 · training 5.75 · held out 5"
        await browser.value("smoothing.value = 0.6; smoothing.dispatchEvent(new Event('input'))")
        await browser.until(f"{facts} == {before!r}")
        await browser.key("Home")
        await browser.key("ArrowRight")
        assert re.fullmatch(r"step 10 · training 17 \(smoothed 2\d\.\d+\) · held out 20", await browser.value(facts))
        path = "document.querySelector('.plot .mark-line path').getAttribute('d')"
        drawn = await browser.value(path)
        await browser.value("log.click()")
        await browser.until(f"{path} && {path} != {drawn!r}")
        slow_first = """void (async () => {
            const embed = vegaEmbed;
            let calls = 0;
            window.vegaEmbed = async (...given) => {
                if (calls++ < document.querySelectorAll('.plot').length) await new Promise(done => setTimeout(done, 200));
                return embed(...given);
            };
            for (const value of [0.9, 0.5, 0]) { smoothing.value = value; smoothing.dispatchEvent(new Event('input')); }
            setTimeout(() => window.waited = true, 1000);
        })()"""
        await browser.value(slow_first)
        await browser.until("window.waited")
        lines = "document.querySelector('.plot').querySelectorAll('.mark-line path').length"
        assert await browser.value(lines) == 2, "the slider stands at 0: no smoothed lines beside the raw ones"

        table, count = (
            "document.querySelectorAll('#answers-table tbody tr')",
            "document.getElementById('count').textContent",
        )
        assert await browser.value(count) == "60 found · page 1 of 3" and await browser.value(f"{table}.length") == 25
        assert (
            await browser.value(f"{table}[0].innerText.replace(/\\s+/g, ' ').trim()")
            == "Which number is 0? which_digit · 0 3 ✗ 4 ✓ 3"
        )
        assert await browser.value(f"{table}[0].querySelector('img').naturalWidth") == 56
        await browser.value("next.click()")
        assert await browser.value(count) == "60 found · page 2 of 3"
        await browser.value("search.value = 'NUMBER IS 5'; search.dispatchEvent(new Event('input'))")
        assert await browser.value(count) == "11 found · page 1 of 1"
        for name, found in {"wrong": 1, "worse": 0, "better": 10, "changed": 11, "cut": 0}.items():
            await browser.value(f"filter.value = {name!r}; filter.dispatchEvent(new Event('input'))")
            assert await browser.value(count) == f"{found} found · page 1 of 1", name
        await browser.value("search.value = ''; search.dispatchEvent(new Event('input'))")

    browse(tmp_path, page_of(run), story)


@in_a_browser
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_report_fits_a_phone_and_paper_in_light_and_dark_and_both_languages(run, tmp_path, language):
    async def story(browser: Browser) -> None:
        title = await browser.value("document.querySelector('.verdict p').textContent")
        assert (
            "模型学到了东西：比起点 +60.0 个百分点" if language == "zh" else "The model learned: +60.0 points"
        ) in title
        await keep(browser, f"report_{language}")
        for name, size in {"phone": (390, 844, "dark"), "print": (760, 1000, "dark", "print")}.items():
            await browser.screen(*size)
            assert await browser.value(FITS), name
            await keep(browser, f"report_{language}_{name}")
        assert await browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)", (
            "paper is white"
        )
        assert await browser.value("[...document.images].every(image => image.alt)")
        assert await browser.value("document.documentElement.lang") == language

    browse(tmp_path, page_of(run, language), story)


@pytest.fixture
def two_runs(tmp_path, resolved) -> Path:
    """EXP_DIR with two runs of other learning rates; b has questions 0 to 59 right from 10 on, a from 40 on."""
    for name, first_right, lr in (("stage2_sft_a", 40, 1e-4), ("stage2_sft_b", 10, 1e-5)):
        run_dir, results = tmp_path / name, tmp_path / f"{name}_results"
        run_dir.mkdir()
        results.mkdir()
        write_json(run_dir / "run.json", resolved | {"settings": resolved["settings"] | {"lr": lr}}, sealed=True)
        write_lines(run_dir / "metrics.jsonl", [step(10 * n, 3 / n) for n in range(1, 5)])
        rows = [answer(n >= first_right, id=str(n // 2), cluster=n) for n in range(60)]  # an id may be repeated
        write_lines(results / "predictions.jsonl", rows)
        found = {"split": "val", "samples": 60, "correct": 60 - first_right, "groups": {}}
        found["predictions"] = file_fingerprint(results / "predictions.jsonl")
        write_json(results / "evaluation.json", found, sealed=True)
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [{"scores": []}, {"scores": [{"name": "exact", "mean": None}]}, {"scores": 5}, {"samples": "60", "scores": None}],
)
def test_scores_that_are_none_are_as_if_nothing_was_evaluated(two_runs, monkeypatch, capsys, change):
    """The results have no seal where an earlier version wrote them."""
    path = two_runs / "stage2_sft_b_results/evaluation.json"
    write_json(path, read_json(path) | change)
    monkeypatch.setattr(sys, "argv", ["list_runs.py", str(two_runs)])
    list_runs.main()
    assert capsys.readouterr().out.count("%") == 1
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "stage2_sft_a,stage2_sft_b", "--exp-dir", str(two_runs)])
    compare_runs.main()
    other = path.parent / "evaluations/other/evaluation.json"
    write_json(other, [])
    assert report.other_sets(path, None) == {}


@pytest.mark.parametrize("row", ["[]", '{"id": 1}', "3"])
def test_answers_of_another_form_are_one_message(two_runs, monkeypatch, capsys, row):
    results = two_runs / "stage2_sft_b_results"
    (results / "predictions.jsonl").write_text(row + "\n")
    found = read_json(results / "evaluation.json") | {"predictions": file_fingerprint(results / "predictions.jsonl")}
    write_json(results / "evaluation.json", found)
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "stage2_sft_a,stage2_sft_b", "--exp-dir", str(two_runs)])
    with pytest.raises(SystemExit) as end:
        compare_runs.main()
    assert end.value.code == 1 and "predictions.jsonl: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("spoiled", ["not evaluated", "damaged", "other questions"])
def test_runs_without_a_question_in_common_are_compared_all_the_same(two_runs, monkeypatch, spoiled):
    results = two_runs / "stage2_sft_b_results"
    if spoiled == "not evaluated":
        shutil.rmtree(results)
    elif spoiled == "damaged":
        (results / "evaluation.json").write_text('{"samples"')
    else:
        write_lines(results / "predictions.jsonl", [answer(True, id=str(n), question="Another?") for n in range(60)])
        found = read_json(results / "evaluation.json")
        found["predictions"] = file_fingerprint(results / "predictions.jsonl")
        write_json(results / "evaluation.json", found, sealed=True)
    words = ["compare_runs.py", "stage2_sft_a,stage2_sft_b", "--exp-dir", str(two_runs), "--language", "en"]
    monkeypatch.setattr(sys, "argv", words)
    compare_runs.main()
    text = text_of((two_runs / "compare_stage2_sft_a_stage2_sft_b.html").read_text())
    assert "lr 0.0001 1e-05" in text and "their accuracies cannot be compared" in text and "answers better" not in text


def test_runs_are_compared_on_the_same_questions_with_the_settings_that_differ(two_runs, monkeypatch, capsys):
    def compare(runs: str) -> None:
        words = ["compare_runs.py", runs, "--exp-dir", str(two_runs), "--language", "en"]
        monkeypatch.setattr(sys, "argv", words)
        compare_runs.main()

    compare("stage2_sft_a， stage2_sft_b")
    page = two_runs / "compare_stage2_sft_a_stage2_sft_b.html"
    assert capsys.readouterr().out == f"comparison: {page}\n"
    for runs, said in (
        ("stage2_sft_a", "two to 6 different runs"),
        ("stage2_sft_a,c", "c: no run here (run.json is missing)"),
    ):
        with pytest.raises(SystemExit):
            compare(runs)
        assert said in capsys.readouterr().err
    text = text_of(page.read_text())
    for expected in (
        "stage2_sft_b answers better than stage2_sft_a: +50.0 points (+35.", "On the 60 held-out questions", "lr 0.0001 1e-05",
        "stage2_sft_a 33.3 % – – 40 0.75", "stage2_sft_b 83.3 % +50.0",
    ):  # fmt: skip
        assert expected in text, expected
    monkeypatch.setattr(sys, "argv", ["list_runs.py", str(two_runs)])
    list_runs.main()
    head, first, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (
        head[:7] == ["name", "state", "step", "loss", "accuracy", "lr", "batch"]
        and "33.3" in first
        and "0.0001" in first
    )
    if not CHROMIUM:
        return

    async def story(browser: Browser) -> None:
        assert await browser.value("document.getElementById('count').textContent") == "30 found · page 1 of 2"
        assert (
            await browser.value("document.querySelectorAll('.plot')[0].querySelectorAll('.mark-line path').length") == 2
        )
        await browser.screen(390, 844)
        assert await browser.value(FITS)
        await keep(browser, "compare_phone")

    browse(two_runs, page.as_uri(), story)
