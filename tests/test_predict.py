"""Preflight's prediction: near what was recorded, in step with the settings, and loud where a run cannot fit."""

import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from calibration import all_factors, calibrate, of_device, recorded
from llava_sft.checkpoint.start import Start
from llava_sft.data.order import Passes
from llava_sft.data.sizes import SampleSizes
from llava_sft.errors import RunError, SettingsError
from llava_sft.machine import GIB, GPU_MEMORY_GIB, gpu, known_gpu
from llava_sft.model.config import load_model_config
from llava_sft.preflight.cost import MicroBatch, stages
from llava_sft.preflight.predict import (
    RESERVE,
    Case,
    Prediction,
    calibration_for,
    equally_slow_stages,
    fits,
    mean_and_largest,
    predict,
    stage_memory,
    stage_seconds,
)
from llava_sft.preflight.proposals import faster_line, forecast_of, proposal_lines, proposals
from llava_sft.settings.layers import CONFIG_DIR, load_settings
from llava_sft.settings.resolve import ResolvedSettings, resolve
from llava_sft.settings.resolved import Resolved, ResolvedData
from llava_sft.training import checks
from llava_sft.training.checks import check_memory

MODEL = load_model_config(CONFIG_DIR / "models" / "4b.yaml")
H200, H100 = gpu("NVIDIA H200"), gpu("NVIDIA H100 80GB HBM3")


@pytest.fixture(scope="module")
def sizes() -> SampleSizes:
    draw = random.Random(1)
    patches = [[4 * draw.randint(300, 900)] for _ in range(2000)]
    return SampleSizes([each[0] // 4 + draw.randint(60, 300) for each in patches], patches, [], [], [])


def settings(sizes: SampleSizes, **changed) -> ResolvedSettings:
    wanted = {"model": "4b", "packing": True, "seq_length": 8192, "micro_batch_size": 1, "gpus_per_node": 1}
    wanted |= {"global_batch_size": "auto", "train_iters": "auto"} | changed
    return resolve(load_settings("vqa", wanted), len(sizes.tokens))[0]


def batches(sizes: SampleSizes, values: ResolvedSettings) -> tuple[MicroBatch, MicroBatch]:
    packs = list(Passes(sizes.tokens, values.seq_length, 2000, seed="1").first_pass()) if values.packing else None
    return mean_and_largest(sizes, values, packs)


def predicted(sizes: SampleSizes, machine=H200, **changed) -> Prediction:
    values = settings(sizes, **changed)
    calibration = calibration_for(machine.device)
    return predict(Case(MODEL, values, machine, *batches(sizes, values)), calibration)


def test_the_factors_are_those_of_the_recorded_runs():
    for device, fitted in all_factors().items():
        kept = calibration_for(device)
        assert (kept.runs, kept.devices) == (fitted.runs, fitted.devices), "run benchmarks/preflight.py errors"
        assert [*kept.memory, *kept.time] == pytest.approx([*fitted.memory, *fitted.time], rel=1e-6)


@pytest.mark.parametrize("device, worst_memory", [("H200", 0.025), ("H100", 0.04)])
def test_a_recorded_run_is_predicted_from_the_others(device, worst_memory):
    runs = of_device(device, recorded())
    own = [run for run in runs if run.case.machine.device == device]
    assert len(own) >= 8
    assert device == "H200" or {run.case.values.lora_rank for run in own} >= {0, 32}
    memory, step = [], []  # relative errors; docs/figures.md has the worst
    for run in own:
        guess = predict(run.case, calibrate([other for other in runs if other is not run]))
        memory.append(abs(guess.memory_gib / run.memory_gib - 1))
        step.append(abs(guess.step_s / run.step_s - 1))
    assert max(memory) < worst_memory and statistics.median(memory) < 0.0125
    assert max(step) < 0.1 and statistics.median(step) < 0.025


def test_recomputation_saves_memory_and_costs_time(sizes):
    plain = predicted(sizes)
    for changed in ({"recompute_vision": "full"}, {"recompute_language": "full"}):
        again = predicted(sizes, **changed)
        assert again.memory_gib < plain.memory_gib
        assert again.step_s > plain.step_s


def test_the_vision_tower_s_stage_gets_fewer_layers_and_all_stages_are_equally_slow(sizes):
    for gpus, layers in ((2, 1), (4, 3)):  # the layers that a cut can be moved by
        values = settings(sizes, gpus_per_node=gpus, pipeline_model_parallel_size=gpus)
        calibration = calibration_for("H200")
        case = Case(MODEL, values, H200, *batches(sizes, values))
        cut = case._replace(values=equally_slow_stages(case, calibration))
        even, found = predict(case, calibration), predict(cut, calibration)
        assert 0 < cut.values.first_stage_layers < 36 / gpus
        assert found.step_s < 0.9 * even.step_s and found.memory_gib < even.memory_gib
        seconds = [stage_seconds(cut, calibration, stage) for stage in stages(MODEL, cut.values)]
        assert max(seconds) - min(seconds) < layers / 36 * sum(seconds)
        alone = predicted(sizes, global_batch_size=values.global_batch_size)
        of_weights = [stage_memory(cut, calibration, stage)["weights"] for stage in stages(MODEL, cut.values)]
        assert sum(of_weights) == pytest.approx(alone.memory["weights"])


def test_of_the_cuts_that_fit_the_fastest_is_taken_and_of_all_where_none_does(sizes):
    values = settings(sizes, gpus_per_node=2, pipeline_model_parallel_size=2)
    calibration, batch = calibration_for("H200"), batches(sizes, values)

    def cut(gib: float) -> Prediction:
        case = Case(MODEL, values, H200._replace(memory_gib=gib), *batch)
        return predict(case._replace(values=equally_slow_stages(case, calibration)), calibration)

    fastest = cut(141)
    for gib in (0.99 * fastest.memory_gib, 0.9 * fastest.memory_gib):
        fitting = cut(gib / (1 - RESERVE))
        assert fitting.memory_gib < gib and fitting.step_s > fastest.step_s
    assert cut(20) == fastest


def test_frozen_parts_need_neither_gradients_nor_moments(sizes):
    adapter = predicted(sizes, trainable_modules=["adapter"], lr_vision="auto")
    assert adapter.memory["optimizer"] < 0.1 * predicted(sizes).memory["optimizer"]


def test_what_does_not_fit_comes_with_settings_that_do_the_fastest_first(sizes):
    values = settings(sizes)
    case = Case(MODEL, values, H100, *batches(sizes, values))
    calibration = calibration_for("H100")
    assert not fits(predict(case, calibration), H100)
    found = proposals(case, calibration)
    assert found
    for changed, prediction in found:
        assert fits(prediction, H100)
        assert any(getattr(values, name) != value for name, value in changed.items())
    assert len(found) == len({str(sorted(changed.items())) for changed, _ in found})
    for names in (set(), {"lora_rank"}):  # what trains the same comes before LoRA
        speeds = [p.tokens_per_s for changed, p in found if names == {"seq_length", "lora_rank"} & changed.keys()]
        assert speeds == sorted(speeds, reverse=True) and speeds
    with_lora = proposal_lines([each for each in found if "lora_rank" in each[0]])
    assert "lora_rank=32 'trainable_modules=[language_model]' lr=0.002 (" in with_lora[0]
    assert all(line.startswith("--config ") for line in proposal_lines(found))


def test_settings_that_would_fit_are_predicted_as_their_run_is(sizes):
    values = settings(sizes)
    packs = list(Passes(sizes.tokens, values.seq_length, 2000, seed="1").first_pass())
    case = Case(MODEL, values, gpu("4090"), *mean_and_largest(sizes, values, packs))
    calibration = calibration_for("4090")

    def batches_of(**changed) -> tuple[MicroBatch, MicroBatch]:
        return mean_and_largest(sizes, values.model_copy(update=changed), packs)

    exact, estimated = proposals(case, calibration, batches_of), proposals(case, calibration)
    assert any("pack_chunk_tokens" in changed for changed, _ in exact)
    for changed, prediction in exact:
        if "seq_length" not in changed:
            run = predicted(sizes, gpu("4090"), **changed)
            assert prediction.memory_gib == pytest.approx(run.memory_gib), changed
    for changed, prediction in estimated:  # without the packs no setting is proposed that would not do
        if "seq_length" not in changed:
            assert predicted(sizes, gpu("4090"), **changed).memory_gib < 1.02 * prediction.memory_gib, changed


def test_a_small_card_keeps_room_for_what_is_not_predicted():
    assert fits(Prediction({"all": 21.9}, 1, 1), gpu("4090")) and not fits(Prediction({"all": 22.1}, 1, 1), gpu("4090"))
    assert fits(Prediction({"all": 75.0}, 1, 1), H100) and not fits(Prediction({"all": 75.5}, 1, 1), H100)


def test_pairs_wait_for_memory_in_fp8_too(sizes):
    lora = {"lora_rank": 32, "trainable_modules": ["language_model"], "lr": 1e-4}
    for fp8 in ("none", "tensorwise"):
        alone = predicted(sizes, H100, fp8=fp8, trainable_modules=["language_model"])
        pairs = predicted(sizes, H100, fp8=fp8, **lora)
        assert 0.7 * alone.step_s < pairs.step_s < 1.05 * alone.step_s
        assert pairs.memory["optimizer"] < 0.05 * alone.memory["optimizer"]


def run_of(values: ResolvedSettings, mean: MicroBatch, largest: MicroBatch) -> Resolved:
    start = Start(sidecars=Path("hf"), fingerprint="s")
    batch = {"mean": mean, "largest": largest}
    return Resolved(
        settings=values, model=MODEL.model_dump(), batch=batch, data=ResolvedData(fingerprint="d"), start=start
    )


def with_memory(monkeypatch, gib: float) -> None:
    monkeypatch.setattr(checks, "this_machine", lambda gpus, processes: H100)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=gib * GIB))


def test_a_save_that_this_machines_memory_can_not_take_stops_the_run_before_it_starts(sizes, monkeypatch):
    values = settings(sizes)
    resolved = run_of(values, MicroBatch(0, 0, 0, 0), MicroBatch(0, 0, 0, 0))
    with_memory(monkeypatch, 20)
    with pytest.raises(RunError, match=r"saving needs 4\d\.\d GiB of host memory.*; 20\.0 GiB are free"):
        check_memory(resolved)
    with_memory(monkeypatch, 200)
    check_memory(resolved)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "16000")
    with pytest.raises(RunError, match=r"; 15\.6 GiB are free") as stopped:
        check_memory(resolved)
    assert "mem_mb" in stopped.value.fix


def test_a_run_that_can_not_fit_stops_before_it_starts_unless_told_otherwise(sizes, monkeypatch, capsys):
    with_memory(monkeypatch, 200)
    values = settings(sizes, seq_length=32768, pack_chunk_tokens=32768)
    batch = batches(sizes, values)
    with pytest.raises(RunError, match=r"predicted to need .* GiB .*has 79") as stopped:
        check_memory(run_of(values, *batch))
    assert "memory_check: warn" in stopped.value.fix
    check_memory(run_of(values.model_copy(update={"memory_check": "warn"}), *batch))
    assert "predicted to need" in capsys.readouterr().out


def test_padding_counts_without_packing(sizes):
    values = settings(sizes, packing=False, micro_batch_size=8, seq_length=2048)
    mean, largest = batches(sizes, values)
    assert 8 * sum(sizes.tokens) / len(sizes.tokens) < mean.tokens < largest.tokens == 8 * max(sizes.tokens)


def test_the_largest_batch_is_what_goes_through_the_model_at_once(sizes):
    whole = batches(sizes, settings(sizes, seq_length=32768, pack_chunk_tokens=32768))
    mean, chunk = batches(sizes, settings(sizes, seq_length=32768, pack_chunk_tokens=8192))
    assert mean == whole[0]
    assert 7800 < chunk.tokens < 9600  # cut between samples: not all alike
    assert chunk.patches < 1.5 * whole[1].patches / 4
    one, two = (batches(sizes, settings(sizes, micro_batch_size=mbs))[0] for mbs in (1, 2))
    assert two.tokens == pytest.approx(2 * one.tokens)


def test_a_batch_may_hold_more_packs_than_the_data_makes(sizes):
    few = SampleSizes(sizes.tokens[:1], sizes.patches[:1], [], [], [])
    mean, largest = batches(few, settings(few, micro_batch_size=4, pack_chunk_tokens=100_000))
    assert mean == largest and mean.tokens == 4 * few.tokens[0]


def test_a_gpu_that_nobody_measured_is_named():
    with pytest.raises(SettingsError, match="RTX"):
        gpu("RTX 9999")


def test_a_faster_way_to_share_a_model_between_the_same_gpus_is_said(sizes):
    def said(machine=H200, **changed):
        values = settings(sizes, gpus_per_node=2, global_batch_size=32, **changed)
        return faster_line(forecast_of(Case(MODEL, values, machine, *batches(sizes, values))))

    tensor, pipeline = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    assert said() == []
    for asked in (tensor, pipeline):
        name = next(iter(asked))
        (line,) = said(**asked)
        assert line.startswith(f"{name} 2: ") and f"--config {name}=1 (" in line
    (line,) = said(H100, **tensor)  # two cards of 80 GB are too small for whole packs in each
    assert line.startswith("tensor_model_parallel_size 2: ")
    assert "--config tensor_model_parallel_size=1 pipeline_model_parallel_size=2 (" in line
    (line,) = said(**tensor, micro_batch_size=32)  # two replicas have 16 packs each
    assert "--config tensor_model_parallel_size=1 micro_batch_size=16 (" in line
    assert said(gpu("NVIDIA RTX 4090"), **tensor) == []  # it does not fit at all
    assert (
        "--config tensor_model_parallel_size=1 ("
        in said(**tensor, lora_rank=8, trainable_modules=["language_model"])[0]
    )


def test_gpus_too_small_for_the_whole_model_are_proposed_to_share_it(sizes):
    def found(model: str, **changed) -> list[tuple[dict, Prediction]]:
        values = settings(sizes, gpus_per_node=2, model=model, **changed)
        architecture = load_model_config(CONFIG_DIR / "models" / f"{model}.yaml")
        forecast = forecast_of(Case(architecture, values, H100, *batches(sizes, values)))
        for proposed, _ in forecast.would_fit:
            resolved = values.model_copy(update=proposed)
            assert not 2 % resolved.model_parallel_size, proposed
        return forecast.would_fit

    name = "pipeline_model_parallel_size"
    of_4b, of_8b = found("4b"), found("8b")
    assert of_4b[0][0] == {"pack_chunk_tokens": 4096}, "a pipeline that is 2 % faster is not worth it"
    assert {name: 2} in [changed for changed, _ in of_4b]
    assert of_8b[0][0].keys() >= {"recompute_vision"} and any(changed.get(name) == 2 for changed, _ in of_8b)
    assert not any("pack_chunk_tokens" in changed for changed, _ in of_8b if changed.get(name) == 2)
    assert found("8b", pipeline_model_parallel_size=2)[0][0] == {
        "recompute_vision": "full",
        "recompute_language": "full",
    }


def test_gpus_that_share_layers_wait_for_one_another_and_in_short_chunks_for_the_host(sizes):
    two = {"gpus_per_node": 2, "seq_length": 8192, "global_batch_size": 64}
    shared = two | {"tensor_model_parallel_size": 2}
    rates = [predicted(sizes, **shared, pack_chunk_tokens=chunk).tokens_per_s for chunk in (8192, 4096, 2048)]
    each_whole = predicted(sizes, **two, pack_chunk_tokens=8192).tokens_per_s
    assert 0.8 * each_whole < rates[0] < 0.95 * each_whole  # 0.87 in benchmarks/results/scaling.json
    assert rates[1] < 0.7 * rates[0] and rates[2] < 0.55 * rates[1], "the host launches chunks, whatever they hold"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H800", "H800"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A800-SXM4-80GB", "A800"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA RTX 6000 Ada Generation", "6000 ADA"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "PRO 6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GB200", "B200"),
    ],
)
def test_gpus_are_known_by_their_makers_names(name, known):
    assert known_gpu(name) == known and (known is None or known in GPU_MEMORY_GIB)


def test_what_a_cluster_takes_is_told_from_the_result_files(monkeypatch, capsys):
    import sizing

    monkeypatch.setattr(sys, "argv", ["sizing.py", "--gpus", "1", "1024", "--packs", "16"])
    sizing.main()
    rows = dict(line.strip("| ").split(" | ", 1) for line in capsys.readouterr().out.splitlines() if "---" not in line)
    assert rows["useful tokens/s"].startswith("15,370 ")  # that was measured
    alone, many = rows["efficiency"].split(" | ")
    assert alone == "100%" and 0.5 < float(many[:-1]) / 100 < 0.9
