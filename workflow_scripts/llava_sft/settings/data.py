"""The settings of the data: what is read, and how."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from llava_sft.data.forms import AS_GIVEN, TARGETS, Target
from llava_sft.model.processing import MAX_PIXELS, MIN_PIXELS
from llava_sft.settings.fields import Fraction, Natural, Positive, Section, free, setting


class SourceSettings(BaseModel):
    """One entry of `sources`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    heldout: str | None = None
    image_root: Path | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    name: Annotated[str, Field(pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*)?$")] = ""
    columns: dict[Target, str] | None = None


class Data(Section):
    """data: one of raw_data or sources (converted here), webdatasets (a finished folder)"""

    raw_data: Path | None = free(
        None,
        "JSONL, a JSON array, CSV, Parquet or Arrow (glob: data/*.parquet); LLaVA or OpenAI records, questions and answers, "
        "captions",
        shown=False,
    )
    heldout_data: Path | None = free(None, "the same formats: validation split, what `evaluate` answers", shown=False)
    image_root: Path | None = free(
        None, "folder that the records' image paths are relative to (default: beside raw_data)", shown=False
    )
    columns: dict[Target, str] = free(
        {},
        "keys or columns of other names: {question: q, answer: a, image: file}; `answers.0` is the first of a list. Of "
        f"{', '.join(TARGETS)}",
    )
    caption_prompt: str = free(AS_GIVEN.caption_prompt, "the question of a record that is a picture and its caption")
    image_first: bool = free(
        False, "put <image> before the first question of a record with images whose texts have no <image>"
    )
    sources: tuple[SourceSettings, ...] = free(
        (),
        "several: a list of {path, heldout, image_root, weight, name, columns}; only path is needed. A record of weight 2 is seen "
        "twice as often as one of weight 1",
    )
    webdatasets: Path | None = free(
        None, "DATA_PATH: a finished webdatasets/ folder; without a usable .nv-meta it is indexed", shown=False
    )
    shard_bytes: Positive | None = free(
        None,
        "bytes of raw data that one job makes one tar of (8 MiB of text or about 10,000 images, 256 MiB of Parquet)",
    )
    max_shard_bytes: Positive = free(
        4 << 30, "a tar that grows beyond (large images) is an error that names the right shard_bytes"
    )
    decode_images: bool = free(
        False, "decode every image while converting; false: header and end marker, odd ones in full"
    )
    max_reject_fraction: Fraction = free(
        0, "share of records that may be rejected before the pipeline stops after the data step"
    )
    val_fraction: Fraction = free(
        0, "share held out by image when there is no heldout_data: an image is on one side only"
    )
    split_seed: Natural = free(0, "of val_fraction")
    min_pixels: Positive = setting(
        MIN_PIXELS, "images are resized to between min_pixels and max_pixels, sides multiples of 28"
    )
    max_pixels: Positive = setting(MAX_PIXELS, "the larger limit of that")
