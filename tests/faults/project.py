"""The chain on a data set and a model as small as they can be, and the states of it that faults begin from.

Notable: the rules' own command lines are taken from Snakemake's dry run, so that a step of a test is the step of a user.
"""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
NAME = "faults"
RUN, RESULTS = f"output/stage2_sft_{NAME}", f"output/stage2_sft_{NAME}_results"
TRAIN, HELDOUT = 150, 18  # records
STEPS, STOPPED = 6, 4  # of the training, and where the state "stopped" stands

ORDER = (
    "convert_checkpoint_hf2mcore", "stage2_sftdata2webdataset", "index_webdataset", "inspect_webdataset",
    "measure_webdataset", "preflight", "train", "convert_checkpoint_mcore2hf", "evaluate", "report",
)  # fmt: skip

EXPERIMENT = f"""\
raw_data: small/train.jsonl
heldout_data: small/heldout.jsonl
image_root: small/images
shard_bytes: 12000
model: {NAME}
load: small/start
seq_length: 256
micro_batch_size: 1
global_batch_size: 4
train_iters: {STEPS}
lr_decay_iters: {STEPS}
save_interval: 2
eval_iters: 1
log_interval: 3        # neither divides the other
log_answers: 1
num_workers: 1
gpus_per_node: 0
nproc_per_node: 1
lr: 2.0e-3
lr_warmup_fraction: 0.04
evaluate_batch_size: 16
max_new_tokens: 3
"""
MODEL = f"""\
name: {NAME}
language:
  {{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, num_query_groups: 1, kv_channels: 16,
   vocab_size: 384, rotary_base: 1000000, layernorm_epsilon: 1.0e-6, max_position_embeddings: 2048}}
vision:
  {{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, patch_size: 14, spatial_merge_size: 2,
   rotary_base: 10000}}
"""
START = """
import json, sys
from llava_sft.model.config import load_model_config
from llava_sft.model.tiny import write_tiny_checkpoint
texts = [turn["value"].replace("<image>", "") for line in open("small/train.jsonl")
         for turn in json.loads(line)["conversations"]]
write_tiny_checkpoint("small/start", texts, load_model_config("config/models/faults.yaml"), 1)
"""


# ------------------------------------------------------------------------------------------------- making it


def make_project(folder: Path, root: Path = ROOT) -> Path:
    """A copy of `root` as git sees it, with the small experiment in it; nothing is run yet."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if name.startswith(("tests/", "docs/", "benchmarks/results/")) and not name.endswith("preflight.json"):
            continue
        if (root / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name, follow_symlinks=False)
    for path in (folder / "config/experiments").glob("[a-z]*.yaml"):
        path.unlink()  # none of them is asked for
    buffer = "packing_buffer_size" in (folder / "config/config.yaml").read_text()
    (folder / f"config/experiments/{NAME}.yaml").write_text(
        EXPERIMENT + ("packing_buffer_size: 60\n" if buffer else "")
    )
    (folder / f"config/models/{NAME}.yaml").write_text(MODEL)
    write_data(folder / "small")
    (folder / "small/make_start.py").write_text(START)
    (folder / "small/plan.py").write_text("from snakemake.cli import main\n\nmain()\n")
    return folder


def write_data(folder: Path) -> None:
    """Records with none, one and two images, PNG and JPEG, of several sizes; the same bytes each time."""
    chance = random.Random(5)
    (folder / "images").mkdir(parents=True)
    for number in range(40):
        size = chance.choice([(56, 56), (84, 56), (56, 112)])
        image = Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1])).resize((8, 8)).resize(size)
        ImageDraw.Draw(image).text((20, 20), str(number % 10), fill="white")
        data = io.BytesIO()
        image.save(data, "JPEG" if number % 2 else "PNG")
        (folder / "images" / f"{number:02d}.{'jpg' if number % 2 else 'png'}").write_bytes(data.getvalue())
    names = sorted(path.name for path in (folder / "images").iterdir())
    for split, count in (("train", TRAIN), ("heldout", HELDOUT)):
        lines = []
        for row in range(count):
            shown = chance.sample(range(40), row % 3)
            asked = "<image>\n" * len(shown) + chance.choice(["Which digit?", "Read it.", "What is the number here?"])
            turns = [("human", asked), ("gpt", " ".join(str(n % 10) for n in shown) or str(row % 10))]
            if row % 5 == 0:
                turns += [("human", "Add one."), ("gpt", str((row + 1) % 10))]
            record = {"id": f"{split}-{row:04d}", "image": [names[n] for n in shown], "kind": f"images{len(shown)}"}
            record["conversations"] = [{"from": speaker, "value": text} for speaker, text in turns]
            if not shown:
                del record["image"]
            lines.append(json.dumps(record) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))


# ------------------------------------------------------------------------------------------------- running it


def environment(project: Path | None = None) -> dict[str, str]:
    """One thread a process, bytecode kept, and nothing that a batch system or another checkout left behind."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SNAKEMAKE", "PYTEST", "FAULTS_"))}
    kept |= {
        "PYTHONDONTWRITEBYTECODE": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if project:
        kept["PYTHONPATH"] = str(project / "workflow_scripts")
    return kept


def run(command: list[str], project: Path, **options) -> subprocess.CompletedProcess:
    """A command in the project that has to succeed."""
    done = subprocess.run(
        command,
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done


def snakemake(*words: str) -> list[str]:
    return [sys.executable, "-m", "snakemake", *words]


def commands(project: Path, *asked: str) -> dict[str, list[list[str]]]:
    """By rule, the script and arguments of each of its jobs, as the shell would pass them. `asked`: targets and options."""
    asked = asked or ("--forceall", f"report_{NAME}")
    listing = run(snakemake("--dry-run", "--printshellcmds", *asked), project).stdout
    recorder, record = project / ".record.sh", project / ".record"
    recorder.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {record}\n")
    recorder.chmod(0o755)
    found: dict[str, list[list[str]]] = {}
    for rule, body in re.findall(r"^(?:local)?rule (\w+):\n((?:.+\n)+)", listing, re.MULTILINE):
        shell = re.search(r"Shell command: (.*?)\s*(?=\nJob stats:|\Z)", body, re.DOTALL)
        if shell and shell[1] != "None":
            command = re.sub(r"\S+(?= workflow_scripts/)", str(recorder), shell[1], count=1)
            scratch = project / ".recorded"
            command = command.replace(f"cd {project}", f"mkdir -p {scratch}/output && cd {scratch}", 1)
            command = re.sub(r"(>|tee -i) output/[^\s)]+", r"\1 /dev/null", command)
            subprocess.run(["bash", "-c", command], cwd=project, check=True, stdout=subprocess.DEVNULL)
            found.setdefault(rule, []).append(record.read_text().split("\0")[:-1])
    return found


def make_states(project: Path, states: Path, step: Callable[[str], None], begin: Callable[[str], Callable]) -> None:
    """Make the chain's files and keep what is there before training, killed in the middle of it, and at the end.

    `step(rule)` runs the jobs of a rule; `begin(rule)` starts them and returns what kills them. Each state is a copy of
    output/ and small/.
    """
    for rule in ORDER[:-4]:
        step(rule)
    keep(project, states / "before")
    tracker = project / RUN / "latest_checkpointed_iteration.txt"
    sealed = project / RUN / f"iter_{STOPPED:07d}/checksums.json"
    following = (
        project / RUN / f"iter_{STEPS:07d}"
    )  # in part: its files would pass for a checkpoint's that must not be lost
    while not sealed.is_file() or following.exists():  # again, where it got further before the kill
        shutil.rmtree(project / RUN, ignore_errors=True)
        kill = begin("train")
        while not sealed.is_file() and not (tracker.is_file() and tracker.read_text().strip() == str(STEPS)):
            time.sleep(0.005)
        kill()
    keep(project, states / "stopped")
    for rule in ORDER[-4:]:
        step(rule)
    keep(project, states / "done")


def keep(project: Path, state: Path) -> None:
    for name in ("output", "small"):
        shutil.copytree(project / name, state / name, symlinks=True)
    for name in ("logs", "benchmarks"):
        shutil.rmtree(state / "output" / name, ignore_errors=True)
    for name in ("config", "workflow_scripts", "Snakefile", "rules", "profiles", "benchmarks"):
        (state / name).symlink_to(project / name)
