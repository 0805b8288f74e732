"""Every form that README names, from what a user has to the report: the rules' own command lines, in a few small experiments.

Each experiment combines several forms. That a start checkpoint is the one asked for shows in the export: parts that are not
trained are the start's, bit for bit, and the others are not.
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Qwen2Tokenizer

from faults.project import ORDER, commands, environment, make_project
from faults.server import Servers
from helpers.original_checkpoint import write_original
from helpers.published_tokenizer import VOCABULARY, write_tokenizer
from helpers.webdatasets import mix, picture, record, tar_of, turns
from llava_sft.checkpoint.safetensors_io import old_name
from llava_sft.data.sizes import SampleSizes
from llava_sft.files import read_json
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.model.tiny import random_weights, write_tiny_checkpoint

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
OWN_VALUES = {"rope_theta": 2e6, "rms_norm_eps": 2e-6, "max_position_embeddings": 4096}  # not those of MODEL
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
    "hub": {"raw_data": "data/part-*.parquet", "val_fraction": 0.3, "load": "org/name", "stage": "align"},
    "published": {"raw_data": "data/published.jsonl", "heldout_data": "data/asked.jsonl", "image_root": "data/images",
                  "model": "published", "load": "published", "seq_length": 4096, "parity": "cpu", **ADAPTER},
    "parts": {"raw_data": "data/openai.jsonl", "image_root": "data/images", "load": "start", "stage": "align",
              "load_parts": {"vision": "other", "adapter": "random"}},
    "single": {"webdatasets": "theirs/single", "load": "legacy/tp1_pp1", "tokenizer": "start", **ADAPTER},
    "packed": {"webdatasets": "theirs/packed", "load": "legacy/tp2_pp2/release", "tokenizer": "start", **ADAPTER},
}  # fmt: skip
THEN = {  # from what the first have left
    "pattern": {"raw_data": "data/some-*.jsonl", "image_root": "data/images", "val_fraction": 0.2, "stage": "mid",
                "load": "output/checkpoints/start_mcore_tp1_pp1", "packing": False, "lr_vision": 1e-4, "lr_adapter": 2e-3},
    "finished": {"webdatasets": "output/data/array/webdatasets", "load": "output/stage2_sft_blend/iter_0000001",
                 "packing": False, "trainable_modules": ["adapter", "vision_model"]},
    "mix": {"webdatasets": "theirs/mix", "load": "output/stage2_sft_blend", **ADAPTER},
}  # fmt: skip
TRAINED_FROM = {  # folder of the weights that it starts from, and what the names of its trained tensors hold
    "blend": ("start", "merger"), "hub": ("start", "merger"), "single": ("start", "merger"), "packed": ("start", "merger"),
    "parts": ("start", "merger"), "published": ("published", "merger"), "pattern": ("start", ""), "finished": ("start", "visual"),
    "mix": ("output/stage2_sft_blend_results/huggingface", "merger"),
}  # fmt: skip


ANSWERS = [
    "<|object_ref_start|>叶子<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>", "<think>\n\n</think>\n\n是。",
    '<tool_call>\n{"name": "f"}\n</tool_call>', "Hello, world!",
]  # fmt: skip


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
    published = [record(i, f"{i}.png", kind="grounding") for i in range(12)]
    for i, each in enumerate(published):
        each["conversations"][0]["value"] = f"<image>\n这是第{i}片叶子吗？"
        each["conversations"][1]["value"] = ANSWERS[i % len(ANSWERS)]
    jsonl("published.jsonl", published[:8])
    jsonl("asked.jsonl", published[8:])
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


def write_published(folder: Path, model: ModelConfig) -> None:
    """As the hub serves it: all files of config, preprocessor and tokenizer; two shards of few and random weights."""
    write_tokenizer(folder)
    config = model.to_hf_config()
    config["text_config"] |= OWN_VALUES
    (folder / "config.json").write_text(json.dumps(config))
    ends = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]}
    sampling = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(ends | sampling | {"transformers_version": "4.53.0"}))
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "do_resize": True,
        "min_pixels": 3136, "max_pixels": 3_240_000, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 1,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    weights, index = random_weights(model, 3), {}
    for number, part in enumerate(("visual", "language"), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        chosen = {key: value for key, value in weights.items() if ("visual" in key) == (part == "visual")}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_starts(project: Path) -> None:
    write_published(project / "published", load_model_config(project / "config/models/published.yaml"))
    model = load_model_config(project / "config/models/forms.yaml")
    texts = [f"Question {i}? Answer {i}. Which is it? Be brief." for i in range(30)]
    for seed, name in enumerate(("start", "other")):
        write_tiny_checkpoint(project / name, texts, model, seed)
    for size in (1, 2):
        write_original(project / f"legacy/tp{size}_pp{size}", project / "start", model, size, size)
    snapshot = project / f"hub/models--org--name/snapshots/{REVISION}"
    shutil.copytree(project / "start", snapshot)  # in the spelling that save_pretrained of transformers 4.53 writes
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(REVISION)
    old = {old_name(key): value for key, value in load_file(snapshot / "model.safetensors").items()}
    save_file(old, snapshot / "model.safetensors", metadata={"format": "pt"})


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
        self.servers = Servers(project, place, environment() | {"HF_HUB_CACHE": str(project / "hub")})

    def run(self, experiments: dict[str, dict]) -> None:
        """All jobs that the reports of the experiments need, rule by rule; what fails is noted."""
        for name, given in experiments.items():
            path = self.project / f"config/experiments/{name}.yaml"
            path.write_text(yaml.safe_dump(SMALL | given))
        jobs = commands(self.project, *(f"report_{name}" for name in experiments), "--rerun-triggers", "mtime")
        self.servers.wait()
        for rule in ORDER:
            for argv in jobs.get(rule, []):
                with open(self.place / "said.txt", "w+") as said:
                    code = self.servers.ask(argv, self.project, said.fileno()).wait()
                    said.seek(0)
                    if code:
                        self.failed.append(f"{argv}\nended with {code}:\n{said.read()[-3000:]}")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("forms") / "project")
    (project / "config/experiments/faults.yaml").unlink()
    (project / "config/models/forms.yaml").write_text(MODEL)
    published = MODEL.replace("forms", "published").replace("vocab_size: 384", f"vocab_size: {VOCABULARY}")
    (project / "config/models/published.yaml").write_text(published)
    chain = Chain(project, project.parent / "servers")
    try:
        write_data(project / "data")
        write_starts(project)
        write_theirs(project / "theirs")
        chain.run(FIRST)
        chain.run(THEN)
        yield chain
    finally:
        chain.servers.close()


def weights(folder: Path) -> dict:
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


@pytest.mark.parametrize("name", [*FIRST, *THEN])
def test_each_form_goes_from_raw_data_to_the_report(chain, name):
    project = chain.project
    prefix = {"hub": "stage1_align", "parts": "stage1_align", "pattern": "stage1.5_mid"}.get(name, "stage2_sft")
    results = project / f"output/{prefix}_{name}_results"
    mine = [failed for failed in chain.failed if name in failed] or chain.failed
    assert (results / "report.html").is_file(), "\n".join(mine)
    evaluation = read_json(results / "evaluation.json")
    held = read_json(project / f"output/data/{name}/dataset.json")["heldout"]["samples"]
    assert (evaluation["samples"] > 0) == (held > 0) == (name not in ("parts", "single", "packed", "mix"))
    if name in TRAINED_FROM:
        source, trained = TRAINED_FROM[name]
        start, export = weights(project / source), weights(results / "huggingface")
        if name == "parts":
            start |= {key: value for key, value in weights(project / "other").items() if "visual" in key}
        changed = {key for key in start if not torch.equal(start[key], export[key])}
        assert changed and all(trained in key for key in changed), sorted(changed)


def test_a_folder_as_the_hub_serves_it_is_trained_and_exported_with_all_that_inference_needs(chain):
    results = chain.project / "output/stage2_sft_published_results"
    export = results / "huggingface"
    tokenizer = Qwen2Tokenizer.from_pretrained(export)
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
        assert (export / name).read_bytes() == (chain.project / "published" / name).read_bytes(), name
    ends = read_json(export / "generation_config.json")
    assert sorted(ends["eos_token_id"]) == [151643, 151645] and ends["pad_token_id"] == 151643
    assert read_json(export / "config.json")["image_token_id"] == 151655
    assert read_json(export / "config.json")["text_config"].items() >= OWN_VALUES.items()
    said = read_json(results / "preflight.json")["warnings"]
    assert any("language rotary_base is 2,000,000, config/models/published.yaml has 1,000,000" in line for line in said)
    assert read_json(chain.project / "output/stage2_sft_published/run.json")["model"]["language"]["rotary_base"] == 2e6
    assert read_json(export / "parity.json")["passed"] is True

    tokenizer.chat_template = (export / "chat_template.jinja").read_text()
    lengths = []
    for line in (chain.project / "data/published.jsonl").read_text().splitlines():
        asked, answer = (turn["value"] for turn in json.loads(line)["conversations"])
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lengths.append(len(tokenizer.apply_chat_template(turns)["input_ids"]))  # an image is one
    sizes = SampleSizes.of(read_json(results / "sizes.json"))
    images = [sum(patches) // 4 for patches in sizes.patches]
    assert [tokens - image + 1 for tokens, image in zip(sizes.tokens, images, strict=True)] == lengths


def test_a_hub_id_without_a_revision_says_its_commit_in_preflight_and_in_the_run(chain):
    said = read_json(chain.project / "output/stage1_align_hub_results/preflight.json")["warnings"]
    noted = read_json(chain.project / "output/stage1_align_hub/run.json")["start"]["notes"]
    assert noted == said[:1] and f"org/name names no revision: commit {REVISION}" in noted[0]


def test_own_rates_reach_their_parts(chain):
    """lr 1e-3, lr_vision 1e-4, lr_adapter 2e-3: Adam's first steps move a weight by about its rate."""
    start = weights(chain.project / "start")
    export = weights(chain.project / "output/stage1.5_mid_pattern_results/huggingface")
    moved = {"vision": [], "adapter": [], "language": []}
    for key, value in start.items():
        part = "adapter" if "merger" in key else "vision" if "visual" in key else "language"
        moved[part].append((export[key] - value).abs().max().item())
    assert max(moved["vision"]) < 4e-4 < max(moved["language"]) < 2.5e-3 < max(moved["adapter"]) < 5e-3


def test_nothing_failed_beside_what_was_asked_for(chain):
    assert not chain.failed, "\n".join(chain.failed)[:3000]
