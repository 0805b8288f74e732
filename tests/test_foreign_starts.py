"""Start checkpoints that other programs wrote: RICE-ViT as published, the coming native class, and forms that are refused."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MLCDVisionConfig, MLCDVisionModel

from llava_sft.checkpoint.convert import hf2mcore
from llava_sft.checkpoint.start import Checkpoint, check_load
from llava_sft.checkpoint.weights import open_weights
from llava_sft.errors import CheckpointError
from llava_sft.model.config import ModelConfig
from llava_sft.model.hf.configuration_llavaonevision1_5 import RiceConfig
from llava_sft.model.hf.modeling_llavaonevision1_5 import RiceTransformerPretrainedModel
from llava_sft.model.tensors import tensor_rows

EPSILON, BASE = 3e-5, 2e4  # neither is that of our files


# --- RICE-ViT as transformers' MLCD class ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rice(small_model, tmp_path_factory) -> MLCDVisionModel:
    """Of small_model's size, with random norms and biases too; `name_or_path` is its folder."""
    vision = small_model.vision
    config = MLCDVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=56,
        patch_size=14,
        layer_norm_eps=EPSILON,
        rope_parameters={"rope_type": "axial", "rope_theta": BASE},
    )
    torch.manual_seed(3)
    model = MLCDVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("rice") / "rice-vit"
    model.save_pretrained(folder)  # without `vision_model.`, which older versions, and so the published folder, have
    rename(folder, lambda name: f"vision_model.{name}")
    model.name_or_path = str(folder)
    return model


def rename(folder: Path, spelled) -> None:
    weights = {spelled(name): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def rice_folder(rice, tmp_path) -> Path:
    return shutil.copytree(rice.name_or_path, tmp_path / "rice-vit")


def with_rice(small_checkpoint, model: ModelConfig, folder: Path, target: Path) -> dict:
    return hf2mcore(small_checkpoint, target, model, parts={"vision_model": folder, "adapter": "random"})


def tower_of(converted: Path, made: dict) -> RiceTransformerPretrainedModel:
    """The exported class with the vision tower of a converted folder."""
    model = ModelConfig(**made["model"])
    given = model.to_hf_config()["vision_config"]
    tower = RiceTransformerPretrainedModel(
        RiceConfig(**{key: value for key, value in given.items() if key != "model_type"})
    )
    reader, weights = open_weights(converted / "release"), {}
    for row in tensor_rows(model):
        if row.part != "language_model":
            weights |= dict(zip(row.hf, row.split(reader.read(row.mcore)), strict=True))
    tower.load_state_dict({name.removeprefix("model.visual."): value for name, value in weights.items()})
    return tower.eval()


@torch.no_grad()
def test_the_published_rice_vit_computes_here_what_it_computes_there(
    rice, rice_folder, small_checkpoint, small_model, tmp_path
):
    made = with_rice(small_checkpoint, small_model, rice_folder, tmp_path / "made")
    assert (made["model"]["vision"]["layernorm_epsilon"], made["model"]["vision"]["rotary_base"]) == (EPSILON, BASE)
    assert [line.split(": ")[1] for line in made["notes"]] == ["post_layernorm is left out"]
    tower = tower_of(tmp_path / "made", made)
    images = torch.randn(2, 3, 56, 84)  # 4 × 6 patches, of another size than image_size: nothing depends on that
    theirs = rice(pixel_values=images).last_hidden_state[:, 1:]  # rows of patches, the class token in front
    theirs = theirs.view(2, 2, 2, 3, 2, -1).transpose(2, 3).flatten(0, 4)  # merge blocks
    patches = images.view(2, 3, 2, 2, 14, 3, 2, 14).permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(2 * 24, 588)
    ours = tower(patches, torch.tensor([[1, 4, 6]] * 2)).last_hidden_state
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
    whole = hf2mcore(small_checkpoint, tmp_path / "whole", small_model)  # another tower, and the test would see it
    other = tower_of(tmp_path / "whole", whole)(patches, torch.tensor([[1, 4, 6]] * 2)).last_hidden_state
    assert (other - theirs).abs().max() > 0.1 * theirs.abs().max()


def test_its_names_may_lack_the_name_of_the_part(rice_folder, small_checkpoint, small_model, tmp_path):
    made = with_rice(small_checkpoint, small_model, rice_folder, tmp_path / "made")
    rename(rice_folder, lambda name: name.removeprefix("vision_model."))
    assert (
        with_rice(small_checkpoint, small_model, rice_folder, tmp_path / "bare")["fingerprint"] == made["fingerprint"]
    )


WRONG_RICE = {
    "depth": ({"num_hidden_layers": 24}, "vision num_layers is 24, config/models/small.yaml has 2", "choose the `model`"),
    "width": ({"hidden_size": 192}, "vision hidden_size is 192, config/models/small.yaml has 96", "hidden_size: 192"),
    "heads": ({"num_attention_heads": 6}, "vision num_attention_heads is 6", "num_attention_heads: 6"),
    "patch size": ({"patch_size": 16}, "patch_size = 16; LLaVA-OneVision-1.5 has 14 there", "checkpoint of this architecture"),
    "patches": ({"patch_size": [14, 16]}, "patch_size = [14, 16]", "checkpoint of this architecture"),
    "activation": ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu'", "checkpoint of this architecture"),
    "channels": ({"num_channels": 1}, "in_channels = 1", "checkpoint of this architecture"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1", "checkpoint of this architecture"),
    "groups": ({"num_key_value_groups": 2}, "num_key_value_groups = 2", "checkpoint of this architecture"),
    "CLIP": ({"model_type": "clip_vision_model"}, "model_type 'clip_vision_model'", "RICE-ViT (MLCD)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_RICE)
def test_another_vision_tower_is_refused_by_the_value(name, rice_folder, small_checkpoint, small_model, tmp_path):
    changes, problem, fix = WRONG_RICE[name]
    edit_config(rice_folder, **changes)
    with pytest.raises(CheckpointError) as error:
        with_rice(small_checkpoint, small_model, rice_folder, tmp_path / "made")
    assert problem in error.value.problem and fix in error.value.fix and str(rice_folder) in error.value.problem
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        (lambda w: w.update({"vision_model.embeddings.position_embedding.weight": torch.zeros(17, 96)}), "not part of the model, the first is vision_model.embeddings.position_embedding"),
        (lambda w: w.pop("vision_model.encoder.layers.1.self_attn.k_proj.bias"), "missing, the first is vision_model.encoder.layers.1.self_attn.k_proj.bias"),
        (lambda w: w.update({"vision_model.embeddings.patch_embedding.weight": torch.zeros(96, 3, 16, 16)}), r"has shape \(96, 3, 16, 16\), the model has \(96, 3, 14, 14\)"),
        (lambda w: w.update({"vision_model.class_pos_emb": torch.zeros(1, 8)}), "class_pos_emb has shape"),
    ],
)  # fmt: skip
def test_without_its_config_its_tensors_say_what_it_is(
    change, mentioned, rice_folder, small_checkpoint, small_model, tmp_path
):
    (rice_folder / "config.json").unlink()
    made = with_rice(small_checkpoint, small_model, rice_folder, tmp_path / "made")
    assert made["model"] == small_model.model_dump() and "no config.json: RoPE base" in made["notes"][0]
    weights = load_file(rice_folder / "model.safetensors")
    change(weights)
    save_file(weights, rice_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=mentioned):
        with_rice(small_checkpoint, small_model, rice_folder, tmp_path / "other")


def test_rice_alone_is_no_model_to_start_from(rice_folder, small_checkpoint):
    with pytest.raises(CheckpointError, match=r"a vision tower alone\n.*load_parts, as vision_model"):
        check_load(Checkpoint.of(rice_folder), {}, small_checkpoint, made_here=False)


# --- the native class ------------------------------------------------------------------------------------------------


def native_config(model: ModelConfig) -> dict:
    """As huggingface/transformers#48896 saves it: what equals its defaults is left out of the parts."""
    text, vision = model.language, model.vision
    return {
        "architectures": ["LlavaOnevision1_5ForConditionalGeneration"],
        "model_type": "llava_onevision1_5",
        "image_token_id": 151655,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llava_onevision1_5_text", "hidden_size": text.hidden_size, "head_dim": text.kv_channels,
            "intermediate_size": text.ffn_hidden_size, "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_attention_heads, "num_key_value_heads": text.num_query_groups,
            "vocab_size": text.vocab_size, "rope_parameters": {"rope_theta": text.rotary_base, "rope_type": "default"},
            "layer_types": ["full_attention"] * text.num_layers, "sliding_window": None,
            "max_position_embeddings": text.max_position_embeddings,
        },
        "vision_config": {
            "model_type": "llava_onevision1_5_vision", "depth": vision.num_layers, "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size, "num_heads": vision.num_attention_heads,
            "num_attention_heads": vision.num_attention_heads, "out_hidden_size": text.hidden_size,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
        },
    }  # fmt: skip


def native_name(name: str) -> str:
    return name.replace("merger.mlp.0", "merger.linear_fc1").replace("merger.mlp.2", "merger.linear_fc2")


def test_a_folder_of_the_native_class_is_read(small_checkpoint, small_model, tmp_path):
    whole = hf2mcore(small_checkpoint, tmp_path / "whole", small_model)
    folder = shutil.copytree(small_checkpoint, tmp_path / "native")
    rename(folder, native_name)
    (folder / "config.json").write_text(json.dumps(native_config(small_model)))
    check_load(Checkpoint.of(folder), {}, None, made_here=False)
    made = hf2mcore(folder, tmp_path / "made", small_model)
    assert made["fingerprint"] == whole["fingerprint"]
    assert made["model"] == small_model.model_dump()
    config = native_config(small_model)
    config["vision_config"]["out_hidden_size"] = 2560
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"out_hidden_size = 2560; LLaVA-OneVision-1\.5 has 128"):
        hf2mcore(folder, tmp_path / "other", small_model)


# --- other forms -----------------------------------------------------------------------------------------------------


def as_pickle(*names: str, wrapped: str = ""):
    """Weights dealt to these files, as torch.save writes them."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()
        for number, name in enumerate(names):
            part = {key: value for i, (key, value) in enumerate(weights.items()) if i % len(names) == number}
            torch.save({wrapped: part} if wrapped else part, folder / name)
        torch.save({"lr": 1e-5}, folder / "training_args.bin")

    return change


FORMS = {
    "bin": as_pickle("pytorch_model.bin"),
    "bins": as_pickle("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    "consolidated": as_pickle("consolidated.pt"),
    "pth": as_pickle("consolidated.00.pth"),
    "lightning": as_pickle("epoch=1-step=2.ckpt", wrapped="state_dict"),
    "other pt": as_pickle("weights.pt", wrapped="model"),
}


@pytest.mark.parametrize("name", FORMS)
def test_pickles_are_refused_with_a_command_that_converts_them(name, small_checkpoint, small_model, tmp_path):
    folder = shutil.copytree(small_checkpoint, tmp_path / "it's [here]")
    FORMS[name](folder)
    for call in (
        lambda: check_load(Checkpoint.of(folder), {}, None, made_here=False),
        lambda: check_load(Checkpoint.of(small_checkpoint), {"language": str(folder)}, None, made_here=False),
        lambda: hf2mcore(folder, tmp_path / "made", small_model),
    ):
        with pytest.raises(CheckpointError, match=r"its weights are in .*, a pickle: that form is not read") as error:
            call()
    python, option, code = shlex.split(error.value.fix.partition("beside it: ")[2])
    assert (python, option) == (".venv/bin/python", "-c")
    exec(code, {})
    made = hf2mcore(folder, tmp_path / "made", small_model)
    assert made["fingerprint"] == hf2mcore(small_checkpoint, tmp_path / "whole", small_model)["fingerprint"]


def test_an_adapter_and_gguf_are_refused_by_name(small_checkpoint, small_model, tmp_path):
    folder = shutil.copytree(small_checkpoint, tmp_path / "adapter")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/base"}))
    parts = {"language_model": str(folder)}
    with pytest.raises(CheckpointError, match=r"a PEFT adapter.*its base is 'models/base'") as error:
        check_load(Checkpoint.of(small_checkpoint), parts, None, made_here=False)
    assert f"merge BASE {folder} {folder}-merged, and name {folder}-merged" in error.value.fix
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    with pytest.raises(CheckpointError, match=r"model-Q4_K_M\.gguf: GGUF is a form for inference"):
        check_load(Checkpoint.of(folder), {}, None, made_here=False)
    file = folder / "model-Q4_K_M.gguf"
    with pytest.raises(CheckpointError, match=r"a file; checkpoints are folders\n.*GGUF is a form for inference"):
        check_load(Checkpoint.of(file), {}, None, made_here=False)
