"""The real chain on a small budget: a copy of the project, real Snakemake, energon, Megatron and transformers.

One run is started, killed with all its processes, started again, and compared with a run that nobody disturbed; then
the same project is asked again after changes that people make. Slow (minutes), so it is one story in one module.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from helpers.projects import environment, losses, planned, snakemake, snakemake_command
from helpers.trainings import stored
from llava_sft.run.sessions import sessions

SMALL = ["train_iters=20", "save_interval=5", "log_interval=2", "evaluate_samples=40"]
RUN, RESULTS = "output/stage2_sft_vqa", "output/stage2_sft_vqa_results"

pytestmark = pytest.mark.timeout(600)


def test_the_whole_chain_is_planned_before_its_data_is_made(project):
    dry = snakemake(project, "-n", "train_vqa")
    assert dry.returncode == 0, dry.stdout
    jobs = planned(dry.stdout)
    assert jobs["stage2_sftdata2webdataset"] > 2
    assert {"make_demo_vqa", "train", "evaluate", "report"} <= jobs.keys()
    assert not (project / "output").exists()


def test_killed_run_goes_on_and_ends_like_an_undisturbed_one(prepared_project):
    with open(prepared_project / "first.log", "w") as log:
        first = subprocess.Popen(
            snakemake_command("train_vqa", "--config", *SMALL),
            cwd=prepared_project,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    tracker = prepared_project / RUN / "latest_checkpointed_iteration.txt"
    while first.poll() is None and not (tracker.exists() and int(tracker.read_text() or 0) >= 5):
        time.sleep(0.1)
    assert first.poll() is None, (prepared_project / "first.log").read_text()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (prepared_project / RESULTS / "train.done.json").exists()

    second = snakemake(prepared_project, "train_vqa", "--config", *SMALL)
    assert second.returncode == 0, second.stdout
    assert "resuming from step" in second.stdout
    assert planned(second.stdout).keys().isdisjoint({"make_demo_vqa", "stage2_sftdata2webdataset"})

    trained = f"{RUN}_undisturbed_results/train.done.json"
    undisturbed = snakemake(prepared_project, trained, "--config", *SMALL, "run_tag=undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stdout
    assert losses(prepared_project, RUN) == losses(prepared_project, f"{RUN}_undisturbed")
    one, other = (stored(prepared_project / run / "iter_0000020") for run in (RUN, f"{RUN}_undisturbed"))
    assert one == other and len(one) > 100

    evaluation = json.loads((prepared_project / RESULTS / "evaluation.json").read_text())
    assert evaluation["samples"] == 40
    page = (prepared_project / RESULTS / "report.html").read_text()
    assert 'id="curves"' in page and f"make chat RUN={RUN}" in page
    trained = sessions(prepared_project / RUN)
    assert len(trained) > 1 and trained[-1]["reached"] == 20 and "ended" in trained[-1]
    for place in ("iter_0000020", "dataloader", "tensorboard", "run.json"):
        assert (prepared_project / RUN / place).exists()
    card = (prepared_project / RESULTS / "huggingface/README.md").read_text()
    assert "| all | exact | 40 |" in card and "19,200 training samples; 600 held out" in card
    assert f"talk to it: make chat RUN={RUN}\n" in second.stdout


def test_a_checkpoint_of_the_run_answers(prepared_project):
    asked = subprocess.run(
        [sys.executable, "workflow_scripts/chat.py", f"{RUN}/iter_0000010", "Which is larger, 3 or 5?", "--max-new-tokens=8"],
        cwd=prepared_project, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert asked.returncode == 0 and asked.stdout.strip(), asked.stderr
    assert "a Megatron checkpoint: exporting it to output/stage2_sft_vqa_exports/iter_0000010" in asked.stderr


def test_finished_target_has_nothing_to_do(prepared_project):
    (prepared_project / "README.md").touch()
    again = snakemake(prepared_project, "train_vqa", "--config", *SMALL)
    assert again.returncode == 0, again.stdout
    assert "Nothing to be done" in again.stdout


def test_preflight_for_another_machine_says_what_would_fit_and_writes_nothing(prepared_project):
    before = {path: path.stat().st_mtime_ns for path in (prepared_project / RESULTS).iterdir()}
    big = ["model=4b", "packing=true", "seq_length=8192", "micro_batch_size=1", "global_batch_size=auto"]
    asked = subprocess.run(
        [sys.executable, "workflow_scripts/preflight.py", "vqa", "--gpu", "H100", "--config", *big, "train_iters=auto"],
        cwd=prepared_project, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    assert re.search(r"fits +no: .* of 79\.1 \(H100\)", asked.stdout)
    assert asked.stdout.count("would fit: ") == 3
    assert {path: path.stat().st_mtime_ns for path in (prepared_project / RESULTS).iterdir()} == before


def test_deleted_shard_is_made_again_without_a_training_step(prepared_project):
    dataset = (prepared_project / "output/data/vqa/dataset.json").read_bytes()
    before = losses(prepared_project, RUN)
    (prepared_project / "output/data/vqa/webdatasets/subtaskdata-00001.tar").unlink()
    again = snakemake(prepared_project, "train_vqa", "--config", *SMALL)
    assert again.returncode == 0, again.stdout
    assert planned(again.stdout)["stage2_sftdata2webdataset"] == 1
    assert "nothing to train" in again.stdout
    assert (prepared_project / "output/data/vqa/dataset.json").read_bytes() == dataset
    assert losses(prepared_project, RUN) == before
    assert len(list((prepared_project / RUN).glob("run_*.log"))) == 2  # the killed start and the resume


def test_changed_lr_is_another_run_and_says_so(prepared_project):
    refused = snakemake(prepared_project, "train_vqa", "--config", *SMALL, "lr=1e-3")
    jobs = planned(refused.stdout)
    assert {"preflight", "train", "convert_checkpoint_mcore2hf", "evaluate", "report"} <= jobs.keys()
    assert jobs.keys().isdisjoint({"stage2_sftdata2webdataset", "index_webdataset", "convert_checkpoint_hf2mcore"})
    assert refused.returncode != 0
    assert "lr: 0.002 → 0.001" in refused.stdout
    assert "run_tag=lr0.001" in refused.stdout
    assert "Traceback" not in refused.stdout


def test_more_records_convert_only_the_ranges_that_changed(prepared_project):
    raw = prepared_project / "output/demo/train.jsonl"
    with open(raw, "a") as file:
        file.write(
            json.dumps({"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]}) + "\n"
        )
    refused = snakemake(prepared_project, "train_vqa", "--config", *SMALL)
    jobs = planned(refused.stdout)
    assert jobs["stage2_sftdata2webdataset"] == 1
    assert "make_demo_vqa" not in jobs
    assert refused.returncode != 0
    assert "data: " in refused.stdout and "run_tag=" in refused.stdout
