"""The same model in transformers' Trainer, on the same batches, for benchmarks/training.py.

The project's Hugging Face file in bf16, SDPA or flex attention, fused AdamW, recomputation only where memory needs it; the
batches are loaded and normalised before the clock runs.
"""

import gc
import json
import tempfile
import time

from llava_sft.model.config import load_model_config
from results import ROOT, machine

PEERS = {
    "transformers": [
        {"name": "transformers sdpa", "packed": True, "attention": "sdpa"},
        {"name": "transformers flex", "packed": True, "attention": "flex_attention"},
        # Less than everything recomputed does not fit: at 8,192 the vision tower alone has to be, and takes 100 GiB.
        {
            "name": "transformers flex 32768",
            "packed": True,
            "attention": "flex_attention",
            "seq_length": 32768,
            "accumulate": 4,
            "recompute": ["full"],
        },
    ],
    "unpacked": [
        {
            "name": "transformers unpacked",
            "packed": False,
            "attention": "sdpa",
            "accumulate": 144,
            "steps": 1,
            "recompute": ["full"],
        }
    ],
}
PEER = {"seq_length": 8192, "accumulate": 16, "warm": 1, "steps": 2, "recompute": ["none", "vision", "full"]}


def transformers_trainer(args, values: dict, peak: float) -> None:
    """One case of `args.cases` (packed, attention, recompute). `values`: settings; `peak`: FLOP/s that MFU is counted against."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llava_sft.data.loader import VlmTaskEncoder
    from llava_sft.data.stream import Ranks, train_loader
    from llava_sft.model.cost import training_flops
    from llava_sft.model.hf.configuration_llavaonevision1_5 import Llavaonevision1_5Config
    from llava_sft.model.hf.modeling_llavaonevision1_5 import LLaVAOneVision1_5_ForConditionalGeneration
    from llava_sft.model.processing import CLIP_MEAN, CLIP_STD
    from llava_sft.model.template import ChatTemplate

    case = args.cases[0]
    template = ChatTemplate(args.tokenizer)
    encoder = VlmTaskEncoder(
        template, case["seq_length"], values["min_pixels"], values["max_pixels"], case["packed"], 1, 0
    )
    config = load_model_config(ROOT / "config/models" / f"{args.model}.yaml")
    hf_config = Llavaonevision1_5Config(**config.to_hf_config({
        "image_token_id": template.image_token_id, "video_token_id": template.image_token_id + 1,
        "vision_start_token_id": template.image_token_id - 3, "vision_end_token_id": template.image_token_id - 2,
    }))  # fmt: skip
    hf_config._attn_implementation = {"text_config": case["attention"], "vision_config": "sdpa"}
    mean, std = (torch.tensor(x).repeat_interleave(14 * 14) * 255 for x in (CLIP_MEAN, CLIP_STD))
    loader = iter(train_loader(args.webdatasets, encoder, Ranks(0, 1, 6), 1, 1000))
    items, flops, useful = [], [], []
    for _ in range(case["accumulate"] * (case["warm"] + case["steps"])):
        batch = next(loader)
        labels = torch.full((batch.input_ids.numel(),), -100)
        labels[batch.answer_index + 1] = batch.answer_labels
        items.append(
            {
                "input_ids": batch.input_ids,
                "labels": labels[None],
                "position_ids": torch.cat([torch.arange(n) for n in batch.segments or batch.lengths])[None],
                "pixel_values": ((batch.pixels.float() - mean) / std).bfloat16(),
                "image_grid_thw": torch.nn.functional.pad(batch.grids, (1, 0), value=1),
            }
        )
        grids = [tuple(grid) for grid in batch.grids.tolist()]
        flops.append(
            training_flops(config, values["trainable_modules"], batch.lengths, grids, len(batch.answer_labels))
        )
        useful.append(batch.num_tokens)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LLaVAOneVision1_5_ForConditionalGeneration(hf_config)
    torch.set_default_dtype(torch.float32)
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *given, **named):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    failed = []
    for recompute in case["recompute"]:
        ends.clear()
        model.gradient_checkpointing_disable()
        if recompute != "none":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if recompute == "vision":
            for layer in model.model.language_model.layers:
                layer.gradient_checkpointing = False
        torch.cuda.reset_peak_memory_stats()
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=1, max_steps=case["warm"] + case["steps"], bf16=True,
            gradient_accumulation_steps=case["accumulate"], optim="adamw_torch_fused", learning_rate=1e-5,
            save_strategy="no", logging_strategy="no", report_to="none", remove_unused_columns=False,
            dataloader_num_workers=0, disable_tqdm=True, use_cpu=not torch.cuda.is_available(), max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, data_collator=lambda samples: samples[0], train_dataset=items, callbacks=[Clock()]
        )
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(items)
        try:
            trainer.train()
            break
        except torch.OutOfMemoryError:
            failed.append(recompute)
            print(f"CASE {case['name']}: out of memory with recompute {recompute}", flush=True)
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    seconds = ends[-1] - ends[case["warm"] - 1]
    timed = slice(case["accumulate"] * case["warm"], None)
    result = case | {
        "recompute": recompute,
        "out_of_memory": failed,
        "mfu": sum(flops[timed]) / seconds / peak,
        "useful_tokens_per_s": sum(useful[timed]) / seconds,
        "step_ms": seconds / case["steps"] * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    print(f"CASE {case['name']}: {result}", flush=True)
    about = {"model": args.model, "gpu": torch.cuda.get_device_name(), "machine": machine()}
    args.result.write_text(json.dumps(about | {"peer": result}))
