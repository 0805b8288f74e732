"""What other programs call on the model of an export. Each call is named after the programs whose source asks it."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from consumers.export import CODE, NEW_TOKENS, Export, call, expect, expect_close, pooled

# ------------------------------------------------------------------------------------------------- one answer


@call("one picture: answer")
def _(export):
    return export.processor.decode(export.answer)


@call("one picture: with cache = without")
def _(export):
    ids, images = export.inputs["input_ids"], {k: export.inputs[k] for k in ("pixel_values", "image_grid_thw")}
    for token in export.answer:
        with torch.no_grad():
            best = export.model(input_ids=ids, **images, use_cache=False).logits[0, -1].argmax()
        expect(int(best) == token, f"{int(best)} is best, {token} was generated")
        ids = torch.cat([ids, best[None, None]], dim=1)


@call("text alone, two pictures")
def _(export):
    alone = export.processor(text=[export.text(0)], return_tensors="pt")
    two = export.processor(text=[export.text(2)], images=export.several(2), return_tensors="pt")
    return [export.processor.decode(export.generate(inputs)[0]) for inputs in (alone, two)]


@call("stops by itself")
def _(export):
    """With the settings of the folder: an end token that the model would not give is put in front of it."""
    ends = export.model.generation_config.eos_token_id
    tokenizer = export.processor.tokenizer
    expect(tokenizer.eos_token_id in ends, f"eos_token_id {ends} lacks {tokenizer.eos_token_id}")
    expect(tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>", "the tokenizer's end is no end of turn")
    steps = iter([export.answer[0], tokenizer.eos_token_id])

    def end_second(ids, scores):
        wanted = next(steps)
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([wanted]), 0.0)

    given = export.generate(export.inputs, logits_processor=[end_second])[0]
    expect(given == [export.answer[0], tokenizer.eos_token_id], f"went on: {given}")


@call("batches with the folder's own padding")
def _(export):
    questions = ["Why?", export.question, "What is 2 plus 2? And what is 3 plus 3, and why is that so?"]
    counts = [0, 1, 2]
    texts = [export.text(n, q) for n, q in zip(counts, questions, strict=True)]
    images = export.several(3)
    options = {"eos_token_id": None, "min_new_tokens": NEW_TOKENS}
    batch = export.processor(text=texts, images=images, padding=True, return_tensors="pt")
    together = export.generate(batch, **options)
    for i, text in enumerate(texts):
        own = images[sum(counts[:i]) : sum(counts[: i + 1])]
        alone = export.processor(text=[text], images=own or None, return_tensors="pt")
        expect(together[i] == export.generate(alone, **options)[0], f"answer {i} of a batch is not its answer alone")


@call("beams and several answers a question")
def _(export):
    text, images = [export.text(2), export.text(1, "Why?")], export.several(3)
    inputs = export.processor(text=text, images=images, padding=True, return_tensors="pt")
    greedy = export.generate(inputs, eos_token_id=None)
    torch.manual_seed(0)
    # Sampling from one token is greedy: every copy of a question has to see its own pictures.
    copies = export.generate(inputs, eos_token_id=None, do_sample=True, top_k=1, num_return_sequences=2)
    expect(copies == [greedy[0], greedy[0], greedy[1], greedy[1]], "copies of a question differ from it")
    expect(len(export.generate(inputs, num_beams=2)) == 2, "beams")


@call("loss, gradients, checkpointing")
def _(export):
    """As ms-swift and transformers' Trainer train."""
    model = export.model.train()
    losses = []
    try:
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            loss = model(**export.inputs, labels=export.inputs["input_ids"], use_cache=False).loss
            loss.backward()
            losses.append((float(loss), float(model.visual.class_embedding.grad.norm())))
            model.zero_grad()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    expect(abs(losses[0][0] - losses[1][0]) < 1e-4 and losses[0][1] > 0, f"{losses}")
    return losses[0]


@call("hidden states of every layer")
def _(export):
    with torch.no_grad():
        states = export.model(**export.inputs, output_hidden_states=True).hidden_states
    expect(len(states) == export.config.text_config.num_hidden_layers + 1, f"{len(states)} hidden states")


# ------------------------------------------------------------------------------------------------- loading


@call("AutoModelForCausalLM (lmms-eval, VLMEvalKit, upstream's README)")
def _(export):
    with torch.no_grad():
        return expect_close(export.load(AutoModelForCausalLM)(**export.inputs).logits[0], export.logits, "logits")


@call("AutoModel (vLLM): the base class, with its weights")
def _(export):
    model = export.load(AutoModel)
    expect(type(model).__name__ == "LLaVAOneVision1_5_Model", type(model).__name__)
    with torch.no_grad():
        states = model(**export.inputs).last_hidden_state
        return expect_close(export.model.lm_head(states)[0], export.logits, "logits")


@call("AutoModel.from_config on the meta device (vLLM)")
def _(export):
    with torch.device("meta"):
        model = AutoModel.from_config(export.config, **export.options)
    expect(type(model).__name__ == "LLaVAOneVision1_5_Model", type(model).__name__)
    expect(type(model).is_backend_compatible() if hasattr(model, "is_backend_compatible") else True, "backend")


@call("class from the folder's code (ms-swift)")
def _(export):
    name = f"{CODE}.LLaVAOneVision1_5_ForConditionalGeneration"
    model = export.load(get_class_from_dynamic_module(name, export.folder))
    layers = {type(module).__name__ for module in model.modules()}
    for wrapped in ("LLaVAOneVision1_5_DecoderLayer", "RiceBlock", *model._no_split_modules):
        expect(wrapped in layers, f"no module is a {wrapped}")


@call("class_embedding and inv_freq are right after loading")
def _(export):
    """Both went wrong in ports: initialised again, or left empty where modules are built without memory."""
    from safetensors import safe_open

    stored = {}
    for path in Path(export.folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {k.split("visual.")[1]: file.get_tensor(k).float() for k in file.keys() if "visual.class_" in k}  # noqa: SIM118
    expect(len(stored) == 2, f"{sorted(stored)} in the folder")
    for name, value in stored.items():
        expect(torch.equal(getattr(export.model.visual, name).detach(), value), f"{name} is not the stored one")
    text = export.config.text_config
    base = (getattr(text, "rope_parameters", None) or {}).get("rope_theta") or text.rope_theta
    wanted = float(base) ** -(torch.arange(0, text.head_dim, 2).float() / text.head_dim)
    expect_close(export.model.language_model.rotary_emb.inv_freq, wanted, "inv_freq")


@call("save_pretrained and load again")
def _(export):
    with tempfile.TemporaryDirectory() as folder:
        export.model.save_pretrained(folder)
        export.processor.save_pretrained(folder)
        again = Export(folder, export.image, export.question)
        return expect_close(again.logits, export.logits, "logits")


# ------------------------------------------------------------------------------------------------- the model's parts


@call("model.visual, .language_model, .visual.merger (ms-swift)")
def _(export):
    model = export.model
    expect(model.visual is model.model.visual and model.language_model is model.model.language_model, "other modules")
    return [type(x).__name__ for x in (model.visual, model.language_model, model.visual.merger)]


@call("visual(pixel_values, grid_thw=…) and .dtype (ms-swift, mcore-bridge)")
def _(export):
    pixels, grid = export.inputs["pixel_values"].type(export.model.visual.dtype), export.inputs["image_grid_thw"]
    with torch.no_grad():
        features = pooled(export.model.visual(pixels, grid_thw=grid))
    expect(features.shape == (int(grid.prod()) // 4, export.config.hidden_size), f"{tuple(features.shape)}")


@call("inputs_embeds made outside (ms-swift)")
def _(export):
    model, inputs = export.model, export.inputs
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = pooled(model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]))
        mask = (inputs["input_ids"] == export.config.image_token_id).unsqueeze(-1).expand_as(embeds)
        embeds = embeds.masked_scatter(mask, features.to(embeds))
        return expect_close(model(inputs_embeds=embeds).logits[0], export.logits, "logits")


@call("RiceTransformerPretrainedModel._from_config (mcore-bridge)")
def _(export):
    vision = get_class_from_dynamic_module(f"{CODE}.RiceTransformerPretrainedModel", export.folder)
    tower = vision._from_config(export.config.vision_config).float().eval()
    tower.load_state_dict(export.model.visual.state_dict())
    args = export.inputs["pixel_values"], export.inputs["image_grid_thw"]
    with torch.no_grad():
        return expect_close(
            pooled(tower(args[0], grid_thw=args[1])), pooled(export.model.visual(*args)), "image features"
        )


@call("get_image_features(…, return_dict=True).pooler_output (vLLM)")
def _(export):
    images = export.processor.image_processor(images=export.several(2), return_tensors="pt")
    grid = images["image_grid_thw"]
    for model in (export.model, export.model.model):
        with torch.no_grad():
            features = model.get_image_features(images["pixel_values"], image_grid_thw=grid, return_dict=True)
        lengths = [len(x) for x in features.pooler_output]
        expect(lengths == (grid.prod(-1) // 4).tolist(), f"{lengths} features")


@call("module names (PEFT, vLLM with several LoRAs)")
def _(export):
    names = {name for name, _ in export.model.named_modules()}
    for i in range(export.config.text_config.num_hidden_layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            expect(f"model.language_model.layers.{i}.{name}" in names, f"no module {name} in layer {i}")
