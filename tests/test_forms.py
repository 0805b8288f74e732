"""Every form that README names, from what a user has to the report: the rules' own command lines, in a few small experiments.

Each experiment combines several forms. That a start checkpoint is the one asked for shows in the export: parts that are not
trained are the start's, bit for bit, and the others are not.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from faults import server
from faults.project import ORDER, commands, environment, make_project
from llava_sft.files import read_json
from llava_sft.model.config import load_model_config
from llava_sft.model.tiny import write_tiny_checkpoint
from test_legacy import write_original
from test_split_and_sources import mix, tar_of, turns
from webdataset_helpers import picture, record

pytestmark = pytest.mark.timeout(900)

MODEL = """\
name: forms
language:
  {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, num_query_groups: 2, kv_channels: 16,
   vocab_size: 384, rotary_base: 1000000, layernorm_epsilon: 1.0e-6, max_position_embeddings: 2048}
vision:
  {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, patch_size: 14, spatial_merge_size: 2,
   rotary_base: 10000}
"""
SMALL = {
    "model": "forms", "seq_length": 512, "micro_batch_size": 1, "global_batch_size": 2, "train_iters": 2, "save_interval": 1,
    "eval_iters": 1, "log_interval": 1, "log_answers": 1, "num_workers": 1, "gpus_per_node": 0, "lr": 1e-3, "parity": "skip",
    "lr_warmup_fraction": 0, "evaluate_samples": 6, "max_new_tokens": 2, "max_reject_fraction": 0.5,
}  # fmt: skip
REVISION = "1a2b3c4d5e6f7a8b9c0d1a2b3c4d5e6f7a8b9c0d"
ADAPTER = {"trainable_modules": ["adapter"]}
# By experiment: its settings, the prefix of its run directory, the folder its start weights equal (by part), parts trained.
FIRST = {
    "blend": {  # several sources: JSONL, JSON array and Parquet, held-out files and a share, weights
        "sources": [
            {"path": "data/llava.jsonl", "heldout": "data/heldout.jsonl", "image_root": "data/images", "weight": 2},
            {"path": "data/openai.json", "image_root": "data/images", "name": "openai"},
            {"path": "data/part-*.parquet", "name": "hub"},
        ],
        "val_fraction": 0.2, "load": "start", "parity": "cpu", **ADAPTER,
    },
    "array": {"raw_data": "data/openai.json", "heldout_data": "data/heldout.jsonl", "image_root": "data/images",
              "load": "random", "tokenizer": "start"},
    "hub": {"raw_data": "data/part-*.parquet", "val_fraction": 0.3, "load": f"org/name@{REVISION}", "stage": "align"},
    "parts": {"raw_data": "data/openai.jsonl", "image_root": "data/images", "load": "start", "stage": "align",
              "load_parts": {"vision": "other", "adapter": "random"}},
    "single": {"webdatasets": "theirs/single", "load": "legacy/tp1_pp1", "tokenizer": "start", **ADAPTER},
    "packed": {"webdatasets": "theirs/packed", "load": "legacy/tp2_pp2/release", "tokenizer": "start", **ADAPTER},
}  # fmt: skip
THEN = {  # from what the first have left
    "pattern": {"raw_data": "data/some-*.jsonl", "image_root": "data/images", "val_fraction": 0.2, "stage": "mid",
                "load": "output/checkpoints/start_mcore_tp1_pp1", "packing": False, "lr_vision": 1e-4, "lr_adapter": 2e-3},
    "finished": {"webdatasets": "output/data/blend/webdatasets", "load": "output/stage2_sft_blend/iter_0000001",
                 "packing": False, "trainable_modules": ["adapter", "vision_model"]},
    "mix": {"webdatasets": "theirs/mix", "load": "output/stage2_sft_blend", **ADAPTER},
}  # fmt: skip
TRAINED_FROM = {  # folder of the weights that untrained parts keep, and the parts that are trained
    "blend": ("start", "merger"), "hub": ("start", "merger"), "single": ("start", "merger"), "packed": ("start", "merger"),
    "parts": ("start", "merger"), "pattern": ("start", ""), "finished": ("start", "visual"), "mix": ("start", "merger"),
}  # fmt: skip


def write_data(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for i in range(12):
        (folder / f"images/{i}.png").write_bytes(picture(size=(28 + i, 30)))

    def openai(i: int) -> dict:
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"<image>\nWhich is {i}?"}]
        return {
            "id": f"o{i}",
            "images": [f"{i % 12}.png"],
            "messages": [*turns, {"role": "assistant", "content": str(i)}],
        }

    def jsonl(name: str, records: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(each) + "\n" for each in records))

    jsonl("llava.jsonl", [record(i, f"{i % 12}.png", kind="a") for i in range(24)])
    jsonl("heldout.jsonl", [record(100 + i, f"{i}.png", kind="b") for i in range(4)])
    jsonl("openai.jsonl", [openai(i) for i in range(16)])
    (folder / "openai.json").write_text(json.dumps([openai(i) for i in range(16)]))
    for part in range(2):
        jsonl(f"some-{part}.jsonl", [record(10 * part + i, f"{i}.png") for i in range(8)])
        image = {"bytes": picture(size=(28, 40 + part)), "path": None}
        rows = [
            record(100 * part + i) | {"image": image | {"bytes": picture(size=(30 + i, 40 + part))}} for i in range(8)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{part}.parquet")


def write_starts(project: Path) -> None:
    model = load_model_config(project / "config/models/forms.yaml")
    texts = [f"Question {i}? Answer {i}. Which is it? Be brief." for i in range(30)]
    for seed, name in enumerate(("start", "other")):
        write_tiny_checkpoint(project / name, texts, model, seed)
    for size in (1, 2):
        write_original(project / f"legacy/tp{size}_pp{size}", project / "start", model, size, size)
    shutil.copytree(project / "start", project / f"hub/models--org--name/snapshots/{REVISION}")


def write_theirs(folder: Path) -> None:
    """The three layouts of the original project."""
    mix(folder / "mix/pretrain-0.tar", range(12))
    pairs = ((f"a_{n}", n) for n in range(8))
    members = {
        f"{key}{end}": made for key, n in pairs for end, made in ((".jpg", picture("JPEG")), (".json", turns(n)))
    }
    tar_of(folder / "single/subtaskdata-00000.tar", members)
    packs = {}
    for n in range(5):
        packs |= {f"ps_{n:08d}.img{i}.jpg": picture("JPEG", (28 + i, 28)) for i in range(3)}
        packs[f"ps_{n:08d}.json"] = {
            "prompts": [f"<image>Question {i}?" for i in range(3)], "captions": [f"Caption {n} {i}" for i in range(3)],
            "images": ["/somewhere/else.jpg"],
        }  # fmt: skip
    tar_of(folder / "packed/pretrain-000000.tar", packs)


class Chain:
    """The project, and two servers that run its steps without importing anything anew."""

    def __init__(self, project: Path, place: Path):
        self.project, self.place, self.failed = project, place, []
        place.mkdir()
        here = {
            "PYTHONPATH": f"{project / 'workflow_scripts'}:{Path(__file__).parent}",
            server.MODULES: str(place / "modules"),
        }
        here["HF_HUB_CACHE"] = str(project / "hub")
        self.servers = [
            subprocess.Popen(
                [sys.executable, "-m", "faults.server", str(place / preload), preload],
                cwd=project, env=environment() | here, stderr=subprocess.DEVNULL,
            )
            for preload in server.PRELOAD
        ]  # fmt: skip

    def run(self, experiments: dict[str, dict]) -> None:
        """All jobs that the reports of the experiments need, rule by rule; what fails is noted."""
        for name, given in experiments.items():
            path = self.project / f"config/experiments/{name}.yaml"
            path.write_text(yaml.safe_dump(SMALL | given))
        jobs = commands(self.project, *(f"report_{name}" for name in experiments), "--rerun-triggers", "mtime")
        while not all((self.place / preload).exists() for preload in server.PRELOAD):
            assert all(process.poll() is None for process in self.servers)
            time.sleep(0.1)
        for rule in ORDER:
            for argv in jobs.get(rule, []):
                with open(self.place / "said.txt", "w+") as said:
                    code = server.ask(str(self.place / "steps"), argv, self.project, said.fileno()).wait()
                    said.seek(0)
                    if code:
                        self.failed.append(f"{argv}\nended with {code}:\n{said.read()[-3000:]}")

    def close(self) -> None:
        for process in self.servers:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("forms") / "project")
    (project / "config/experiments/faults.yaml").unlink()
    (project / "config/models/forms.yaml").write_text(MODEL)
    chain = Chain(project, project.parent / "servers")
    try:
        write_data(project / "data")
        write_starts(project)
        write_theirs(project / "theirs")
        chain.run(FIRST)
        chain.run(THEN)
        yield chain
    finally:
        chain.close()


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", [*FIRST, *THEN])
def test_each_form_goes_from_raw_data_to_the_report(chain, name):
    project = chain.project
    prefix = {"hub": "stage1_align", "parts": "stage1_align", "pattern": "stage1.5_mid"}.get(name, "stage2_sft")
    results = project / f"output/{prefix}_{name}_results"
    mine = [failed for failed in chain.failed if name in failed] or chain.failed
    assert (results / "report.html").is_file(), "\n".join(mine)
    evaluation = read_json(results / "evaluation.json")
    held = read_json(project / f"output/data/{name}/dataset.json")["heldout"]["samples"]
    assert (evaluation["samples"] > 0) == (held > 0) == (name not in ("single", "packed", "mix"))
    if name in TRAINED_FROM:
        source, trained = TRAINED_FROM[name]
        start, export = weights(project / source), weights(results / "huggingface")
        same = {key for key in start if torch.equal(start[key], export[key])}
        if name in ("finished", "mix"):  # from a run in which the adapter was trained
            same |= {key for key in start if "merger" in key}
        if name == "parts":
            other = weights(project / "other")
            same = {key for key in start if torch.equal((other if "visual" in key else start)[key], export[key])}
        frozen = {key for key in start if trained and trained not in key}
        assert frozen <= same and same != set(start), sorted(frozen - same)[:5]


def test_nothing_failed_beside_what_was_asked_for(chain):
    assert not chain.failed, "\n".join(chain.failed)[:3000]
