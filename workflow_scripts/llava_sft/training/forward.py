"""The model of a training, and its forward pass on a micro-batch of the loader."""

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from llava_sft.data.loader import VlmBatch
from llava_sft.megatron.config import transformer_config
from llava_sft.megatron.distributed import reduce_gradients, report_complete, unwrapped
from llava_sft.model import flash4, lora_layers
from llava_sft.model.attention import packed_seq_params
from llava_sft.model.config import ModelConfig
from llava_sft.model.llava import LlavaOneVision
from llava_sft.model.lora_dropout import begin_pass
from llava_sft.settings.resolve import ResolvedSettings


def build_model(model: ModelConfig, values: ResolvedSettings, random_weights: bool = True) -> LlavaOneVision:
    """This rank's share of the model, what is not trained frozen; not `random_weights`: without any yet."""
    config = transformer_config(model, values)
    flash4.choose(values.attention if values.on_gpu else "cudnn")
    config.perform_initialization = random_weights
    last = parallel_state.is_pipeline_last_stage()
    built = LlavaOneVision(
        config,
        model,
        max_sequence_length=values.seq_length,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=last,
        recompute_vision=values.recompute_vision == "full",
    )
    if config.gradient_accumulation_fusion and last:
        # Transformer Engine's layers add weight gradients in place; Megatron's output layer (TP > 1) would need Apex.
        built.language_model.output_layer.gradient_accumulation_fusion = False
    for name, part in built.named_children():
        if name not in values.trained.whole:
            part.requires_grad_(False)
    if values.trained.lora:
        lora_layers.attach(built, values.trained.lora, values.seed)
    return built


class Forward:
    """Losses of micro-batches. Notes the shape of the largest tensors, for the message when memory runs out."""

    NOTHING: ClassVar = {"rows": 0, "tokens": 0, "patches": 0, "image": 0}

    def __init__(self, model: DistributedDataParallel, device: torch.device):
        self.model, self.device, self.largest = model, device, self.NOTHING
        self.text_only = False  # this rank's share of the model sees no image just now
        self.image_parameters: list[torch.nn.Parameter] = []  # that are trained, where reduction overlaps
        module = unwrapped(model)
        self.dropout_seed, self.step, self.passes = module.dropout_seed, 0, 0
        if module.pre_process and model.ddp_config.overlap_grad_reduce:
            parts = (module.vision_model, module.adapter)
            self.image_parameters = [p for part in parts for p in part.parameters() if p.requires_grad]
            module.language_model.register_forward_pre_hook(self._before_language_model, with_kwargs=True)

    def __call__(self, batch: VlmBatch) -> Tensor:
        """Loss of each answer token [answer tokens] of a batch, or what the next pipeline stage takes."""
        grids = [tuple(grid) for grid in batch.grids.tolist()]
        rows, tokens = batch.input_ids.shape
        image = max((height * width for height, width in grids), default=0)
        self.text_only = self.model.training and not grids[unwrapped(self.model).own_images(grids)]
        if self.dropout_seed is not None and self.model.training:
            begin_pass(self.dropout_seed, self.step, parallel_state.get_data_parallel_rank(), self.passes)
            self.passes += 1
        self.largest = {"rows": rows, "tokens": tokens, "patches": len(batch.pixels), "image": image}
        output = self.model(
            self._on_device(batch.input_ids),
            self._on_device(batch.pixels),
            grids,
            self._on_device(batch.image_index),
            answer_index=self._on_device(batch.answer_index),
            answer_labels=self._on_device(batch.answer_labels),
            packed_seq_params=packed_seq_params(batch.segments, self.device) if batch.segments else None,
        )
        if self.model.training and not output.requires_grad:  # text alone, and only parts that see images are trained
            output = output + torch.zeros((), device=output.device, requires_grad=True)
            output.register_hook(self._no_image_gradients)
        return output

    def begin(self, step: int) -> None:
        """The micro-batches that follow are those of a training step."""
        self.step, self.passes = step, 0
        lora_layers.settle(unwrapped(self.model))

    def evaluate(self, batches: Iterable[VlmBatch]) -> Tensor:
        """[2]: sum of losses, answer tokens."""
        return torch.vstack([torch.stack((self(batch).sum(), self.count(batch).float())) for batch in batches]).sum(
            dim=0
        )

    def count(self, batch: VlmBatch) -> Tensor:
        """The answer tokens of a batch, [] int. Filled on the device: a copy from the host would wait for the whole forward
        pass."""
        return torch.full((), len(batch.answer_labels), dtype=torch.int, device=self.device)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _before_language_model(self, language_model, inputs, named: dict) -> None:
        if self.text_only and named["decoder_input"].requires_grad:
            named["decoder_input"].register_hook(self._no_image_gradients)

    def _no_image_gradients(self, gradient: Tensor) -> None:
        report_complete(self.model, self.image_parameters)


def through_stages(
    model: DistributedDataParallel, forward: Forward, next_batch: Callable[[], VlmBatch], micro_batches: int,
    values: ResolvedSettings,
) -> Tensor | None:  # fmt: skip
    """Forward, and backward where the model is trained, by Megatron's schedule for a model cut into pipeline stages.

    Returns [2]: this rank's sum of losses and answer tokens, on the last stage; None on the others.
    """

    def one(data_iterator: None, stage: DistributedDataParallel) -> tuple[Tensor, Callable[[Tensor], tuple]]:
        batch = next_batch()

        def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, answers = losses.sum(), forward.count(batch)
            return total, answers, torch.stack((total.detach(), answers.float()))

        return forward(batch), loss

    model.config.finalize_model_grads_func = reduce_gradients
    if model.ddp_config.overlap_grad_reduce:
        model.config.no_sync_func = model.no_sync
    reports = get_forward_backward_func()(
        forward_step_func=one,
        data_iterator=None,
        model=[model],
        num_microbatches=micro_batches,
        seq_length=values.seq_length,
        micro_batch_size=values.micro_batch_size,
        forward_only=not model.training,
    )
    return torch.vstack(reports).sum(dim=0) if reports else None
