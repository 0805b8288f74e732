"""Settings and samples of the trainings on a GPU."""

from helpers.webdatasets import picture
from llava_sft.data.loader import Conversation

VALUES = {
    "seq_length": 2048, "micro_batch_size": 1, "global_batch_size": 2, "train_iters": 4, "save_interval": 10_000,
    "log_interval": 1, "lr": 1e-3, "min_lr": 1e-4, "lr_vision": 1e-3, "lr_adapter": 1e-3, "lr_decay_style": "constant",
    "lr_warmup_fraction": 0.01, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_eps": 1e-8,
    "clip_grad": 1.0, "seed": 42, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "bf16": False,
    "gpus_per_node": 0, "nproc_per_node": 1, "nodes": 1, "min_pixels": 3136, "max_pixels": 50_000, "lr_decay_iters": 1000, "eval_iters": 0,
    "eval_interval": 10_000, "trainable_modules": ["language_model", "adapter", "vision_model"], "fp8": "none",
    "optimizer_precision": "bf16", "deterministic": False, "pack_chunk_tokens": 8192, "recompute_language": "none",
    "recompute_vision": "none", "packing": True, "packing_buffer_size": 64, "num_workers": 1, "keep_last": None,
    "keep_every": None, "async_save": True, "log_samples": False, "max_damaged_samples": 0, "log_answers": 0, "max_bad_steps": 1000, "max_minutes": None,
}  # fmt: skip


def samples():
    """Conversations of several lengths, with none, one or two pictures of several sizes."""
    for number, sizes in enumerate([[(200, 130)], [], [(56, 56), (300, 84)], [(120, 400)], [(90, 90)]]):
        content = "".join("<image>" for _ in sizes) + f"What is shown in number {number}? " * (number + 1)
        answer = {"role": "assistant", "content": f"It is a grey slope, darker on one side. {number} " * (number + 2)}
        yield Conversation(
            __key__=str(number), __restore_key__=(), __subflavors__={}, messages=[{"role": "user", "content": content}, answer],
            images=[picture(size=size) for size in sizes],
        )  # fmt: skip
