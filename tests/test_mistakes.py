"""Mistakes that people make when they write settings by hand: the fix is the line to write, and nothing runs before it."""

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from helpers.experiments import EXPERIMENT, SOUND, mistake, sound_project, write_experiment
from llava_sft.errors import SettingsError, nearest
from llava_sft.machine import gpu
from llava_sft.settings.layers import load_settings
from llava_sft.settings.mistakes import mended, written
from llava_sft.settings.schema import DEFAULTS
from llava_sft.workflow import Workflow
from snakemake_logger_plugin_llava_sft import words


@pytest.fixture
def project(tmp_path, monkeypatch):
    return sound_project(tmp_path, monkeypatch)


# --- the line to write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("lr: 1,0e-5", "lr: 1e-05"),
        ("lr: 5e\N{MINUS SIGN}6", "lr: 5e-06"),
        ("lr: 2e\N{EN DASH}5", "lr: 2e-05"),
        ("lr: 10^-5", "lr: 1e-05"),
        ("seq_length: 8k", "seq_length: 8192"),
        ("seq_length: 16 K tokens", "seq_length: 16384"),
        ("pack_chunk_tokens: 4Ki", "pack_chunk_tokens: 4096"),
        ("train_iters: 1e6", "train_iters: 1000000"),
        ("train_iters: 12,000", "train_iters: 12000"),
        ("train_iters: 3 000 steps", "train_iters: 3000"),
        ("max_pixels: 1280*28*28", "max_pixels: 1003520"),
        ("max_pixels: 1280 × 28 × 28", "max_pixels: 1003520"),
        ("max_shard_bytes: 2GB", "max_shard_bytes: 2000000000"),
        ("shard_bytes: 64 MiB", "shard_bytes: 67108864"),
        ("val_fraction: 5%", "val_fraction: 0.05"),
        ("max_minutes: 1.5h", "max_minutes: 90"),
        ("max_minutes: 45 min", "max_minutes: 45"),
        ("gpus_per_node: 4xA100", "gpus_per_node: 4"),
        ("gpus_per_node: 2 GPUs", "gpus_per_node: 2"),
        ("trainable_modules: llm", "trainable_modules: [language_model]"),
        ("trainable_modules: ViT, merger", "trainable_modules: [vision_model, adapter]"),
        ("trainable_modules: [adapter\N{FULLWIDTH COMMA}vision_model]", "trainable_modules: [adapter, vision_model]"),
        ("trainable_modules: vision_model、adaptor", "trainable_modules: [vision_model, adapter]"),
        ("trainable_modules: all", "trainable_modules: [language_model, vision_model, adapter]"),
        ("lora_modules: [language]", "lora_modules: [language_model]"),
        ("packing: ture", "packing: true"),
        ("decode_images: flase", "decode_images: false"),
        ("bf16: Auto", "bf16: auto"),
        ("lr_decay_style: Cosine", "lr_decay_style: cosine"),
        ("stage: SFT", "stage: sft"),
        ("fp8: tensor-wise", "fp8: tensorwise"),
        ("fp8: block wise", "fp8: blockwise"),
        ("trackers: wandb", "trackers: [wandb]"),
        ("language: zh", "language: [zh]"),
        ("lr: “1e-4”", "lr: 0.0001"),
        ("raw_data: “raw.jsonl”", "raw_data: raw.jsonl"),
        ("image_root: ‘images’", "image_root: images"),
        ("exp_dir: $HOME/out", "exp_dir: /home/me/out"),
        ("exp_dir: ~/out", "exp_dir: /home/me/out"),
        ("load: ${HOME}/4B", "load: /home/me/4B"),
        ("tokenizer: '4B '", "tokenizer: 4B"),
        ("exp_dir: ' out'", "exp_dir: out"),
        ("exp_dir: $NOT_SET/out", "for example exp_dir: output"),
        ("exp_dir: ''", "for example exp_dir: output"),
        ("exp_dir: .", "for example exp_dir: output"),
        ("exp_dir: s3://bucket/out", "for example exp_dir: output"),
        ("exp_dir: D:\\out", "for example exp_dir: output"),
        ("report_language: zh_CN", "report_language: zh"),
        ("tracker_project: 2026", "tracker_project: '2026'"),
        ("license: 5.0", "license: '5.0'"),
        ("run_tag: 1.10", "run_tag: '1.10'"),
        ("run_tag: 0x1F", "run_tag: '0x1F'"),
        ("run_tag: 20261129_1200", "run_tag: '20261129_1200'"),
        ("run_tag: on", "run_tag: 'on'"),
        ("evaluate_by: 2.50", "evaluate_by: '2.50'"),
        ("base_model: 7.0e+3", "base_model: '7.0e+3'"),
        ("license: 2026-11-29", "license: '2026-11-29'"),
        ("caption_prompt: yes", "caption_prompt: 'yes'"),
        ("exp_dir: 1.50", "exp_dir: '1.50'"),
        ("raw_data: 1_000", "raw_data: '1_000'"),
        ("language: [en, no]", "language: [en, 'no']"),
        ("language: no", "language: ['no']"),
        ("columns:\n  question: y\n  answer: 2.0", "columns: {question: y, answer: '2.0'}"),
        ("columns: {question: off}", "columns: {question: 'off'}"),
        ("load_parts: {adapter: 1.10}", "load_parts: {adapter: '1.10'}"),
        ("lr:", "for example lr: 1e-05"),
        ("micro_batch_size: some", "for example micro_batch_size: 1"),
        ("trainable_modules: []", "for example trainable_modules: [language_model, adapter, vision_model]"),
    ],
)
def test_the_fix_is_the_line_to_write(project, line, fix, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    values = {key: value for key, value in SOUND.items() if not line.startswith(key)}
    (project / EXPERIMENT).write_text(yaml.safe_dump(values) + line + "\n", encoding="utf-8")
    error = mistake()
    assert error.fix == fix or ("for example" in fix and fix in error.fix)
    if "for example" not in fix:
        (project / EXPERIMENT).write_text(yaml.safe_dump(values) + error.fix + "\n")
        load_settings("mine")


def test_what_is_no_path_is_said_without_pythons_words():
    for given in ({"exp_dir": {"braces": None}}, {"tokenizer": ["a", "b"]}):
        with pytest.raises(SettingsError, match="input is not a valid path") as refused:
            load_settings("vqa", given)
        assert "class" not in str(refused.value)


def test_the_folder_of_the_output_is_filled_in_wherever_a_path_stands(project):
    given = {
        "sources": [{"path": "{exp_dir}/a.jsonl", "image_root": "{exp_dir}/i"}],
        "load_parts": {"adapter": "{exp_dir}/hf"},
    }
    write_experiment("mine", raw_data=None, image_root=None, vllm_python="{exp_dir}/python", exp_dir="out", **given)
    settings = load_settings("mine")
    assert (settings.sources[0].path, str(settings.sources[0].image_root)) == ("out/a.jsonl", "out/i")
    assert (settings.load_parts, str(settings.vllm_python)) == ({"adapter": "out/hf"}, "out/python")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run_tag: 1.10", "run_tag: 1.10: to YAML this is the number 1.1, not text"),
        ("tracker_project: 1_0", "tracker_project: 1_0: to YAML this is the number 10, not text"),
        ("language: [en, no]", "language: no: to YAML this is yes or no, not text"),
        ("license: 2026-11-29", "license: 2026-11-29: to YAML this is a date, not text"),
        ("run_tag: 2026-11-29 10:00:00", "run_tag: 2026-11-29 10:00:00: string should match"),
        ("micro_batch_size: 1.50", "micro_batch_size: 1.50: input should be"),
        (
            "raw_data:\nsources: [{path: raw.jsonl, weight: 1.50, name: 1.10}]",
            "sources: 1.10: to YAML this is the number 1.1",
        ),
    ],
)
def test_a_value_that_yaml_changes_is_shown_as_it_was_typed(project, line, said):
    values = {key: value for key, value in SOUND.items() if f"{key}:" not in line}
    (project / EXPERIMENT).write_text(yaml.safe_dump(values) + line + "\n")
    assert mistake().problem.startswith(f"{EXPERIMENT}: {said}")


def test_a_text_of_the_command_line_is_taken_as_it_was_typed(project):
    typed = {"run_tag": "0103", "license": "1.10", "tracker_project": "1e3", "exp_dir": "007"}
    words = [f"{key}={value}" for key, value in typed.items()]
    read = {"run_tag": 103, "license": 1.1, "tracker_project": 1000.0, "exp_dir": 7, "seed": 7}  # as Snakemake does
    settings = Workflow(read, ["train_mine", "--config", *words, "seed=007"]).paths("mine").settings
    assert {key: str(getattr(settings, key)) for key in typed} == typed and settings.seed == 7
    assert Workflow({"run_tag": None}, ["--config", "run_tag="]).paths("mine").settings.run_tag == ""


def test_no_guess_is_better_than_a_wrong_one():
    for key, value in (("lr", "fast"), ("packing", "yes please"), ("seed", "forty"), ("epochs", "-1"), ("stage", "x")):
        assert mended(key, value) is None
    for name, value in DEFAULTS.items():
        assert yaml.safe_load(f"{name}: {written(value)}") is not None


def test_the_fix_of_a_word_of_the_command_line_is_a_word_of_the_command_line(project):
    for given, fix in (("8k", "seq_length=8192"), ("trainable_modules", None)):
        if fix:
            assert mistake(seq_length=given).fix == fix
    assert shlex.split(mistake(trainable_modules="vit,llm").fix) == ["trainable_modules=[vision_model, language_model]"]
    assert "preflight.py EXPERIMENT --gpu H100" in mistake(gpu="H100").fix


# --- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said", "fix"),
    [
        ("lr:1e-4", "line 4: 'lr:1e-4': a setting needs a space behind its colon", "lr: 1e-4"),
        ("lr:1e-4\nseed: 1", "line 4: 'lr:1e-4'", "lr: 1e-4"),
        ("seed: 1\nlr:\N{NO-BREAK SPACE}1e-4", "line 5", "lr: 1e-4"),
        ("lr\N{FULLWIDTH COLON}1e-4", "needs an ordinary colon and a space behind its name", "lr: 1e-4"),
        ("lr\N{FULLWIDTH COLON} 1e-4\nseed: 3", "ordinary colon", "lr: 1e-4"),
        ("lr = 1e-4", "ordinary colon", "lr: 1e-4"),
        ("packing=false\nseed: 3", "ordinary colon", "packing: false"),
        ("lr:1e-4\n# of LoRA\n\nseed: 1", "line 4: 'lr:1e-4'", "lr: 1e-4"),
        ("columns:\n  question:q\n  answer: a", "line 5: 'question:q'", "question: q"),
        ("caption_prompt: |\n  Answer=x\nload: @org", "line 6", "goes in quotes"),
        ("caption_prompt: |\n  Answer=x\nlr: : 3", "line 6", "goes in quotes"),
        ("caption_prompt: 'x\n  Answer=x'\nsources: [{path:x", "line 6, column 11: the { that opens", "close it"),
        ("run_tag: 'a\nb=c", "line 4, column 10: the quote that opens here", "close it"),
        ("sources:\n- path:x", "sources", ""),
        ("seed: 3\nrun_tag: 'a\nlr: 1", "line 5, column 10: the quote that opens here is not closed", "close it"),
        ("trainable_modules: [adapter\nlr: 1", "line 4, column 20: the [ that opens here is not closed", "close it"),
        ("load: @org/name", "line 4", "goes in quotes"),
        ("image_root: %TEMP%", "line 4", "goes in quotes"),
        ("  lr: 1e-4", "line 4: '  lr: 1e-4': indented otherwise than 'raw_data: raw.jsonl', the setting above it", "alike"),
        ("sources:\n- path: a\n   heldout: b", "line 6: '   heldout: b': indented otherwise than '- path: a'", "alike"),
        ("columns:\n  question: q\n answer: a", "line 6: ' answer: a': indented otherwise", "alike"),
        ("trainable_modules:\n-adapter\n-vision_model", "line 5: '-adapter': an entry needs a space", "- adapter"),
        ('evaluate_scores: ["regex:\\d+"]', "line 4: between double quotes a backslash begins an escape", "single"),
        ("lr: 1e-4, seed: 3", "line 4, column 15", "one setting a line"),
        ("\tlr: 1", "line 4", "spaces, not with tabs"),
        ("lr:\t\tfast\n\tseed: 1", "line", "tabs"),
        ("training:\n  lr: 1e-4\n  seed: 3", "'training' stands as a heading", "without indentation: lr: …"),
        ("optimizer:\n  learning_rate: 1e-4", "'optimizer' stands as a heading", "lr: …"),
        ("lora:\n  rank: 8", "'lora' stands as a heading", "lora_rank: …"),
        ("model:\n  load: hf", "'model' stands as a heading", "load: …"),
        ("sources: [{path: raw.jsonl, image_dir: .}]", "entry 1: image_dir", "did you mean image_root?"),
        ("LR: 1", "unknown setting 'LR'", "did you mean lr?"),
        ("Seq-Length: 1", "unknown setting", "did you mean seq_length?"),
        ("ｌｒ: 1", "unknown setting", "did you mean lr?"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_setting_to_yaml_is_named_with_the_line_to_write(project, text, said, fix):
    (project / EXPERIMENT).write_text(yaml.safe_dump(SOUND) + text + "\n", encoding="utf-8")
    error = mistake()
    assert EXPERIMENT in error.problem and said in error.problem and fix in error.fix


def test_a_file_of_lines_with_dashes_or_of_one_line_without_a_space_is_no_settings(project):
    for text, fix in (("- lr: 1e-4\n- seed: 3", "without dashes"), ("lr:1e-4", "lr: 1e-4"), ("[]", "without dashes")):
        (project / EXPERIMENT).write_text(text)
        assert fix in mistake().fix
    assert "config/experiments/TEMPLATE.yaml" in mistake().fix


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "gbk"])
def test_a_file_in_another_encoding_is_mended_by_the_command_of_the_fix(project, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    text = mark + yaml.safe_dump(SOUND) + "caption_prompt: 描述这张图片。\n"
    (project / EXPERIMENT).write_bytes(text.encode(encoding))
    error = mistake()
    assert ("UTF-16" if "16" in encoding else "not UTF-8") in error.problem
    command = error.fix.partition("by: ")[2].replace("GBK (or what it is in)", "GBK")
    subprocess.run(command, shell=True, check=True)
    assert load_settings("mine").caption_prompt == "描述这张图片。"


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_read(project):
    text = yaml.safe_dump(SOUND | {"seed": 7}).replace("\n", "\r\n")
    (project / EXPERIMENT).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_settings("mine").seed == 7


# --- names ---------------------------------------------------------------------------------------------------------------


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit):
        Workflow({}, list(words))
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "stray", ["experiments/new.yml", "experiments/new.YAML", "experiments/new.yaml.txt", "new.yaml"]
)
def test_a_file_under_another_name_or_elsewhere_is_moved_by_the_command_of_the_fix(project, capsys, stray):
    Path("config", stray).write_text(yaml.safe_dump(SOUND))
    said = refused(capsys, "train_new")
    assert f"there is no config/experiments/new.yaml, but 'config/{stray}'" in said
    subprocess.run(said.partition("fix: ")[2], shell=True, check=True)
    assert Workflow({}, ["train_new"]).experiments == ["mine", "new"]


def test_names_that_are_nearly_right_are_answered_with_the_name(project, capsys):
    assert "did you mean train_mine? ask for" in refused(capsys, "train_mien")
    assert "did you mean train_mine? ask for" in refused(capsys, "train_mine.yaml")
    assert "did you mean" not in refused(capsys, "train_xyzzy")
    assert mistake(learningrate=1).fix == "did you mean lr?"
    for theirs, ours in {
        "use_lora": "lora_rank",
        "lora_targets": "lora_modules",
        "freeze_vit": "trainable_modules",
    }.items():
        assert mistake(**{theirs: True}).fix == f"did you mean {ours}?"
    frozen = mistake(lora_rank=8, trainable_modules=["vision_model"])
    assert frozen.fix == "add language_model to trainable_modules, or lora_modules: [vision_model]"
    assert words.near("mine", ["data_mine", "train_mine"]) == "did you mean train_mine? "
    assert "did you mean 4b? model: one of" in mistake(model="4B").fix
    with pytest.raises(SettingsError, match="--gpu H100 --gpus-per-node 8"):
        gpu("8xH100")
    assert nearest("train-VQA", ["train_vqa", "train_all"]) == "train_vqa" and nearest("", ["a"]) is None
