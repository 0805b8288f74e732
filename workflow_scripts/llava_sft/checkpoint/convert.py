"""Hugging Face ↔ Megatron-Core, both ways through the table in model/tensors.py, one tensor in memory at a time.

The way in also takes the original project's Megatron folders, and parts of the model from different folders.

A converted folder looks like one that Megatron wrote: `latest_checkpointed_iteration.txt`, `release/…`; beside them
`huggingface/` keeps all that is not a weight (config, tokenizer, preprocessor, chat template), and `converted.json`
is the marker that stands only when all is there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import xxhash

from llava_sft.checkpoint.adapters import merged, write_pairs
from llava_sft.checkpoint.architecture import parts_of_folder, with_own_values, with_values_beside
from llava_sft.checkpoint.hf_folder import ADAPTER, ADAPTER_WEIGHTS
from llava_sft.checkpoint.legacy import LegacySource
from llava_sft.checkpoint.peft import Adapter
from llava_sft.checkpoint.pickles import check_pickles
from llava_sft.checkpoint.safetensors_io import (
    SafetensorsReader,
    check_finite,
    old_name,
    tensor_bytes,
    write_safetensors,
)
from llava_sft.checkpoint.start import (
    RANDOM,
    copy_sidecars,
    is_legacy,
    newest_checkpoint,
)
from llava_sft.checkpoint.torch_dist import write_torch_dist
from llava_sft.checkpoint.verify import MARKER, require_whole, sidecars_damage
from llava_sft.checkpoint.weights import open_weights
from llava_sft.checksums import note
from llava_sft.errors import CheckpointError, many, shown
from llava_sft.files import atomic_dir, file_hash, fingerprint, read_object, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.model.export_files import tokenizer_added_tokens, tokenizer_token_ids, write_hf_sidecars
from llava_sft.model.hf_config import LANGUAGE_ALONE, Parts
from llava_sft.model.tensors import (
    HF_EMBEDDINGS,
    HF_OUTPUT_LAYER,
    MLCD_UNUSED,
    PARTS,
    Row,
    as_mlcd,
    check_tensors,
    hf_shapes,
    is_mlcd,
    parameter_count,
    tensor_rows,
)
from llava_sft.model.tokens import TOKEN_ID_KEYS
from llava_sft.progress import Progress, tracked
from llava_sft.run.layout import PAIRS, SIDECARS, TRACKER


class HfSource:
    """A Hugging Face folder as a source of Megatron tensors."""

    def __init__(self, folder: Path, model: ModelConfig):
        self.folder, self.model = folder, model
        self.reader = SafetensorsReader(folder)
        self.config = read_object(folder / "config.json", {})
        names, head = self.reader.names(), HF_OUTPUT_LAYER
        self.mlcd = is_mlcd(names)
        # A tied language model (Qwen3-4B) does not store its output layer: here it becomes a tensor of its own.
        self.tied = self.config.get("model_type") in LANGUAGE_ALONE and bool(self.config.get("tie_word_embeddings"))
        self.stand_ins = {head: HF_EMBEDDINGS} if self.tied and head not in names else {}

    def says(self, parts: list[str], alone: bool) -> Parts:
        """What its config.json says of these parts, see `parts_of_folder`."""
        return parts_of_folder(self.folder, parts, alone)

    def check(self, rows: list[Row], alone: bool) -> list[str]:
        """Raise CheckpointError unless the folder holds exactly the tensors of `rows`; if not `alone`, at least those.

        Returns lines on what a user may not expect of it.
        """
        wanted = {name: shape for row in map(self._here, rows) for name, shape in row.hf.items()}
        found = {name: self.reader.shape(name) for name in self.reader.names()}
        found |= {name: found[other] for name, other in self.stand_ins.items()}
        others = set() if alone else hf_shapes(self.model).keys() - wanted.keys()
        others |= MLCD_UNUSED if self.mlcd else set()
        check_tensors({name: shape for name, shape in found.items() if name not in others}, wanted, self.folder)
        return [f"{self.folder}: {line}" for line in self._surprises(wanted)]

    def _surprises(self, wanted: Iterable[str]) -> Iterator[str]:
        if not self.config:
            yield f"no config.json: RoPE base and epsilons are those of config/models/{self.model.name}.yaml"
        if self.mlcd and MLCD_UNUSED & self.reader.names():
            yield "post_layernorm is left out: it belongs to the pooled output, and here nothing follows the blocks"
        if (self.folder / ADAPTER).is_file():
            yield f"{ADAPTER}: a LoRA adapter lies here; merge it first if it is to count"
        head = HF_OUTPUT_LAYER
        both = self.tied and {head, HF_EMBEDDINGS} <= self.reader.names() and head in wanted
        if both and not torch.equal(self.reader.read(head), self.reader.read(HF_EMBEDDINGS)):
            yield f"config.json ties lm_head to the embeddings, another {head} is stored: it is taken"
        if (self.folder / "tokenizer.json").is_file():
            added = tokenizer_added_tokens(self.folder)
            for key, token in TOKEN_ID_KEYS.items():
                said, actual = self.config.get(key), added.get(token)
                if said is not None and actual is not None and said != actual:
                    yield f"config.json says {key} {shown(said)}, the tokenizer {actual}: the tokenizer's is used"
        dtypes = Counter(str(self.reader.dtype(self.stand_ins.get(name, name)))[len("torch.") :] for name in wanted)
        if len(dtypes) > 1:
            counts = ", ".join(f"{many(count, 'tensor')} in {dtype}" for dtype, count in dtypes.most_common())
            yield f"{counts}: all become the type that holds every value exactly"

    def _here(self, row: Row) -> Row:
        """The row with the names that this folder has."""
        return as_mlcd(row) if self.mlcd else row

    def dtype(self, rows: list[Row]) -> torch.dtype:
        """One for all, and where a folder mixes them the one that holds every value exactly."""
        names = (self.stand_ins.get(name, name) for row in map(self._here, rows) for name in row.hf)
        return reduce(torch.promote_types, map(self.reader.dtype, names))

    def read(self, row: Row) -> torch.Tensor:
        row = self._here(row)
        return row.join([self.reader.read(self.stand_ins.get(name, name)) for name in row.hf])


class RandomAdapter:
    """`load_parts: {adapter: random}`, for stage 1: norms one, biases zero, the rest as Megatron starts a linear layer."""

    folder = RANDOM
    config: dict[str, Any] = {}

    def __init__(self):
        self.generator = torch.Generator().manual_seed(42)

    def says(self, parts: list[str], alone: bool) -> Parts:
        return {}

    def check(self, rows: list[Row], alone: bool) -> list[str]:
        return []

    def dtype(self, rows: list[Row]) -> torch.dtype:
        return torch.bfloat16  # gives way to that of any other part

    def read(self, row: Row) -> torch.Tensor:
        if row.mcore.endswith("bias"):
            return torch.zeros(row.shape)
        return torch.ones(row.shape) if "norm" in row.mcore else 0.02 * torch.randn(row.shape, generator=self.generator)


Source = HfSource | LegacySource | RandomAdapter


def open_source(folder: Path | str, model: ModelConfig) -> Source:
    if folder == RANDOM:
        return RandomAdapter()
    folder = Path(folder)
    return LegacySource(newest_checkpoint(folder)) if is_legacy(folder) else HfSource(folder, model)


def hf2mcore(
    source: Path, target: Path, model: ModelConfig, sidecars: Path | None = None,
    parts: dict[str, Path | str] | None = None, adapter: Adapter | None = None,
) -> dict:  # fmt: skip
    """Convert a Hugging Face folder, or one of the original project, into a Megatron folder; returns its marker.

    Args:
        sidecars: folder with config and tokenizer; by default the source itself.
        adapter: LoRA's pairs that stand beside the source; they become a checkpoint of LoRA in `target`/pairs.
        parts: part of the model → the folder that it comes from instead; "adapter" may be "random".

    Raises CheckpointError when a tensor is missing, left over, or of another shape than `model` has.
    """
    if sidecars is not None:
        tokenizer_token_ids(sidecars)  # before weights are read, not when all is trained
    parts = parts or {}
    sources = {folder: open_source(folder, model) for folder in dict.fromkeys((source, *parts.values()))}
    source_of = {part: sources[parts.get(part, source)] for part in PARTS}
    rows = {row.mcore: row for row in tensor_rows(model)}
    model, dtypes, said = looked_at(sources, source_of, model, sidecars)
    if adapter:  # refused here where it does not fit: the base may take minutes
        said["origin"].append(f"pairs of rank {adapter.lora(model).rank} from {adapter.folder}")
    print("\n".join(line for lines in said.values() for line in lines), flush=True)
    dtype = reduce(torch.promote_types, dtypes)
    digest = xxhash.xxh3_128()

    progress = Progress(len(rows), "tensors")

    def produce(key: str) -> torch.Tensor:
        row = rows[key]
        progress.add()
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
        base = {"folder": str(target / "release"), "fingerprint": digest.hexdigest()}
        pairs = write_pairs(folder, adapter, model, base | {"load": adapter.base}) if adapter else {}
        marker = _marker(source, model, dtype) | {
            "fingerprint": digest.hexdigest(),
            "untrained": bool(sources[source].config.get("untrained")),
            "origin": said["origin"],
            "notes": said["notes"],
            "model": model.model_dump(),
            "files": files | pairs,
        }
        if adapter:
            marker[PAIRS] = fingerprint([file_hash(adapter.folder / ADAPTER_WEIGHTS), adapter.rank, adapter.alpha])
        write_json(folder / MARKER, marker, sealed=True)
    return marker


def looked_at(
    sources: Mapping[Path | str, Source], source_of: Mapping[str, Source], model: ModelConfig, sidecars: Path | None
) -> tuple[ModelConfig, list[torch.dtype], dict[str, list[str]]]:
    """`model` with the checkpoint's own values, the type of each source's tensors, and lines about them: the `origin` of
    each part, `notes` on what a user may not expect, `values` that are not those of `model`.

    Raises CheckpointError when a source does not hold what is taken from it.
    """
    dtypes: list[torch.dtype] = []
    said: dict[str, list[str]] = {"origin": [], "notes": [], "values": []}
    alone = len(sources) == 1  # of several folders each may be a whole checkpoint of which only a part is taken
    for source in sources.values():
        taken = [part for part in PARTS if source_of[part] is source]
        if not taken:
            raise CheckpointError(
                f"{source.folder}: every part comes from another folder", "leave a part of load_parts out"
            )
        rows = [row for row in tensor_rows(model) if row.part in taken]
        model, lines = with_own_values(model, source.says(taken, alone), source.folder)
        if alone and sidecars and isinstance(source, LegacySource):
            model, lines = with_values_beside(model, sidecars, sidecars)
        said["values"] += lines
        said["notes"] += source.check(rows, alone)
        said["origin"].append(f"{' and '.join(taken)} ({len(rows)} Megatron tensors) from {source.folder}")
        dtypes.append(source.dtype(rows))
    return model, dtypes, said


def mcore2hf(
    source: Path, target: Path, sidecars: Path, model: ModelConfig, min_pixels: int, max_pixels: int,
    names: str = "model", gate: Callable[[Path], None] | None = None,
) -> dict:  # fmt: skip
    """Write the weights of one checkpoint folder (`iter_0000400/`, `release/`) as a Hugging Face folder.

    Args:
        sidecars: folder with config, tokenizer and the like that training started from.
        min_pixels, max_pixels: image limits of the training, written where inference will read them.
        names: the spelling of the tensors' names, "model" or "published": see the setting `export_names`.
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
    reader = open_weights(source)
    rows = tensor_rows(model)
    stored = reader.tensors()
    found = {row.mcore: tuple(stored[row.mcore].size) for row in rows if row.mcore in stored}
    check_tensors(found, {row.mcore: row.shape for row in rows}, source)
    spell = old_name if names == "published" else str
    order = {spell(name): shape for name, shape in hf_shapes(model).items()}

    def tensors():
        for row in tracked(rows, len(rows), "tensors"):
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
        _finish(folder, weights, marker)
    return marker


def merge(
    base: Path, adapters: list[tuple[Adapter, float]], target: Path, model: ModelConfig, min_pixels: int, max_pixels: int,
    names: str = "model", about: Mapping[str, Any] | None = None,
) -> dict:  # fmt: skip
    """Write a Hugging Face folder of the weights of `base` with the pairs of `adapters`, each times its number.

    Args:
        about: what else the marker says.

    The rest as in `mcore2hf`. Raises CheckpointError when a pair does not fit the model.
    """
    for adapter, _ in adapters:
        adapter.beside(model)
    tokenizer_token_ids(base)
    source, rows = HfSource(base, model), list(tensor_rows(model))
    print("".join(f"{line}\n" for line in source.check(rows, alone=True)), end="", flush=True)
    spell = old_name if names == "published" else str
    shapes, dtype = hf_shapes(model), source.dtype(rows)
    marker = _marker(base, model, dtype) | dict(about or {})
    with atomic_dir(target) as folder:
        write_hf_sidecars(folder, base, model, min_pixels, max_pixels, marker["dtype"])
        tensors = zip(map(spell, shapes), merged(source.reader, list(shapes), adapters), strict=True)
        weights = write_safetensors(folder, {spell(name): shape for name, shape in shapes.items()}, dtype, tensors)
        _finish(folder, weights, marker)
    return marker


def _finish(folder: Path, weights: dict[str, list], marker: dict) -> None:
    """Note the files of an export in its `marker`, and write that."""
    marker["files"] = weights | note(folder, [path for path in folder.iterdir() if path.name not in weights])
    write_json(folder / MARKER, marker, sealed=True)


def _marker(source: Path, model: ModelConfig, dtype: torch.dtype) -> dict:
    tensors, parameters = len(hf_shapes(model)), parameter_count(model)
    return {"source": str(source), "tensors": tensors, "parameters": parameters, "dtype": str(dtype)[len("torch.") :]}
