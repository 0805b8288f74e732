"""The same model in transformers' Trainer, on the same batches, for benchmarks/training.py.

The project's Hugging Face file in bf16, SDPA or flex attention, fused AdamW, recomputation only where memory needs it; the
batches are loaded and normalised before the clock runs.
"""

import gc
import json
import tempfile
import time

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from cases import PEAK, run_settings
from llava_sft.data.loader import VlmBatch, VlmTaskEncoder
from llava_sft.data.stream import Ranks, train_loader
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.model.hf.configuration_llavaonevision1_5 import Llavaonevision1_5Config
from llava_sft.model.hf.modeling_llavaonevision1_5 import LLaVAOneVision1_5_ForConditionalGeneration
from llava_sft.model.processing import CLIP_MEAN, CLIP_STD, PATCH_SIZE
from llava_sft.model.template import ChatTemplate
from llava_sft.preflight.cost import training_flops
from results import ROOT, machine


class Clock(TrainerCallback):
    """When each step ended, the GPU included."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *given, **named):
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def model_inputs(batch: VlmBatch) -> dict[str, torch.Tensor]:
    """What the Hugging Face model takes, with pixels normalised."""
    labels = torch.full((batch.input_ids.numel(),), -100)
    labels[batch.answer_index + 1] = batch.answer_labels
    mean, std = (torch.tensor(x).repeat_interleave(PATCH_SIZE**2) * 255 for x in (CLIP_MEAN, CLIP_STD))
    return {
        "input_ids": batch.input_ids,
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(n) for n in batch.segments or batch.lengths])[None],
        "pixel_values": ((batch.pixels.float() - mean) / std).bfloat16(),
        "image_grid_thw": torch.nn.functional.pad(batch.grids, (1, 0), value=1),
    }


def build_model(config: ModelConfig, template: ChatTemplate, attention: str) -> torch.nn.Module:
    image = template.image_token_id
    tokens = {"image_token_id": image, "video_token_id": image + 1}
    tokens |= {"vision_start_token_id": image - 3, "vision_end_token_id": image - 2}
    hf_config = Llavaonevision1_5Config(**config.to_hf_config(tokens))
    hf_config._attn_implementation = {"text_config": attention, "vision_config": "sdpa"}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LLaVAOneVision1_5_ForConditionalGeneration(hf_config)
    torch.set_default_dtype(torch.float32)
    return model


def add_pairs(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """PEFT's LoRA on the linear layers of the language model; all else is frozen."""
    from peft import LoraConfig, get_peft_model

    linears = r".*language_model\.layers\..*(q|k|v|o|gate|up|down)_proj"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=linears))


def recompute(model: torch.nn.Module, what: str) -> None:
    """`what`: none, vision or full."""
    model.gradient_checkpointing_disable()
    if what != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if what == "vision":
        for layer in model.model.language_model.layers:
            layer.gradient_checkpointing = False


def train_once(model: torch.nn.Module, case: dict, inputs: list[dict]) -> list[float]:
    """Times at which the steps ended; none when memory ran out."""
    options = {"max_steps": case["warm"] + case["steps"], "bf16": True, "use_cpu": not torch.cuda.is_available()}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": case["accumulate"]}
    options |= {"optim": "adamw_torch_fused", "learning_rate": 1e-5, "max_grad_norm": 1.0}
    options |= {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
    options |= {"remove_unused_columns": False, "dataloader_num_workers": 0}
    arguments = TrainingArguments(output_dir=tempfile.mkdtemp(), **options)
    clock = Clock()
    trainer = Trainer(
        model, arguments, data_collator=lambda samples: samples[0], train_dataset=inputs, callbacks=[clock]
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(inputs)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        clock.ends.clear()
    if not clock.ends:  # not above: there the error holds tensors
        trainer.accelerator.free_memory()
    return clock.ends


def train(args) -> None:
    """One case; its figures are written to `args.result`."""
    (case,) = args.cases
    values, config = run_settings(args.model, {}), load_model_config(ROOT / "config/models" / f"{args.model}.yaml")
    template = ChatTemplate(args.tokenizer)
    limits = case["seq_length"], values.min_pixels, values.max_pixels
    encoder = VlmTaskEncoder(template, *limits, case["packed"], 1, 0)
    loader = iter(train_loader(args.webdatasets, encoder, Ranks(0, 1, 6), 1, 1000))
    batches = [next(loader) for _ in range(case["accumulate"] * (case["warm"] + case["steps"]))]
    inputs = [model_inputs(batch) for batch in batches]
    model = build_model(config, template, case["attention"])
    if case.get("lora_rank"):
        model = add_pairs(model, case["lora_rank"])
        values = values.model_copy(update={"trainable_modules": ["language_model"], "lora_rank": case["lora_rank"]})
    out_of_memory = []
    for what in case["recompute"]:
        recompute(model, what)
        torch.cuda.reset_peak_memory_stats()
        if ends := train_once(model, case, inputs):
            break
        out_of_memory.append(what)
        print(f"CASE {case['name']}: out of memory with recompute {what}", flush=True)
        gc.collect()
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    else:
        raise SystemExit("no recomputation makes it fit")
    seconds = ends[-1] - ends[case["warm"] - 1]
    flops = useful = 0
    for batch in batches[case["accumulate"] * case["warm"] :]:
        grids = [tuple(grid) for grid in batch.grids.tolist()]
        flops += training_flops(config, values.trained, batch.lengths, grids, len(batch.answer_labels))
        useful += batch.num_tokens
    result = case | {
        "recompute": what,
        "out_of_memory": out_of_memory,
        "mfu": flops / seconds / PEAK,
        "useful_tokens_per_s": useful / seconds,
        "step_ms": seconds / case["steps"] * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    print(f"CASE {case['name']}: {result}", flush=True)
    source = {"model": args.model, "gpu": torch.cuda.get_device_name(), "machine": machine()}
    args.result.write_text(json.dumps(source | {"peer": result}))
