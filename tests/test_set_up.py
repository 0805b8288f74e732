"""Set-up and doctor on machines of every kind, with stand-ins for their programs on PATH. Nothing is installed here."""

import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import doctor
import set_up
from helpers import ROOT
from llava_sft import gpu_stack, inputs, machine
from llava_sft.errors import SettingsError, SftError
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.training import checks

SMI = """#!/bin/sh
echo "$*" >> "$0.asked"
case "$*" in
  -L) echo "GPU 0: NVIDIA H100 (UUID: GPU-1-a)" ;;
  *memory*) echo "NVIDIA H100 80GB HBM3, 81559, 4, 9.0" ;;
  *driver*) echo "NVIDIA H100 80GB HBM3, $DRIVER" ;;
esac
"""
UV = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
echo "Resolved 3 packages in 5ms"; echo "Downloading torch (846.9MiB)"; echo " + torch==2.15.0"
if [ -n "$BREAKS" ]; then echo "error: $BREAKS" >&2; exit 1; fi
"""


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """The only folder on PATH; a machine without GPU, compiler and CUDA, and an environment that holds a stand-in for uv."""
    folder, environment = tmp_path / "programs", tmp_path / "venv"
    folder.mkdir()
    (environment / "bin").mkdir(parents=True)
    put(environment / "bin/uv", UV)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(
        gpu_stack.shutil, "which", lambda name: str(folder / name) if (folder / name).exists() else None
    )
    monkeypatch.setattr(sys, "prefix", str(environment))
    for name in ("CUDA_HOME", "CXX", "CUDNN_HOME", "CUDA_VISIBLE_DEVICES", "BREAKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DRIVER", "590.10")
    monkeypatch.setattr(
        gpu_stack.Path, "glob", lambda self, pattern: iter(()) if str(self) == "/dev" else GLOB(self, pattern)
    )
    machine._installed_gpus.cache_clear()
    yield folder
    machine._installed_gpus.cache_clear()


GLOB = Path.glob


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(script, monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [script.__name__, *words])
    try:
        script.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def asked() -> str:
    path = Path(sys.prefix, "bin/asked")
    return path.read_text() if path.is_file() else ""


def test_the_cuda_of_the_stack_is_that_of_the_locked_torch():
    assert set(re.findall(r"^nvidia-cudnn-cu(\d+)==", (ROOT / "requirements.lock").read_text(), re.M)) == {
        str(gpu_stack.CUDA)
    }


@pytest.mark.parametrize(
    ("name", "machine", "release", "said"),
    [
        ("Linux", "x86_64", "6.1", "supported"),
        ("Linux", "x86_64", "5.15-microsoft-standard-WSL2", "WSL 2: not tried"),
        ("Linux", "aarch64", "6.1", "not tried"),
        ("Darwin", "arm64", "25.0", "Darwin is not supported"),
        ("Linux", "riscv64", "6.1", "no wheels"),
    ],
)
def test_a_system_is_supported_or_not_tried_or_refused_in_a_sentence(monkeypatch, name, machine, release, said):
    for what, value in (("system", name), ("machine", machine), ("release", release)):
        monkeypatch.setattr(platform, what, lambda value=value: value)
    try:
        assert said in set_up.system()
    except SftError as error:
        assert said in error.problem and error.fix


def test_a_laptop_is_set_up_with_a_line_a_step_and_nothing_is_ever_removed(programs, monkeypatch, capfd):
    assert run(set_up, monkeypatch) == 0
    said = capfd.readouterr().out
    for line in ("supported", "packages of requirements.lock", "Downloading torch (846.9MiB)", "no NVIDIA GPU here"):
        assert line in said
    assert "+ torch" not in said
    assert "-r requirements.lock" in asked()
    assert not re.search(r"\bsync\b|uninstall|transformer", asked())
    assert "pip sync" not in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("c++", ["no C++ compiler", "build-essential"]),
        ("driver", ["driver 535.1 is too old for CUDA 13", "580"]),
        (None, []),
    ],
)
def test_on_a_gpu_machine_transformer_engine_comes_along_or_one_line_says_what_it_lacks(
    programs, monkeypatch, capfd, lacks, said
):
    put(programs / "nvidia-smi", SMI)
    monkeypatch.setattr(set_up, "engine_trouble", lambda: gpu_stack.Missing("no", "make gpu"))
    if lacks != "c++":
        put(programs / "c++", "")
    if lacks == "driver":
        monkeypatch.setenv("DRIVER", "535.1")
    assert run(set_up, monkeypatch) == 0  # what runs on a CPU runs in any case
    out = capfd.readouterr().out
    assert all(text in out for text in said)
    assert ("transformer-engine" in asked()) == ("nvidia-cuda-nvcc==13." in asked()) == (lacks is None)
    assert out.count("warning") == out.count("then make gpu") == (0 if lacks is None else 1)
    assert run(set_up, monkeypatch, "--engine") == (0 if lacks is None else 1)  # what `make gpu` runs


def test_a_compiled_wheel_needs_neither_compiler_nor_toolkit_nor_a_network(programs, tmp_path, monkeypatch, capfd):
    put(programs / "nvidia-smi", SMI)
    monkeypatch.setattr(set_up, "engine_trouble", lambda: gpu_stack.Missing("no", "make gpu"))
    wheels = tmp_path / "wheels"
    put(wheels / "transformer_engine_torch-2.20.2-cp312-cp312-linux_x86_64.whl", "")
    assert run(set_up, monkeypatch, "--wheels", str(wheels)) == 0
    lines = asked().splitlines()
    assert lines and all("--offline --no-index" in line and str(wheels) in line for line in lines)
    assert "transformer-engine" in lines[-1]
    (wheels / "transformer_engine_torch-2.20.2-cp312-cp312-linux_x86_64.whl").rename(
        wheels / "other-1-py3-none-any.whl"
    )
    assert run(set_up, monkeypatch, "--wheels", str(wheels)) == 0  # the CPU part is whole
    assert "has no wheel transformer_engine_torch" in capfd.readouterr().out


def test_without_a_network_one_message_says_so_and_how_to_go_on(programs, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("BREAKS", "Failed to fetch: dns error: failed to lookup address information")
    assert run(set_up, monkeypatch) == 1
    said = capfd.readouterr().err
    assert "the package index cannot be reached" in said and "make WHEELS=folder" in said and "Traceback" not in said
    monkeypatch.setenv("BREAKS", "Because torch was not found in the provided package locations …")
    put(tmp_path / "wheels/one.whl", "")
    assert run(set_up, monkeypatch, "--wheels", str(tmp_path / "wheels")) == 1
    assert "lacks a package" in capfd.readouterr().err
    assert run(set_up, monkeypatch, "--wheels", str(tmp_path / "empty")) == 1
    assert "no wheels there" in capfd.readouterr().err


def test_preflight_and_train_ask_for_transformer_engine_before_anything_runs(monkeypatch):
    monkeypatch.setattr(machine, "engine_trouble", lambda: gpu_stack.Missing("no Transformer Engine", "make gpu"))
    machine.require_engine(0)
    with pytest.raises(SettingsError, match="gpus_per_node is 2: no Transformer Engine\n  fix: make gpu"):
        machine.require_engine(2)
    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    with pytest.raises(SettingsError, match="no Transformer Engine"):
        inputs.check_gpus(ResolvedSettings(experiment="x", gpus_per_node=2, bf16=True), 2, cluster=False)
    with pytest.raises(SettingsError, match="no Transformer Engine"):
        checks.check_node(SimpleNamespace(settings=ResolvedSettings(experiment="x", gpus_per_node=2, bf16=True)))


def test_flash_attention_4_is_used_where_it_can_be_and_asked_for_by_name(monkeypatch):
    settings = ResolvedSettings(experiment="x", gpus_per_node=1, bf16=True, attention="flash4")
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    monkeypatch.setattr(machine, "require_engine", lambda gpus: None)
    monkeypatch.setattr(gpu_stack, "flash4_version", lambda: "4.0.0b1")
    with pytest.raises(
        SettingsError, match=r"flash-attn-4 is 4\.0\.0b1, and .* is needed\n  fix: .*uv pip install"
    ) as refused:
        inputs.check_gpus(settings, 1, cluster=False)
    assert f'"flash-attn-4[cu13]=={gpu_stack.FLASH4}"' in refused.value.fix
    assert f"flash-attn-4[cu13]=={gpu_stack.FLASH4}" in (ROOT / "pyproject.toml").read_text()
    inputs.check_gpus(settings.model_copy(update={"attention": "auto"}), 1, cluster=False)
    monkeypatch.setattr(gpu_stack, "flash4_version", lambda: gpu_stack.FLASH4)
    inputs.check_gpus(settings, 1, cluster=False)
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("NVIDIA A100-SXM4-80GB", 80, 0, 8.0)])
    with pytest.raises(SettingsError, match=r"A100.*attention: flash4 needs 9\.0"):
        machine.require_able_gpus(1, "none", "flash4")


def test_set_up_needs_nothing_but_python(tmp_path):
    command = [sys.executable, "-S", "-E", ROOT / "workflow_scripts/set_up.py", "--wheels", tmp_path]  # -S: no packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "system: Linux" in done.stdout and "no wheels there" in done.stderr


@pytest.mark.parametrize("recipe", ["Dockerfile", "llava_sft.def"])
def test_a_container_recipe_copies_what_there_is(recipe):
    text = (ROOT / "container" / recipe).read_text()
    assert re.findall(r"^(?:FROM|From:) (\S+)", text, re.M) == ["ubuntu:24.04"]
    lines = re.findall(r"^(?:COPY | +)(\w.*) \S+$", text.replace("%post", "\0").partition("\0")[0], re.M)
    names = {name for line in lines for name in line.split() if not line.startswith(("apt", "&&"))}
    assert {"Makefile", "Snakefile", "config", "workflow_scripts", "requirements.lock"} <= names
    assert all((ROOT / name).exists() for name in names)


def test_make_hands_a_folder_of_wheels_on():
    command = ["make", "-n", "-W", "requirements.lock", "setup", "WHEELS=/a b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'set_up.py --wheels "/a b"' in done.stdout


def test_the_doctor_says_what_a_laptop_can_do(programs, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    put(programs / "gcc", "")
    assert run(doctor, monkeypatch) == 0
    said = capfd.readouterr().out
    assert "training can run here, on the CPU" in said and "conversions and `model: tiny` run here" in said
    assert "Transformer Engine" not in said


def test_the_doctor_names_each_thing_that_keeps_a_gpu_from_training_with_its_fix(programs, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DRIVER", "535.1")
    put(programs / "nvidia-smi", SMI)
    monkeypatch.setitem(doctor.ON_GPUS, "CUDA", lambda: doctor.ok(""))
    monkeypatch.setattr(
        doctor, "engine_trouble", lambda: gpu_stack.Missing("Transformer Engine is not installed", "make gpu")
    )
    assert run(doctor, monkeypatch) == 1
    said = capfd.readouterr()
    for line in ("bad  driver", "bad  Transformer Engine", "fix: make gpu", "H100 80GB HBM3 (80 GiB", "bad  compiler"):
        assert line in said.out
    assert "training cannot run here: compiler, driver, Transformer Engine" in said.err
    questions = (programs / "nvidia-smi.asked").read_text().splitlines()
    assert len(questions) == len(set(questions)) <= 3  # each may take half a minute to fail


@pytest.mark.parametrize("endpoint", ["hf-mirror.example", "//hf-mirror.example"])
def test_the_doctor_names_an_endpoint_that_is_no_address(monkeypatch, endpoint):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor, "HUB", endpoint)
    found = doctor.find_hub()
    assert found.state == "no" and endpoint in found.what and "=https://hf-mirror.example" in found.fix


def test_transformer_engine_is_compiled_again_for_another_torch_and_where_make_gpu_finds_it_broken(
    programs, monkeypatch, capfd
):
    put(programs / "nvidia-smi", SMI)
    put(programs / "c++", "")
    monkeypatch.setattr(gpu_stack, "find_spec", lambda name: object())
    torch, works = ["2.9"], [True]
    monkeypatch.setattr(gpu_stack, "version", lambda package: torch[0])
    monkeypatch.setattr(set_up, "said", lambda *command, **how: "" if works[0] else None)
    assert run(set_up, monkeypatch) == 0 and "transformer-engine" not in asked()
    torch[0] = "2.10"  # as a new requirements.lock brings it
    assert "compiled for torch 2.9, and torch 2.10" in gpu_stack.engine_trouble().what
    assert run(set_up, monkeypatch) == 0
    assert "--no-cache --reinstall-package=transformer-engine " in asked() and gpu_stack.engine_trouble() is None
    times = asked().count("--no-cache")
    assert run(set_up, monkeypatch, "--engine") == 0 and asked().count("--no-cache") == times
    works[0] = False
    assert run(set_up, monkeypatch, "--engine") == 0 and asked().count("--no-cache") == times + 1
