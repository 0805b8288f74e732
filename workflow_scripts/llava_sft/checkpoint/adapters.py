"""LoRA's pairs in PEFT's form: written from a checkpoint, gone on from beside their base, merged into it.

Notable: A is shared by q, k and v (gate and up) here and is not in PEFT. On the way out each gets the same A; on the way in
different ones lie one below the other, each B beside zeros, which is the same product.
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_sft.checkpoint.base import base_of, lora_of, note_base
from llava_sft.checkpoint.hf_folder import ADAPTER, ADAPTER_WEIGHTS
from llava_sft.checkpoint.peft import PREFIX, Adapter, pair_of
from llava_sft.checkpoint.pickles import check_pickles
from llava_sft.checkpoint.safetensors_io import SafetensorsReader, check_finite, write_safetensors
from llava_sft.checkpoint.start import Checkpoint, split_id
from llava_sft.checkpoint.torch_dist import TorchDistReader, write_torch_dist
from llava_sft.checkpoint.verify import require_whole
from llava_sft.errors import CheckpointError, many
from llava_sft.files import atomic_dir, write_json, write_text
from llava_sft.model.config import ModelConfig
from llava_sft.model.lora import pair
from llava_sft.model.tensors import Row, Shape
from llava_sft.run.layout import PAIRS

CARD = """---
{base_model}library_name: peft
pipeline_tag: image-text-to-text
tags: [lora, llava-onevision-1.5]
---

LoRA's pairs of rank {lora.rank}, alpha {lora.alpha:g}, in {parts} of {base}.

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained({base!r}, {revision}trust_remote_code=True)
model = PeftModel.from_pretrained(model, {folder!r})
```
"""


def write_peft(source: Path, target: Path, model: ModelConfig, base: str = "") -> str:
    """The pairs of a checkpoint folder as `peft` loads them onto the base; returns what is written of the base.

    Args:
        base: written as the base's folder or hub id; as it was loaded where it is empty.

    Raises CheckpointError for a checkpoint of another kind, or with weights that an adapter does not hold.
    """
    found = lora_of(source)
    if found is None:
        raise CheckpointError(f"{source}: not a LoRA checkpoint", "export the whole model with mcore2hf")
    check_pickles(source)
    require_whole(source, full=True)
    lora, reader = found[0], TorchDistReader(source)
    whole = [key for key in reader.tensors() if not key.startswith("optimizer") and "lora_" not in key]
    if whole:
        raise CheckpointError(
            f"{source}: {many(len(whole), 'tensor', 'were')} trained whole, the first is {whole[0]}: an adapter does not hold them",
            "export it merged, with mcore2hf",
        )
    tensors: dict[str, Tensor] = {}
    for row in lora.rows(model):
        a, b = (reader.read(name) for name in pair(row.mcore))
        for name, piece in zip(row.hf, row.split(b), strict=True):
            tensors |= dict(zip((PREFIX + each for each in pair_of(name)), (a, piece.contiguous()), strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtype = next(iter(tensors.values())).dtype
    modules = {name.removesuffix(".weight") for row in lora.rows(model) for name in row.hf}
    if lora.parts == ("language_model",):  # elsewhere the last words are those of other modules too
        modules = {name.rsplit(".", 1)[1] for name in modules}
    noted = base_of(source)
    name, revision = split_id(base or str(noted["load"]))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
    }
    on_hub = Checkpoint.of(name).kind == "hub"
    card = CARD.format(
        base_model=f"base_model: {name}\n" if on_hub else "", lora=lora, parts=" and ".join(lora.parts), base=name,
        revision=f"revision={revision!r}, " if revision else "", folder=target.name,
    )  # fmt: skip
    with atomic_dir(target) as folder:
        write_json(folder / ADAPTER, config)
        # Of a converted base: what its conversion of the same weights will find again.
        about = {"base": noted["fingerprint"]} if Path(noted["folder"]).name == "release" else {}
        write_safetensors(folder, shapes, dtype, iter(tensors.items()), about)
        (folder / "model.safetensors").rename(folder / ADAPTER_WEIGHTS)
        write_text(folder / "README.md", card)
    return name + (f" at {revision}" if revision else "")


class Pairs:
    """The pairs of a PEFT folder, in float32. Raises CheckpointError for a value that is NaN or infinite."""

    def __init__(self, adapter: Adapter):
        self.adapter, self.reader = adapter, SafetensorsReader.of_pairs(adapter)

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] beside the weight `name`."""
        a, b = ((each, self.reader.read(each).float()) for each in pair_of(name))
        for each, tensor in (a, b):
            check_finite(tensor, f"{self.adapter.folder}: {each}")
        return a[1], b[1]

    def joined(self, row: Row, rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] beside a fused weight [out, in]. What `rank` is more than PEFT's pairs fill begins as pairs begin: A random, B zero."""
        a, b = map(list, zip(*map(self.read, row.hf), strict=True))
        if not self.adapter.shares(row):
            before = [self.adapter.rank * place for place in range(len(b))]
            b = [F.pad(each, (at, before[-1] - at)) for each, at in zip(b, before, strict=True)]
            a = [torch.cat(a)]
        left = rank - len(a[0])
        generator = torch.Generator().manual_seed(zlib.crc32(row.mcore.encode()))
        random = (torch.rand(left, row.shape[1], generator=generator) * 2 - 1) / row.shape[1] ** 0.5
        return torch.cat([a[0], random]), F.pad(row.join(b), (0, left))


def write_pairs(folder: Path, adapter: Adapter, model: ModelConfig, base: dict[str, str]) -> dict[str, list]:
    """The pairs as a checkpoint of LoRA in `folder`/pairs; `base`: what they are noted to stand beside, see `note_base`.

    Returns size and checksum of each file, by its name below `folder`. Raises CheckpointError.
    """
    if adapter.noted not in ("", base["fingerprint"]):
        raise CheckpointError(
            f"{adapter.folder}: its pairs were trained on other weights than {adapter.base} holds now",
            f"restore the base, or name it (base_model_name_or_path in {ADAPTER})",
        )
    lora, pairs = adapter.lora(model), Pairs(adapter)
    made: dict[str, Tensor] = {}
    rows = {name: row for row in lora.rows(model) for name in pair(row.mcore)}

    def produce(key: str) -> Tensor:
        row = rows[key]
        if key not in made:
            made.clear()
            made.update(zip(pair(row.mcore), pairs.joined(row, lora.rank), strict=True))
        return made[key].contiguous()

    shapes: dict[str, Shape] = {name: shape for row in lora.rows(model) for name, shape in lora.shapes(row).items()}
    files = write_torch_dist(folder / PAIRS, shapes, dict.fromkeys(shapes, torch.float32), produce)
    note_base(folder / PAIRS, lora, base)
    return {f"{PAIRS}/{name}": entry for name, entry in files.items()}


def merged(
    source: SafetensorsReader, names: Sequence[str], adapters: Sequence[tuple[Adapter, float]]
) -> Iterator[Tensor]:
    """The weights `names` with each adapter's product, times its own number: added up in float32, rounded once.

    Raises CheckpointError for a value that is NaN or infinite, before or after.
    """
    pairs = [(Pairs(adapter), number * adapter.alpha / adapter.rank) for adapter, number in adapters]
    for name in names:
        weight = source.read(name)
        products = [
            (b @ a) * scale
            for each, scale in pairs
            if pair_of(name)[0] in each.adapter.pairs
            for a, b in [each.read(name)]
        ]
        weight = reduce(torch.add, products, weight.float()).to(weight.dtype) if products else weight
        check_finite(weight, f"{name}, merged" if products else name)
        yield weight
