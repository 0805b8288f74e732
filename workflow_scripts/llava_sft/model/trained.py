"""What of the model a training changes: parts whose weights are trained, parts with LoRA's pairs, and what is frozen."""

from typing import NamedTuple

from llava_sft.model.config import ModelConfig
from llava_sft.model.lora import Lora
from llava_sft.model.tensors import parameters_by_part

SPARED = 0.25  # of a GPU's memory: left free where more is kept than has to be
FLOW = ("vision_model", "adapter", "language_model")  # the order in which the parts compute


class Trained(NamedTuple):
    """`whole`: the parts whose weights are trained; `lora`: the pairs beside frozen weights, and their parts."""

    whole: tuple[str, ...]
    lora: Lora | None = None

    @property
    def by_pairs(self) -> tuple[str, ...]:
        return self.lora.parts if self.lora else ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that learn, in whichever way."""
        return self.whole + self.by_pairs

    def reaches(self, part: str) -> bool:
        """Whether the backward pass goes through a part: it learns, or one does that computes before it."""
        return any(each in self.parts for each in FLOW[: FLOW.index(part) + 1])

    def passes(self, part: str) -> tuple[int, int]:
        """How often a step does the work of the forward pass: in matrix products, and in attention.

        The gradient of a product's input takes as much as the product, and so does that of its weight; attention has no
        weights, and its backward pass takes twice as much.
        """
        back = self.reaches(part)
        return 1 + back + (part in self.whole), 1 + 2 * back

    def parameters(self, model: ModelConfig, parts: tuple[str, ...] = FLOW) -> int:
        """Values that are trained, of `parts` of the model."""
        counts = parameters_by_part(model)
        of_pairs = sum(self.lora.parameters(model, part) for part in parts) if self.lora else 0
        return sum(counts[part] for part in self.whole if part in parts) + of_pairs
