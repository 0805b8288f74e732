"""A stored sample → token ids and uint8 patches, and several of them → a batch; in Megatron-Energon's forms.

Notable:
- samples are packed into sequences of `seq_length`, or padded behind the text to the longest of their batch;
- stock energon opens a data set of ours with the cookers below. The training reads it in an order of its own (stream.py):
  energon draws with repetition, and logs a sample that cannot be read.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from megatron import energon
from megatron.energon import Cooker, SkipSample, TaskEncoder, basic_sample_keys, edataclass, stateless
from megatron.energon.task_encoder import Batch

from llava_sft.data.images import decode_rgb, image_grid
from llava_sft.data.layouts import LAYOUTS, stored_sample
from llava_sft.data.packing import PACKED_IDS, cut_between
from llava_sft.data.records import Sample
from llava_sft.model.processing import PATCH_VALUES, image_tokens, to_patches
from llava_sft.model.template import ChatTemplate, UnusableSample


@edataclass
class Conversation(energon.Sample):
    """A `Sample[bytes]` as stock energon hands it on."""

    messages: list[dict]
    images: list[bytes]


@edataclass
class EncodedSample(energon.Sample):
    """One sequence: token ids and loss mask [tokens], uint8 patches of its images, their grids, and the lengths of the
    samples that it was packed from."""

    input_ids: np.ndarray
    answer_mask: np.ndarray
    patches: list[np.ndarray]
    grids: list[tuple[int, int]]
    segments: list[int]


@edataclass
class VlmBatch(Batch):
    """What a forward step takes: `input_ids` [batch, tokens], `pixels` [patches, 588] uint8, `grids` [images, 2],
    `lengths` of all samples without padding, and two indices into the flattened [tokens, batch]: `image_index` [image tokens], and
    `answer_index` [answer tokens], the places that predict a token of an answer, with `answer_labels`, those tokens.

    Packed sequences lie behind one another in a single row; `segments` are the lengths of their samples and of the
    padding at the end. Without packing `segments` is empty, and rows are padded behind the text."""

    input_ids: torch.Tensor
    answer_index: torch.Tensor
    answer_labels: torch.Tensor
    pixels: torch.Tensor
    grids: torch.Tensor
    image_index: torch.Tensor
    lengths: list[int]
    segments: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def chunks(self, size: int, pad_multiple: int = 1) -> list["VlmBatch"]:
        """A pack cut between its samples into packs of about `size` tokens each; a longer sample stays whole.

        No sample sees another, so the sums of their losses and gradients are those of the pack.
        """
        groups = cut_between(self.segments, size)
        if len(groups) == 1:
            return [self]
        ends = np.cumsum(self.segments)
        merge = len(self.pixels) // max(1, len(self.image_index))  # patches that make one image token
        image_ends = self.grids.prod(1).cumsum(0)
        chunks = []
        for group in groups:
            first, last = group[0], group[-1] + 1
            segments = self.segments[first:last]
            stop = int(ends[last - 1])
            span = torch.tensor((stop - sum(segments), stop))
            answers, images = (
                slice(*torch.searchsorted(places, span).tolist()) for places in (self.answer_index, self.image_index)
            )
            patches = slice(images.start * merge, images.stop * merge)
            pictures = torch.searchsorted(image_ends, torch.tensor((patches.start, patches.stop)), right=True)
            if padding := -sum(segments) % pad_multiple:
                segments = [*segments, padding]
            chunks.append(
                dataclasses.replace(
                    self,
                    input_ids=F.pad(self.input_ids[:, slice(*span.tolist())], (0, padding)),
                    answer_index=self.answer_index[answers] - span[0],
                    answer_labels=self.answer_labels[answers],
                    pixels=self.pixels[patches],
                    grids=self.grids[slice(*pictures.tolist())],
                    image_index=self.image_index[images] - span[0],
                    lengths=self.lengths[first:last],
                    segments=segments,
                )
            )
        return chunks


def make_cook(layout: str) -> Callable[[dict], Conversation]:
    """The cooker of a WebDataset layout (layouts.py)."""

    @stateless
    def cook(sample: dict) -> Conversation:
        members = {name: content for name, content in sample.items() if not name.startswith("__")}
        stored = stored_sample(layout, sample["__key__"], members)
        keys = basic_sample_keys(sample)
        if source := sample["__subflavors__"].get("source"):  # several may have tars of one name
            keys["__key__"] = f"{source}/{keys['__key__']}"
        return Conversation(**keys, messages=stored.messages, images=[sample[name] for name in stored.images])

    return cook


class VlmTaskEncoder(TaskEncoder[Conversation, EncodedSample, VlmBatch, VlmBatch]):
    """Renders the chat template, decodes images, packs samples into sequences, and makes batches of them.

    Args:
        seq_length: tokens of a sequence; a longer conversation is cut at the end of a turn.
        min_pixels, max_pixels: limits of height × width that images are resized to.
        packing: whether sequences are packed.
        pad_multiple: batches are padded to a multiple of this many tokens (matrix units want 16 in FP8).
        seed: of the order of the samples.
    """

    decoder = None  # raw bytes: images are decoded here, in the worker
    # A folder without a layout in its dataset.yaml is in our own.
    cookers = (
        *(Cooker(make_cook(name), has_subflavors={"layout": name}) for name in LAYOUTS),
        Cooker(make_cook("own")),
    )

    def __init__(
        self, template: ChatTemplate, seq_length: int, min_pixels: int, max_pixels: int,
        packing: bool = False, pad_multiple: int = 1, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.template, self.seq_length = template, seq_length
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.packing, self.pad_multiple, self.seed = packing, pad_multiple, seed

    @stateless
    def encode_sample(self, sample: Conversation) -> EncodedSample:
        encoded = self.encode(sample.__key__, Sample(None, sample.messages, sample.images, {}))
        encoded.__restore_key__ = sample.__restore_key__
        return encoded

    def encode(self, key: str, sample: Sample[bytes]) -> EncodedSample:
        """Token ids and patches of a sample. Raises SkipSample, and prints why, when it cannot be trained on."""
        # The size in an image's header tells how many tokens it takes: what is cut off need not be decoded.
        grids = [image_grid(data, self.min_pixels, self.max_pixels) for data in sample.images]
        try:
            encoded = self.template.encode(sample.messages, [image_tokens(grid) for grid in grids], self.seq_length)
        except UnusableSample as reason:
            print(f"sample {key} left out: {reason}", flush=True)
            raise SkipSample from reason
        grids, patches = grids[: encoded.num_images], []
        for number, (data, grid) in enumerate(zip(sample.images, grids, strict=False), 1):
            cut, decoded = to_patches(decode_rgb(data), self.min_pixels, self.max_pixels)
            if decoded != grid:
                raise ValueError(f"image {number}: its header says {grid} patches, it decodes to {decoded}")
            patches.append(cut)
        return EncodedSample(
            __key__=key,
            __restore_key__=(),
            input_ids=encoded.input_ids,
            answer_mask=encoded.answer_mask,
            patches=patches,
            grids=grids,
            segments=[len(encoded.input_ids)],
        )

    @stateless
    def pack_selected_samples(self, samples: list[EncodedSample]) -> EncodedSample:
        return EncodedSample.derive_from(
            samples[0],
            __key__=PACKED_IDS.join(sample.__key__ for sample in samples),
            input_ids=np.concatenate([sample.input_ids for sample in samples]),
            answer_mask=np.concatenate([sample.answer_mask for sample in samples]),
            patches=[patches for sample in samples for patches in sample.patches],
            grids=[grid for sample in samples for grid in sample.grids],
            segments=[length for sample in samples for length in sample.segments],
        )

    @stateless
    def batch(self, samples: list[EncodedSample]) -> VlmBatch:
        rows = [self.pack_selected_samples(samples)] if self.packing else samples
        width = max(len(row.input_ids) for row in rows)
        segments = rows[0].segments if self.packing else []
        if padding := -width % self.pad_multiple:
            width += padding
            segments = [*segments, padding] if self.packing else []
        shape = (len(rows), width)
        input_ids = np.full(shape, self.template.pad_token_id, dtype=np.int64)
        answers = np.zeros(shape, dtype=bool)
        for number, row in enumerate(rows):
            input_ids[number, : len(row.input_ids)] = row.input_ids
            answers[number, : len(row.input_ids)] = row.answer_mask
        # No segment begins with an answer, so the place before an answer token lies in the same segment.
        answer_row, answer_token = np.nonzero(answers)
        # Row by row, as the images come; the places are counted in the model's [tokens, batch] layout.
        batch_index, token_index = np.nonzero(input_ids == self.template.image_token_id)
        patches = [patch for row in rows for patch in row.patches]
        return VlmBatch.from_samples(
            samples,
            input_ids=torch.from_numpy(input_ids),
            answer_index=torch.from_numpy((answer_token - 1) * len(rows) + answer_row),
            answer_labels=torch.from_numpy(input_ids[answer_row, answer_token]),
            pixels=torch.from_numpy(
                np.concatenate(patches) if patches else np.empty((0, PATCH_VALUES), dtype=np.uint8)
            ),
            grids=torch.tensor([grid for row in rows for grid in row.grids], dtype=torch.int64).view(-1, 2),
            image_index=torch.from_numpy(token_index * len(rows) + batch_index),
            lengths=[length for row in rows for length in row.segments],
            segments=segments,
        )
