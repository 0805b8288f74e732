"""Reading and inspecting a WebDataset of arbitrary bytes: a report or one message, never a traceback."""

import os
import tarfile

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers.webdatasets import Raw, record
from llava_sft.data.index import index_webdataset
from llava_sft.data.inspect import inspect_webdataset
from llava_sft.data.nv_meta import is_finished
from llava_sft.data.tars import find_layout, first_layout, walk_tar
from llava_sft.errors import SftError

EXAMPLES, LONG_EXAMPLES = 40, 30_000
FILES = (
    "subtaskdata-00000.tar", "subtaskdata-00001.tar.idx", ".nv-meta/.info.json", ".nv-meta/split.yaml",
    ".nv-meta/dataset.yaml", ".nv-meta/index.sqlite",
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.binary(max_size=80), st.integers(0, 600)),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Raw:
    raw = Raw(tmp_path_factory.mktemp("fuzz"), [record(i, [None, "a.png"][i % 2]) for i in range(9)])
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    return raw


def inspect_changed(raw: Raw, changes: list[tuple[str, float, bytes, int]]) -> None:
    """Put bytes in the place of others in some files; inspect; put the files back."""
    before = {name: (raw.wds / name).read_bytes() for name, *_ in changes}
    try:
        for name, place, new, gone in changes:
            data = (raw.wds / name).read_bytes()
            at = int(place * len(data))
            (raw.wds / name).write_bytes(data[:at] + new + data[at + gone :])
        is_finished(raw.wds)
        try:
            inspect_webdataset(raw.wds, raw.parts)
        except SftError as error:
            assert str(error)  # one message
    finally:
        for name, data in before.items():
            (raw.wds / name).write_bytes(data)


def read_tar(path, data: bytes) -> None:
    path.write_bytes(data)
    first_layout(path)
    try:
        samples = walk_tar(path)
    except (tarfile.TarError, OSError):
        return
    find_layout(path, samples)
    assert all(0 <= sample.offset < sample.offset + sample.size <= os.path.getsize(path) for sample in samples)


SHORT = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=LONG_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
TARS = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=600), st.integers(0, 1024))


def changed(raw: Raw, change: tuple[float, bytes, int]) -> bytes:
    data = (raw.wds / FILES[0]).read_bytes()
    at = int(change[0] * len(data))
    return data[:at] + change[1] + data[at + change[2] :]


@SHORT
@example([(".nv-meta/index.sqlite", 0.123046875, b"'\x80", 0)])  # SQLite's own message quotes these bytes
@given(CHANGES)
def test_inspection_reports_any_bytes(raw, changes):
    inspect_changed(raw, changes)


@SHORT
@given(TARS)
def test_tars_of_any_bytes_are_read_or_refused(raw, change):
    read_tar(raw.folder / "x.tar", changed(raw, change))


@pytest.mark.long
@LONG
@given(CHANGES, TARS)
def test_inspection_and_tars_of_any_bytes_for_long(raw, changes, change):
    inspect_changed(raw, changes)
    read_tar(raw.folder / "x.tar", changed(raw, change))
