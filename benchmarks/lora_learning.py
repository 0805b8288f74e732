"""How much of what full fine-tuning learns LoRA learns: the embedded model, a kind of question it has never seen.

    python benchmarks/lora_learning.py [NAME …]   # of SETS; default: all

Start: the experiment `vqa` trained without its kind "larger of two" (two pictures, which digit is larger). Then 400 steps on
that kind alone, on a CPU, with full fine-tuning and with LoRA, each at three learning rates, the best of them with two more
seeds; what counts is how far the loss on held-out questions of that kind falls. Every training is the workflow's own step, `snakemake` and its files. A
finished one stays in --folder and is not run again.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from llava_sft.data.demo import write_demo
from llava_sft.files import write_text
from llava_sft.model.config import load_model_config
from llava_sft.run.layout import VALIDATION, checkpoint_dir
from llava_sft.run.records import read_jsonl
from llava_sft.settings.resolve import ResolvedSettings
from results import ROOT, row, timed, write_results

KIND, START_STEPS, STEPS = "larger_of_two", 800, 400
ONE_PROCESS = {"nproc_per_node": 1, "num_workers": 1, "gpus_per_node": 0}
ALL = ["language_model", "adapter", "vision_model"]
FULL_RATES, LORA_RATES = (1e-3, 2e-3, 4e-3), (2e-3, 5e-3, 1e-2)
SETS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {  # settings, learning rates
    "full": ({}, FULL_RATES),
    "lora": ({"trainable_modules": ["language_model"], "lora_rank": 8, "lora_alpha": 16}, LORA_RATES),
    "lora_32": ({"trainable_modules": ["language_model"], "lora_rank": 32, "lora_alpha": 32}, LORA_RATES),
    "lora_all": ({"trainable_modules": ALL, "lora_modules": ALL, "lora_rank": 8, "lora_alpha": 16}, LORA_RATES),
}
SEED, MORE_SEEDS = 42, (43, 44)  # config.yaml's, for every rate; the others for the best rate of a set
GOAL = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SETS)} (all)")
    parser.add_argument(
        "--folder", type=Path, default="/tmp/llava_sft_lora_learning", help="of data and runs (%(default)s)"
    )
    args = parser.parse_args()
    folder = args.folder.resolve()
    records = write_records(folder / "records")
    start = train(folder / "start", records, "other", "", {"train_iters": START_STEPS, "save_interval": START_STEPS})
    print(f"start: held-out loss of its own kinds {heldout_loss(start):.4f}", flush=True)
    load = {"load": str(checkpoint_dir(start, START_STEPS)), "save_interval": STEPS, "eval_iters": 5}
    still = train(folder / "kind", records, KIND, "still", load | {"train_iters": 1, "lr": 1e-12, "min_lr": 1e-12})
    before = heldout_loss(still)
    print(f"start: held-out loss of {KIND} {before:.4f}", flush=True)
    after = {}
    for name in args.names or SETS:
        values, rates = SETS[name]
        runs = Runs(folder / "kind", records, name, load | values | {"train_iters": STEPS})
        after[name] = {(lr, SEED): runs.loss(lr, SEED) for lr in rates}
        best = best_rate(after[name])
        after[name] |= {(best, seed): runs.loss(best, seed) for seed in MORE_SEEDS}
    if after.keys() == SETS.keys():
        write_results("lora_learning", rows(before, after), "python benchmarks/lora_learning.py")


class Runs(NamedTuple):
    """The trainings of one of SETS."""

    exp_dir: Path
    records: Path
    name: str
    settings: dict[str, Any]

    def loss(self, lr: float, seed: int) -> float:
        """Held-out loss at the end."""
        tag, other = f"{self.name}_{lr:g}", {} if seed == SEED else {"seed": seed}
        tag += "".join(f"_s{seed}" for _ in other)
        loss = heldout_loss(train(self.exp_dir, self.records, KIND, tag, self.settings | {"lr": lr} | other))
        print(f"{self.name}, lr {lr:g}, seed {seed}: {loss:.4f}", flush=True)
        return loss


Losses = dict[tuple[float, int], float]  # by learning rate and seed


def best_rate(losses: Losses) -> float:
    return min((loss, lr) for (lr, seed), loss in losses.items() if seed == SEED)[1]


def rows(before: float, after: dict[str, Losses]) -> list[dict[str, Any]]:
    """The loss at the end of every training, and what each set learned at its best rate, full fine-tuning being 1."""
    found = [row("heldout_loss", before, "nats", None, "lower", "before the 400 steps", run="start")]
    model, falls = load_model_config(ROOT / "config/models/tiny.yaml"), {}
    for name, losses in after.items():
        values, _ = SETS[name]
        note = f"{ResolvedSettings(experiment='vqa', **values).trained.parameters(model):,} trained parameters"
        for (lr, seed), loss in losses.items():
            run = f"{name}, lr {lr:g}, seed {seed}"
            found.append(row("heldout_loss", loss, "nats", None, "lower", note, run=run, lr=lr, seed=seed, **values))
        falls[name] = [before - loss for (lr, _), loss in losses.items() if lr == best_rate(losses)]
    full = falls.pop("full")
    for name, fall in falls.items():
        seeds = ", ".join(f"{mine / whole:.3f}" for mine, whole in zip(fall, full, strict=True))
        note = (
            f"fall of the held-out loss {mean(fall):.3f}, with full fine-tuning {mean(full):.3f}; seed by seed {seeds}"
        )
        share = mean(fall) / mean(full)
        found.append(row("lora_learning", share, "", GOAL, "higher", note, run=name, **SETS[name][0]))
    return found


def write_records(folder: Path) -> Path:
    """The embedded records, those of KIND apart from the others."""
    if not (folder / "images").is_dir():
        write_demo(folder)
        for split in ("train", "heldout"):
            lines = (folder / f"{split}.jsonl").read_text().splitlines(keepends=True)
            for name, wanted in ((KIND, True), ("other", False)):
                chosen = [line for line in lines if (json.loads(line)["kind"] == KIND) is wanted]
                write_text(folder / f"{name}_{split}.jsonl", "".join(chosen))
    return folder


def train(exp_dir: Path, records: Path, kind: str, tag: str, settings: dict) -> Path:
    """The run directory of a finished training of `vqa` on the records of `kind`."""
    values = ONE_PROCESS | {"exp_dir": exp_dir, "image_root": records / "images", "run_tag": tag} | settings
    values |= {"raw_data": records / f"{kind}_train.jsonl", "heldout_data": records / f"{kind}_heldout.jsonl"}
    run = exp_dir / f"stage2_sft_vqa{'_' * bool(tag)}{tag}"
    given = [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in values.items()]
    os.environ["OMP_NUM_THREADS"] = "1"
    command = [Path(sys.executable).with_name("snakemake"), "--cores", 1, "--nolock", f"{run}_results/train.done.json"]
    timed(*command, "--config", *given, cwd=ROOT)
    return run


def heldout_loss(run: Path) -> float:
    return read_jsonl(run / VALIDATION)[-1]["lm loss validation"]


if __name__ == "__main__":
    main()
