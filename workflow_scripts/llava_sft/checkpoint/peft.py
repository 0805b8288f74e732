"""A LoRA adapter as PEFT writes it: what its two files say, and whether it is one to train on from. No torch.

Notable: a key of its config that is not known here is refused. A pair that is read in another way than it was trained is a
wrong model without an error.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava_sft.checkpoint.hf_folder import ADAPTER, ADAPTER_WEIGHTS, canonical, merging, read_header, refuse_pickles
from llava_sft.errors import CheckpointError, many, shown
from llava_sft.files import read_object
from llava_sft.model.config import ModelConfig
from llava_sft.model.lora import Lora
from llava_sft.model.tensors import PARTS, Row, Shape, check_tensors, hf_shapes

PREFIX = "base_model.model."
# Keys of adapter_config.json that say nothing of what trained pairs do, or that are read here.
KNOWN = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
ALONE = {  # of these keys the values that are read
    "bias": ("none",),
    "peft_type": ("LORA",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # others begin by changing the base
}


class Adapter(NamedTuple):
    """The pairs of a PEFT folder: a linear layer's weight counts as W + alpha / rank · B·A.

    base: folder or hub id of the weights that they stand beside; empty where it is not said.
    pairs: `….q_proj.lora_A.weight` and the like, without PEFT's prefix → its entry in the file's header, see `read_header`.
    noted: the base's fingerprint, which `mcore2peft` notes; empty in another's folder.
    """

    folder: Path
    base: str
    rank: int
    alpha: float
    pairs: Mapping[str, dict[str, Any]]
    noted: str = ""

    @classmethod
    def of(cls, folder: Path) -> "Adapter":
        """Raises CheckpointError for a damaged folder, and for what PEFT has and is not read here."""
        if not (folder / ADAPTER).is_file():
            raise CheckpointError(
                f"{folder}: no PEFT folder (no {ADAPTER} in it)",
                f"name one; of a run with LoRA: convert_checkpoint.py mcore2peft {folder} ADAPTER",
            )
        config, weights = read_object(folder / ADAPTER), folder / ADAPTER_WEIGHTS
        base, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
        for key, value in sorted(config.items()):
            if value and (key not in KNOWN or value not in ALONE.get(key, (value,))):
                raise CheckpointError(
                    f"{folder / ADAPTER}: {key} is {shown(value)}: adapters of this kind are not supported",
                    merging(folder, base, by_peft=True),
                )
        rank: Any = config.get("r")
        alpha: Any = config.get("lora_alpha")
        types = type(rank) is int and type(alpha) in (int, float)
        if not (types and 0 < rank < 2**31 and 0 < alpha < 2**31):
            raise CheckpointError(
                f"{folder / ADAPTER}: r and lora_alpha must be numbers above 0, below 2**31, not {shown(rank)} and {shown(alpha)}",
                "copy the file again",
            )
        if not weights.is_file():
            refuse_pickles(folder, str(folder))
            raise CheckpointError(f"{folder}: no {ADAPTER_WEIGHTS} in it", "copy the folder again")
        header, about = read_header(weights)
        if others := [name for name in header if not name.startswith(PREFIX)]:
            raise CheckpointError(f"{weights}: {others[0]} is not a tensor of a PEFT adapter", "copy the file again")
        if whole := [name for name in header if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
            raise CheckpointError(
                f"{weights}: {many(len(whole), 'tensor', 'are')} no pairs of linear layers, the first is {whole[0]}: adapters of this kind "
                "are not supported",
                merging(folder, base, by_peft=True),
            )
        pairs = {canonical(name.removeprefix(PREFIX)): entry for name, entry in header.items()}
        if config.get("use_rslora"):
            alpha *= rank**0.5
        named = f"{base}@{revision}" if revision and "@" not in base and not Path(base).exists() else base
        return cls(folder, named, rank, alpha, pairs, about.get("base", ""))

    def check(self, names: Iterable[str], model: ModelConfig) -> None:
        """Raise CheckpointError unless there is a pair beside each of these weights, of the right shape, and no other."""
        wanted: dict[str, Shape] = {}
        for name in names:
            (out, columns), (a, b) = hf_shapes(model)[name], pair_of(name)
            wanted |= {a: (self.rank, columns), b: (out, self.rank)}
        check_tensors({n: tuple(e["shape"]) for n, e in self.pairs.items()}, wanted, self.folder / ADAPTER_WEIGHTS)

    def beside(self, model: ModelConfig) -> list[str]:
        """The weights that have a pair. Raises CheckpointError for pairs that do not fit the model."""
        names = [
            n
            for n, shape in hf_shapes(model).items()
            if len(shape) == 2 and not self.pairs.keys().isdisjoint(pair_of(n))
        ]
        self.check(names, model)
        return names

    def lora(self, model: ModelConfig) -> Lora:
        """What trains these pairs on. Where q, k and v (gate and up) have an A each, as PEFT makes them, the one A that a
        fused layer has here holds theirs one below the other, and rank and alpha are PEFT's
        times the number of the weights that are joined (3, 2).

        Raises CheckpointError unless every linear layer of each part that has pairs has one.
        """
        names = set(self.beside(model))
        parts = tuple(part for part in PARTS if any(names & row.hf.keys() for row in Lora(1, 1, (part,)).rows(model)))
        rows = Lora(1, 1, parts).rows(model)
        try:
            self.check((name for row in rows for name in row.hf), model)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error.problem}; training goes on where all linear layers of a part have pairs",
                merging(self.folder, self.base),
            ) from None
        times = max((len(row.hf) for row in rows if not self.shares(row)), default=1)
        return Lora(self.rank * times, self.alpha * times, parts)

    def shares(self, row: Row) -> bool:
        """Whether the weights that are joined to a fused one have the same A."""
        with open(self.folder / ADAPTER_WEIGHTS, "rb") as file:
            seen = set()
            for name in row.hf:
                entry = self.pairs[pair_of(name)[0]]
                first, end = entry["data_offsets"]
                file.seek(entry["start"])
                seen.add((entry["dtype"], file.read(end - first)))
        return len(seen) == 1


def pair_of(name: str) -> tuple[str, str]:
    """`….q_proj.weight` → `….q_proj.lora_A.weight`, `….q_proj.lora_B.weight`."""
    layer = name.removesuffix(".weight")
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
