"""JSON files of the project's own that say when they hold other content than was written; files that cannot be used."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sft import errors
from llava_sft.checkpoint.start import Start
from llava_sft.checkpoint.verify import MARKER, sidecars_damage
from llava_sft.checksums import note
from llava_sft.errors import DamagedFileError, exits_cleanly
from llava_sft.files import naming_full_disk, read_json, write_json
from llava_sft.run.identity import keep_sidecars
from llava_sft.run.layout import SIDECARS

VALUE = {"steps": 6, "loss": 5.25, "name": "数据", "nested": {"seal": "mine"}, "list": [1, 2, 3]}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    path = tmp_path_factory.mktemp("sealed") / "state.json"
    write_json(path, VALUE, sealed=True)
    return path


def test_sealed_file_reads_as_what_was_written_and_is_json_for_others(sealed):
    assert read_json(sealed) == VALUE
    assert json.loads(sealed.read_bytes()).items() >= VALUE.items()


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_sealed_file_never_reads_as_something_else_after_any_changed_byte(sealed, data):
    original = sealed.read_bytes()
    where = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[where] = data.draw(st.integers(0, 255))
    damaged = sealed.with_name("damaged.json")
    damaged.write_bytes(changed)
    try:
        found = read_json(damaged)
    except DamagedFileError as error:
        assert "damaged.json" in error.problem
    else:
        assert {key: found.get(key) for key in VALUE} == VALUE


def test_files_without_a_seal_are_read_as_before(tmp_path):
    write_json(tmp_path / "old.json", VALUE)
    assert read_json(tmp_path / "old.json") == VALUE
    (tmp_path / "list.json").write_text("[1, 2]")
    assert read_json(tmp_path / "list.json") == [1, 2]
    (tmp_path / "number.json").write_text("3")
    assert read_json(tmp_path / "number.json") == 3


@pytest.mark.parametrize("kind", ["missing", "a folder", "a link to nowhere"])
def test_file_that_cannot_be_read_ends_in_one_message_with_its_name(tmp_path, capsys, kind):
    path = tmp_path / "state.json"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to nowhere":
        path.symlink_to("nowhere")
    with pytest.raises(SystemExit) as end:
        exits_cleanly(lambda: path.read_bytes())()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {path}: ")


def test_full_disk_ends_in_one_message_and_other_trouble_of_the_system_keeps_its_traceback(capsys):
    def fails(number: int):
        raise OSError(number, "why")

    with pytest.raises(SystemExit):
        exits_cleanly(fails)(errno.ENOSPC)
    assert "free some space" in capsys.readouterr().err
    with pytest.raises(OSError):
        exits_cleanly(fails)(errno.EMFILE)


def test_a_disk_without_inodes_is_not_said_to_be_full(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda path: SimpleNamespace(f_files=60, f_favail=50, f_bavail=9, f_bfree=9, f_blocks=9, f_frsize=4096),
    )

    def fails():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a.png"))

    with pytest.raises(SystemExit):
        exits_cleanly(fails)()
    assert f"the disk of {tmp_path} takes 50 more files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("total", "said"), [(3_200_000_000_000, "0.1 MB of 3,200.0 GB"), (64 << 20, "0.1 MB of 67.1 MB"), (None, "")]
)
def test_the_room_on_a_disk_is_said_in_its_size_and_not_of_one_that_is_gone(monkeypatch, total, said):
    def usage(folder):
        if total is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))
        return SimpleNamespace(free=100_000, total=total)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    message = errors.of_file(OSError(errno.ENOSPC, "No space left on device", "/gone/a.tar"))
    assert message.problem == "/gone/a.tar: No space left on device" + (f"; free in /: {said}" if said else "")


def test_a_full_disk_is_named_though_files_vanish_while_they_are_counted(tmp_path, monkeypatch):
    (tmp_path / "whole").write_bytes(b"1" * 1_500_000)
    (tmp_path / "vanishing").touch()
    sizes = Path.lstat

    def lstat(path):
        (tmp_path / "vanishing").unlink(missing_ok=True)
        return sizes(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    with (
        pytest.raises(OSError, match=r"No space left on device: it takes more than 1\.5 MB"),
        naming_full_disk(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_quota_is_no_full_disk(capsys):
    def fails():
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "a.tar")

    with pytest.raises(SystemExit):
        exits_cleanly(fails)()
    said = capsys.readouterr().err
    assert said.startswith("error: a.tar: Disk quota exceeded") and "`quota -s`" in said


@pytest.mark.parametrize(
    "words",
    [
        "database or disk is full",
        "OSError: [Errno 28] No space left on device",
        "[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598",
    ],
)
def test_full_disk_is_said_in_the_words_of_libraries_too(capsys, words):
    class OfTorch(BaseException):
        pass

    def fails():
        raise OfTorch(f"ranks:\n  Traceback …\n  {words}")

    with pytest.raises(SystemExit):
        exits_cleanly(fails)()
    assert "the disk may be full" in capsys.readouterr().err


def test_damaged_tokenizer_of_a_run_is_copied_again_from_its_start_checkpoint(tmp_path, capsys):
    start, run = tmp_path / "start", tmp_path / "run"
    start.mkdir()
    (start / "tokenizer.json").write_text('{"vocab": 12}')
    run.mkdir()
    begun = Start(sidecars=start, fingerprint="s")
    keep_sidecars(run, begun, done=0)
    (run / SIDECARS / "tokenizer.json").write_text('{"vocab": 13}')
    assert "tokenizer.json" in sidecars_damage(run / SIDECARS)
    keep_sidecars(run, begun, done=4)
    assert (run / SIDECARS / "tokenizer.json").read_text() == '{"vocab": 12}'
    assert "copied from" in capsys.readouterr().out
    assert sidecars_damage(run / SIDECARS) is None


def test_damaged_tokenizer_of_a_converted_checkpoint_is_named(tmp_path):
    folder = tmp_path / "start_mcore_tp1_pp1" / SIDECARS
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text('{"vocab": 12}')
    assert sidecars_damage(folder) is None  # an older one, which noted nothing
    write_json(folder.parent / MARKER, {"files": note(folder.parent, [folder / "tokenizer.json"])}, sealed=True)
    assert sidecars_damage(folder) is None
    (folder / "tokenizer.json").write_text('{"vocab": 13}')
    assert "huggingface/tokenizer.json" in sidecars_damage(folder)


def test_folder_in_the_place_of_a_file_is_named_and_not_the_temporary_file(tmp_path, capsys):
    (tmp_path / "state.json").mkdir()
    with pytest.raises(SystemExit):
        exits_cleanly(write_json)(tmp_path / "state.json", {"steps": 1})
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'state.json'}: ")
