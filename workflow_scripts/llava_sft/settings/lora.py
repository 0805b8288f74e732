"""The settings of LoRA."""

from llava_sft.settings.fields import Fraction, Natural, Parts, Rate, Section, setting


class LoraSettings(Section):
    """LoRA: low-rank pairs are trained beside frozen weights, for GPUs of 24 to 48 GB"""

    lora_rank: Natural = setting(
        0, "rank of the pairs, 8 to 64; 0: no LoRA, the weights themselves are trained", later=True
    )
    lora_alpha: Rate = setting(32, "the product of a pair counts alpha / rank", later=True)
    lora_dropout: Fraction = setting(
        0, "share of a pair's input that is left out, other values at each step; 0 is fastest", later=True
    )
    lora_modules: Parts = setting(
        ["language_model"], "which of trainable_modules are trained by pairs; the others whole", later=True
    )
