"""PEFT: a LoRA by module names, one step of training, kept and loaded again, merged; or a PEFT folder of this project."""

import tempfile

import torch
from asked import Job
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

NAMES = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
CLOSE = 1e-5  # of the largest logit


def main() -> None:
    job = Job()
    if job.adapter:
        ask_adapter(job)
    else:
        train_one(job)


def ask_adapter(job: Job) -> None:
    """Its answers are to be those of the merged export, and so are its logits and the weights that PEFT merges."""
    options = {"trust_remote_code": True, "dtype": torch.float32}
    processor = AutoProcessor.from_pretrained(job.export, trust_remote_code=True)
    inputs = inputs_of(job, processor, next(q for q in job.questions if job.pictures(q)))
    merged = AutoModelForImageTextToText.from_pretrained(job.merged, **options)
    wanted, weights, checks = logits(merged, inputs), merged.state_dict(), {}
    theirs = AutoModelForImageTextToText.from_pretrained(job.export, **options)
    theirs.load_adapter(job.adapter)
    checks["load_adapter of transformers"] = close(logits(theirs, inputs), wanted)
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(job.export, **options), job.adapter)
    answers = answers_of(job, processor, model)
    checks["logits"] = close(logits(model, inputs), wanted)
    found = model.merge_and_unload().state_dict()
    others = [name for name, weight in weights.items() if not torch.equal(weight, found[name])]
    checks["merge_and_unload, bit for bit"] = f"{len(others)} tensors differ: {others[0]}" if others else ""
    called = "PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(…), ADAPTER), merge_and_unload"
    job.give(called, answers, ["peft", "transformers", "torch"], checks)


def answers_of(job, processor, model):
    answers = []
    for messages in job.questions:
        asked = inputs_of(job, processor, messages)
        output = model.eval().generate(**asked, max_new_tokens=job.max_new_tokens, do_sample=False)
        answers.append(processor.decode(output[0, asked["input_ids"].shape[1] :]))
    return answers


def train_one(job: Job) -> None:
    options = {"trust_remote_code": True, "dtype": torch.float32}
    processor = AutoProcessor.from_pretrained(job.export, trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained(job.export, **options)
    shown = next(q for q in job.questions if job.pictures(q))
    inputs = inputs_of(job, processor, shown)
    model = get_peft_model(base, LoraConfig(target_modules=NAMES, r=4, lora_dropout=0.0))
    with model.disable_adapter():
        answers = answers_of(job, processor, model)

    checks = {"layers": ""}
    layers = base.config.text_config.num_hidden_layers
    found = sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    if found != 7 * layers:
        checks["layers"] = f"{found} layers have a LoRA, not 7 × {layers}"
    before = logits(model, inputs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first moves B alone
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model, inputs)
    checks["one step changes the logits"] = "" if apart(trained, before) > 100 * CLOSE else "they are the same"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(job.export, **options), folder)
        checks["kept and loaded again"] = close(logits(again, inputs), trained)
    merged = model.merge_and_unload()
    checks["merged"] = close(logits(merged, inputs), trained)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        again = AutoModelForImageTextToText.from_pretrained(folder, **options)
        checks["merged, saved and loaded again"] = close(logits(again, inputs), trained)
    called = "get_peft_model(AutoModelForCausalLM.from_pretrained(…), LoraConfig(target_modules=model.language_model.layers.N…)), merge_and_unload"
    job.give(called, answers, ["peft", "transformers", "torch"], checks)


def inputs_of(job, processor, messages):
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=job.pictures(messages) or None, return_tensors="pt")


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def apart(found, wanted) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def close(found, wanted) -> str:
    return "" if apart(found, wanted) <= CLOSE else f"logits differ by {apart(found, wanted):.1e} of the largest"


if __name__ == "__main__":
    main()
