"""What a run came to, in a sentence, and what to do next: a few rules over what its files say, each of which holds by itself.

Notable: nothing is claimed that chance alone may explain, and where nothing can be said, that is said.
"""

import shlex
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from llava_sft.report.figures import LOSS, best_validation
from llava_sft.report.html import number, percent, points
from llava_sft.report.language import Say
from llava_sft.run.layout import checkpoint_dir
from llava_sft.run.remedies import lower_lr

FALLING = 0.01  # share that the held-out loss still fell by in the last interval: it had not come to rest
RISEN = 0.02  # … by which it rose since its lowest value; less is noise, of the same batches at each validation
FEW = 200  # questions: on fewer, ten points of difference may be chance
CUT, WAITING, REJECTED = 0.01, 0.2, 0.01  # shares that are worth a sentence
ONE_EPOCH = 0.95


class Verdict(NamedTuple):
    """`tone`: good, bad, or open where nothing can be said."""

    tone: str
    headline: str
    next_steps: list[str]


def verdict(found: dict[str, Any], records: dict[str, list[dict[str, Any]]], say: Say, run_dir: Path) -> Verdict:
    """
    Args:
        found: the content of the JSON files by name, None where one is missing.
        records: those of metrics.jsonl, validation.jsonl and bad_steps.jsonl: `metrics`, `validations`, `bad`.
    """
    tone, headline = _headline(found, say)
    steps = [*_about_answers(found, say), *_about_held_out_loss(found, records["validations"], say, run_dir)]
    steps += _about_training(found, records, say)
    return Verdict(tone, headline, steps)


def _headline(found: dict[str, Any], say: Say) -> tuple[str, str]:
    evaluation = found["evaluation"]
    if not evaluation:
        return "open", say("Not evaluated: nothing here says how the model answers what it has not seen.")
    if not evaluation["samples"]:
        return "open", say("No held-out data: nothing can be said about how the model answers what it has not seen.")
    score = evaluation["scores"][0]
    if "base" not in score:
        low, high = score["interval"]
        return "open", say(
            "%(mean)s on held-out questions (95 %% confidence interval %(low)s to %(high)s). It was not compared with its start, "
            "so that nothing here says how much of that it learned in this run.",
            mean=percent(score["mean"]),
            low=percent(low),
            high=percent(high),
        )
    low, high = score["interval_of_difference"]
    values = {"change": points(score["difference"]), "low": points(low), "high": points(high)}
    if low > 0:
        return "good", say("The model learned: %(change)s points over the start (%(low)s to %(high)s).", **values)
    if high < 0:
        return "bad", say(
            "The model became worse: %(change)s points against the start (%(low)s to %(high)s).", **values
        )
    return "open", say(
        "No difference from the start that chance alone could not explain: %(change)s points (%(low)s to %(high)s).",
        **values,
    )


def _about_answers(found: dict[str, Any], say: Say) -> Iterator[str]:
    experiment, evaluation = found["resolved"]["settings"].get("experiment", ""), found["evaluation"]
    held_out = ((found["dataset"] or {}).get("heldout") or {}).get("samples")
    if not evaluation:
        yield say("Evaluate it: `make evaluate_%(name)s`", name=experiment)
        return
    if not evaluation["samples"] and not held_out:
        yield say(
            "Hold some data out: `val_fraction: 0.05` in `config/experiments/%(name)s.yaml`. It is another run then: give it a "
            "`run_tag`.", name=experiment,
        )  # fmt: skip
    cut = evaluation.get("cut", 0)
    if cut and cut > CUT * evaluation["answers"]:
        yield say(
            "%(cut)s of %(all)s answers were cut off and are mostly wrong for that: `max_new_tokens: %(more)s` evaluates again, "
            "and trains nothing anew.",
            cut=number(cut), all=number(evaluation["answers"]), more=2 * evaluation.get("max_new_tokens", 0),
        )  # fmt: skip
    low, high = (evaluation.get("scores") or [{}])[0].get("interval_of_difference", (1, 1))
    if low <= 0 <= high and evaluation["samples"] < FEW:
        few = "%(count)s questions are few: more held-out data can show a smaller difference."
        one = "One question is little: more held-out data can show a smaller difference."
        yield say(one if evaluation["samples"] == 1 else few, count=evaluation["samples"])


def _about_held_out_loss(
    found: dict[str, Any], validations: list[dict[str, Any]], say: Say, run_dir: Path
) -> Iterator[str]:
    losses = [(each["iteration"], each[LOSS]) for each in validations if isfinite(each.get(LOSS) or float("nan"))]
    best, settings = best_validation(validations), found["resolved"]["settings"]
    if len(losses) < 2 or not best:
        return
    (_, before), (last_step, last) = losses[-2:]
    if last > (1 + RISEN) * best[LOSS]:
        yield say(
            "Held-out loss rose again after step %(step)s (%(low)s → %(last)s): the model began to learn its training data by "
            "heart. Fewer epochs, a lower learning rate, or more data.",
            step=number(best["iteration"]), low=number(best[LOSS]), last=number(last),
        )  # fmt: skip
        if (folder := checkpoint_dir(run_dir, best["iteration"])).is_dir():
            yield say(
                "Exported is the last checkpoint. The best one, of step %(step)s: `%(command)s`", step=number(best["iteration"]),
                command=f"python workflow_scripts/convert_checkpoint.py mcore2hf {shlex.quote(str(folder))} best",
            )  # fmt: skip
    elif last < (1 - FALLING) * before and last_step >= settings.get("train_iters", 0):
        given = "epochs" if "train_iters" in found["resolved"]["why"] else "train_iters"
        yield say(
            "Held-out loss was still falling at the end (%(before)s → %(last)s): train longer, with a schedule of the learning "
            "rate of its own: `--config %(name)s=%(value)s run_tag=longer`",
            before=number(before), last=number(last), name=given, value=f"{2 * settings.get(given, 1):.12g}",
        )  # fmt: skip


def _about_training(found: dict[str, Any], records: dict[str, list[dict[str, Any]]], say: Say) -> Iterator[str]:
    settings, dataset, counts = found["resolved"]["settings"], found["dataset"] or {}, found["counts"] or {}
    done, train_iters = (found["train_done"] or {}).get("iteration"), settings.get("train_iters", 0)
    if done and done < train_iters:
        yield say(
            "The training ended at step %(step)s of %(all)s: `make train_%(name)s` goes on with it.",
            step=number(done), all=number(train_iters), name=settings.get("experiment", ""),
        )  # fmt: skip
    if bad := {each["iteration"] for each in records["bad"]}:
        yield say(
            "Steps whose loss jumped or was not a number: %(count)s; bad_steps.jsonl names their samples. If it goes on: a "
            "lower learning rate, `lr: %(lr)s`.", count=number(len(bad)), lr=f"{lower_lr(settings['lr']):g}",
        )  # fmt: skip
    waits = [each["data_wait_share"] for each in records["metrics"][1:] if each.get("data_wait_share") is not None]
    if waits and (share := median(waits)) > WAITING:
        yield say(
            "Steps waited %(share)s of their time for data: a local disk, smaller `max_pixels`, or more cores.",
            share=percent(share),
        )
    never = (counts.get("seen") or {}).get("0", 0)
    if never and counts["epochs"] < ONE_EPOCH:
        yield say(
            "%(epochs)s epochs; samples that were never seen: %(count)s. `epochs: 1` sees each once.",
            epochs=number(float(counts["epochs"])), count=number(never),
        )  # fmt: skip
    if (dataset.get("rejected") or 0) > REJECTED * (dataset.get("read") or 1):  # None: of a finished folder
        yield say(
            "Rejected records: %(count)s of %(all)s; the reasons stand under “Data”.",
            count=number(dataset["rejected"]), all=number(dataset["read"]),
        )  # fmt: skip
