"""One run, continued on other numbers of processes that share the model otherwise: the same samples, the same losses."""

import os
import signal
import sys
import time
from argparse import Namespace

import pytest

import train
from helpers import ROOT, trainings
from llava_sft.errors import RunError
from llava_sft.files import read_json
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.identity import keeping_cut, refuse_layout
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.settings.resolved import Resolved

pytestmark = pytest.mark.timeout(600)
STEPS = 8
LAYOUTS = {
    "one": {"nproc_per_node": 1},
    "DP2": {"nproc_per_node": 2, "micro_batch_size": 4},
    "TP2": {"nproc_per_node": 2, "tensor_model_parallel_size": 2},
    "PP2": {"nproc_per_node": 2, "pipeline_model_parallel_size": 2},
}
TWO_STAGES = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2}
TWO_RANKS = {"nproc_per_node": 2, "tensor_model_parallel_size": 2}
ALONE = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "micro_batch_size": 8}


@pytest.fixture(scope="module")
def base(prepared_project):
    """The embedded experiment with a model that two tensor-parallel ranks or two stages can share."""
    resolved = trainings.demo(prepared_project)
    resolved["start"]["folder"] = None
    resolved["model"]["vision"]["num_attention_heads"] = 4
    return resolved


def start(servers, run, first: str = "", **settings):
    run.change(**ALONE | settings)
    with open(run.folder.with_suffix(".log"), "ab") as log:
        return servers.ask(run.script(), ROOT, log.fileno(), first)


def a_run(base, folder):
    return trainings.Run(base, folder, train_iters=STEPS, save_interval=2, log_answers=1, eval_interval=4)


@pytest.fixture(scope="module")
def undisturbed(base, servers, tmp_path_factory):
    run = a_run(base, tmp_path_factory.mktemp("runs") / "undisturbed")
    assert start(servers, run).wait() == 0, run.said()
    return run


def steps(run) -> dict[int, list[str]]:
    """The samples of each step, of all ranks."""
    found: dict[int, list[str]] = {}
    for records in run.samples().values():
        for record in records:
            found.setdefault(record["iteration"], []).extend(record["samples"])
    return {step: sorted(samples) for step, samples in found.items()}


def assert_same(run, undisturbed):
    assert steps(run) == steps(undisturbed)
    for (step, loss, norm), (_, *expected) in zip(run.losses(), undisturbed.losses(), strict=True):
        assert [loss, norm] == pytest.approx(expected, rel=2e-4), step
    ours, theirs = (
        [(each["iteration"], each["lm loss validation"]) for each in one.validations()] for one in (run, undisturbed)
    )
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=2e-4)


def test_a_run_goes_from_layout_to_layout(base, undisturbed, servers, tmp_path):
    run = a_run(base, tmp_path / "chain")
    for number, name in enumerate(("one", "TP2", "PP2", "DP2", "PP2", "one", "DP2")):
        assert start(servers, run, max_minutes=0.001, **LAYOUTS[name]).wait() == 75, (name, run.said())
        assert f"stopped at step {number + 1} of {STEPS}" in run.said(), run.said()
    assert start(servers, run, max_minutes=None, **LAYOUTS["TP2"]).wait() == 0, run.said()
    assert_same(run, undisturbed)
    answers = [one["prediction"] for one in run.validations()[-1]["answers"]]  # of two tensor-parallel ranks together
    assert answers == [one["prediction"] for one in undisturbed.validations()[-1]["answers"]] and answers


def test_what_two_ranks_saved_before_one_of_them_was_killed_one_process_goes_on_with(
    base, undisturbed, servers, tmp_path
):
    run, pid = a_run(base, tmp_path / "killed"), tmp_path / "pid"
    assert start(servers, run, max_minutes=0.001).wait() == 75, run.said()  # random weights are drawn by layout
    run.change(max_minutes=None)
    noted = f"import os; os.environ.get('RANK') == '0' and open({str(pid)!r}, 'w').write(str(os.getpid()))"
    process = start(servers, run, noted, **LAYOUTS["PP2"])
    while process.poll() is None and not run.logged(5):
        time.sleep(0.01)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert process.wait(60) == 1 and "rank 0 of 2 was ended by SIGKILL" in run.said(), run.said()
    assert start(servers, run).wait() == 0, run.said()
    assert_same(run, undisturbed)


@pytest.mark.long
def test_eight_ranks_learn_what_one_does_and_go_on_as_two_and_as_one(base, undisturbed, servers, tmp_path):
    run, pid = a_run(base, tmp_path / "eight"), tmp_path / "pid"
    eight = {"nproc_per_node": 8, "micro_batch_size": 1, "max_minutes": None}
    noted = f"import os; os.environ.get('RANK') == '5' and open({str(pid)!r}, 'w').write(str(os.getpid()))"
    process = start(servers, run, noted, **eight)
    while process.poll() is None and not run.logged(3):
        time.sleep(0.01)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert process.wait(60) == 1 and "rank 5 of 8 was ended by SIGKILL" in run.said(), run.said()
    for number, layout in enumerate((eight, LAYOUTS["DP2"]), iterations_done(run.folder) + 1):
        assert start(servers, run, **layout | {"max_minutes": 0.001}).wait() == 75, run.said()
        assert f"stopped at step {number} of {STEPS}" in run.said(), run.said()
    assert start(servers, run, max_minutes=None, **LAYOUTS["one"]).wait() == 0, run.said()
    assert_same(run, undisturbed)


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ({"nproc_per_node": 8}, {"nproc_per_node": 4}, None),
        ({"nproc_per_node": 8}, {"nproc_per_node": 8, "nodes": 2}, None),
        ({"nproc_per_node": 8}, {"nproc_per_node": 8, "nodes": 6}, "data_parallel_size: 8 → 48"),
        ({"nproc_per_node": 1}, {"nproc_per_node": 2}, "data_parallel_size: 1 → 2"),
        ({"nproc_per_node": 2}, {"nproc_per_node": 2, "tensor_model_parallel_size": 2}, "tensor_model_parallel_size: 1 → 2"),
        ({"nproc_per_node": 2}, {"nproc_per_node": 2, "gpus_per_node": 0}, "gpus_per_node: 2 → 0"),
        (TWO_STAGES, TWO_STAGES | {"first_stage_layers": 9}, "first_stage_layers: 0 → 9"),
        ({"nproc_per_node": 2}, {"nproc_per_node": 2, "first_stage_layers": 9}, None),
        ({**TWO_RANKS, "first_stage_layers": 0}, TWO_RANKS, None),
        (TWO_RANKS, TWO_RANKS, "an earlier version, which also cut the vision tower into tensor_model_parallel_size (2)"),
        ({**TWO_RANKS, "nproc_per_node": 4}, {**TWO_RANKS, "nproc_per_node": 8}, "an earlier version"),
        (TWO_RANKS, {**TWO_RANKS, "train_iters": 4}, None),
        (TWO_RANKS, {**TWO_RANKS, "trainable_modules": ["language_model", "adapter"]}, None),
    ],
)  # fmt: skip
def test_on_gpus_a_layout_that_the_optimizers_state_does_not_fit_is_refused(tmp_path, before, now, refused):
    old, new = (
        ResolvedSettings(experiment="x", **{"gpus_per_node": 2, "train_iters": 9, **each}) for each in (before, now)
    )
    if refused is None:
        refuse_layout(tmp_path, 4, old, new)
        return
    with pytest.raises(RunError) as error:
        refuse_layout(tmp_path, 4, old, new)
    assert refused in error.value.problem and "load=" in error.value.fix


def test_a_run_keeps_its_cut_into_stages_unless_another_is_asked_for(base):
    resolved = Resolved.model_validate(base)

    def cut(first: int, why: dict, **layout) -> Resolved:
        settings = resolved.settings.model_copy(update={"first_stage_layers": first, **TWO_STAGES, **layout})
        return resolved.model_copy(update={"settings": settings, "why": why})

    before = cut(9, {})
    assert keeping_cut(before, cut(10, {"first_stage_layers": "auto"})).settings.first_stage_layers == 9
    assert keeping_cut(before, cut(10, {})).settings.first_stage_layers == 10
    other = cut(4, {"first_stage_layers": "auto"}, pipeline_model_parallel_size=4)
    assert keeping_cut(before, other).settings.first_stage_layers == 4


def test_memory_is_checked_for_the_cut_that_a_run_keeps(base, tmp_path, monkeypatch):
    asked = Resolved.model_validate(base)
    kept = asked.model_copy(update={"settings": asked.settings.model_copy(update={"first_stage_layers": 9})})
    checked = []
    monkeypatch.setattr(train, "open_run", lambda run_dir, resolved: kept.write(run_dir / "run.json") or 4)
    monkeypatch.setattr(train, "check_node", lambda resolved: checked.append(resolved) or sys.exit())
    with pytest.raises(SystemExit):
        train.train(Namespace(run_dir=tmp_path), asked, None, None, None)
    assert [resolved.settings.first_stage_layers for resolved in checked] == [9]


COPIES = """
import json, os
if "RANK" in os.environ:
    from llava_sft.training import loop
    run = loop.Loop.run
    def checked(self):
        from llava_sft.megatron import distributed
        import torch
        run(self)
        model = distributed.unwrapped(self.model)
        names = [name for name, _ in distributed.replicated(model)]
        same = distributed.unlike_copies(model)
        if torch.distributed.get_rank() == 1:  # one of its own now
            next(model.adapter.parameters()).data.flatten()[0] += 1
        found = {"names": names, "unlike": same, "spoiled": distributed.unlike_copies(model)}
        json.dump(found, open(os.environ["COPIES"], "w")) if torch.distributed.get_rank() == 0 else None
    loop.Loop.run = checked
"""


def test_copies_of_a_parameter_frozen_or_not_are_equal_on_all_tensor_parallel_ranks_after_50_steps(
    base, servers, tmp_path
):
    run = trainings.Run(base, tmp_path / "copies", train_iters=50, save_interval=50, eval_interval=50)
    run.change(eval_iters=0, trainable_modules=["language_model", "adapter"], lr=1e-3, lr_adapter=1e-3)
    first = f"import os; os.environ['COPIES'] = {str(tmp_path / 'found.json')!r}\n{COPIES}"
    assert start(servers, run, first, **LAYOUTS["TP2"]).wait() == 0, run.said()
    found = read_json(tmp_path / "found.json")
    assert {"vision_model.class_embedding", "adapter.linear_1.weight"} & set(found["names"]) and len(
        found["names"]
    ) > 10
    assert found["unlike"] == [] and len(found["spoiled"]) == 1 and found["spoiled"][0].startswith("adapter.")
