"""A script of the by-hand guide becomes an experiment: what it says is taken over, told, or refused, and nothing of it is run."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import import_shell_script
from helpers import SCRIPTS
from helpers.experiments import sound_project
from llava_sft.migrate.arguments import OPTIONS
from llava_sft.migrate.shell import Script
from llava_sft.settings.layers import load_settings
from llava_sft.settings.schema import Settings

GUIDE = r"""#!/bin/bash
# ---- edit these (8 variables) ----
EXP_DIR='/data/exps/'                 # don't forget the quotes
SAVE_CKPT_PATH=$EXP_DIR/stage2_sft_leaves_$(date +%m%d)
TP=1; PP=1
SEQ_LEN=8192  # tokens
MBS=2
GBS=$((MBS * 4 * 8))
NSTEP=3200
DATA_PATH=${DATA_PATH:-"/data/leaves set"}
TOKENIZER_PATH=/models/Instruct
# CHECKPOINT_PATH=/models/Base
CHECKPOINT_PATH="/runs/earlier/iter_0400"

if [ $WORLD_SIZE -gt 1 ];
then
   GPUS_PER_NODE=8; NNODES=$WORLD_SIZE
 else
   GPUS_PER_NODE=8
   NNODES=1
fi
GPUS_PER_NODE=4
if [[ $SINGLE_NODE -eq 1 ]]; then
    DISTRIBUTED_ARGS=( --nproc_per_node "$GPUS_PER_NODE" )
else
    DISTRIBUTED_ARGS=(
        --nproc_per_node "$GPUS_PER_NODE"
        --nnodes "$NNODES"   # isn't it (the same
        --master_addr "$MASTER_ADDR"
    )
fi
MODEL_ARGS=( --model-name llava-ov-1.5-8b )
DATA_ARGS=(
    --tokenizer-type HFTokenizer
    --hf-tokenizer-path "$TOKENIZER_PATH"
    --data-path "$DATA_PATH"
    --split 100,0,0
)
TRAINING_ARGS=(
    --image-resolution 1000
    --training-phase sft
    --trainable-modules language_model adapter
    --seq-length "${SEQ_LEN}"
    --micro-batch-size ${MBS}
    --global-batch-size "${GBS}"
    --lr 1.0e-5     --min-lr 1e-06
    --train-iters "$NSTEP"
    --lr-decay-iters "$NSTEP"
    --lr-decay-style cosine
    --load "$CHECKPOINT_PATH"
    --save "$SAVE_CKPT_PATH"
    --save-interval 200
    --bf16
)
if [ -n "${WANDB_API_KEY}" ]; then
    TRAINING_ARGS+=(
        --wandb-project "${WANDB_PROJECT}"
    )
fi
logfile="${SAVE_CKPT_PATH}/run_$(date "+%Y-%m-%d_%H:%M:%S")_${NSTEP}steps.log"
export OFFLINE_PACKED_DATA='0'
export NCCL_IB_DISABLE=1
PYTHONPATH="$AIAK:$PYTHONPATH" \
    torchrun "${DISTRIBUTED_ARGS[@]}" \
    "$AIAK/train.py" \
    "${MODEL_ARGS[@]}" \
    "${DATA_ARGS[@]}" ${IMG_ARGS:+${IMG_ARGS[@]}} \
    "${TRAINING_ARGS[@]}" \
    2>&1 | tee "$logfile"
echo "done: $logfile"
"""

POSITIONAL = r"""
GBS="${1:-16}"
NSTEP="${2:-100}"
declare -a list_ip=(
    "10.0.0.1"
    "10.0.0.2"
)
NNODES=${#list_ip[@]}
if [[ ${#list_ip[@]} -eq 1 && ( "${list_ip[0]}" == "localhost" ) ]]; then NNODES=1; fi
for i in "${!list_ip[@]}"; do
    if [[ "${list_ip[$i]}" == "$(hostname -i | awk '{print $1}')" ]]; then NODE_RANK=$i; break; fi
done
SAVE=$(basename "$0" .sh)
cat <<'END'
a note that "quotes, and says torchrun --lr 7
END
export WANDB_PROJECT=leaves OFFLINE_PACKED_DATA=1
torchrun --nnodes=$NNODES --nproc-per-node=8 train.py --seq-length=4096 --micro-batch-size=1 --global-batch-size=$GBS \
  --train-iters=$NSTEP --lr=2e-5 --load=/models/stage0_mcore_tp1_pp1/ --save=$SAVE --data-path=/data/packed \
  --recompute-granularity=full --lr-warmup-iters=10 --fp8-format hybrid --fp8-recipe blockwise > log.txt
"""

FLAT = r"""
ARGS="
    --seq-length 2048 \
    --micro-batch-size 1 --global-batch-size 8 \
    --train-iters 50 \
    --trainable-modules all
"
CMD="python -m torch.distributed.run --nproc_per_node 2 train.py $ARGS"
CMD="$CMD --load ${MODEL:=/models/4b} --data-path ${ROOT%/}/x --save runs/plain --frobnicate 3"
ROOT=/late/
eval $CMD --lr 5e-6
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return sound_project(tmp_path, monkeypatch)


def imported(project: Path, text: str, *options: str, name: str = "train_it.sh") -> Path:
    script = project / name
    script.write_text(text)
    before = sys.argv
    sys.argv = ["import_shell_script.py", str(script), *options]
    try:
        import_shell_script.main()
    finally:
        sys.argv = before
    [path] = [p for p in (project / "config/experiments").glob("*.yaml") if p.stem != "mine"]
    return path


def values(settings: Settings, *names: str) -> list:
    return [getattr(settings, name) for name in names]


def test_the_guides_script_becomes_an_experiment_that_passes_the_settings_check(project, capsys):
    path = imported(project, GUIDE)
    settings, said = load_settings("leaves"), capsys.readouterr().out
    assert path.stem == "leaves"
    assert values(settings, "exp_dir", "run_name", "stage", "model") == [
        Path("/data/exps"),
        "stage2_sft_leaves",
        "sft",
        "8b",
    ]
    assert values(settings, "webdatasets", "load", "tokenizer") == [
        Path("/data/leaves set"), "/runs/earlier/iter_0000400", Path("/models/Instruct"),
    ]  # fmt: skip
    assert values(settings, "micro_batch_size", "global_batch_size", "train_iters") == [2, 64, 3200]
    assert values(settings, "seq_length", "packing", "max_pixels") == [8192, False, 1_000_000]
    assert values(settings, "gpus_per_node", "nodes", "save_interval") == [4, "auto", 200]
    assert values(settings, "lr", "min_lr", "lr_decay_style", "lr_decay_iters") == [1e-5, 1e-6, "cosine", "auto"]
    assert values(settings, "adam_beta2", "weight_decay") == [
        0.999,
        0.01,
    ]  # not given: what Megatron-LM does, not the stage
    assert settings.trainable_modules == ["vision_model", "language_model", "adapter"][1:]
    assert settings.trackers == ()
    told = said.partition("not taken over:")[2]
    for expected in (
        "stage2_sft_leaves_$(date +%m%d)",
        "NCCL_IB_DISABLE",
        "trackers: [wandb]",
        "/data/leaves set is not on",
    ):
        assert expected in told
    assert "--wandb-project" in path.read_text().partition("Not taken over")[2]  # and it stays with the experiment


def test_defaults_of_positions_nodes_and_packs_are_read_and_a_heredoc_is_not(project, capsys):
    imported(project, POSITIONAL, "--name", "aligned", name="stage_1_alignment_mine.sh")
    settings = load_settings("aligned")
    assert values(settings, "global_batch_size", "train_iters", "lr", "nodes", "gpus_per_node") == [16, 100, 2e-5, 2, 8]
    assert values(settings, "stage", "packing", "max_pixels") == ["align", True, 512 * 512]
    assert settings.load == "/models/stage0_mcore_tp1_pp1/"
    assert values(settings, "lr_warmup_fraction", "recompute_language", "fp8") == [0.1, "full", "blockwise"]
    assert values(settings, "trackers", "tracker_project") == [("wandb",), "leaves"]


def test_arithmetic_is_no_heredoc_and_sets_what_it_assigns(tmp_path):
    text = """
(( batch = 4 * 2 ))
((batch += 1, parts = 1 << 2))
for (( i = 1 << 1; i < 3; i++ )); do train --before; done
if (( batch > 1 << 2 )); then ((n++)); fi
(train --a); ((train --b); train --c)
train --global-batch-size $batch --parts $parts
"""
    (path := tmp_path / "train.sh").write_text(text)
    script = Script(path)
    assert [command.words[1] for command in script.commands if command.words[0] == "train"] == [
        "--before", "--a", "--b", "--c", "--global-batch-size",
    ]  # fmt: skip
    *_, batch, _, parts = script.commands[-1].words
    assert batch == "9" and script.variables.shown(parts) == "$((1 << 2))"


def test_a_command_in_one_string_is_read_and_what_nothing_tells_is_named(project, capsys):
    imported(project, FLAT)
    settings, said = load_settings("plain"), capsys.readouterr().out
    assert values(settings, "seq_length", "train_iters", "lr", "load", "exp_dir") == [
        2048,
        50,
        5e-6,
        "/models/4b",
        Path("runs"),
    ]
    assert len(settings.trainable_modules) == 3
    assert "--frobnicate 3: not known here" in said
    assert "--data-path ${ROOT%/}/x: only running the script would tell" in said
    assert "data/plain/webdatasets is not on this machine" in said


def test_a_script_that_resumes_in_its_own_folder_starts_another_run_beside_it(project):
    text = GUIDE.replace("_$(date +%m%d)", "_1220").replace('"/runs/earlier/iter_0400"', "$SAVE_CKPT_PATH")
    imported(project, text)
    settings = load_settings("leaves")
    assert settings.run_name == "stage2_sft_leaves_1220_imported"
    assert settings.load == "/data/exps//stage2_sft_leaves_1220"


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        (("llava-ov-1.5-8b", "qwen2_5-vl-7b"), ["--model-name qwen2_5-vl-7b", "4B and 8B"]),
        (("--bf16", "--fp16 --context-parallel-size 2"), ["--fp16", "--context-parallel-size 2", "may be 1"]),
        (("--training-phase sft", "--training-phase pretrain"), ["pretrain"]),
        (("--min-lr 1e-06", "--min-lr 1e-3"), ["min_lr 0.001", "nothing was written"]),
        (("language_model adapter\n", "language_model projector\n"), ["projector", "nothing was written"]),
        (
            ('--lr-decay-iters "$NSTEP"', "--lr-decay-iters 0 --lr-warmup-iters 9"),
            ["lr_decay_iters", "nothing was written"],
        ),
        (("echo", "echo '"), ["never closed", "line 70"]),
    ],
)
def test_what_would_train_something_else_is_refused_and_nothing_is_written(project, change, mentioned, capsys):
    with pytest.raises(SystemExit) as end:
        imported(project, GUIDE.replace(*change))
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert all(text in said for text in [*mentioned, "fix:"]), said
    assert [path.name for path in (project / "config/experiments").iterdir()] == ["mine.yaml"]


def test_no_training_command_and_a_name_that_is_taken_are_told(project, capsys):
    for text, options, mentioned in (
        ("deepspeed train.py --model_id x --lr 1\n", (), "no command with the arguments"),
        (GUIDE, ("--name", "mine"), "mine.yaml exists already"),
        (GUIDE, ("--name", "a b"), "--name: letters"),
    ):
        with pytest.raises(SystemExit):
            imported(project, text, *options)
        assert mentioned in capsys.readouterr().err


def test_nothing_of_the_script_is_run(project):
    text = GUIDE.replace("MBS=2", "MBS=2; X=$(touch ran); Y=`touch ran`; touch ran; Z=$((`touch ran`))")
    (project / "it.sh").write_text(text)
    command = [sys.executable, SCRIPTS / "import_shell_script.py", "it.sh"]
    subprocess.run(command, check=True, capture_output=True, cwd=project)
    assert not (project / "ran").exists()
    assert yaml.safe_load((project / "config/experiments/leaves.yaml").read_text())["micro_batch_size"] == 2


def test_every_argument_is_said_once_and_names_a_setting_that_there_is():
    named = {rule for rule in OPTIONS.values() if isinstance(rule, str)}
    assert named <= set(Settings.model_fields)
