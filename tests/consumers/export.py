"""An exported folder as other programs have it, and the list of what they call on it. Nothing of this project is imported."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

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
