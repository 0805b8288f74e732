"""What other programs call on an exported folder, without those programs: one JSON with every call and its outcome.

    python tests/consumers/calls.py EXPORT [--image FILE] [--question TEXT]

Stands alone: it imports transformers, torch and Pillow, in whatever versions are installed, and nothing of this project.
Each call is named after the program whose source asks it. `answer` is the greedy answer about one picture, `logits` the
figures to compare two versions by.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if __name__ == "__main__":  # the code of one export shall not meet that of another of the same name
    code_cache = tempfile.TemporaryDirectory(prefix="calls-")
    os.environ["HF_MODULES_CACHE"] = code_cache.name

import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CODE = "modeling_llavaonevision1_5"
NEW_TOKENS = 8
SIZES = [(120, 90), (56, 140), (300, 30)]  # width, height
CLOSE = 2e-5  # of the largest value: float32, summed in another order
CALLS: dict[str, Callable[["Export"], Any]] = {}


def call(name: str):
    def register(function):
        CALLS[name] = function
        return function

    return register


class Export:
    """An exported folder as a user has it, loaded in float32 when a call first needs it."""

    def __init__(self, folder: Path | str, image: Image.Image | None = None, question: str = "What is this?"):
        self.folder, self.question = str(folder), question
        self.image = image or Image.radial_gradient("L").resize((112, 84)).convert("RGB")
        self.options = {"trust_remote_code": True}

    @cached_property
    def config(self):
        return AutoConfig.from_pretrained(self.folder, **self.options)

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        return json.loads(Path(self.folder, "config.json").read_text())

    @cached_property
    def processor(self):
        return AutoProcessor.from_pretrained(self.folder, **self.options)

    @cached_property
    def model(self):
        return self.load(AutoModelForImageTextToText)

    def load(self, auto_class, **options):
        """Raises ValueError when a weight is not taken from the folder."""
        model, info = auto_class.from_pretrained(
            self.folder, dtype=torch.float32, output_loading_info=True, **self.options, **options
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(f"not loaded: {sorted(map(str, [*info['missing_keys'], *info['mismatched_keys']]))[:3]}")
        return model.eval()

    def text(self, images: int = 1, question: str | None = None) -> str:
        content = [{"type": "image"}] * images + [{"type": "text", "text": question or self.question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    @cached_property
    def inputs(self):
        return self.processor(text=[self.text()], images=[self.image], return_tensors="pt")

    @cached_property
    def logits(self) -> torch.Tensor:
        """[tokens, vocabulary] of the question about the picture."""
        with torch.no_grad():
            return self.model(**self.inputs).logits[0].float()

    def generate(self, inputs, **options) -> list[list[int]]:
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
        output = self.model.generate(**inputs, **options)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    @cached_property
    def answer(self) -> list[int]:
        return self.generate(self.inputs)[0]

    def several(self, count: int) -> list[Image.Image]:
        return [self.image.resize(SIZES[i % len(SIZES)]) for i in range(count)]


def expect(condition: Any, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def expect_close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> float:
    expect(found.shape == wanted.shape, f"{what}: {tuple(found.shape)}, not {tuple(wanted.shape)}")
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    expect(apart <= CLOSE, f"{what} differ by {apart:.1e} of the largest")
    return apart


def pooled(output: Any) -> torch.Tensor:
    """As ms-swift and mcore-bridge take it."""
    return output.pooler_output if hasattr(output, "pooler_output") else output


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


# ------------------------------------------------------------------------------------------------- configuration


@call("config.vocab_size, hidden_size, tie_word_embeddings (SGLang fork, AReaL)")
def _(export):
    config = export.config
    expect(config.vocab_size == export.model.lm_head.out_features, f"vocab_size {config.vocab_size}")
    expect(config.hidden_size == export.model.lm_head.in_features, f"hidden_size {config.hidden_size}")
    expect(config.tie_word_embeddings is False, "tie_word_embeddings")


@call("keys of config.json that converters index")
def _(export):
    text, vision = export.raw_config["text_config"], export.raw_config["vision_config"]
    for key in ("initializer_range", "use_cache", "sliding_window", "max_window_layers"):
        expect(key in text, f"text_config lacks {key}")
    expect("initializer_range" in vision, "vision_config lacks initializer_range")
    expect(export.raw_config["architectures"] == ["LLaVAOneVision1_5_ForConditionalGeneration"], "architectures")
    return export.raw_config["transformers_version"]


@call("tokenizer by itself")
def _(export):
    tokenizer = AutoTokenizer.from_pretrained(export.folder, **export.options)
    expect(tokenizer.padding_side == "left", f"padding_side {tokenizer.padding_side}")
    ids = tokenizer(export.text().replace("<|image_pad|>", ""))["input_ids"]
    expect(ids == [i for i in export.inputs["input_ids"][0].tolist() if i != export.config.image_token_id], "ids")


@call("image processor by itself")
def _(export):
    try:
        processor = AutoImageProcessor.from_pretrained(export.folder, **export.options)
    except ImportError as error:  # of some versions' AutoImageProcessor, whatever the folder holds
        if "AutoImageProcessor requires the Torchvision library" in str(error):
            return "AutoImageProcessor of this transformers needs torchvision"
        raise
    images = processor(export.image, return_tensors="pt")
    expect(torch.equal(images["pixel_values"], export.inputs["pixel_values"]), "pixel values")


# ------------------------------------------------------------------------------------------------- processor


@call("processor with videos=None, do_sample_frames=False (lmms-eval, VLMEvalKit, NeMo)")
def _(export):
    text, options = [export.text()], {"padding": True, "return_tensors": "pt"}
    for more in ({"videos": None}, {"videos": None, "do_sample_frames": False}, {"videos": []}):
        found = export.processor(text=text, images=[export.image], **more, **options)
        expect(torch.equal(found["input_ids"], export.inputs["input_ids"]), f"other ids with {more}")


@call("processor with images=[]")
def _(export):
    found = export.processor(text=[export.text(0)], images=[], return_tensors="pt")
    expect(set(found) == {"input_ids", "attention_mask"}, f"{sorted(found)}")


@call("apply_chat_template to tensors, pictures inside")
def _(export):
    content = [{"type": "image", "image": export.image}, {"type": "text", "text": export.question}]
    found = export.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
    )  # fmt: skip
    for key in ("input_ids", "pixel_values", "image_grid_thw"):
        expect(torch.equal(found[key], export.inputs[key]), f"another {key}")


@call("AutoProcessor with min_pixels, max_pixels; image_processor.min_pixels (lmms-eval)")
def _(export):
    limits = {"min_pixels": 28 * 28 * 12, "max_pixels": 28 * 28 * 16}
    processor = AutoProcessor.from_pretrained(export.folder, **limits, **export.options)
    images = processor.image_processor
    expect((images.min_pixels, images.max_pixels) == tuple(limits.values()), "limits are not those asked for")
    for side in (20, 900):
        grid = images(images=[export.image.resize((side, side))], return_tensors="pt")["image_grid_thw"]
        pixels = int(grid.prod()) * 14 * 14
        expect(limits["min_pixels"] <= pixels <= limits["max_pixels"], f"{side}×{side} became {pixels} pixels")
    own = export.processor.image_processor
    return own.min_pixels, own.max_pixels


@call("image_processor with do_resize=False (ms-swift)")
def _(export):
    image = export.image.resize((84, 56))
    found = export.processor.image_processor(images=[image], return_tensors="pt", do_resize=False)
    expect(found["image_grid_thw"].tolist() == [[1, 4, 6]], f"{found['image_grid_thw'].tolist()}")


@call("processor._get_num_multimodal_tokens (vLLM)")
def _(export):
    images = [export.image.resize((w, h)) for h, w in [(448, 448), (90, 120), (30, 800)]]
    grid = export.processor.image_processor(images=images, return_tensors="pt")["image_grid_thw"].prod(-1)
    data = export.processor._get_num_multimodal_tokens(image_sizes=[(i.height, i.width) for i in images])
    expect(list(data["num_image_patches"]) == grid.tolist(), f"{data}")
    expect(list(data["num_image_tokens"]) == (grid // 4).tolist(), f"{data}")


@call("return_mm_token_type_ids (vLLM)")
def _(export):
    found = export.processor(
        text=export.text(), images=[export.image], return_mm_token_type_ids=True, return_tensors="pt"
    )
    wanted = (export.inputs["input_ids"] == export.config.image_token_id).long()
    expect(torch.equal(torch.as_tensor(found["mm_token_type_ids"]), wanted), "not one where an image stands")
    with torch.no_grad():
        expect_close(export.model(**found).logits[0], export.logits, "logits")


@call("return_text_replacement_offsets (vLLM ≥ 0.33, transformers ≥ 5.15)")
def _(export):
    if not hasattr(transformers.ProcessorMixin, "return_text_replacement_offsets"):
        return "this transformers does not know it"
    found = export.processor(
        text=export.text(2), images=export.several(2), return_text_replacement_offsets=True, return_tensors="pt"
    )
    lengths = [x["replacement"].count("<|image_pad|>") for x in found["text_replacement_offsets"][0]]
    expect(lengths == (found["image_grid_thw"].prod(-1) // 4).tolist(), f"{lengths}")


# ------------------------------------------------------------------------------------------------- outcome


def outcome(function: Callable[[Export], Any], export: Export) -> dict[str, Any]:
    try:
        value = function(export)
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {"ok": True} if value is None else {"ok": True, "value": value}


def figures(export: Export) -> dict[str, Any]:
    """Answer and logits of the question about the picture: what two versions are compared by."""
    logits = export.logits
    spread = torch.linspace(0, logits.numel() - 1, 16).long()
    return {
        "answer": export.processor.decode(export.answer),
        "answer_ids": export.answer,
        "input_ids_sha256": _sha256(export.inputs["input_ids"]),
        "pixel_values_sha256": _sha256(export.inputs["pixel_values"]),
        "logits": {
            "shape": list(logits.shape),
            "largest": float(logits.abs().max()),
            "spread": [round(x, 6) for x in logits.flatten()[spread].tolist()],  # 16 of them, evenly
            "sha256": _sha256(logits),
        },
    }


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def run(export: Export) -> dict[str, Any]:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    calls = {name: outcome(function, export) for name, function in CALLS.items()}
    try:
        found = figures(export)
    except Exception:  # told by the first call
        found = {"answer": None}
    return {**versions, "all_ok": all(x["ok"] for x in calls.values()), **found, "calls": calls}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", help="folder")
    parser.add_argument("--image", help="a picture; default: a made one")
    parser.add_argument("--question", default="What is this?")
    args = parser.parse_args()
    image = Image.open(args.image).convert("RGB") if args.image else None
    result = run(Export(args.export, image, args.question))
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 0 if result["all_ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
