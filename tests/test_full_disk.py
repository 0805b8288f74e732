"""A disk that fills up while data is converted, indexed or inspected: one message with the place, and nothing half-written."""

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import index_webdataset
import inspect_webdataset
import stage2_sftdata2webdataset
from helpers.webdatasets import Raw, record
from llava_sft.data.stored import read_split
from llava_sft.errors import exits_cleanly
from llava_sft.files import atomic_dir, atomic_file

SIZE = 4 << 20


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A folder on a disk of SIZE bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    gc.collect()  # what a failed step of this process still holds open
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with open(folder / "filler", "r+b") as file:
        file.truncate((folder / "filler").stat().st_size - leave)
    return folder / "filler"


def test_a_full_disk_is_named_and_the_same_command_goes_on(disk, tmp_path, monkeypatch, capsys):
    raw = Raw(tmp_path, [record(n, "a.png", note="n" * 400) for n in range(900)])
    wds = disk / "webdatasets"

    def run(script, *words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        try:
            script.main()
        except SystemExit as end:
            assert end.code == 1
            return capsys.readouterr().err
        return capsys.readouterr().out

    steps = {
        stage2_sftdata2webdataset: ("--input", raw.path, "--image-root", raw.images, "--output-dir", wds),
        index_webdataset: (wds,),
        inspect_webdataset: (wds, "--html", disk / "page.html", "--json", disk / "page.json"),
    }
    for script, words in steps.items():
        before = {path for path in disk.rglob("*") if path.is_file()}
        filler = fill(disk, 0 if script is inspect_webdataset else 64 << 10)
        said = run(script, *words)
        for part in (
            f"error: {disk}/",
            "No space left on device" if script is not index_webdataset else "full",
            "it takes more than",
            f"of {SIZE / 1e6:.1f} MB",
        ):
            assert part in said, said
        left = {path for path in disk.rglob("*") if path.is_file()} - before - {filler}
        assert not [path for path in left if path.suffix in (".tmp", ".tar", ".html", ".json", ".sqlite")], left
        filler.unlink()
        assert "error" not in run(script, *words)
    assert len(list(read_split(wds, "train"))) == 900
    assert json.loads((disk / "page.json").read_bytes())["ok"]


class OfALibrary(BaseException):
    pass


@pytest.mark.parametrize("writer", [atomic_file, atomic_dir])
@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        OfALibrary("database or disk is full"),
    ],
)
def test_every_writer_names_the_place_of_a_full_disk(writer, error, tmp_path, capsys):
    def fails():
        with writer(tmp_path / "whole") as place:
            (place / "part").write_bytes(bytes(3_000_000)) if isinstance(place, Path) else place.write(bytes(3_000_000))
            raise error

    with pytest.raises(SystemExit):
        exits_cleanly(fails)()
    said = capsys.readouterr().err
    assert f"{tmp_path / 'whole'}: {error.args[-1]!s}: it takes more than 3.0 MB; free in {tmp_path}: " in said
    assert list(tmp_path.iterdir()) == []
