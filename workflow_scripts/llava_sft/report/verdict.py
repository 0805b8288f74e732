"""What a run came to, in a sentence, and what to do next: a few rules over what its files say, each of which holds by itself.

Notable: nothing is claimed that chance alone may explain, and where nothing can be said, that is said.
"""

import shlex
from math import isfinite
from statistics import median
from typing import Any, NamedTuple

from llava_sft.report.figures import LOSS, best_validation
from llava_sft.report.html import number, percent, points
from llava_sft.report.language import Say
from llava_sft.run.layout import checkpoint_dir
from llava_sft.run.remedies import lower_lr

FALLING = 0.01  # share that the held-out loss still fell by in the last interval: training longer would have lowered it
RISEN = 0.02  # … that it rose by since its lowest value: more than from one validation to the next by chance
FEW = 200  # questions: on fewer, ten points of difference may be chance
CUT, WAITING, REJECTED = 0.01, 0.2, 0.01  # shares that are worth a sentence


class Verdict(NamedTuple):
    """`tone`: good, bad, or open where nothing can be said."""

    tone: str
    headline: str
    next_steps: list[str]


def verdict(found: dict[str, Any], records: dict[str, list[dict[str, Any]]], say: Say, run_dir: Any) -> Verdict:
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


def _about_answers(found: dict[str, Any], say: Say) -> list[str]:
    steps, evaluation = [], found["evaluation"] or {"samples": 0}
    experiment = found["resolved"]["settings"].get("experiment", "")
    held_out = ((found["dataset"] or {}).get("heldout") or {}).get("samples")
    if found["evaluation"] and not evaluation["samples"] and not held_out:
        steps.append(
            say(
                "Hold some data out: `val_fraction: 0.05` in `config/experiments/%(name)s.yaml`. It is another run then: "
                "give it a `run_tag`.",
                name=experiment,
            )
        )
    elif not found["evaluation"]:
        steps.append(say("Evaluate it: `make evaluate_%(name)s`", name=experiment))
    cut, tokens = evaluation.get("cut", 0), evaluation.get("max_new_tokens", 0)
    if cut and cut > CUT * evaluation["answers"]:
        steps.append(
            say(
                "%(cut)s of %(all)s answers were cut off and are mostly wrong for that: `max_new_tokens: %(more)s` evaluates "
                "again, and trains nothing anew.",
                cut=number(cut),
                all=number(evaluation["answers"]),
                more=2 * tokens,
            )
        )
    scores = evaluation.get("scores") or [{}]
    low, high = scores[0].get("interval_of_difference", (1, 1))
    if low <= 0 <= high and evaluation["samples"] < FEW:
        steps.append(
            say(
                "%(count)s questions are few: more held-out data can show a smaller difference.",
                count=evaluation["samples"],
            )
        )
    return steps


def _about_held_out_loss(found: dict[str, Any], validations: list[dict[str, Any]], say: Say, run_dir: Any) -> list[str]:
    losses = [(each["iteration"], each[LOSS]) for each in validations if isfinite(each.get(LOSS) or float("nan"))]
    best = best_validation(validations)
    if len(losses) < 2 or not best:
        return []
    (_, before), (last_step, last) = losses[-2:]
    if last > (1 + RISEN) * best[LOSS]:
        folder = checkpoint_dir(run_dir, best["iteration"])
        kept = shlex.quote(str(folder)) if folder.is_dir() else ""
        text = say(
            "Held-out loss rose again after step %(step)s (%(low)s → %(last)s): the model began to learn its training data by "
            "heart. Fewer epochs, a lower learning rate, or more data.",
            step=number(best["iteration"]),
            low=number(best[LOSS]),
            last=number(last),
        )
        if not kept:
            return [text]
        command = f"python workflow_scripts/convert_checkpoint.py mcore2hf {kept} best"
        return [
            text,
            say(
                "Exported is the last checkpoint. The best one, of step %(step)s: `%(command)s`",
                step=number(best["iteration"]),
                command=command,
            ),
        ]
    settings, why = found["resolved"]["settings"], found["resolved"]["why"]
    if last >= (1 - FALLING) * before or last_step < settings.get("train_iters", 0):
        return []
    name, value = (
        ("epochs", settings.get("epochs", 1)) if "train_iters" in why else ("train_iters", settings["train_iters"])
    )
    return [
        say(
            "Held-out loss was still falling at the end (%(before)s → %(last)s): train longer, with a schedule of the learning "
            "rate of its own: `--config %(name)s=%(value)s run_tag=longer`",
            before=number(before),
            last=number(last),
            name=name,
            value=f"{2 * value:g}",
        )
    ]


def _about_training(found: dict[str, Any], records: dict[str, list[dict[str, Any]]], say: Say) -> list[str]:
    steps, settings = [], found["resolved"]["settings"]
    experiment, done = settings.get("experiment", ""), (found["train_done"] or {}).get("iteration")
    if done and done < settings.get("train_iters", 0):
        steps.append(
            say(
                "The training ended at step %(step)s of %(all)s: `make train_%(name)s` goes on with it.",
                step=number(done),
                all=number(settings["train_iters"]),
                name=experiment,
            )
        )
    if bad := {each["iteration"] for each in records["bad"]}:
        steps.append(
            say(
                "Steps whose loss jumped or was not a number: %(count)s; bad_steps.jsonl names their samples. If it goes on: a "
                "lower learning rate, `lr: %(lr)s`.",
                count=number(len(bad)),
                lr=f"{lower_lr(settings['lr']):g}",
            )
        )
    waits = [each["data_wait_share"] for each in records["metrics"][1:] if each.get("data_wait_share") is not None]
    if waits and (share := median(waits)) > WAITING:
        steps.append(
            say(
                "Steps waited %(share)s of their time for data: a local disk, smaller `max_pixels`, or more cores.",
                share=percent(share),
            )
        )
    never = ((found["counts"] or {}).get("seen") or {}).get("0", 0)
    if never and found["counts"]["epochs"] < 0.95:
        steps.append(
            say(
                "%(epochs)s epochs; samples that were never seen: %(count)s. `epochs: 1` sees each once.",
                epochs=number(float(found["counts"]["epochs"])),
                count=number(never),
            )
        )
    dataset = found["dataset"] or {}
    if dataset.get("rejected", 0) > REJECTED * dataset.get("read", 1):
        steps.append(
            say(
                "Rejected records: %(count)s of %(all)s; the reasons stand under “Data”.",
                count=number(dataset["rejected"]),
                all=number(dataset["read"]),
            )
        )
    return steps
