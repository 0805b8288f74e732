"""The architecture tables: sizes, names, and reading of config.json as found in the wild."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from helpers import MODELS, SCRIPTS
from helpers.models import published_names
from llava_sft.errors import CheckpointError, SettingsError
from llava_sft.model.config import load_model_config
from llava_sft.model.hf_config import model_of_config, parts_of_config
from llava_sft.model.processing import CLIP_MEAN, CLIP_STD, MAX_PIXELS, MERGE_SIZE, MIN_PIXELS, PATCH_SIZE
from llava_sft.model.tensors import hf_shapes, parameter_count
from llava_sft.model.tokens import CONTROL_TOKENS, IMAGE, IMAGE_PAD, IMAGE_TEXT, PUBLISHED_TOKEN_IDS, SYSTEM_PROMPT

SHIPPED = SCRIPTS / "llava_sft/model/hf"


@pytest.mark.parametrize(("size", "count"), [("4b", 4_741_610_528), ("8b", 8_527_214_624)])
def test_published_sizes_have_exactly_the_published_tensors(size, count):
    model = load_model_config(MODELS / f"{size}.yaml")
    assert hf_shapes(model) == published_names(size)
    assert len(hf_shapes(model)) == 698
    assert parameter_count(model) == count


@pytest.mark.parametrize("size", ["tiny", "4b", "8b"])
def test_hf_config_and_back(size):
    model = load_model_config(MODELS / f"{size}.yaml")
    hf = json.loads(json.dumps(model.to_hf_config()))
    assert model_of_config(hf, name=size) == model
    assert {key: hf[key] for key in PUBLISHED_TOKEN_IDS} == PUBLISHED_TOKEN_IDS


def test_missing_keys_mean_the_published_defaults():
    model = load_model_config(MODELS / "4b.yaml")
    assert model_of_config({"model_type": "llavaonevision1_5"}, name="4b") == model
    # what transformers 4.53 leaves of the 8B config: only the keys that differ from the class
    sparse = {
        "model_type": "llavaonevision1_5",
        "vocab_size": 152064,
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "max_position_embeddings": 40960,
        },
        "vision_config": {"text_hidden_size": 4096},
    }
    assert model_of_config(sparse, name="8b") == load_model_config(MODELS / "8b.yaml")


@pytest.mark.parametrize(("name", "kind"), [("Qwen3Config", "language"), ("MLCDVisionConfig", "vision")])
def test_a_missing_key_means_the_default_of_the_class_that_wrote_it(name, kind):
    import transformers

    written = getattr(transformers, name)(**({"hidden_size": 1664} if kind == "vision" else {})).to_dict()
    assert parts_of_config({"model_type": written["model_type"]}) == parts_of_config(written)
    assert set(parts_of_config(written)) == {kind}


def test_rope_base_is_read_from_both_spellings():
    hf = load_model_config(MODELS / "8b.yaml").to_hf_config()
    theta = hf["text_config"].pop("rope_theta")
    hf["text_config"]["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    assert model_of_config(hf).language.rotary_base == 1e6


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"text_config": {"tie_word_embeddings": True}}, "text_config.tie_word_embeddings"),
        ({"text_config": {"rope_scaling": {"type": "yarn", "factor": 4}}}, "yarn"),
        ({"vision_config": {"temporal_patch_size": 2}}, "temporal_patch_size"),
        ({"vision_config": {"text_hidden_size": 4096}}, "text_hidden_size"),
        ({"text_config": {"num_key_value_heads": 5}}, "num_query_groups"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}},
            "mrope_section",
        ),
        ({"text_config": {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}}, "full_attention"),
        ({"text_config": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"text_config": {"rope_theta": float("inf")}}, "rotary_base"),
        ({"text_config": {"rms_norm_eps": 1}}, "layernorm_epsilon"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act"),
        ({"text_config": {"attention_bias": True}}, "attention_bias"),
        ({"text_config": {"attention_dropout": 0.1}}, "text_config.attention_dropout"),
        ({"text_config": {"use_sliding_window": True}}, "use_sliding_window"),
        ({"text_config": {"layer_types": ["sliding_attention"]}}, "layer_types"),
        ({"vision_config": {"attention_dropout": 0.1}}, "vision_config.attention_dropout"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config.hidden_act"),
        ({"vision_config": {"patch_size": 16}}, "vision_config.patch_size"),
        ({"vision_config": {"spatial_merge_size": 4}}, "spatial_merge_size"),
        ({"vision_config": {"out_hidden_size": 4096}}, "out_hidden_size"),
    ],
)
def test_another_architecture_is_refused_with_the_key(change, mentioned):
    with pytest.raises(CheckpointError, match=mentioned):
        model_of_config({"model_type": "llavaonevision1_5", **change})


@pytest.mark.parametrize(
    ("text", "mentioned"),
    [
        ("name: x", "language: Field required"),
        ("name: x\nheads: 3", "heads: Extra inputs"),
        ("[1, 2", "not valid YAML"),
        ("", "language: Field required"),
    ],
)
def test_a_wrong_model_file_is_one_clear_message(tmp_path, text, mentioned):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=mentioned) as error:
        load_model_config(file)
    assert str(file) in str(error.value)


def test_a_missing_model_file_names_those_there_are():
    with pytest.raises(SettingsError, match=r"4b, 8b, tiny"):
        load_model_config(MODELS / "5b.yaml")


def test_importing_the_config_does_not_import_torch():
    code = "import sys, llava_sft.model.config, llava_sft.model.export_files; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("key", "value"), [("patch_size", 16), ("spatial_merge_size", 4), ("patch_size", 7)])
def test_patches_that_the_data_does_not_cut_are_refused_by_name(tmp_path, key, value):
    path = tmp_path / "other.yaml"
    content = yaml.safe_load((MODELS / "tiny.yaml").read_text())
    path.write_text(yaml.safe_dump({**content, "vision": {**content["vision"], key: value}}))
    with pytest.raises(SettingsError, match=rf"{key}.*(14|2)"):
        load_model_config(path)


def test_the_shipped_files_spell_the_tokens_as_the_model_does():
    texts = {path.name: path.read_text() for path in SHIPPED.iterdir() if path.is_file()}
    assert {token for text in texts.values() for token in re.findall(r"<\|\w+\|>", text)} <= set(CONTROL_TOKENS)
    template = texts["chat_template.jinja"]
    assert f"set image = '{IMAGE_TEXT}'" in template and f"replace('{IMAGE}', image)" in template
    assert SYSTEM_PROMPT in template


def test_the_shipped_classes_have_the_constants_and_defaults_of_the_model():
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from llava_sft.model.hf import configuration_llavaonevision1_5 as configuration
    from llava_sft.model.hf import processing_llavaonevision1_5 as processing

    assert (processing.IMAGE_TOKEN, processing.IMAGE_PLACEHOLDER) == (IMAGE_PAD, IMAGE)
    images = processing.LLaVAOneVision1_5_ImageProcessor
    assert (images.patch_size, images.merge_size) == (PATCH_SIZE, MERGE_SIZE)
    assert images.size == {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    assert (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)) == (CLIP_MEAN, CLIP_STD)
    shipped = configuration.Llavaonevision1_5Config()
    assert {key: getattr(shipped, key) for key in PUBLISHED_TOKEN_IDS} == PUBLISHED_TOKEN_IDS
    assert model_of_config(shipped.to_dict(), "4b") == load_model_config(MODELS / "4b.yaml")
