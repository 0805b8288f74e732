"""README and docs/: both languages say the same, links lead somewhere, settings, options and messages exist, figures are those
of benchmarks/results, commands are run by a test or by hand, and questions that people ask are answered in few words."""

import json
import re
import shlex

import pytest
import yaml

from helpers import ROOT
from helpers.documented import BY_HAND, COMMANDS, FIGURES, QUESTIONS
from helpers.documents import anchors, commands, comparable, english, links, sections, twin
from llava_sft.settings.data import SourceSettings
from llava_sft.settings.layers import CONFIG_DIR, load_settings
from llava_sft.settings.schema import Settings
from write_schema import chinese_texts, settings_page, untranslated

DOCUMENTS = english()
NAMES = [path.name for path in DOCUMENTS]
SOURCES = "\n".join(path.read_text() for path in sorted((ROOT / "workflow_scripts").rglob("*.py")))


def texts(document) -> str:
    return "\n".join(section.title + "\n" + section.prose for section in sections(document))


def test_every_document_has_its_twin():
    assert {path.name for path in (ROOT / "docs").glob("*.md")} | {"README.md", "README_zh.md"} == {
        name for path in DOCUMENTS for name in (path.name, twin(path).name)
    }
    for path in DOCUMENTS:
        head, chinese_head = (path.read_text().split("\n", 3)[2] for path in (path, twin(path)))
        assert f"]({twin(path).name})" in head and f"]({path.name})" in chinese_head, path


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_both_languages_say_the_same(document):
    """Headings, code, what stands in backticks, and numbers, section by section."""
    ours, theirs = sections(document), sections(twin(document))
    assert [(one.level, len(one.blocks)) for one in ours] == [(one.level, len(one.blocks)) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        where = f"{document.name}: {one.title} / {other.title}"
        assert list(map(comparable, one.blocks)) == list(map(comparable, other.blocks)), where
        assert one.spans == other.spans, where
        assert one.numbers == other.numbers, where


EVERY = [path for one in DOCUMENTS for path in (one, twin(one))] + [ROOT / "config/README.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_links_lead_somewhere_and_stay_in_their_language(path):
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}: the headings are {anchors(target)}"
        if target.suffix == ".md" and target.with_name(f"{target.stem}_zh.md").exists() and path.stem.endswith("_zh"):
            assert target in (twin(path), path.with_name(f"{path.stem.removesuffix('_zh')}.md")), (
                f"{link} leads to English"
            )


def test_readme_is_short_and_leads_to_every_document():
    for readme in (ROOT / "README.md", ROOT / "README_zh.md"):
        assert len(readme.read_text().splitlines()) <= 200
        named = {link.partition("#")[0] for link in links(readme)}
        own = [path if readme.stem == "README" else twin(path) for path in DOCUMENTS[1:]]
        assert {f"docs/{path.name}" for path in own} <= named


def test_settings_pages_are_those_of_the_schema():
    assert (ROOT / "docs/settings.md").read_text() == settings_page(), "run `make schema`"
    assert (ROOT / "docs/settings_zh.md").read_text() == settings_page(chinese_texts()), "run `make schema`"
    assert untranslated(chinese_texts()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_settings_in_examples_exist(document):
    for section in sections(document):
        for language, lines in section.blocks:
            if language == "yaml":
                values = yaml.safe_load("\n".join(lines))
                assert set(values) <= set(Settings.model_fields), section.title
                for source in values.get("sources", []):
                    assert set(source) <= set(SourceSettings.model_fields)


def test_messages_are_those_of_the_program():
    """Every message on the page of messages, cut at its values, stands in the source."""
    program = re.sub(r'"\s*\n\s*f?"', "", SOURCES)  # a text over several lines
    foreign = ["The detected CUDA version"]
    for section in sections(ROOT / "docs/messages.md")[1:]:
        for row in section.prose.splitlines():
            if row.startswith("| `"):
                for message in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
                    for part in filter(None, (part.strip() for part in message.split("…"))):
                        assert part in program or part in foreign, message


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_commands_name_targets_settings_and_options_that_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY:(.*(?:\\\n.*)*)", makefile, re.M)[1].split())
    steps = re.search(r"^STEPS := (.*)", makefile, re.M)[1].split()
    experiments = {path.stem for path in (CONFIG_DIR / "experiments").glob("*.yaml")}
    inline = [span for one in sections(document) for span in one.spans if re.match(r"(make|snakemake|python) \w", span)]
    for command in commands(document) + inline:
        words = shlex.split(command, comments=True)
        for number, word in enumerate(words):
            step, _, experiment = word.partition("_")
            if step in steps and experiment and "=" not in word and words[0] in ("make", "snakemake"):
                assert experiment in experiments | {"X", "mydata", "EXPERIMENT"}, command
            elif number == 1 and words[0] == "make" and "=" not in word:
                assert word in targets, command
            elif word.startswith("workflow_scripts/"):
                source = (ROOT / word).read_text() + SOURCES
                for option in (other.partition("=")[0] for other in words if other.startswith("--")):
                    assert f'"{option}"' in source or option == "--help", f"{command}: {option}"
        first = words.index("--config") if "--config" in words else 0 if words[0] == "make" else None
        if first is not None:
            values = dict(word.split("=", 1) for word in words[first + 1 :] if re.match(r"[a-z_]+=", word))
            load_settings("vqa", {key: yaml.safe_load(value) for key, value in values.items()})


def test_every_command_is_run_by_a_test_or_by_hand():
    """COMMANDS names, for each form, the test that runs it; BY_HAND the day and the machine."""
    unknown = [
        f"{document.name}: {command}"
        for document in DOCUMENTS
        for command in commands(document)
        if not any(re.fullmatch(pattern, command) for pattern in [*COMMANDS, *BY_HAND])
    ]
    assert not unknown, "\n".join(unknown)
    for where in COMMANDS.values():
        file, _, name = where.partition("::")
        assert name in (ROOT / file).read_text(), where
    every = "\n".join(command for document in DOCUMENTS for command in commands(document))
    stale = [pattern for pattern in [*COMMANDS, *BY_HAND] if not re.search(f"^(?:{pattern})$", every, re.M)]
    assert not stale


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: f"{row[0]}: {row[1]}")
def test_figures_in_readme_are_those_of_the_results(row):
    file, metric, settings, shown = row
    rows = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())["rows"]
    found = [r["value"] for r in rows if r["metric"] == metric and r["settings"] == settings]
    assert len(found) == 1, found
    text = shown.format(found[0]).replace("%", " %")
    for readme in ("README.md", "README_zh.md"):
        line = next(
            line
            for line in (ROOT / readme).read_text().splitlines()
            if line.endswith(f"`benchmarks/results/{file}.json` |")
        )
        assert text in line, f"{readme}: {text} is not in {line}"


def test_figures_name_files_that_exist():
    for document in DOCUMENTS:
        for path in re.findall(r"`(benchmarks/results/\w+\.json)`", texts(document)):
            assert (ROOT / path).is_file(), f"{document.name}: {path}"


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda asked: asked[0])
def test_a_question_is_answered_within_a_minute(asked):
    """Its heading is in the FAQ, which README leads to; the answer has few words, in both languages, and leads on."""
    _, heading = asked
    faq = ROOT / "docs/faq.md"
    place = [section.title for section in sections(faq)].index(heading)
    answer, chinese = sections(faq)[place], sections(twin(faq))[place]
    assert answer.level == 3 and 15 < len(answer.prose.split()) <= 120
    assert 30 < len(chinese.prose) <= 450


def test_faq_has_questions_that_were_asked_and_an_index_of_them():
    faq = ROOT / "docs/faq.md"
    assert {section.title for section in sections(faq) if section.level == 3} == {name for _, name in QUESTIONS}
    for page in (faq, twin(faq)):
        index = [
            f"#{anchor}" for section, anchor in zip(sections(page), anchors(page), strict=True) if section.level == 3
        ]
        assert [link for link in links(page)[1:] if link.startswith("#")][: len(index)] == index


def test_code_that_writes_a_file_of_questions_runs(tmp_path, monkeypatch):
    """What docs/faq.md gives for pictures without answers is a file that evaluate.py reads."""
    from llava_sft.evaluation.questions import read_questions

    (tmp_path / "photos").mkdir()
    import PIL.Image

    for number in range(3):
        PIL.Image.new("RGB", (64, 48), (80 * number, 0, 0)).save(tmp_path / f"photos/{number}.jpg")
    code = [lines for section in sections(ROOT / "docs/faq.md") for kind, lines in section.blocks if kind == "python"]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(code[0]), {})
    assert len(read_questions(tmp_path / "ask.jsonl", None, "val", None, tmp_path).samples) == 3
