"""Fixtures of several test files, and the order of the files where two processes share them."""

import copy
import fcntl
import os
import shutil
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores wait for each other: 40 % of the time
if not Path("/dev/nvidia0").exists():  # the kernels of the GPU's layers, run by Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

from helpers import MODELS, ROOT
from helpers.projects import copy_project, snakemake
from llava_sft.files import write_json
from llava_sft.model.config import LanguageConfig, ModelConfig, VisionConfig, load_model_config
from llava_sft.settings.layers import load_settings
from llava_sft.settings.resolve import resolve

# nohup, and a shell that starts us in the background, have us ignore what a terminal sends; tests send it.
for number, default in {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGQUIT: signal.SIG_DFL,
}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)
# What `make test` gives to a make below it: one that a test starts is to be as a user's.
for name in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS"):
    os.environ.pop(name, None)
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
# Files that take longest, in the order in which `make test` hands them to its two processes. The first two need different
# things: one prepares the project, which the third then finds.
SLOWEST = (
    "test_end_to_end", "test_parallel", "test_training_life", "test_forms", "test_slurm", "test_faults", "test_kernels",
    "test_lora", "test_layouts", "test_nodes", "test_ranks", "test_megatron_model", "test_redo", "test_chat", "test_trackers",
    "test_lora_layers", "test_state_of_a_run", "test_split_and_sources",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WORKER:
        place = {name: number for number, name in enumerate(SLOWEST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def small_model() -> ModelConfig:
    """As small as `tiny`, but: heads wider than the hidden size, another ViT width, a vocabulary that is no multiple of 128."""
    language = LanguageConfig(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=320,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=48,
        vocab_size=500,
        rotary_base=1e6,
        max_position_embeddings=2048,
    )
    vision = VisionConfig(num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=3)
    return ModelConfig(name="small", language=language, vision=vision)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, small_model) -> Path:
    from helpers.models import write_noisy_checkpoint  # torch: only where it is needed

    return write_noisy_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", small_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A WebDataset with questions that `evaluate` asks."""
    from helpers.questions import write_test_set

    return write_test_set(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def export(small_checkpoint) -> Path:
    """A folder that `evaluate` takes: an export's files, of random weights."""
    write_json(small_checkpoint / "converted.json", {"depends": "this export"})
    return small_checkpoint


@pytest.fixture
def source(small_checkpoint, tmp_path) -> Path:
    """A copy of the small checkpoint that a test may spoil."""
    return shutil.copytree(small_checkpoint, tmp_path / "source")


@pytest.fixture(scope="module")
def shipped_settings():
    """Resolved settings of the shipped experiment `vqa`, as preflight writes them; for one process on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return resolve(load_settings("vqa", {"gpus_per_node": 0}), 5000)[0].dump()


@pytest.fixture
def resolved(shipped_settings, tmp_path):
    sidecars = tmp_path / "start_checkpoint"
    sidecars.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (sidecars / name).write_text("{}")
    return {
        "run_name": "stage2_sft_vqa",
        "why": {},
        "settings": copy.deepcopy(shipped_settings) | {"train_iters": 100, "num_workers": 2, "lr": 1e-4},
        "model": load_model_config(MODELS / "tiny.yaml").model_dump(),
        "data": {"path": "wds", "fingerprint": "d1", "train_samples": 5000, "heldout_samples": 100},
        "start": {"load": "hf", "folder": None, "sidecars": str(sidecars), "fingerprint": "s1", "untrained": True},
        "versions": {"torch": "2"},
    }


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "stage2_sft_vqa"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project as git sees it, with nothing made in it yet."""
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A project in which the embedded experiment has got as far as preflight; made once for all processes of the tests."""
    top = tmp_path_factory.getbasetemp()
    shared = (top.parent if WORKER else top) / "shared"
    shared.mkdir(exist_ok=True)
    project, ready = shared / "prepared", shared / "ready"
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            made = snakemake(copy_project(project), "preflight_vqa")
            assert made.returncode == 0, made.stdout
            ready.touch()
    return project


@pytest.fixture(scope="module")
def prepared_project(prepared, tmp_path_factory) -> Path:
    """A copy of it, to be changed; the demo's many pictures are linked."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".png") else shutil.copy2)(source, target)

    return shutil.copytree(prepared, tmp_path_factory.mktemp("project") / "copy", copy_function=copy, symlinks=True)


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Processes that have imported Megatron, and from which trainings are forked: that takes seconds less for each rank."""
    from faults.project import environment
    from faults.server import Servers

    with Servers(ROOT, tmp_path_factory.mktemp("servers"), environment()) as servers:
        servers.wait()
        yield servers
