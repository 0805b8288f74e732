"""What preflight resolves and a training uses: resolved.json, and run.json in the run's directory. No torch."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from llava_sft.checkpoint.start import Start
from llava_sft.errors import DamagedFileError
from llava_sft.files import read_json, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.settings.resolve import ResolvedSettings


class ResolvedData(BaseModel):
    """The data set of a run."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    path: str = ""  # what energon opens
    dataset_file: str | None = None
    sizes: str | None = None
    sizes_depend: str | None = None
    train_samples: int = 0
    sequences: int | float = 0  # packs of one pass over the training samples
    heldout_samples: int = 0


class Resolved(BaseModel):
    """A run as preflight resolved it. Files of earlier versions are read too: what they do not say has its default."""

    model_config = ConfigDict(frozen=True)

    run_name: str = ""
    settings: ResolvedSettings
    why: dict[str, str] = {}  # setting that was `auto` → where its value came from
    model: dict[str, Any]  # the fields of ModelConfig; as they are written, for they are part of the run's identity
    batch: dict[str, tuple[int | float, ...]] = {}  # mean and largest micro-batch, cost.MicroBatch
    data: ResolvedData
    start: Start
    versions: dict[str, str] = {}

    @property
    def architecture(self) -> ModelConfig:
        return ModelConfig(**self.model)

    @classmethod
    def read(cls, path: Path) -> "Resolved":
        """Raises DamagedFileError, OSError."""
        try:
            return cls.model_validate(read_json(path))
        except ValidationError:
            raise DamagedFileError(f"{path}: damaged: not the settings of a run", "restore it from a copy") from None

    def write(self, path: Path) -> None:
        write_json(path, self.dump(), sealed=True)

    def dump(self) -> dict[str, Any]:
        """The content of the file."""
        return self.model_dump(mode="json")
