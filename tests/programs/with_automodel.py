"""NeMo AutoModel's own class of the model with the export's weights. Its `from_pretrained` wants a GPU, so the steps below
are those that it takes; the class has no generate."""

from pathlib import Path

import torch
from asked import Job
from nemo_automodel.components.models.llava_onevision.model import LLaVAOneVision1_5_ForConditionalGeneration
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor


def main() -> None:
    job = Job()
    config = AutoConfig.from_pretrained(job.export, trust_remote_code=True)
    (architecture,) = config.architectures
    model = LLaVAOneVision1_5_ForConditionalGeneration.from_config(config, attn_implementation="sdpa").eval()
    stored = {}
    for path in Path(job.export).glob("*.safetensors"):
        stored |= load_file(path)
    model.load_state_dict(model.state_dict_adapter.from_hf(stored))  # strict: none missing, none left
    model.to(getattr(torch, job.dtype))
    processor = AutoProcessor.from_pretrained(job.export, trust_remote_code=True)
    ends = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    answers = []
    for messages in job.questions:
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(
            text=[text], images=job.pictures(messages) or None, videos=None, do_sample_frames=False, return_tensors="pt"
        )
        ids = inputs["input_ids"]
        images = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        given: list[int] = []
        while len(given) < job.max_new_tokens and not set(given) & set(ends):
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **images).logits
            given.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, ids.new_tensor([given[-1:]])], dim=1)
        answers.append(processor.tokenizer.decode(given))
    known = type(model).__name__ == architecture
    checks = {"architectures in config.json": "" if known else f"{architecture} is not its class"}
    called = f"AutoConfig, {architecture}.from_config, state_dict_adapter.from_hf, forward"
    job.give(called, answers, ["nemo-automodel", "transformers", "torch"], checks)


if __name__ == "__main__":
    main()
