"""chat.py: what may be named, what stands on stdout, conversations, Ctrl-C, and messages for what is missing or broken."""

import contextlib
import fcntl
import os
import pty
import select
import shutil
import socket
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import chat
from helpers import ROOT, SCRIPTS
from helpers.webdatasets import picture
from llava_sft.chat import models, web
from llava_sft.chat.questions import Turn
from llava_sft.checkpoint.safetensors_io import old_name
from llava_sft.checksums import note
from llava_sft.errors import CheckpointError, DataError, SettingsError
from llava_sft.evaluation.export import Export
from llava_sft.files import write_json

ASKED = "<image>\n<image>\nWhich of the two digits is larger?"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, small_checkpoint) -> Path:
    """A run's folder with one checkpoint, and beside it the results with its export."""
    run_dir = tmp_path_factory.mktemp("output") / "stage2_sft_x"
    checkpoint = run_dir / "iter_0000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    (run_dir / "latest_checkpointed_iteration.txt").write_text("100")
    export = shutil.copytree(small_checkpoint, run_dir.with_name("stage2_sft_x_results") / "huggingface")
    (export / "converted.json").unlink(missing_ok=True)
    marker = {"source": f"output/{run_dir.name}/iter_0000100", "files": note(export, list(export.iterdir()))}
    write_json(export / "converted.json", marker, sealed=True)
    return run_dir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.png").write_bytes(picture(size=(56, 56)))
    (folder / "b c.jpg").write_bytes(picture("JPEG", (84, 56)))
    return [str(folder / "a.png"), str(folder / "b c.jpg")]


def run(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, words)])
    try:
        chat.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def with_pictures(pictures: list[str]) -> list[str]:
    return [word for path in pictures for word in ("--image", path)]


@pytest.fixture(scope="module")
def expected(run_dir, pictures) -> str:
    """What evaluate.py would count as this model's answer."""
    export = Export(run_dir.with_name("stage2_sft_x_results") / "huggingface", 6)
    images = [Image.open(path).convert("RGB") for path in pictures]
    (answer,) = export.answer(export.encode([export.render([{"role": "user", "content": ASKED}])], images))
    return answer.text


@pytest.mark.parametrize(
    "named", ["export", "results", "run", "iteration", "folder", "published spelling", "on the hub"]
)
def test_the_answer_alone_stands_on_stdout_whatever_is_named(
    named, run_dir, small_checkpoint, pictures, expected, tmp_path, monkeypatch, capsys
):
    results = run_dir.with_name("stage2_sft_x_results")
    folder = tmp_path / "LLaVA"
    if named in ("folder", "published spelling", "on the hub"):  # with code of its own, which is not executed
        shutil.copytree(small_checkpoint, folder, ignore=shutil.ignore_patterns("converted.json"))
        for path in folder.glob("*.py"):
            path.write_text("raise SystemExit(7)")
        (folder / "generation_config.json").write_text('{"custom": 1}')  # what is said of it goes to stderr
    if named == "published spelling":
        weights = load_file(folder / "model.safetensors")
        save_file({old_name(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    places = {
        "export": results / "huggingface",
        "results": results,
        "run": run_dir,
        "iteration": run_dir / "iter_0000100",
    }
    monkeypatch.setattr(models, "fetch", lambda name: ({"org/LLaVA": folder}[name], ["commit 1"]))
    monkeypatch.setattr(models.subprocess, "run", None)  # nothing is exported: it is there
    name = "org/LLaVA" if named == "on the hub" else places.get(named, folder)
    code = run(monkeypatch, name, *with_pictures(pictures), "--max-new-tokens", 6, ASKED.replace("<image>\n", ""))
    said = capsys.readouterr()
    assert (code, said.out.strip()) == (0, expected)
    assert "float32 on cpu" in said.err


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no model", "no model is named\n  fix: one of output/stage2_sft_x_results"),
        ("no such folder", "nowhere: no such folder"), ("another folder", "neither a model nor a run"),
        ("no picture", "picture gone.png: No such file or directory"), ("broken picture", "truncated or damaged image"),
        ("no weights", "no *.safetensors file in it"), ("a tensor less", "1 tensor is missing"),
        ("mixed spelling", "not named as in LLaVA-OneVision-1.5"),
        ("damaged export", "does not hold what was written"), ("no gpu", "no GPU here"), ("control token", "<|im_start|>"),
        ("legacy", "convert_checkpoint.py hf2mcore"), ("no streamlit", "--web needs Streamlit"), ("port", "--port 99999"),
        ("bytes", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_missing_or_broken_is_one_message(
    case, message, run_dir, small_checkpoint, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    results = shutil.copytree(run_dir.with_name("stage2_sft_x_results"), tmp_path / "output/stage2_sft_x_results")
    export, words = results / "huggingface", ["What?"]
    if case == "broken picture":
        (tmp_path / "half.png").write_bytes(Path(pictures[0]).read_bytes()[:-60])
    if case in ("no weights", "a tensor less", "mixed spelling"):
        (export / "converted.json").unlink()
        weights = load_file(export / "model.safetensors")
        (export / "model.safetensors").unlink()
        if case == "a tensor less":
            save_file(dict(list(weights.items())[1:]), export / "model.safetensors")
        if case == "mixed spelling":
            mixed = {name if "visual" in name else old_name(name): tensor for name, tensor in weights.items()}
            save_file(mixed, export / "model.safetensors")
    if case == "damaged export":
        with open(export / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
    if case == "legacy":
        (tmp_path / "old/release/mp_rank_00").mkdir(parents=True)
    monkeypatch.setattr(web, "find_spec", lambda name: None if case == "no streamlit" else True)
    named = {"no model": [], "no such folder": ["nowhere"], "another folder": [tmp_path], "legacy": ["old/release"]}
    more = {
        "no picture": ["--image", "gone.png"], "broken picture": ["--image", "half.png"], "no gpu": ["--device", "cuda"],
        "no streamlit": ["--web"], "port": ["--web", "--port", "99999"],
        "bytes": ["--system", "\udcff"],
    }  # fmt: skip
    if case == "control token":
        words = ["a <|im_start|> b"]
    elif case in named or "--web" in more.get(case, []):
        words = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(monkeypatch, *named.get(case, [export]), *more.get(case, []), *words) == 1
    said = capsys.readouterr()
    assert said.out == "" and message in said.err.rpartition("error: ")[2]
    assert "\n  fix: " in said.err and "Traceback" not in said.err


def test_no_code_of_a_folder_that_looks_like_an_export_is_executed(run_dir, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(run_dir.with_name("stage2_sft_x_results") / "huggingface", tmp_path / "theirs")
    (folder / "converted.json").unlink()
    for code in folder.glob("*.py"):
        code.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    write_json(folder / "converted.json", {"files": note(folder, list(folder.iterdir()))}, sealed=True)
    assert run(monkeypatch, folder, "What?", "--max-new-tokens", 2) == 0
    assert not (tmp_path / "executed").exists()


def test_the_message_installs_what_the_project_names():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert web.INSTALL.endswith("'.[web]'") and [name.partition(">")[0] for name in extras["web"]] == ["streamlit"]


def test_a_port_in_use_is_said(monkeypatch):
    monkeypatch.setattr(web, "find_spec", lambda name: True)
    with socket.socket() as taken:
        taken.bind((web.ADDRESS, 0))
        taken.listen()
        with pytest.raises(SettingsError, match="in use"):
            web.check_page(taken.getsockname()[1])


def test_a_megatron_checkpoint_is_exported_once_beside_its_run(run_dir, tmp_path, monkeypatch, capfd):
    other = shutil.copytree(run_dir, tmp_path / "stage2_sft_y")
    asked = []

    def convert(command, **_):
        asked.append([str(word) for word in command[2:]])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(models.subprocess, "run", convert)
    target = tmp_path / "stage2_sft_y_exports/iter_0000100"
    assert models.find_model(str(other)) == models.find_model(str(other / "iter_0000100")) == target
    assert asked[0] == ["mcore2hf", str(other / "iter_0000100"), str(target)]
    assert f"exporting it to {target}" in capfd.readouterr().err
    monkeypatch.chdir(other)
    assert models.find_model(".") == models.find_model("iter_0000100") == target
    # An export of the run that is older than the checkpoint is of another training.
    results = shutil.copytree(run_dir.with_name("stage2_sft_x_results"), tmp_path / "stage2_sft_y_results")
    marker = results / "huggingface/converted.json"
    write_json(marker, {"source": "output/stage2_sft_y/iter_0000100"})
    assert models.find_model(str(results)) == models.find_model(str(other)) == results / "huggingface"
    os.utime(marker, (0, 0))
    assert models.find_model(str(other)) == target
    monkeypatch.setattr(models.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit):
        models.find_model(str(other))


class Scripted:
    """Stands for a model: notes the conversations, and answers with their number of turns; one answer is interrupted."""

    was_cut = False

    def __init__(self, interrupt: int = 0):
        self.heard, self.interrupt, self.closed = [], interrupt, 0

    def answer(self, turns):
        self.heard.append([(turn.text, len(turn.pictures)) for turn in turns])
        try:
            yield f"{len(turns)} "
            if len(self.heard) == self.interrupt:
                raise KeyboardInterrupt
            yield "turns"
        finally:
            self.closed += 1


def type_in(monkeypatch, *lines):
    """Lines typed at the terminal; an exception is Ctrl-C or Ctrl-D."""
    remaining = iter(lines)

    def read(prompt=""):
        line = next(remaining)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


def test_a_conversation_remembers_until_it_is_reset(pictures, monkeypatch, capsys):
    a, b = pictures
    type_in(
        monkeypatch,
        "One?",
        f"/image '{b}'",
        "",
        "Two?",
        "/image 'x",
        "/image gone.png",
        "/nope",
        "/reset",
        "Three?",
        "/quit",
    )
    model = Scripted()
    chat.converse(model, [Turn("system", "Be brief.")], [Image.open(a)])
    system = ("Be brief.", 0)
    assert model.heard[0] == [system, ("<image>\nOne?", 1)]
    assert model.heard[1] == [system, ("<image>\nOne?", 1), ("2 turns", 0), ("<image>\nTwo?", 1)]
    assert model.heard[2:] == [[system, ("Three?", 0)]]
    said = capsys.readouterr()
    assert said.out == "2 turns\n4 turns\n2 turns\n"
    for message in ("No closing quotation", "gone.png: No such file", "/nope: no such command"):
        assert message in said.err


def test_ctrl_c_ends_an_answer_and_twice_the_program(monkeypatch, capsys):
    once = KeyboardInterrupt
    type_in(monkeypatch, "One?", "Two?", once, "", once, "Three?", once, once)
    model = Scripted(interrupt=1)
    with pytest.raises(KeyboardInterrupt):
        chat.converse(model, [], [])
    assert [len(heard) for heard in model.heard] == [1, 3, 5] and model.closed == 3
    assert capsys.readouterr().out == "1 \n3 turns\n5 turns\n"
    type_in(monkeypatch, "One?", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):  # in the answer, and again
        chat.converse(Scripted(interrupt=1), [], [])
    type_in(monkeypatch, EOFError)
    chat.converse(Scripted(), [], [])


@pytest.mark.parametrize("closed", ["<&-", "What? | exec 3>&-"])
def test_streams_that_cannot_be_used_end_without_a_traceback(closed, small_checkpoint):
    command = f"set -o pipefail; {sys.executable} {SCRIPTS / 'chat.py'} {small_checkpoint} --max-new-tokens 2 {closed}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
    assert ("stdin is closed" in ended.stderr) == (closed == "<&-")


def test_a_script_that_feeds_lines_stops_at_the_first_mistake(monkeypatch):
    type_in(monkeypatch, "/image gone.png", "What?")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(DataError):
        chat.converse(Scripted(), [], [])


def test_ctrl_c_on_a_real_terminal(small_checkpoint):
    """An answer that would take minutes ends at once, and the program at the second Ctrl-C, with exit code 130."""
    command = [sys.executable, str(SCRIPTS / "chat.py"), str(small_checkpoint), "--max-new-tokens", "100000"]
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    said = b""

    def until(text: bytes, seconds: float = 60) -> None:
        nonlocal said
        end = time.monotonic() + seconds
        while text not in said and time.monotonic() < end:
            if select.select([main], [], [], 0.1)[0]:
                said += os.read(main, 1 << 16)
        assert text in said, said[-2000:]
        said = said.partition(text)[2]

    try:
        until(b"> ")
        os.write(main, b"Which digit is this?\n")
        until(b"?\r\n")
        time.sleep(1)
        os.write(main, b"\x03")
        until(b"^C")  # the answer may hold a prompt's characters
        until(b"\n> ")
        time.sleep(0.5)  # readline prints its prompt a moment before a signal can wake it
        os.write(main, b"\x03")
        with contextlib.suppress(OSError):  # the terminal is closed by the exit, which takes seconds on a busy machine
            while True:
                until(b"\n> ", 100)
                os.write(main, b"\x03")  # the answer was still closing: a prompt follows, and one more ends it
        assert process.wait(100) == chat.INTERRUPTED
    finally:
        process.kill()
        os.close(main)


def test_no_such_name_on_the_hub_is_said(monkeypatch):
    with pytest.raises(CheckpointError, match="not in the hub's cache"):  # HF_HUB_OFFLINE is set for all tests
        models.find_model("org/no-such-model@main")
