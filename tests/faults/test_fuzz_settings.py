"""Files of settings that hold anything: settings, or one short message."""

import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_sft.errors import SftError
from llava_sft.inputs import check_inputs
from llava_sft.settings.layers import CONFIG_DIR, load_settings
from llava_sft.settings.schema import Settings
from llava_sft.workflow import Workflow

ROOT = Path(__file__).parents[2]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text(max_size=300)
    | st.sampled_from(["auto", "1e-5", "1_000", "0o17", "yes", "~", "{exp_dir}/x", "../x", "a/b", "org/name@main", "*.jsonl", "-n"])
    | st.integers(min_value=-(10**400), max_value=10**400)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6
)
KEYS = st.sampled_from(sorted(Settings.model_fields)) | SCALARS
SOUND = {"raw_data": "raw.jsonl", "image_root": ".", "load": "hf"}
TEXTS = st.text(alphabet=st.sampled_from("abl:-[]{}&*!|>'\"%@#?,.~ \t\n01e_rd"), max_size=200)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shutil.copytree(ROOT / "config", "config")
    for path in (CONFIG_DIR / "experiments").glob("*.yaml"):
        path.unlink()
    Path("raw.jsonl").write_text("{}\n")
    return CONFIG_DIR / "experiments/fuzz.yaml"


def told(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    try:
        load_settings("fuzz")
        check_inputs(Workflow({}, []).paths("fuzz"))
    except SftError as error:
        assert error.fix and len(str(error)) <= 1000, (len(str(error)), str(error)[:300])


def fuzzed(examples):
    """The test of anything, with so many examples."""
    kept = settings(
        max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    )

    def test(here, content):
        told(content, here)

    values = st.dictionaries(KEYS, VALUES, max_size=4)
    files = values.map(lambda more: yaml.safe_dump(SOUND | more, allow_unicode=True).encode("utf-8", "surrogatepass"))
    return kept(given(content=files | TEXTS.map(str.encode) | st.binary(max_size=200))(test))


test_any_file_of_settings_is_read_or_refused_in_one_short_message = fuzzed(40)
test_many_files_of_settings_are_read_or_refused_in_one_short_message = pytest.mark.long(fuzzed(1000))
