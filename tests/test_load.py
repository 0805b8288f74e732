"""`load` beyond a whole local folder: hub ids, parts from several folders, and what is wrong with either."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

import convert_checkpoint
from helpers import ROOT
from llava_sft.checkpoint.convert import hf2mcore
from llava_sft.checkpoint.hub import download, fetch
from llava_sft.checkpoint.safetensors_io import old_name
from llava_sft.checkpoint.start import Checkpoint, check_load, existing_checkpoint, named_parts
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.errors import CheckpointError
from llava_sft.run.layout import TRACKER

HUB = "lmms-lab/LLaVA-OneVision-1.5-4B-Base@1a2b3c4d5e6f7a8b9c0d"
NAMES = ("language_model", "vision_model", "adapter")


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_told_from_a_folder_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest = HUB.partition("@")[0]
    for name in (HUB, newest):
        assert Checkpoint.of(name).kind == "hub" and Checkpoint.of(name).needs_conversion
        check_load(Checkpoint.of(name), {"language": name}, None, made_here=False)
    assert Checkpoint.of(HUB).converted_name({}) == "LLaVA-OneVision-1.5-4B-Base@1a2b3c4d5e6f_mcore_tp1_pp1"
    assert Checkpoint.of(newest).converted_name({}) == "LLaVA-OneVision-1.5-4B-Base_mcore_tp1_pp1"
    for name in ("run/iter_0000400", "checkpoints/x_mcore_tp1_pp1", "./models", "a/b/c", "org/", "-x/y"):
        assert Checkpoint.of(name).kind != "hub", name
    (tmp_path / "lmms-lab").mkdir()  # a path of which all but the last folder is there
    with pytest.raises(CheckpointError, match="no such folder") as error:
        check_load(Checkpoint.of(newest), {}, None, made_here=False)
    assert "org/name@revision" in error.value.fix
    assert Checkpoint.of(HUB).kind == "hub"
    (tmp_path / HUB).mkdir(parents=True)
    assert Checkpoint.of(HUB).kind != "hub"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, with one repository; `hub.commit` is an exception where it does not answer so."""
    hub = SimpleNamespace(commit=COMMIT, asked=[])

    def model_info(self, repo, **options):
        if isinstance(hub.commit, Exception):
            raise hub.commit
        return SimpleNamespace(sha=hub.commit)

    def snapshot_download(repo, revision, **options):
        hub.asked.append(revision)
        folder = tmp_path / "snapshots" / (revision if revision and len(revision) == 40 else COMMIT)
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def test_an_id_without_a_revision_says_which_commit_it_took(hub, monkeypatch):
    folder, said = fetch("org/name")
    assert folder.name == COMMIT and hub.asked == [None]  # the branch: offline, the cache knows what it was
    assert f"commit {COMMIT}, the newest on the hub" in said[0] and f"org/name@{COMMIT}" in said[0]
    hub.commit = ConnectionError("no")
    assert "the newest in the hub's cache (the hub cannot be reached: ConnectionError)" in fetch("org/name")[1][0]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "in the hub's cache (HF_HUB_OFFLINE is set)" in fetch("org/name")[1][0]
    assert hub.asked == [None, None, None]
    assert fetch(f"org/name@{COMMIT[:7]}")[1] == fetch(f"org/name@{COMMIT}")[1] == []
    assert fetch("org/name@main")[1] == [f"org/name@main is commit {COMMIT}"]


def test_a_repository_that_is_not_there_may_have_been_meant_as_a_folder(hub):
    hub.commit = made(RepositoryNotFoundError)
    with pytest.raises(
        CheckpointError, match="no org/name on the hub, or you have no access to it, and org/name is no folder here"
    ):
        fetch("org/name")


def test_the_cache_names_the_commits_that_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / f"models--org--name/snapshots/{COMMIT}").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=f"HF_HUB_OFFLINE is set.*the cache has {COMMIT}: name one, org/name@{COMMIT}"
    ):
        fetch("org/name@main")


def made(kind):
    """The hub's errors want a whole HTTP response to be made."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("failure", "mentioned"),
    [
        (LocalEntryNotFoundError("no"), ["not in the hub's cache", "hf download lmms-lab/LLaVA-OneVision-1.5-4B-Base --revision"]),
        (ConnectionError("no"), ["cannot be reached", "hf download"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["no room in the hub's cache", "export HF_HOME="]),
        (made(RepositoryNotFoundError), ["no lmms-lab"]),
        (made(RevisionNotFoundError), ["no revision 1a2b3c4d"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_download_is_one_clear_message(monkeypatch, failure, mentioned):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as error:
        download(HUB)
    for text in [HUB, *mentioned]:
        assert text in str(error.value)


def test_offline_mode_looks_into_the_cache_alone_and_says_so():
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        download(HUB)  # conftest sets it


def test_the_revision_asked_for_is_the_one_downloaded(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **options: asked.update(repo=repo, **options) or str(tmp_path),
    )
    assert download(HUB) == tmp_path
    assert (asked["repo"], asked["revision"]) == tuple(HUB.split("@"))
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])


# --- parts -----------------------------------------------------------------------------------------------------------


def part(source: Path, target: Path, wanted, config: dict | None = None, spell=str) -> Path:
    """A folder with the tensors of some parts only."""
    target.mkdir()
    weights = {spell(name): value for name, value in load_file(source / "model.safetensors").items() if wanted(name)}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        for path in source.glob("*.json"):
            shutil.copy(path, target)
        (target / "config.json").write_text(json.dumps(config))
    return target


def is_adapter(name):
    return ".merger." in name


def is_vision(name):
    return "visual" in name and not is_adapter(name)


def is_language(name):
    return "visual" not in name


@pytest.fixture
def folders(small_checkpoint, tmp_path):
    """A vision tower alone (old names, no config), and a language model as Qwen3's own folder: its names, its config."""
    text = json.loads((small_checkpoint / "config.json").read_text())["text_config"] | {"model_type": "qwen3"}
    vision = part(small_checkpoint, tmp_path / "rice", is_vision, spell=old_name)
    language = part(small_checkpoint, tmp_path / "Qwen3", is_language, text, old_name)
    return vision, language


def tensors(folder):
    reader = TorchDistReader(folder / "release")
    return {key: reader.read(key) for key in reader.tensors()}


def test_parts_come_from_where_they_are_named_and_the_marker_says_so(small_checkpoint, small_model, folders, tmp_path):
    vision, language = folders
    whole = hf2mcore(small_checkpoint, tmp_path / "whole", small_model)
    made = hf2mcore(
        language, tmp_path / "made", small_model, parts={"vision_model": vision, "adapter": small_checkpoint}
    )
    assert made["fingerprint"] == whole["fingerprint"]
    assert [("language" in line, str(source) in line) for line, source in zip(sorted(made["origin"]), [small_checkpoint, language, vision], strict=True)] == [(False, True), (True, True), (False, True)]  # fmt: skip


def test_a_random_adapter_is_made_only_when_asked_for(small_checkpoint, small_model, folders, tmp_path):
    vision, language = folders
    with pytest.raises(CheckpointError, match=r"merger\.ln_q"):
        hf2mcore(language, tmp_path / "made", small_model, parts={"vision_model": vision})
    for name in ("made", "again"):
        hf2mcore(language, tmp_path / name, small_model, parts={"vision_model": vision, "adapter": "random"})
    made, again, source = tensors(tmp_path / "made"), tensors(tmp_path / "again"), small_checkpoint
    hf2mcore(source, tmp_path / "whole", small_model)
    whole = tensors(tmp_path / "whole")
    assert all(torch.equal(value, again[key]) for key, value in made.items())
    assert {key for key in made if not torch.equal(made[key], whole[key])} == {
        k for k in made if k.startswith("adapter.")
    }
    assert 0.015 < made["adapter.linear_fc1.weight"].std() < 0.025


def test_a_tied_language_model_gets_an_output_layer_of_its_own(small_checkpoint, small_model, folders, tmp_path):
    vision, language = folders
    config = json.loads((language / "config.json").read_text())
    weights = load_file(language / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, language / "model.safetensors")
    parts = {"vision_model": vision, "adapter": "random"}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        hf2mcore(language, tmp_path / "made", small_model, parts=parts)
    (language / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    hf2mcore(language, tmp_path / "made", small_model, parts=parts)
    made = tensors(tmp_path / "made")
    assert torch.equal(
        made["language_model.output_layer.weight"], made["language_model.embedding.word_embeddings.weight"]
    )


def test_a_part_brings_its_own_values_and_has_to_be_of_its_size(small_model, folders, tmp_path, capsys):
    vision, language = folders
    parts = {"vision_model": vision, "adapter": "random"}
    config = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(config | {"rope_theta": 5e6}))
    made = hf2mcore(language, tmp_path / "made", small_model, parts=parts)
    assert (
        made["model"]["language"]["rotary_base"] == 5e6 and made["model"]["vision"] == small_model.vision.model_dump()
    )
    assert (
        "language rotary_base is 5,000,000, config/models/small.yaml has 1,000,000: the checkpoint's"
        in capsys.readouterr().out
    )
    assert made["notes"] == [f"{vision}: no config.json: RoPE base and epsilons are those of config/models/small.yaml"]
    (language / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"num_layers is 3, config/models/small\.yaml has 2"):
        hf2mcore(language, tmp_path / "made", small_model, parts=parts)
    (language / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="language alone, no vision"):
        hf2mcore(language, tmp_path / "made", small_model, parts={"vision_model": language, "adapter": "random"})
    extra = load_file(vision / "model.safetensors") | {"visual.blocks.7.norm1.weight": torch.ones(96)}
    save_file(extra, vision / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.visual\.blocks\.7\.norm1\.weight"):
        hf2mcore(language, tmp_path / "made", small_model, parts=parts)


@pytest.mark.parametrize(
    ("parts", "mentioned"),
    [
        ({"vision": "nowhere"}, "no such folder"),
        ({"eyes": "nowhere"}, "eyes"),
        ({"language": "random"}, "language: random"),
    ],
)
def test_wrong_parts_are_refused_before_any_job(small_checkpoint, parts, mentioned):
    with pytest.raises(CheckpointError, match=mentioned):
        check_load(Checkpoint.of(small_checkpoint), parts, None, made_here=False)
    named = Checkpoint.of("models/Qwen3-4B").converted_name({"vision": "models/rice", "adapter": "random"})
    assert named == "Qwen3-4B+adapter=random+vision=rice_mcore_tp1_pp1"


def test_parts_go_by_the_names_of_the_models_modules_and_by_those_they_had(small_checkpoint):
    new = {"vision_model": str(small_checkpoint), "adapter": "random"}
    old = {"vision": str(small_checkpoint), "adapter": "random"}
    assert named_parts(new.items()) == named_parts(old.items())
    load = Checkpoint.of("models/Qwen3-4B")
    assert load.converted_name(new) == load.converted_name(old)
    with pytest.raises(CheckpointError, match="vision_model stands twice"):
        named_parts((new | old).items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mcore2hf", "run/iter_20"], "run/iter_20: no such folder\n  fix: name run/iter_0000020\n"),
        (["mcore2hf", "gone"], "gone: no such folder\n  fix: name a run directory, one of its iter_ folders"),
        (["mcore2peft", "run/iter_0000020"], "run/iter_0000020: no torch_dist checkpoint in it"),
        (["mcore2hf", "hf"], "hf: no torch_dist checkpoint in it"),
        (["verify", "gone"], "gone: no such folder\n  fix: name a run directory"),
        (["hf2mcore", "run/iter_0000020"], "error: run/iter_0000020/config.json: no such file"),
        (["mcore2hf", "run/iter_0000020", "--model", "config/models/tiny.yml"], "one of 4b, 8b, tiny"),
    ],
)
def test_what_is_no_checkpoint_to_convert_is_answered_with_what_is(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    for name in ("run/iter_0000010", "run/iter_0000020", "hf"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "hf/config.json").write_text("{}")
    if "--model" in words:
        (tmp_path / "run/iter_0000020/.metadata").touch()
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *words, *(["out"] if words[0] != "verify" else [])])
    with pytest.raises(SystemExit):
        convert_checkpoint.main()
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_tokenizer_is_a_folder(tmp_path, small_checkpoint):
    (tmp_path / "tokenizer.json").touch()
    load = Checkpoint.of(small_checkpoint)
    for name, fix in (
        (tmp_path / "tokenizer.json", f"tokenizer: {tmp_path}"),
        (Path("org/name"), "hf download org/name --exclude"),
    ):
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json in it") as error:
            check_load(load, {}, name, made_here=False)
        assert fix in error.value.fix


def test_a_run_without_its_tracker_is_said_with_the_checkpoint_to_name(tmp_path):
    for number in (200, 400):
        (tmp_path / f"iter_{number:07d}").mkdir()
    with pytest.raises(CheckpointError, match=rf"{TRACKER}: missing\n.*iter_0000400 itself"):
        existing_checkpoint(tmp_path)
