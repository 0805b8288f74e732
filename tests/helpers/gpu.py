"""Settings and samples of the trainings on a GPU."""

from helpers.webdatasets import picture
from llava_sft.data.loader import Conversation
from llava_sft.settings.resolve import ResolvedSettings

VALUES = ResolvedSettings(
    experiment="x", seq_length=2048, micro_batch_size=1, global_batch_size=2, packing_buffer_size=64, min_pixels=3136, max_pixels=50_000,
    train_iters=4, save_interval=10_000, eval_interval=10_000, log_interval=1, log_samples=False, log_answers=0, max_bad_steps=1000,
    lr=1e-3, min_lr=1e-4, lr_vision=1e-3, lr_adapter=1e-3, lr_decay_style="constant", lr_decay_iters=1000, lr_warmup_fraction=0.01,
    adam_eps=1e-8, nproc_per_node=1, async_save=True,
)  # fmt: skip


def samples(scale: int = 1):
    """Conversations of several lengths, with none, one or two pictures of several sizes, `scale` times as wide and high."""
    for number, sizes in enumerate([[(200, 130)], [], [(56, 56), (300, 84)], [(120, 400)], [(90, 90)]]):
        content = "".join("<image>" for _ in sizes) + f"What is shown in number {number}? " * (number + 1)
        answer = {"role": "assistant", "content": f"It is a grey slope, darker on one side. {number} " * (number + 2)}
        yield Conversation(
            __key__=str(number), __restore_key__=(), __subflavors__={}, messages=[{"role": "user", "content": content}, answer],
            images=[picture(size=(scale * width, scale * height)) for width, height in sizes],
        )  # fmt: skip
