"""benchmarks/: each file of results has a command, scripts take what they are told to be given, and what is not measured for want
of time spoils nothing."""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest

import cases
import lora
import on_gpus
from helpers import ROOT

README = (ROOT / "benchmarks/README.md").read_text()


def shown(name: str, *given: str) -> list[str]:
    """The commands of a set of on_gpus.py."""
    command = [sys.executable, ROOT / "benchmarks/on_gpus.py", name, "--show", *given]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.removeprefix("python ") for line in output.splitlines()]


def test_each_file_of_results_has_a_command():
    described = set(re.findall(r"`(\w+)`", README))
    assert {path.stem for path in (ROOT / "benchmarks/results").glob("*.json")} <= described


@pytest.mark.parametrize("commands", [re.findall(r"python (benchmarks/[^`\n]+)", README), *on_gpus.SETS])
def test_scripts_take_what_they_are_given(commands, monkeypatch, tmp_path):
    if isinstance(commands, str):
        commands = shown(commands, "--folder", str(tmp_path)) + shown(commands, "--read", str(tmp_path))
    parse = argparse.ArgumentParser.parse_args
    parsed = []

    def parsed_and_no_more(parser, given=None, namespace=None):
        parsed.append(parse(parser, given, namespace))
        sys.exit("parsed")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed_and_no_more)
    for command in map(shlex.split, commands):
        if command[0] == "-m":
            named = command[command.index("-k") + 1] if "-k" in command else "def test_"
            assert named in (ROOT / "tests/test_gpu.py").read_text()
        elif "Parser(" not in (ROOT / command[0]).read_text():
            assert len(command) == 1
        else:
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit, match="parsed"):
                runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    assert parsed


def test_no_case_of_a_process_hides_another():
    lists = [each for each in vars(cases).values() if isinstance(each, list)] + [
        each[3] for each in lora.PROCESSES.values()
    ]
    for names in ([case["name"] for case in each] for each in lists):
        assert len(set(names)) == len(names)


def test_nothing_is_begun_after_its_time(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/on_gpus.py", "lora", "--seconds", "0", "--folder", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(line.startswith("not begun, the time is over: python ") for line in run.stdout.splitlines())
    assert len(run.stdout.splitlines()) == 6 and not list(tmp_path.iterdir())


def case(seconds: float, tokens: int = 8) -> dict:
    step = {"seconds": seconds, "waited": 0.0, "batches": [{"segments": [tokens], "flops": 1.0}]}
    return {"steps": [step, step], "warm": 1, "peak_allocated_gib": 1.0, "peak_reserved_gib": 2.0}


def test_figures_are_made_of_the_processes_that_ran():
    raw = {
        "long-lora": {"whole packs": case(4.0), "whole packs, q k v made again": {"out_of_memory": "no"}},
        "long-language": {"whole packs": case(5.0)},
        "long-full": {"chunks": case(8.0)},
    }

    def ratios(*names: str) -> dict[str, float]:
        rows = lora.rows({name: {"gpu": "NVIDIA H200", "cases": raw[name]} for name in names})
        return {row["metric"]: row["value"] for row in rows if row["unit"] == "×"}

    assert ratios(*raw) == {"lora_speedup_same_parts": 1.25, "lora_speedup": 2.0}
    assert ratios("long-lora", "long-full") == {"lora_speedup": 2.0}
    assert ratios("long-full") == ratios("long-lora") == {}
    raw["long-language"]["whole packs"] = case(5.0, tokens=9)
    with pytest.raises(SystemExit, match="not the same"):
        ratios(*raw)


def test_a_whole_set_of_lora_still_has_its_other_figures():
    names = {name: {each["name"]: case(2.0) for each in those} for name, (_, _, _, those) in lora.PROCESSES.items()}
    peer = {"name": "peft", "useful_tokens_per_s": 1.0}
    raw = {name: {"gpu": "NVIDIA H200", "cases": those} for name, those in names.items()}
    raw["peft"] = {"gpu": "NVIDIA H200", "peer": peer}
    recorded = json.loads((ROOT / "benchmarks/results/lora.json").read_text())["rows"]
    assert {row["metric"] for row in lora.rows(raw)} == {row["metric"] for row in recorded}
