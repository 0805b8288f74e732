"""Nothing in a checkpoint runs code, and no damage of its files is silent or ends in a traceback. In-process, tiny model."""

import argparse
import copyreg
import functools
import io
import json
import operator
import os
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata

import convert_checkpoint
from helpers.models import MAX_PIXELS, MIN_PIXELS
from helpers.original_checkpoint import write_original
from llava_sft.checkpoint import pickles
from llava_sft.checkpoint.convert import hf2mcore, mcore2hf
from llava_sft.checkpoint.legacy import LegacySource
from llava_sft.checkpoint.pickles import check_pickles, read_metadata
from llava_sft.checkpoint.safetensors_io import SafetensorsReader
from llava_sft.checkpoint.start import Checkpoint, check_load, open_start
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.checkpoint.verify import verify
from llava_sft.errors import CheckpointError, SftError
from llava_sft.model.export_files import write_hf_sidecars
from llava_sft.run.layout import SIDECARS, VERIFIED


@pytest.fixture(scope="module")
def mcore(small_checkpoint, small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "small_mcore_tp1_pp1"
    hf2mcore(small_checkpoint, folder, small_model)
    return folder


@pytest.fixture(scope="module")
def export(mcore, small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    mcore2hf(mcore / "release", folder, mcore / SIDECARS, small_model, MIN_PIXELS, MAX_PIXELS)
    return folder


# --- pickles ---------------------------------------------------------------------------------------------------------


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args, state) if state is not None else (function, args)

    def __reduce__(self):
        return self.call


class WithState:
    def __setstate__(self, state):
        os.system(state)


def with_state():
    made = WithState()
    made.command = "touch RAN"
    return made


def object_array():
    array = np.empty(1, dtype=object)
    array[0] = Calls(os.system, "touch RAN")
    return array


GADGETS = {
    "os.system": lambda: Calls(os.system, "touch RAN"),
    "eval": lambda: Calls(eval, "open('RAN', 'w')"),
    "exec": lambda: Calls(exec, "open('RAN', 'w')"),
    "open": lambda: Calls(open, "RAN", "w"),
    "getattr": lambda: Calls(getattr, os, "system") if False else Calls(getattr, "x", "upper"),
    "attrgetter": lambda: Calls(operator.attrgetter, "system"),
    "methodcaller": lambda: Calls(operator.methodcaller, "touch"),
    "partial": lambda: Calls(functools.partial, os.system, "touch RAN"),
    "reduce": lambda: Calls(functools.reduce, operator.add, ["a"]),
    "map": lambda: Calls(map, os.system, ["touch RAN"]),
    "import": lambda: Calls(__import__, "this"),
    "setstate": with_state,
    "nested pickle": lambda: Calls(pickle.loads, pickle.dumps(Calls(os.system, "touch RAN"))),
    "torch.load": lambda: Calls(torch.load, "elsewhere.pt"),
    "load from bytes": lambda: Calls(torch.storage._load_from_bytes, b"x"),
    "numpy objects": object_array,
    "constructor": lambda: Calls(copyreg._reconstructor, WithState, object, None),
    "in a dict key": lambda: {Calls(os.system, "touch RAN"): 1},
    "deep inside": lambda: OrderedDict(a=[({"b": Calls(os.system, "touch RAN")},)]),
    "state of an allowed class": lambda: Calls(argparse.Namespace, state={"x": Calls(os.system, "touch RAN")}),
}
RAW = {
    "changes a class": b"\x80\x02cargparse\nNamespace\nN}X\x08\x00\x00\x00__call__K\x01s\x86b.",
    "by the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x09touch RAN\x85R.",
    "old module name": b"c__builtin__\neval\n(S'open(\"RAN\", \"w\")'\ntR.",
    "INST": b"(S'touch RAN'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch RAN'\no.",
    "dotted name": b"\x80\x04\x8c\x08argparse\x8c\x0e_os.system\x93\x8c\x09touch RAN\x85R."[:0] + b"\x80\x04\x8c\x08argparse\x8c\x0a_os.system\x93\x8c\x09touch RAN\x85R.",
    "extension registry": b"\x80\x02\x82\x01.",
    "module with side effects": b"cantigravity\nfly\n.",
    "case of a name": b"cOS\nSystem\n(S'touch RAN'\ntR.",
}  # fmt: skip


def archive(data: bytes, **more: bytes) -> bytes:
    """What torch.save would have written with `data` in place of its pickle."""
    buffer, made = io.BytesIO(), io.BytesIO()
    torch.save({"x": torch.zeros(2)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(made, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, data if member.filename.endswith("data.pkl") else old.read(member))
        for name, content in more.items():
            new.writestr(f"archive/{name}", content)
    return made.getvalue()


def hostile() -> dict[str, bytes]:
    made = {f"{name}, protocol {n}": pickle.dumps(make(), n) for name, make in GADGETS.items() for n in (0, 2, 4, 5)}
    return made | RAW


@pytest.fixture
def victim(mcore, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(mcore, tmp_path / "victim")


def refused(call, *mentioned):
    with pytest.raises(SftError) as error:
        call()
    assert error.value.fix and not Path("RAN").exists(), error.value
    for text in mentioned:
        assert text in str(error.value), error.value


def test_no_pickle_that_names_anything_else_is_read(victim, small_model):
    release, rank = victim / "release", victim / "legacy/release/mp_rank_00"
    rank.mkdir(parents=True)
    metadata, common = (release / ".metadata").read_bytes(), (release / "common.pt").read_bytes()
    ok = pickle.dumps({"x": 1})
    for name, data in hostile().items():
        for payload in (data, ok[:-1] + b"0" + data):  # a harmless object in front
            (release / ".metadata").write_bytes(payload)
            refused(lambda: TorchDistReader(release), ".metadata")
        (release / ".metadata").write_bytes(metadata)
        (release / "common.pt").write_bytes(archive(data))
        refused(lambda: check_pickles(release), "common.pt")
        (release / "common.pt").write_bytes(common)
        (rank / "model_optim_rng.pt").write_bytes(archive(data))
        refused(lambda: LegacySource(rank.parent), "model_optim_rng.pt")
        assert not Path("RAN").exists(), name
    (release / ".metadata").write_bytes(metadata + data)
    refused(lambda: read_metadata(release), "behind its end")
    (release / ".metadata").write_bytes(metadata)
    check_pickles(release)


def test_archives_of_another_kind_are_refused_before_they_are_opened(victim):
    module = torch.jit.script(torch.nn.Linear(2, 2))
    path = victim / "release/common.pt"
    torch.jit.save(module, str(path))
    refused(lambda: check_pickles(path.parent), "TorchScript")
    rank = victim / "legacy/release/mp_rank_00"
    rank.mkdir(parents=True)
    shutil.copy(path, rank / "model_optim_rng.pt")
    refused(lambda: LegacySource(rank.parent), "TorchScript")
    good = pickle.dumps({"x": 1}, 2)
    evil = pickle.dumps(Calls(os.system, "touch RAN"), 2)
    for members in ({"DATA.PKL": evil}, {"constants.pkl": good}, {"code/x.py": b""}, {"data.pkl": evil}):
        with pytest.warns() if "data.pkl" in members else pytest.MonkeyPatch.context():
            path.write_bytes(archive(good, **members))
        refused(lambda: check_pickles(path.parent), "common.pt")
    for data in (b"", evil, b"\0" * 500, b"PK\x03\x04" + b"x" * 90, b"ustar" * 200):
        path.write_bytes(data)
        refused(lambda: check_pickles(path.parent), "common.pt")


def test_the_objects_between_the_tensors_are_gone_through_too(victim):
    """torch.distributed.checkpoint opens them without any restriction."""
    release = victim / "release"
    evil = archive(pickle.dumps(Calls(os.system, "touch RAN"), 2))
    (release / "__1_0.distcp").write_bytes(evil)
    metadata = read_metadata(release)
    kinds = torch.distributed.checkpoint.metadata
    metadata.state_dict_metadata["rng_state"] = kinds.BytesStorageMetadata()
    place = next(iter(metadata.storage_data.values()))
    metadata.storage_data[kinds.MetadataIndex("rng_state")] = type(place)("__1_0.distcp", 0, len(evil))
    (release / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(lambda: check_pickles(release), "rng_state", "system")
    metadata.storage_data[kinds.MetadataIndex("rng_state")] = type(place)("../../elsewhere", 0, 9)
    (release / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(lambda: check_pickles(release), "no file of this folder")


def test_what_trainings_keep_is_read():
    state = {
        "a": argparse.Namespace(dtype=torch.bfloat16, path=Path("x")),
        "n": np.random.get_state(),
        "r": random.getstate(),
    }
    buffer = io.BytesIO()
    torch.save(state | {"t": torch.zeros(3), "s": {1, 2}, "b": b"x", "o": OrderedDict(x=1)}, buffer)
    pickles.check_archive(buffer, "state")
    with pytest.raises(CheckpointError, match="behind its end"):
        pickles.check_pickle(pickle.dumps(Metadata({})) + b"x", "x", pickles.METADATA)


# --- damage ----------------------------------------------------------------------------------------------------------


def spoil(path: Path, generator: random.Random) -> None:
    """One of: a bit, a run of bytes, cut, emptied, gone, a folder in its place."""
    data = bytearray(path.read_bytes())
    form = generator.choice(["bit"] * 4 + ["run", "cut", "empty", "gone", "folder"])
    if form == "bit":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif form == "run":
        at = generator.randrange(len(data))
        data[at : at + 64] = bytes(255 - b for b in data[at : at + 64])
    path.unlink()
    if form == "folder":
        path.mkdir()
    elif form != "gone":
        path.write_bytes(data[: {"cut": len(data) // 2, "empty": 0}.get(form, len(data))])


@pytest.mark.parametrize("kind", ["converted", "export", "original"])
def test_no_damage_is_silent_or_a_traceback(kind, mcore, export, small_checkpoint, small_model, tmp_path, capsys):
    if kind == "original":
        whole = write_original(tmp_path / "x", small_checkpoint, small_model, 2, 1)
    else:
        whole = mcore / "release" if kind == "converted" else export

    def use(folder: Path) -> None:
        if kind == "converted":
            open_start(Checkpoint.of(folder.parent), None, None)
            mcore2hf(folder, tmp_path / "out", folder.parent / SIDECARS, small_model, MIN_PIXELS, MAX_PIXELS)
        elif kind == "export":
            verify(folder)
        else:
            hf2mcore(folder, tmp_path / "out", small_model, sidecars=small_checkpoint)

    generator = random.Random(7)
    top = whole.parent if kind == "converted" else whole
    names = sorted(str(p.relative_to(top)) for p in top.rglob("*") if p.is_file() and p.name != VERIFIED)
    for number in range(2 * len(names)):
        copy = shutil.copytree(top, tmp_path / f"copy{number}")
        spoil(copy / names[number % len(names)], generator)
        with pytest.raises(SftError) as error:
            use(copy / "release" if kind == "converted" else copy)
        assert error.value.fix and not (tmp_path / "out").exists(), names[number % len(names)]
        shutil.rmtree(copy)


def nan(w):
    w["model.language_model.norm.weight"][3] = float("nan")
    return w


def infinite(w):
    w["lm_head.weight"][1, 1] = float("-inf")
    return w


@pytest.mark.parametrize("change", [nan, infinite])
def test_values_that_are_no_numbers_are_refused_by_name(change, small_checkpoint, small_model, tmp_path):
    source = shutil.copytree(small_checkpoint, tmp_path / "source")
    save_file(change(load_file(source / "model.safetensors")), source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of [0-9,]+ values? (is|are) NaN or infinite"):
        hf2mcore(source, tmp_path / "out", small_model)
    assert not (tmp_path / "out").exists()


def rewritten(change):
    def spoil(folder):
        file = folder / "mp_rank_01/model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        change(content)
        torch.save(content, file)

    return spoil


MIXED = {
    "iteration": (lambda c: c.update(iteration=7), "is of iteration 7"),
    "replicated": (lambda c: c["model"]["adapter.linear_fc1.weight"].add_(1), "ranks of different checkpoints"),
    "key of one rank": (lambda c: c["model"].update({"language_model.more": torch.zeros(2)}), "another rank has it"),
}


@pytest.mark.parametrize("name", MIXED)
def test_ranks_of_different_checkpoints_are_refused(name, small_checkpoint, small_model, tmp_path):
    change, mentioned = MIXED[name]
    folder = write_original(tmp_path / "x", small_checkpoint, small_model, 2, 1)
    rewritten(change)(folder)
    with pytest.raises(CheckpointError, match=mentioned):
        hf2mcore(folder, tmp_path / "out", small_model, sidecars=small_checkpoint)


# --- small files -----------------------------------------------------------------------------------------------------


def test_an_export_has_what_inference_needs_whatever_the_start_folder_brings(
    small_checkpoint, small_model, tmp_path, capsys
):
    source = shutil.copytree(small_checkpoint, tmp_path / "source")
    ids = {t["content"]: t["id"] for t in json.loads((source / "tokenizer.json").read_text())["added_tokens"]}
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    hostile = {
        "auto_map": {"AutoConfig": "evil.X"}, "custom_generate": "evil", "eos_token_id": 5, "pad_token_id": ids["<|image_pad|>"],
        "temperature": float("inf"), "top_p": 0.8, "do_sample": "yes", "max_length": 20, "top_k": True,
    }  # fmt: skip
    for given in ({}, {"_from_model_config": True, "transformers_version": "5"}, hostile, {"eos_token_id": None}):
        target = tmp_path / "target"
        target.mkdir()
        (source / "generation_config.json").write_text(json.dumps(given))
        changed = {key: value for key, value in tokenizer.items() if key not in ("eos_token", "pad_token")}
        changed |= {"padding_side": "right", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
        (source / "tokenizer_config.json").write_text(json.dumps(changed))
        (source / "evil.py").write_text("open('RAN', 'w')")
        write_hf_sidecars(target, source, small_model, MIN_PIXELS, MAX_PIXELS)
        generation = json.loads((target / "generation_config.json").read_text())
        assert generation["eos_token_id"] == ends and generation["pad_token_id"] == ends[1]
        assert generation.keys() <= {"eos_token_id", "pad_token_id", "top_p"}
        written = json.loads((target / "tokenizer_config.json").read_text())
        assert (written["padding_side"], written["eos_token"], written["pad_token"]) == (
            "left",
            "<|im_end|>",
            "<|endoftext|>",
        )
        assert "auto_map" not in written and not (target / "evil.py").exists()
        assert "eos_token_id" in capsys.readouterr().out
        shutil.rmtree(target)
    for text in ("[]", "{", "\xff", '{"eos_token_id": [[]], "pad_token_id": {}}'):
        (source / "generation_config.json").write_bytes(text.encode("latin-1"))
        target.mkdir()
        if "eos" in text:
            write_hf_sidecars(target, source, small_model, MIN_PIXELS, MAX_PIXELS)
        else:
            refused(
                lambda: write_hf_sidecars(target, source, small_model, MIN_PIXELS, MAX_PIXELS), "generation_config.json"
            )
        shutil.rmtree(target)


def script(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
    convert_checkpoint.main.__wrapped__()


def test_an_export_by_hand_takes_limits_and_model_from_the_run(
    mcore, small_model, resolved, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(mcore / "release", run / "iter_0000004")
    shutil.copytree(mcore / SIDECARS, run / SIDECARS)
    settings = {"min_pixels": 6272, "max_pixels": 12544}
    of_run = resolved | {"settings": resolved["settings"] | settings, "model": small_model.model_dump()}
    (run / "run.json").write_text(json.dumps(of_run))
    (run / "latest_checkpointed_iteration.txt").write_text("4")
    config = json.loads((run / SIDECARS / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 4096
    (run / SIDECARS / "config.json").write_text(json.dumps(config))

    def limits(target, *more):
        script(monkeypatch, "mcore2hf", run, target, *more)
        return json.loads((target / "preprocessor_config.json").read_text())["size"]

    assert limits(tmp_path / "a") == {"shortest_edge": 6272, "longest_edge": 12544}
    assert json.loads((tmp_path / "a/config.json").read_text())["text_config"]["max_position_embeddings"] == 4096
    assert limits(tmp_path / "b", "--max-pixels=25088") == {"shortest_edge": 6272, "longest_edge": 25088}
    assert "as given" in capsys.readouterr().out
    (run / "run.json").unlink()
    assert limits(tmp_path / "c") == {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    script(monkeypatch, "verify", tmp_path / "a")
    assert "GB/s" in capsys.readouterr().out
    damaged = tmp_path / "a/tokenizer.json"
    damaged.write_bytes(damaged.read_bytes().replace(b"a", b"b", 1))
    refused(lambda: script(monkeypatch, "verify", tmp_path / "a"), "tokenizer.json")
    script(monkeypatch, "mcore2hf", run, tmp_path / "a", "--max-pixels=12544", "--min-pixels=6272")
    script(monkeypatch, "verify", tmp_path / "a")  # made anew, not "nothing to convert"


def put(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


ODD = {
    "tracker names a missing folder": (
        put("latest_checkpointed_iteration.txt", b"77"),
        "iter_0000077, which is not there",
    ),
    "tracker is not UTF-8": (
        put("latest_checkpointed_iteration.txt", b"\xff\xfe"),
        "latest_checkpointed_iteration.txt",
    ),
    "tracker holds another script's digits": (
        put("latest_checkpointed_iteration.txt", "٣".encode()),
        "neither a number",
    ),
    "marker cut": (put("converted.json", b'{"fing'), "converted.json"),
    "marker of another type": (put("converted.json", b"[1]"), "converted.json"),
    "marker without its fingerprint": (put("converted.json", b'{"a": 1}'), "converted.json"),
    "marker with odd checksums": (put("converted.json", b'{"files": {"x": 3}}'), "checksums"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_small_files_of_a_converted_folder_are_one_message(name, victim):
    change, mentioned = ODD[name]
    change(victim)
    refused(lambda: open_start(Checkpoint.of(victim), None, None), mentioned)


INDEX = "model.safetensors.index.json"
ODD_HF = {
    "index to elsewhere": (put(INDEX, b'{"weight_map": {"a": "../x.safetensors"}}'), "no file of this folder"),
    "index to a root": (put(INDEX, b'{"weight_map": {"a": "/etc/x.safetensors"}}'), "no file of this folder"),
    "index of numbers": (put(INDEX, b'{"weight_map": {"a": 3}}'), "no file of this folder"),
    "index is a list": (put(INDEX, b"[]"), INDEX),
    "header too long": (put("model.safetensors", b"\xff" * 8 + b"{}"), "model.safetensors"),
    "header no JSON": (put("model.safetensors", b"\x08" + b"\0" * 7 + b"{{{{{{{{"), "model.safetensors"),
    "overlapping": (put("model.safetensors", (lambda t: len(t).to_bytes(8, "little") + t + b"\0" * 8)(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}')), "model.safetensors"),
    "config a list": (put("config.json", b"[]"), "config.json"),
    "quantized": (put("config.json", json.dumps({"model_type": "llavaonevision1_5", "quantization_config": {"quant_method": "awq"}}).encode()), "awq"),
    "flat": (put("config.json", json.dumps({"model_type": "llavaonevision1_5", "hidden_size": 128}).encode()), "text_config"),
    "text_config a list": (put("config.json", json.dumps({"model_type": "llavaonevision1_5", "text_config": [1]}).encode()), "text_config"),
    "only a .bin": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pytorch_model.bin"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_HF)
def test_odd_hugging_face_folders_are_one_message(name, small_checkpoint, small_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(small_checkpoint, tmp_path / "source")
    change, mentioned = ODD_HF[name]
    change(source)
    refused(lambda: hf2mcore(source, tmp_path / "out", small_model), mentioned)


def test_unreadable_files_are_said_to_be_so(small_checkpoint, small_model, tmp_path, monkeypatch):
    source = shutil.copytree(small_checkpoint, tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsReader(source)
    rank = tmp_path / "x/release/mp_rank_00"
    rank.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"load: {rank.parent}$"):
        check_load(Checkpoint.of(rank), {}, small_checkpoint, made_here=False)

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    for call in (lambda: SafetensorsReader(source), lambda: LegacySource(rank.parent)):
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            call()
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        check_load(Checkpoint.of(rank.parent), {}, small_checkpoint, made_here=False)


def test_sidecars_are_looked_at_before_any_weight(small_checkpoint, small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(SafetensorsReader, "read", lambda *args: pytest.fail("a weight was read"))
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            hf2mcore(small_checkpoint, tmp_path / "out", small_model, sidecars=folder)


def test_leftover_buffers_are_left_out_and_surprises_are_said(small_checkpoint, small_model, tmp_path, capsys):
    source = shutil.copytree(small_checkpoint, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    norm = "model.language_model.norm.weight"
    weights |= {norm: weights[norm].bfloat16(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(weights, source / "model.safetensors")
    (source / "adapter_config.json").write_text("{}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"image_token_id": 3}))
    hf2mcore(source, tmp_path / "out", small_model)
    told = capsys.readouterr().out
    for text in ("inv_freq", "adapter_config.json", "image_token_id 3", "1 tensor in bfloat16"):
        assert text in told
