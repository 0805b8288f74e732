"""Hugging Face ↔ Megatron-Core, both ways through the table in model/tensors.py, one tensor in memory at a time.

The way in also takes the original project's Megatron folders, and parts of the model from different folders.

A converted folder looks like one that Megatron wrote: `latest_checkpointed_iteration.txt`, `release/…`; beside them
`huggingface/` keeps all that is not a weight (config, tokenizer, preprocessor, chat template), and `converted.json`
is the marker that stands only when all is there.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import xxhash

from llava_sft.checkpoint.adapters import open_weights
from llava_sft.checkpoint.legacy import LegacySource
from llava_sft.checkpoint.pickles import check_pickles
from llava_sft.checkpoint.safetensors_io import SafetensorsReader, old_name, tensor_bytes, write_safetensors
from llava_sft.checkpoint.start import (
    RANDOM,
    copy_sidecars,
    is_legacy,
    newest_checkpoint,
    old_names,
    read_hf_config,
)
from llava_sft.checkpoint.torch_dist import write_torch_dist
from llava_sft.checkpoint.verify import MARKER, require_whole, sidecars_damage
from llava_sft.checksums import note
from llava_sft.errors import CheckpointError, shown
from llava_sft.files import atomic_dir, read_object, write_json
from llava_sft.model.config import MODEL_TYPE, ModelConfig
from llava_sft.model.export_files import tokenizer_added_tokens, tokenizer_token_ids, write_hf_sidecars
from llava_sft.model.tensors import (
    HF_EMBEDDINGS,
    HF_OUTPUT_LAYER,
    PARTS,
    Row,
    check_tensors,
    hf_shapes,
    parameter_count,
    tensor_rows,
)
from llava_sft.model.tokens import TOKEN_ID_KEYS
from llava_sft.run.layout import SIDECARS, TRACKER


class HfSource:
    """A Hugging Face folder as a source of Megatron tensors."""

    def __init__(self, folder: Path, model: ModelConfig):
        self.folder, self.model = folder, model
        self.reader = SafetensorsReader(folder)
        self.config = read_object(folder / "config.json", {})
        self.old_names = self.reader.old_names
        names, head = self.reader.names(), HF_OUTPUT_LAYER
        # A tied language model (Qwen3-4B) does not store its output layer: here it becomes a tensor of its own.
        self.tied = self.config.get("model_type") == "qwen3" and bool(self.config.get("tie_word_embeddings"))
        self.stand_ins = {head: HF_EMBEDDINGS} if self.tied and head not in names else {}

    def check(self, parts: list[str], rows: list[Row], alone: bool) -> None:
        """Raise CheckpointError unless the folder holds exactly the tensors of `rows`; if not `alone`, at least those."""
        if alone or self.config.get("model_type") in (MODEL_TYPE, "qwen3"):
            try:
                config = ModelConfig.from_hf_config(read_hf_config(self.folder))
            except CheckpointError as error:
                raise CheckpointError(f"{self.folder}: {error.problem}", error.fix) from None
            check_same_architecture(self.model, config, self.folder, parts)
        wanted = {name: shape for row in rows for name, shape in row.hf.items()}
        found = {name: self.reader.shape(name) for name in self.reader.names()}
        found |= {name: found[other] for name, other in self.stand_ins.items()}
        unwanted = set() if alone else hf_shapes(self.model).keys() - wanted.keys()
        check_tensors({name: shape for name, shape in found.items() if name not in unwanted}, wanted, self.folder)
        self._tell(wanted)

    def _tell(self, wanted: Iterable[str]) -> None:
        """Say what a user may not expect of this folder."""
        if (self.folder / "adapter_config.json").is_file():
            print(f"{self.folder}: adapter_config.json: a LoRA adapter lies here; merge it first if it is to count")
        head = HF_OUTPUT_LAYER
        both = self.tied and {head, HF_EMBEDDINGS} <= self.reader.names() and head in wanted
        if both and not torch.equal(self.reader.read(head), self.reader.read(HF_EMBEDDINGS)):
            print(f"{self.folder}: config.json ties lm_head to the embeddings, another {head} is stored: it is taken")
        if (self.folder / "tokenizer.json").is_file():
            added = tokenizer_added_tokens(self.folder)
            for key, token in TOKEN_ID_KEYS.items():
                said, actual = self.config.get(key), added.get(token)
                if said is not None and actual is not None and said != actual:
                    print(
                        f"{self.folder}: config.json says {key} {shown(said)}, the tokenizer {actual}: the tokenizer's is used"
                    )
        dtypes = Counter(str(self.reader.dtype(self.stand_ins.get(name, name)))[len("torch.") :] for name in wanted)
        if len(dtypes) > 1:
            counts = ", ".join(f"{count} tensors in {dtype}" for dtype, count in dtypes.most_common())
            print(f"{self.folder}: {counts}: all become the type that holds every value exactly")

    def dtype(self, rows: list[Row]) -> torch.dtype:
        """One for all, and where a folder mixes them the one that holds every value exactly."""
        names = (self.stand_ins.get(name, name) for row in rows for name in row.hf)
        return reduce(torch.promote_types, map(self.reader.dtype, names))

    def read(self, row: Row) -> torch.Tensor:
        return row.join([self.reader.read(self.stand_ins.get(name, name)) for name in row.hf])


class RandomAdapter:
    """`load_parts: {adapter: random}`, for stage 1: norms one, biases zero, the rest as Megatron starts a linear layer."""

    folder = RANDOM
    config: dict[str, Any] = {}
    old_names = False

    def __init__(self):
        self.generator = torch.Generator().manual_seed(42)

    def check(self, parts: list[str], rows: list[Row], alone: bool) -> None:
        pass

    def dtype(self, rows: list[Row]) -> torch.dtype:
        return torch.bfloat16  # gives way to that of any other part

    def read(self, row: Row) -> torch.Tensor:
        if row.mcore.endswith("bias"):
            return torch.zeros(row.shape)
        return torch.ones(row.shape) if "norm" in row.mcore else 0.02 * torch.randn(row.shape, generator=self.generator)


def open_source(folder: Path | str, model: ModelConfig) -> HfSource | LegacySource | RandomAdapter:
    if folder == RANDOM:
        return RandomAdapter()
    folder = Path(folder)
    return LegacySource(newest_checkpoint(folder)) if is_legacy(folder) else HfSource(folder, model)


def hf2mcore(
    source: Path, target: Path, model: ModelConfig, sidecars: Path | None = None,
    parts: dict[str, Path | str] | None = None,
) -> dict:  # fmt: skip
    """Convert a Hugging Face folder, or one of the original project, into a Megatron folder; returns its marker.

    Args:
        sidecars: folder with config and tokenizer; by default the source itself.
        parts: part of the model → the folder that it comes from instead; "adapter" may be "random".

    Raises CheckpointError when a tensor is missing, left over, or of another shape than `model` has.
    """
    if sidecars is not None:
        tokenizer_token_ids(sidecars)  # before weights are read, not when all is trained
    parts = parts or {}
    sources = {folder: open_source(folder, model) for folder in dict.fromkeys((source, *parts.values()))}
    source_of = {part: sources[parts.get(part, source)] for part in PARTS}
    rows = {row.mcore: row for row in tensor_rows(model)}
    dtypes, origin = [], []
    for each in sources.values():
        taken = [part for part in PARTS if source_of[part] is each]
        if not taken:
            raise CheckpointError(f"{source}: every part comes from another folder", "leave a part of load_parts out")
        its_rows = [row for row in rows.values() if row.part in taken]
        # Of several folders each may be a whole checkpoint of which only a part is taken.
        each.check(taken, its_rows, alone=len(sources) == 1)
        dtypes.append(each.dtype(its_rows))
        origin.append(f"{' and '.join(taken)} ({len(its_rows)} Megatron tensors) from {each.folder}")
    print("\n".join(origin), flush=True)
    dtype = reduce(torch.promote_types, dtypes)
    digest = xxhash.xxh3_128()

    def produce(key: str) -> torch.Tensor:
        row = rows[key]
        tensor = source_of[row.part].read(row).to(dtype).contiguous()
        check_finite(tensor, f"{source_of[row.part].folder}: {' and '.join(row.hf)}")
        digest.update(key.encode())
        digest.update(tensor_bytes(tensor))
        return tensor

    with atomic_dir(target) as folder:
        shapes = {key: row.shape for key, row in rows.items()}
        weights = write_torch_dist(folder / "release", shapes, dict.fromkeys(shapes, dtype), produce)
        (folder / TRACKER).write_text("release\n")
        copy_sidecars(sidecars or source, folder / SIDECARS)
        files = {f"release/{name}": entry for name, entry in weights.items()}
        files |= note(folder, [folder / TRACKER, *(folder / SIDECARS).iterdir()])
        marker = _marker(source, model, dtype) | {
            "fingerprint": digest.hexdigest(),
            "untrained": bool(sources[source].config.get("untrained")),
            "old_names": sources[source].old_names,
            "origin": origin,
            "files": files,
        }
        write_json(folder / MARKER, marker, sealed=True)
    return marker


def mcore2hf(
    source: Path, target: Path, sidecars: Path, model: ModelConfig, min_pixels: int, max_pixels: int,
    gate: Callable[[Path], None] | None = None,
) -> dict:  # fmt: skip
    """Write the weights of one checkpoint folder (`iter_0000400/`, `release/`) as a Hugging Face folder.

    Args:
        sidecars: folder with config, tokenizer and the like that training started from.
        min_pixels, max_pixels: image limits of the training, written where inference will read them.
        gate: looks at the finished folder before it gets its name, and raises to keep it from getting one.

    Raises CheckpointError when the checkpoint is damaged, or would run code, or lacks a tensor.
    """
    check_pickles(source)
    require_whole(source, full=True)
    if damage := sidecars_damage(sidecars):
        raise CheckpointError(
            f"{sidecars}: {damage}: damaged since the training began", "copy the file from the start checkpoint again"
        )
    tokenizer_token_ids(sidecars)
    model = with_source_positions(model, sidecars)
    reader = open_weights(source)
    rows = tensor_rows(model)
    stored = reader.tensors()
    found = {row.mcore: tuple(stored[row.mcore].size) for row in rows if row.mcore in stored}
    check_tensors(found, {row.mcore: row.shape for row in rows}, source)
    spell = old_name if old_names(source.parent) else str
    order = {spell(name): shape for name, shape in hf_shapes(model).items()}

    def tensors():
        for row in rows:
            tensor = reader.read(row.mcore)[: row.shape[0]]  # vocabulary padding is cut off
            check_finite(tensor, f"{source}: {row.mcore}")
            yield from zip(map(spell, row.hf), row.split(tensor), strict=True)

    dtype = stored[rows[0].mcore].properties.dtype
    marker = _marker(source, model, dtype)
    with atomic_dir(target) as folder:
        write_hf_sidecars(folder, sidecars, model, min_pixels, max_pixels, marker["dtype"])
        weights = write_safetensors(folder, order, dtype, tensors())
        if gate:
            gate(folder)
        small = [path for path in folder.iterdir() if path.name not in weights]
        marker["files"] = weights | note(folder, small)
        write_json(folder / MARKER, marker, sealed=True)
    return marker


def _marker(source: Path, model: ModelConfig, dtype: torch.dtype) -> dict:
    tensors, parameters = len(hf_shapes(model)), parameter_count(model)
    return {"source": str(source), "tensors": tensors, "parameters": parameters, "dtype": str(dtype)[len("torch.") :]}


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise CheckpointError for a tensor with a value that is NaN or infinite: least and greatest are, if one is."""
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise CheckpointError(
            f"{name}: {count:,} of {tensor.numel():,} values are NaN or infinite",
            "use a checkpoint from before that happened",
        )


def with_source_positions(model: ModelConfig, sidecars: Path) -> ModelConfig:
    """The model with the number of positions that the start checkpoint's config.json gives: no weight depends on it."""
    config = read_object(sidecars / "config.json", {})
    if config.get("model_type") not in (MODEL_TYPE, "qwen3"):
        return model
    try:
        positions = ModelConfig.from_hf_config(config).language.max_position_embeddings
    except CheckpointError as error:  # the weights say what model it is
        print(f"{sidecars}: not used: {error.problem}")
        return model
    if positions == model.language.max_position_embeddings:
        return model
    print(f"{sidecars}: max_position_embeddings {positions:,}, as the start checkpoint has it")
    language = model.language.model_copy(update={"max_position_embeddings": positions})
    return model.model_copy(update={"language": language})


def check_same_architecture(wanted: ModelConfig, found: ModelConfig, source: Path, parts: list[str]) -> None:
    """Raise CheckpointError, naming the first difference, unless both describe the same sizes of these parts."""
    for part in [part for part in ("language", "vision") if f"{part}_model" in parts]:
        ours, theirs = getattr(wanted, part).model_dump(), getattr(found, part).model_dump()
        for key, value in ours.items():
            if theirs[key] != value and key != "max_position_embeddings":
                raise CheckpointError(
                    f"{source}: {part} {key} is {theirs[key]}, config/models/{wanted.name}.yaml has {value}",
                    "choose the `model` that fits this checkpoint, or another checkpoint",
                )
