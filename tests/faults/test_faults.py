"""The harness of faults itself, and a short, seeded selection of damage at rest: a case of each kind of file.

`make test-faults` runs all the others (test_faults_long.py).
"""

import ast
import shutil

import pytest

from faults.at_rest import BAD, Bench, Case, judge, run_cases, table
from faults.damage import FORMS, UNREADABLE, damage
from faults.kinds import KINDS, USES
from faults.limits import LIMITS
from faults.page import PAGES, PROMISES
from faults.project import ROOT, RUN

pytestmark = pytest.mark.timeout(300)
# A training takes some seconds, every other step a fraction of one.
QUICK = {use for use in USES if use not in ("train", "resume", "export")}
CHECKPOINT = next(kind for kind in KINDS if kind.name == "checkpoint shards")
BROKEN_CHECK = """
import contextlib, importlib
for name in ("llava_sft.checksums", "llava_sft.run.checkpoints"):
    with contextlib.suppress(ImportError):
        module = importlib.import_module(name)
        for check in ("find_damage", "damage"):
            if hasattr(module, check):
                getattr(module, check).__code__ = (lambda *a, **k: None).__code__
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with Bench(tmp_path_factory.mktemp("faults") / "bench") as bench:
        yield bench
    shutil.rmtree(bench.folder, ignore_errors=True)


def test_undisturbed_steps_make_the_same_artefacts_each_time(bench):
    once = {use: bench.unsteady(use) for use in USES if use != "train"}  # resume is the same, and quicker
    assert {use: found for use, found in once.items() if found} == {}


def test_damage_of_each_kind_of_file_is_never_believed(bench):
    quick = [kind._replace(uses=tuple(use for use in kind.uses if use in QUICK) or kind.uses[-1:]) for kind in KINDS]
    first = [kind._replace(uses=(kind.uses[number % len(kind.uses)],)) for number, kind in enumerate(quick)]
    found = run_cases(bench, count=len(first), seed=3, kinds=first)
    bad = [f"{case['outcome']}: {case}" for case in found if case["outcome"] in BAD]
    assert len(found) > 0.8 * len(KINDS)
    assert not bad, "\n".join([table(found), *bad])


def test_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_like_the_undisturbed_one(bench):
    case = Case(CHECKPOINT.name, "resume", f"{RUN}/iter_0000004/__0_0.distcp", "run", True, 1)
    assert bench.try_case(case, CHECKPOINT)["outcome"] == "mended"


def test_folder_in_the_place_of_a_file_that_the_training_writes_is_named(bench):
    best = next(kind for kind in KINDS if kind.name == "best.json")
    assert (
        bench.try_case(Case(best.name, "resume", f"{RUN}/best.json", "folder", True, 1), best)["outcome"] == "reported"
    )


def test_check_that_was_broken_on_purpose_turns_up_as_silent(bench):
    case = Case(CHECKPOINT.name, "resume", f"{RUN}/iter_0000004/__0_0.distcp", "zero", True, 5)
    bench.baseline(case.use)
    bench.sabotage = BROKEN_CHECK
    try:
        assert bench.try_case(case, CHECKPOINT)["outcome"] in BAD
    finally:
        bench.sabotage = ""


@pytest.mark.parametrize("form", [*FORMS, *UNREADABLE])
def test_damage_is_seeded_changes_the_file_and_keeps_its_date_where_asked(tmp_path, form):
    paths = [tmp_path / name for name in ("one.json", "two.json")]
    made = []
    for seed in (1, 1, 2):
        paths[0].write_bytes(b'{"loss": 12.5, "name": "a"}' * 40)
        paths[1].write_text('{"loss": 3}')
        before = paths[0].stat().st_mtime_ns
        assert damage(paths[0], form, seed, True, paths)
        made.append(paths[0].read_bytes() if paths[0].is_file() else form)
        if paths[0].is_file():
            assert paths[0].stat().st_mtime_ns == before
        paths[0].rmdir() if paths[0].is_dir() else paths[0].unlink(missing_ok=True)
    assert made[0] == made[1] != b'{"loss": 12.5, "name": "a"}' * 40
    assert made[0] != made[2] or form in ("empty", "swap", *UNREADABLE)


@pytest.mark.parametrize(
    ("code", "said", "named", "differ", "touched", "outcome"),
    [
        (0, "", False, [], False, "harmless"),
        (0, "", False, ["report.html"], False, "silent"),
        (0, "warning: run.json", True, ["report.html"], False, "reported"),
        (0, "set aside", True, [], True, "mended"),
        (1, "error: run.json", True, [], False, "reported"),
        (1, "error: something", False, [], False, "unnamed"),
        (1, "Traceback (most recent call last):", True, [], False, "traceback"),
        (124, "", False, [], False, "stuck"),
    ],
)
def test_outcome_of_a_case_is_judged_by_code_words_and_artefacts(code, said, named, differ, touched, outcome):
    assert judge(code, said, named, differ, touched) == outcome


def test_tables_name_uses_kinds_and_tests_that_there_are():
    assert {use for kind in KINDS for use in kind.uses} == set(USES)
    assert {kind for limit in LIMITS for kind in limit.kinds} <= {kind.name for kind in KINDS}
    here = ROOT / "tests/faults"
    for promise in PROMISES:
        tests = {node.name for node in ast.parse((here / promise.file).read_text()).body if hasattr(node, "name")}
        assert promise.test in tests


@pytest.mark.parametrize("name", PAGES)
def test_page_of_the_docs_says_what_the_harness_does(name):
    assert (ROOT / name).read_text() == PAGES[name], "run: PYTHONPATH=tests:benchmarks python -m faults.page"
