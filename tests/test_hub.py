"""What `load: org/name` takes from the hub, and from the hub's cache where the hub has no answer; huggingface-hub asks a
stand-in over HTTP."""

import re

import pytest
from huggingface_hub import constants

from helpers.hub import serving
from llava_sft.checkpoint.hub import fetch, name_problem
from llava_sft.errors import CheckpointError

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the client's retries
    with serving(monkeypatch) as server:
        publish(server, OLD)
        yield server


def publish(hub, commit: str) -> None:
    files = {"config.json": b"{}", "model.safetensors": commit.encode(), "modeling.py": b"raise SystemExit"}
    hub.repositories["me/model"] = {"private": False, "sha": commit, "files": files}


def fetched(load: str) -> tuple[str, str]:
    folder, notes = fetch(load)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_text() == folder.name
    return folder.name, "\n".join(notes)


def only_weights(status: int):
    return lambda request: status if "safetensors" in request else 0


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 599])
def test_a_hub_without_an_answer_leaves_what_the_cache_has(hub, status):
    assert fetched("me/model")[0] == OLD
    hub.refuses = lambda request: status
    commit, said = fetched("me/model")
    assert commit == OLD and f"the newest in the hub's cache (the hub answers {status}); to keep to it" in said
    assert "\n" not in said
    assert fetched("me/model@main")[0] == fetched(f"me/model@{OLD}")[0] == OLD
    with pytest.raises(CheckpointError, match=f"not in the hub's cache, and the hub answers {status}"):
        fetch("me/other")


@pytest.mark.parametrize("how", ["offline", "no network", "busy"])
@pytest.mark.parametrize("filled", ["main", "by commit", "older last"])
def test_the_cache_knows_the_newest_however_it_was_filled(hub, monkeypatch, how, filled):
    if filled == "by commit":
        publish(hub, NEW)
        fetched(f"me/model@{NEW}")
    else:
        for commit in (OLD, NEW):
            publish(hub, commit)
            fetched("me/model")
    if filled == "older last":  # what another project pins is not what main was
        publish(hub, "c" * 40)
        fetched(f"me/model@{'c' * 40}")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "busy":
        hub.refuses = lambda request: 503
    else:
        hub.close()
    assert fetched("me/model")[0] == NEW


@pytest.mark.parametrize("load", ["me/model", "me/model@main", f"me/model@{NEW}"])
def test_a_download_that_broke_off_is_not_taken_for_the_model(hub, monkeypatch, load):
    fetched("me/model")
    publish(hub, NEW)
    for status in (429, 503):
        hub.refuses = only_weights(status)
        with pytest.raises(
            CheckpointError, match=f"not whole in the hub's cache, and the hub answers {status}"
        ) as broken:
            fetch(load)
    hub.refuses = lambda request: 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not whole in the hub's cache, and HF_HUB_OFFLINE is set") as offline:
        fetch(load)
    for error in (broken.value, offline.value):  # the fix that it names works
        (named,) = re.findall(r"name one, (\S+)", str(error))
        assert fetched(named)[0] == OLD
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert fetched(load)[0] == NEW, "the same command goes on"


@pytest.mark.parametrize("status", [400, 403, 410])
def test_an_answer_of_the_hub_is_no_missing_network(hub, monkeypatch, status):
    fetched("me/model")
    hub.refuses = lambda request: status
    with pytest.raises(CheckpointError, match=rf"the hub refuses it \({status}\): .*not now") as error:
        fetch("me/model")
    assert "HF_HUB_OFFLINE=1" in error.value.fix
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched("me/model")[0] == OLD


@pytest.mark.parametrize("name", ["me/..", "me/x.git", "me/a--b", "me/x.", f"me/{'x' * 97}", "me/-x"])
@pytest.mark.parametrize("revision", ["", "@main"])
def test_a_name_that_the_hub_allows_nobody_is_not_asked_for(hub, name, revision):
    with pytest.raises(CheckpointError, match="no folder here, and no name on the hub: ") as error:
        fetch(name + revision)
    assert hub.asked == [] and str(error.value).count(name) == 1


@pytest.mark.parametrize("status", [0, 503])
def test_what_is_no_folder_here_is_read_both_ways(hub, status):
    hub.refuses = lambda request: status
    with pytest.raises(CheckpointError, match="checkpoints/X is no folder here") as error:
        fetch("checkpoints/X")
    assert error.value.fix.startswith("if a folder is meant, correct the path or put it there; if the hub is meant, ")


def test_names_of_the_hub():
    for name in ("me/x", "me/_x", "A.b-c_d/1", f"m/{'x' * 94}"):
        assert name_problem(name) == ""
    for name in [
        "",
        "/",
        "x",
        "me/",
        "/x",
        "a/b/c",
        "ü/x",
        "me/x y",
        "me/x\n",
        ".me/x",
        "me-/x",
        "~/x",
        "https://hub/me/x",
    ]:
        assert name_problem(name), name
