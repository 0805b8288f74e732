"""PEFT folders: gone on from, written, merged; and all that is refused, with a way on."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import convert_checkpoint
from helpers.adapters import added, pairs, rewrite_pairs, write_adapter
from helpers.models import rewrite, weights
from llava_sft.checkpoint.adapters import write_peft
from llava_sft.checkpoint.base import beside_its_base, require_wanted
from llava_sft.checkpoint.convert import hf2mcore, mcore2hf, merge
from llava_sft.checkpoint.peft import Adapter
from llava_sft.checkpoint.start import Checkpoint, Start, check_load, open_start, split_id
from llava_sft.checkpoint.verify import require_export, verify
from llava_sft.errors import CheckpointError
from llava_sft.evaluation.base import exported
from llava_sft.model.lora import Lora
from llava_sft.model.tensors import PARTS
from llava_sft.publish.card import base_model

LIMITS = 3136, 50_000
Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs convert_checkpoint.py here, where torch is imported already: exit status, and all that was printed."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
        status = 0
        try:
            convert_checkpoint.main()
        except SystemExit as error:
            status = int(error.code or 0)
        return status, "".join(capsys.readouterr())

    return run


def converted(adapter: Path, target: Path, model) -> dict:
    read = Adapter.of(adapter)
    return hf2mcore(Path(read.base), target, model, adapter=read)


@pytest.mark.parametrize(
    ("shared", "parts", "lora"),
    [
        (True, ("language_model",), Lora(4, 8, ("language_model",))),
        (False, ("language_model",), Lora(12, 24, ("language_model",))),
        (False, PARTS, Lora(12, 24, PARTS)),
        (False, ("vision_model",), Lora(4, 8, ("vision_model",))),
    ],
)
def test_pairs_come_in_beside_their_base_and_go_out_again_as_the_same_model(
    shared, parts, lora, small_checkpoint, small_model, tmp_path
):
    adapter = write_adapter(tmp_path / "adapter", small_checkpoint, small_model, shared=shared, parts=parts)
    checkpoint = Checkpoint.of(adapter)
    assert (checkpoint.kind, checkpoint.base.name) == ("peft", str(small_checkpoint))
    check_load(checkpoint, {}, None, made_here=False)
    assert Adapter.of(adapter).lora(small_model) == lora
    converted(adapter, tmp_path / "made", small_model)
    assert "whole" in verify(tmp_path / "made")
    start = beside_its_base(open_start(checkpoint, tmp_path / "made", None), lora._replace(dropout=0.1))
    assert (start.folder, start.pairs) == (tmp_path / "made/release", tmp_path / "made/pairs")
    wanted = added(weights(small_checkpoint), adapter)
    mcore2hf(start.pairs, tmp_path / "whole", tmp_path / "made/huggingface", small_model, *LIMITS)
    write_peft(start.pairs, tmp_path / "again", small_model)
    for found in (weights(tmp_path / "whole"), added(weights(small_checkpoint), tmp_path / "again")):
        assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-6) for name in wanted)
    assert Adapter.of(tmp_path / "again").lora(small_model) == lora


def test_the_start_is_another_one_with_other_pairs_and_the_base_is_the_same(small_checkpoint, small_model, tmp_path):
    found = set()
    for seed in (1, 2):
        adapter = write_adapter(tmp_path / f"{seed}/adapter", small_checkpoint, small_model, seed)
        made = tmp_path / f"{seed}/made"
        assert (
            converted(adapter, made, small_model)["fingerprint"]
            == hf2mcore(small_checkpoint, tmp_path / "base", small_model)["fingerprint"]
        )
        found.add(open_start(Checkpoint.of(adapter), made, None).fingerprint)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora is True"), ({"bias": "all"}, "bias is 'all'"), ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"), ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"made_up_later": 1}, "made_up_later is 1"),
    ],
)  # fmt: skip
def test_kinds_of_adapters_that_are_not_read_are_named_with_pefts_own_way(
    config, said, small_checkpoint, small_model, tmp_path
):
    adapter = write_adapter(tmp_path / "adapter", small_checkpoint, small_model, **config)
    with pytest.raises(CheckpointError, match=said) as error:
        check_load(Checkpoint.of(adapter), {}, None, made_here=False)
    command = error.value.fix.partition("installed: ")[2].partition("; then load")[0]
    compile(shlex.split(command)[2], "fix", "exec")


A, B = Q.format("A"), Q.format("B")
SPOILED = {
    "a tensor missing": (lambda f: rewrite_pairs(f, {A: None}), "lora_A.weight", "copy it again"),
    "a layer missing": (lambda f: rewrite_pairs(f, {A: None, B: None}), "all linear layers of a part", "merge"),
    "a tensor more": (lambda f: rewrite_pairs(f, {A.replace("q_proj", "x_proj"): pairs(f)[A]}), "x_proj.lora_A.weight", "copy it"),
    "a layer kept whole": (lambda f: rewrite_pairs(f, {"base_model.model.lm_head.weight": pairs(f)[A]}), "no pairs of linear", "peft is installed"),
    "pairs of embeddings": (lambda f: rewrite_pairs(f, {A.replace("A.weight", "embedding_A"): pairs(f)[A]}), "no pairs of linear", "peft is installed"),
    "another shape": (lambda f: rewrite_pairs(f, {A: torch.zeros(4, 5)}), r"\(4, 5\)", "copy it"),
    "another rank": (lambda f: edit(f, r=8), "shape", "copy it"),
    "no PEFT names": (lambda f: rewrite_pairs(f, {"x": torch.zeros(2)}), "x is not a tensor of a PEFT adapter", "copy"),
    "NaN": (lambda f: rewrite_pairs(f, {A: pairs(f)[A].fill_(torch.nan)}), "q_proj.lora_A.weight: .* values are NaN", "checkpoint"),
    "float64": (lambda f: rewrite_pairs(f, {A: pairs(f)[A].double()}), "of type F64", "F32"),
    "cut off": (lambda f: cut(f / "adapter_model.safetensors"), "damaged or cut off", "copy"),
    "config cut off": (lambda f: cut(f / "adapter_config.json"), "adapter_config.json: damaged", "copy"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors", "copy"),
    "a pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "a pickle", "save_file"),
    "no rank": (lambda f: edit(f, r=None), "r and lora_alpha must be numbers above 0, below 2..31, not None", "copy"),
    "a huge rank": (lambda f: edit(f, r=10**400, use_rslora=True), "numbers above 0, below 2..31, not 1000", "copy"),
    "no base": (lambda f: edit(f, base_model_name_or_path=None), "its base is ''", "base_model_name_or_path"),
    "base gone": (lambda f: edit(f, base_model_name_or_path="/gone/4B"), "its base is '/gone/4B'", "base_model_name_or_path"),
}  # fmt: skip


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", SPOILED)
def test_a_damaged_folder_is_refused_and_nothing_is_left(name, small_checkpoint, small_model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", small_checkpoint, small_model)
    spoil, said, fix = SPOILED[name]
    spoil(adapter)
    with pytest.raises(CheckpointError, match=said) as error:
        converted(adapter, tmp_path / "made", small_model) if Checkpoint.of(adapter).base else None
    assert fix in error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_settings_that_ask_for_other_pairs_are_refused_with_those_to_write_and_the_merge(
    small_checkpoint, small_model, tmp_path
):
    adapter = Adapter.of(write_adapter(tmp_path / "adapter", small_checkpoint, small_model))
    lora = adapter.lora(small_model)
    for wanted in (None, lora._replace(rank=4), lora._replace(alpha=12), lora._replace(parts=PARTS)):
        with pytest.raises(CheckpointError, match=r"pairs of rank 12, alpha 24, in \[language_model\]") as error:
            require_wanted("adapter", lora, wanted, "the merge")
        assert error.value.fix == "lora_rank: 12, lora_alpha: 24, lora_modules: [language_model]; or the merge"
    require_wanted("adapter", lora._replace(parts=PARTS), lora._replace(parts=PARTS[::-1], dropout=0.5), "")


def test_our_pairs_beside_a_base_that_changed_are_refused(source, small_model, tmp_path):
    converted(write_adapter(tmp_path / "adapter", source, small_model), tmp_path / "made", small_model)
    write_peft(tmp_path / "made/pairs", tmp_path / "ours", small_model)
    converted(tmp_path / "ours", tmp_path / "again", small_model)
    rewrite(source, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(CheckpointError, match="trained on other weights than"):
        converted(tmp_path / "ours", tmp_path / "changed", small_model)
    converted(tmp_path / "adapter", tmp_path / "changed", small_model)  # another's folder says nothing of it


def test_load_parts_and_an_adapter_is_refused_either_way(small_checkpoint, small_model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", small_checkpoint, small_model)
    with pytest.raises(CheckpointError, match="is a PEFT folder"):
        check_load(Checkpoint.of(adapter), {"adapter": "random"}, None, made_here=False)
    with pytest.raises(CheckpointError, match="a PEFT adapter") as error:
        check_load(Checkpoint.of(small_checkpoint), {"language_model": str(adapter)}, None, made_here=False)
    assert f"merge {small_checkpoint} {adapter} {adapter}-merged, and name {adapter}-merged" in error.value.fix
    with pytest.raises(CheckpointError, match="a PEFT adapter") as error:  # push_to_hub, evaluate
        require_export(adapter)
    assert error.value.fix.startswith(f"`hf upload --private org/name {adapter}` uploads it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_are_added_to_the_base_in_float32_and_rounded_once(dtype, script, source, small_model, tmp_path):
    """rsLoRA, pairs of some layers alone, and pairs of another type than the base's are merged too."""
    rewrite(source, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    one = write_adapter(tmp_path / "one", source, small_model, parts=PARTS)
    two = write_adapter(tmp_path / "two", source, small_model, 1, rank=16, lora_alpha=8, use_rslora=True)
    rewrite_pairs(two, {name: tensor.bfloat16() for name, tensor in pairs(two).items()} | {A: None, B: None})
    status, said = script("merge", source, one, f"{two}:-0.5", tmp_path / "merged")
    assert status == 0 and "two: × -0.5: rank 16, alpha 32, beside 13 weights" in said, said
    edit(two, lora_alpha=32)  # as alpha / sqrt(16)
    wanted = added(added({n: t.float() for n, t in weights(source).items()}, one), two, -0.5)
    found = weights(tmp_path / "merged")
    assert all(found[name].equal(wanted[name].to(dtype)) for name in wanted)
    assert "whole" in verify(tmp_path / "merged")
    card = (tmp_path / "merged/README.md").read_text()
    assert "made from `source`" in card and "`one` (1), `two` (-0.5)" in card and "\nbase_model" not in card


def test_a_merge_is_whole_when_it_gets_its_name_and_its_card_names_a_base_on_the_hub(
    script, source, small_model, tmp_path, monkeypatch
):
    adapter = write_adapter(tmp_path / "adapter", source, small_model)
    monkeypatch.setattr(convert_checkpoint, "fetch", lambda name: (source, [name]))
    monkeypatch.chdir(tmp_path)
    assert script("merge", "org/Base@v1", adapter, "merged")[0] == 0
    card = Path("merged/README.md").read_text()
    assert "[org/Base](https://huggingface.co/org/Base)" in card and "\nbase_model: org/Base\n" in card
    monkeypatch.setattr(convert_checkpoint, "say_done", None)  # killed after the folder is there
    with pytest.raises(TypeError):
        script("merge", "org/Base@v1", adapter, "again")
    assert exported(tmp_path / "again").fingerprint == exported(tmp_path / "merged").fingerprint


def test_a_merge_that_would_be_none_is_refused_in_one_message(script, small_checkpoint, small_model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", small_checkpoint, small_model)
    other = write_adapter(tmp_path / "other", small_checkpoint, small_model, parts=PARTS)
    large = write_adapter(tmp_path / "large", small_checkpoint, small_model, size=3e38)
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists/file").write_text("")
    shutil.copytree(small_checkpoint, tmp_path / "narrow")
    config = json.loads((small_checkpoint / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 384
    (tmp_path / "narrow/config.json").write_text(json.dumps(config))
    for words, said in (
        ((small_checkpoint, f"{adapter}:nan", "new"), "nothing is merged nan times"),
        ((small_checkpoint, f"{adapter}:0", "new"), "nothing is merged 0 times"),
        ((small_checkpoint, f"{adapter}:half", "new"), "adapter:half: no such folder"),
        ((small_checkpoint, adapter, f"{adapter}:2", "new"), "named twice"),
        ((small_checkpoint, adapter, other), "exists already"),
        ((small_checkpoint, adapter, "exists"), "exists already"),
        ((small_checkpoint, adapter, "exists/file/out"), "exists/file: File exists"),
        ((small_checkpoint, large, "new"), "are NaN or infinite"),
        ((small_checkpoint, small_checkpoint, "new"), "no PEFT folder (no adapter_config.json in it)"),
        ((small_checkpoint, "gone", "new"), "mcore2peft gone ADAPTER"),
        ((tmp_path / "narrow", adapter, "new"), "lora_B.weight has shape (320, 4), the model has (384, 4)"),
        ((adapter, other, "new"), "the base comes first"),
        ((small_checkpoint, "new"), "the following arguments are required"),
    ):
        status, found = script("merge", *words[:-1], tmp_path / words[-1])
        assert status and said in found and "Traceback" not in found, (words, found)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


def test_words_that_only_look_like_others(script, small_checkpoint, small_model, tmp_path, monkeypatch):
    """An @ in a path is no revision, a folder may be called as a direction is, and the current folder is no adapter's base."""
    assert split_id("org/name@abc") == ("org/name", "abc")
    assert split_id("/data/me@site/X") == ("/data/me@site/X", "")
    others = shutil.ignore_patterns("converted.json")
    monkeypatch.chdir(shutil.copytree(small_checkpoint, tmp_path / "me@site", ignore=others))
    adapter = write_adapter(tmp_path / "ADAPTERS/MERGED", small_checkpoint, small_model)
    assert script("--export-names", "published", "merge", small_checkpoint, adapter, "verify")[0] == 0
    assert "whole" in script("verify", "verify")[1]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    said = script("hf2mcore", adapter, "new")[1]
    assert 'base, own = "BASE"' in said.replace("\\", ""), "no code of what another's file names"
    assert f'"{adapter}").merge' in said.replace("\\", "") and f'"{adapter}-merged"' in said.replace("\\", "")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": ""}))
    status, said = script("hf2mcore", adapter, "new", "--model", "tiny")
    assert status == 1 and "neither a Hugging Face folder nor on the hub" in said


def test_a_folder_of_others_is_never_replaced(script, small_checkpoint, small_model, tmp_path):
    """Each direction replaces what it wrote itself, and nothing else: neither its source nor what lies around it."""
    source = shutil.copytree(small_checkpoint, tmp_path / "models/source")
    adapter = write_adapter(tmp_path / "models/adapter", source, small_model, shared=True)
    converted(adapter, tmp_path / "models/made", small_model)
    others = tmp_path / "others"
    others.mkdir()
    (others / "precious").write_text("")
    before = sorted(tmp_path.rglob("*"))
    pairs = tmp_path / "models/made/pairs"
    for words in (
        ("hf2mcore", source, source),
        ("hf2mcore", source, tmp_path / "models"),
        ("hf2mcore", source, others),
        ("mcore2hf", pairs, others, "--sidecars", source),
        ("mcore2peft", pairs, pairs.parent),
        ("mcore2peft", pairs, others),
        ("mcore2peft", pairs, source),
        ("merge", source, adapter, others / "precious"),
    ):
        status, found = script(*words)
        assert status == 1 and "exists already" in found and "Traceback" not in found, (words, found)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert script("mcore2peft", pairs, tmp_path / "empty", "--sidecars", source)[0] == 0


def test_a_merge_without_numbers_is_what_training_exports(small_checkpoint, small_model, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", small_checkpoint, small_model, shared=True)
    converted(adapter, tmp_path / "made", small_model)
    mcore2hf(tmp_path / "made/pairs", tmp_path / "export", tmp_path / "made/huggingface", small_model, *LIMITS)
    merge(small_checkpoint, [(Adapter.of(adapter), 1.0)], tmp_path / "merged", small_model, *LIMITS)
    for path in (tmp_path / "export").iterdir():
        assert path.name == "converted.json" or path.read_bytes() == (tmp_path / "merged" / path.name).read_bytes()


def test_the_folder_names_a_base_that_its_user_has(script, small_checkpoint, small_model, tmp_path):
    converted(write_adapter(tmp_path / "adapter", small_checkpoint, small_model), tmp_path / "made", small_model)
    for base, card in (("org/4B@v1", "base_model: org/4B\n"), ("", f"in language_model of {small_checkpoint}")):
        _, said = script("mcore2peft", tmp_path / "made/pairs", tmp_path / "out", *(["--base", base] if base else []))
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        wanted = ("org/4B", "v1") if base else (str(small_checkpoint), None)
        assert (config["base_model_name_or_path"], config["revision"]) == wanted, said
        assert card in (tmp_path / "out/README.md").read_text() and "warning" not in said
        assert Adapter.of(tmp_path / "out").base == (base or str(small_checkpoint))
        start = Start(load=str(tmp_path / "out"), sidecars=tmp_path, fingerprint="")
        assert base_model(start) == ("org/4B" if base else None)  # of a run from there, for its model card
    _, said = script("mcore2peft", tmp_path / "made/pairs", tmp_path / "out", "--base", tmp_path / "made")
    assert f"warning: PEFT cannot load {tmp_path / 'made'}" in said
