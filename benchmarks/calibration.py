"""Fits preflight's factors to the recorded runs, rows of results/preflight.json; see preflight.py."""

import json
from collections.abc import Collection
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from llava_sft.files import read_json, write_json
from llava_sft.machine import GIB, Machine
from llava_sft.model.config import load_model_config
from llava_sft.preflight.cost import MicroBatch, host_seconds, stages, state_bytes
from llava_sft.preflight.predict import (
    FACTORS,
    Calibration,
    Case,
    calibration_for,
    memory_terms,
    stage_memory,
    stage_seconds,
    time_terms,
)
from llava_sft.settings.resolve import ResolvedSettings
from results import RESULTS, ROOT

HOST_BOUND = 1.1  # a step that takes no longer than the host, by so much, is limited by it
ENOUGH_RUNS, ENOUGH_FP8 = 8, 4  # of one device, and of them in FP8 on a GPU: from fewer no factor is sure


class Recorded(NamedTuple):
    """One measured run: GiB at the peak, seconds of a step."""

    case: Case
    memory_gib: float
    step_s: float


@cache
def recorded() -> tuple[Recorded, ...]:
    """The recorded runs."""
    by_settings: dict[str, dict[str, Any]] = {}
    for row in read_json(RESULTS / "preflight.json", {"rows": []})["rows"]:
        if row["metric"] in ("peak_memory_gib", "step_s"):
            settings = row["settings"]
            same = json.dumps(
                [settings[name] for name in ("run", "mean", "largest")]
            )  # measured again, the later holds
            by_settings.setdefault(same, {"settings": settings})[row["metric"]] = row["value"]
    return tuple(_recorded(**run) for run in by_settings.values())


def _recorded(settings: dict[str, Any], peak_memory_gib: float, step_s: float) -> Recorded:
    values = ResolvedSettings.model_validate(settings["values"] | {"experiment": ""})
    model = load_model_config(ROOT / "config/models" / f"{values.model}.yaml")
    mean, largest = MicroBatch(*settings["mean"]), MicroBatch(*settings["largest"])
    return Recorded(Case(model, values, Machine(*settings["machine"]), mean, largest), peak_memory_gib, step_s)


def calibrate(runs: Collection[Recorded]) -> Calibration:
    """Non-negative factors with the least relative errors over `runs`."""
    memory, time = [], []
    for run in runs:
        # Of pipeline stages one decides; which is not a matter of the last digits.
        before, each = calibration_for(run.case.machine.device), stages(run.case.model, run.case.values)
        fullest = max(each, key=lambda stage: sum(stage_memory(run.case, before, stage).values()))
        slowest = max(each, key=lambda stage: stage_seconds(run.case, before, stage))
        state = sum(state_bytes(run.case.model, run.case.values, fullest).values()) / GIB
        rest = max(run.memory_gib - state, 0.0)
        memory.append(([term / run.memory_gib for term in memory_terms(run.case, fullest)], rest / run.memory_gib))
        if run.step_s > HOST_BOUND * host_seconds(
            run.case.model, run.case.values, run.case.mean, slowest
        ):  # else it tells nothing of the GPU
            time.append(([term / run.step_s for term in time_terms(run.case, slowest)], 1.0))
    return Calibration(_fit(memory), _fit(time), len(runs), sorted({run.case.machine.device for run in runs}))


def _fit(rows: list[tuple[list[float], float]]) -> list[float]:
    matrix, target = np.array([terms for terms, _ in rows]), np.array([value for _, value in rows])
    scale = np.where(matrix.any(0), np.abs(matrix).max(0), 1.0)  # columns of one size: the fit is well-conditioned
    return list(map(float, nnls(matrix / scale, target)[0] / scale))


def of_device(device: str, runs: Collection[Recorded]) -> list[Recorded]:
    """The runs of this device where they are enough, else those of all GPUs, scaled by the peaks; a CPU stands for no GPU and
    no GPU for a CPU."""
    kind = [run for run in runs if (run.case.machine.device == "CPU") == (device == "CPU")]
    own = [run for run in kind if run.case.machine.device == device]
    return own if enough(own) else kind


def enough(runs: Collection[Recorded]) -> bool:
    """Whether these runs of one device tell how it computes, in FP8 too where it is a GPU."""
    in_fp8 = sum(run.case.values.fp8 != "none" or run.case.machine.device == "CPU" for run in runs)
    return len(runs) >= ENOUGH_RUNS and in_fp8 >= ENOUGH_FP8


def all_factors() -> dict[str, Calibration]:
    """Of each device with enough runs, and of all GPUs."""
    runs = recorded()
    devices = sorted({run.case.machine.device for run in runs})
    own = [device for device in devices if enough([run for run in runs if run.case.machine.device == device])]
    return {device: calibrate(of_device(device, runs)) for device in (*own, "GPU")}


def write_factors() -> None:
    write_json(FACTORS, {device: fitted._asdict() for device, fitted in all_factors().items()})
