"""mcore-bridge, which ms-swift trains with on Megatron. Its models need a GPU; what it reads of an export before does not:
the sizes, and the vision tower, built as its `LLaVAOneVision1_5Vit` does and called as that does."""

import torch
from asked import Job
from mcore_bridge import hf_to_mcore_config
from mcore_bridge.model.mm_gpts.llava import LLaVAOneVision1_5Vit
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

CLOSE = 1e-5  # of the largest value


def main() -> None:
    job = Job()
    config = AutoConfig.from_pretrained(job.export, trust_remote_code=True)
    read, text = hf_to_mcore_config(config), config.text_config
    wanted = {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_query_groups": text.num_key_value_heads,
        "kv_channels": text.head_dim,
        "padded_vocab_size": text.vocab_size,
        "layernorm_epsilon": text.rms_norm_eps,
        "rotary_base": (getattr(text, "rope_parameters", None) or {}).get("rope_theta") or text.rope_theta,
        "untie_embeddings_and_output_weights": True,
        "qk_layernorm": True,
        "image_token_id": config.image_token_id,
    }
    checks = {
        f"hf_to_mcore_config: {key}": "" if read.get(key) == value else f"{read.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
    }

    model = AutoModelForCausalLM.from_pretrained(job.export, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(job.export, trust_remote_code=True)
    shown = next(messages for messages in job.questions if len(job.pictures(messages)) > 1)
    rendered = processor.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[rendered], images=job.pictures(shown), return_tensors="pt")
    tower = LLaVAOneVision1_5Vit.__new__(LLaVAOneVision1_5Vit)  # its __init__ moves to a GPU
    torch.nn.Module.__init__(tower)
    tower.hf_config = config
    tower.prepare_model(config)
    tower.visual.load_state_dict(model.visual.state_dict())
    with torch.no_grad():
        embeds = tower.get_inputs_embeds(model.get_input_embeddings()(inputs["input_ids"]), **inputs)
        found, own = model(inputs_embeds=embeds).logits, model(**inputs).logits
    apart = float((found - own).abs().max() / own.abs().max())
    checks["logits with its vision tower"] = "" if apart <= CLOSE else f"differ by {apart:.1e} of the largest"
    called = "hf_to_mcore_config, LLaVAOneVision1_5Vit.prepare_model, .get_inputs_embeds; not on a CPU: get_mcore_model"
    job.give(called, [None] * len(job.questions), ["mcore-bridge", "megatron-core", "transformers", "torch"], checks)


if __name__ == "__main__":
    main()
