"""WebDataset → batches of token ids and uint8 patches, through Megatron-Energon.

Notable:
- a sample that can not be read or encoded stops the run: energon alone would log it and go on, a hundred times;
- batches are padded behind the text to their own longest sample, never to `seq_length`;
- the loader's state is saved with every Megatron checkpoint and restored with it: a resumed run reads the very next
  sample.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from megatron.energon import (
    Cooker,
    Sample,
    SavableDataLoader,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    reraise_exception,
    stateless,
)
from megatron.energon.task_encoder import Batch

from llava_sft.data.images import decode_rgb, image_tokens, to_patches
from llava_sft.data.layouts import LAYOUTS
from llava_sft.data.template import ChatTemplate, UnusableSample


@edataclass
class Conversation(Sample):
    """A sample as it stands in the WebDataset: messages, and the encoded bytes of each image in order."""

    messages: list[dict]
    images: list[bytes]


@edataclass
class EncodedSample(Sample):
    """Token ids and loss mask [tokens], patches [patches, 588] uint8 of all images, their grids."""

    input_ids: np.ndarray
    answer_mask: np.ndarray
    patches: list[np.ndarray]
    grids: list[tuple[int, int]]


@edataclass
class VlmBatch(Batch):
    """What a forward step takes: `input_ids`, `labels`, `loss_mask` [batch, tokens], `pixels` [patches, 588] uint8,
    `grids` [images, 2], `image_index` [image tokens] into the flattened [tokens, batch], `num_tokens` without padding."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    pixels: torch.Tensor
    grids: torch.Tensor
    image_index: torch.Tensor
    num_tokens: int


def make_cook(layout: str) -> Callable[[dict], Conversation]:
    """The cooker of a WebDataset layout (layouts.py)."""

    @stateless
    def cook(sample: dict) -> Conversation:
        members = {name for name in sample if not name.startswith("__")}
        stored = LAYOUTS[layout](sample["__key__"], orjson.loads(sample["json"]), members)
        return Conversation(
            **basic_sample_keys(sample), messages=stored.messages, images=[sample[name] for name in stored.images]
        )

    return cook


class VlmTaskEncoder(TaskEncoder[Conversation, EncodedSample, VlmBatch, VlmBatch]):
    """Decodes images, renders the chat template and pads batches."""

    decoder = None  # raw bytes: images are decoded here, in the worker
    # A folder without a layout in its dataset.yaml is in our own.
    cookers = (
        *(Cooker(make_cook(name), has_subflavors={"layout": name}) for name in LAYOUTS),
        Cooker(make_cook("own")),
    )

    def __init__(self, template: ChatTemplate, seq_length: int, min_pixels: int, max_pixels: int):
        super().__init__()
        self.template, self.seq_length = template, seq_length
        self.min_pixels, self.max_pixels = min_pixels, max_pixels

    @stateless
    def encode_sample(self, sample: Conversation) -> EncodedSample:
        pairs = [to_patches(decode_rgb(data), self.min_pixels, self.max_pixels) for data in sample.images]
        try:
            encoded = self.template.encode(sample.messages, [image_tokens(grid) for _, grid in pairs], self.seq_length)
        except UnusableSample as reason:
            print(f"sample {sample.__key__} left out: {reason}", flush=True)
            raise SkipSample from reason
        pairs = pairs[: encoded.num_images]
        return EncodedSample.derive_from(
            sample,
            input_ids=encoded.input_ids,
            answer_mask=encoded.answer_mask,
            patches=[patches for patches, _ in pairs],
            grids=[grid for _, grid in pairs],
        )

    @stateless
    def batch(self, samples: list[EncodedSample]) -> VlmBatch:
        longest = max(len(sample.input_ids) for sample in samples)
        shape = (len(samples), longest)
        input_ids = np.full(shape, self.template.pad_token_id, dtype=np.int64)
        labels = np.full(shape, self.template.pad_token_id, dtype=np.int64)
        loss_mask = np.zeros(shape, dtype=np.float32)
        for row, sample in enumerate(samples):
            length = len(sample.input_ids)
            input_ids[row, :length] = sample.input_ids
            labels[row, : length - 1] = sample.input_ids[1:]
            loss_mask[row, : length - 1] = sample.answer_mask[1:]
        # Row by row, as the images come; the places are counted in the model's [tokens, batch] layout.
        rows, columns = np.nonzero(input_ids == self.template.image_token_id)
        patches = [patch for sample in samples for patch in sample.patches]
        grids = [grid for sample in samples for grid in sample.grids]
        return VlmBatch.from_samples(
            samples,
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            loss_mask=torch.from_numpy(loss_mask),
            pixels=torch.from_numpy(np.concatenate(patches) if patches else np.empty((0, 588), dtype=np.uint8)),
            grids=torch.tensor(grids, dtype=torch.int64).view(-1, 2),
            image_index=torch.from_numpy(columns * len(samples) + rows),
            num_tokens=sum(len(sample.input_ids) for sample in samples),
        )


def worker_config(rank: int, world_size: int, num_workers: int, seed: int, group: Any = None) -> WorkerConfig:
    """Energon's view of this data-parallel rank; the first sample that can not be used ends the run."""
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        data_parallel_group=group,
        seed_offset=seed,
        global_error_handler=reraise_exception,
    )


def train_loader(
    path: Path | str, encoder: VlmTaskEncoder, config: WorkerConfig, micro_batch_size: int
) -> SavableDataLoader:
    """Endless, shuffled micro-batches of the training split."""
    dataset = get_train_dataset(
        path,
        worker_config=config,
        batch_size=micro_batch_size,
        batch_drop_last=True,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        task_encoder=encoder,
    )
    return get_savable_loader(dataset, checkpoint_every_sec=20, watchdog_timeout_seconds=600)
