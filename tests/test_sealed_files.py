"""JSON files of the project's own that say when they hold other content than was written."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sft.errors import DamagedFileError
from llava_sft.files import read_json, write_json

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
