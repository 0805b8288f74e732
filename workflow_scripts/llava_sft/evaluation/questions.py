"""The samples that are asked: a split of a WebDataset folder, or records as they are, of any format that is converted."""

import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import xxhash

from llava_sft.data.formats import EXTENSIONS, FORMATS, format_of
from llava_sft.data.forms import AS_GIVEN, Reading
from llava_sft.data.image_checks import ImageRoot, check_image
from llava_sft.data.images import image_grid
from llava_sft.data.index import leak_note
from llava_sft.data.nv_meta import NV_META, source_folders
from llava_sft.data.records import Sample, parse_json, parse_record
from llava_sft.data.rejects import Rejected
from llava_sft.data.stored import read_split
from llava_sft.data.verify import require_whole
from llava_sft.errors import DamagedFileError, DataError, SettingsError
from llava_sft.files import file_fingerprint, fingerprint, read_json
from llava_sft.model.config import ModelConfig
from llava_sft.model.export_files import image_limits
from llava_sft.model.processing import MAX_PIXELS, MIN_PIXELS, image_tokens


class Questions(NamedTuple):
    """Samples to ask; `fingerprint` stands for the content, `leak` says how many of them are trained on, if any."""

    samples: list[Sample[bytes]]
    split: str
    fingerprint: str
    leak: str = ""


def read_questions(
    data: Path,
    dataset: Path | None,
    split: str,
    limit: int | None,
    image_root: Path | None,
    reading: Reading = AS_GIVEN,
) -> Questions:
    """The first `limit` samples of a folder's split, or of a raw file.

    Args:
        dataset: dataset.json of the folder; by default that beside it, if there is one. Its files are compared with it.
        image_root: of a raw file; by default the folder that it lies in.
        reading: of a raw file.

    Errors: DataError for data that is missing, damaged, or holds a record that cannot be read.
    """
    if data.is_file():
        return _raw(data, image_root or data.parent, limit, reading)
    if not data.is_dir():
        raise DataError(f"{data}: no such file or folder", "a webdatasets folder, or a JSONL, JSON or Parquet file")
    dataset = dataset or next((path for path in [data.parent / "dataset.json"] if path.is_file()), None)
    leak = ""
    if dataset:
        require_whole(data, dataset)
        content = read_json(dataset)
        if not isinstance(content, dict) or not isinstance(content.get("fingerprint"), str):
            raise DamagedFileError(
                f"{dataset}: damaged, or no dataset.json: it has no fingerprint",
                f"--dataset with the dataset.json beside {data}; if it is that, delete it and run make data_X: it is made again",
            )
        stamp, leak = content["fingerprint"], leak_note(content) or ""
    else:
        stamp = _fingerprint(data)
    return Questions(list(islice(read_split(data, split), limit)), split, fingerprint([stamp, split, limit]), leak)


def _fingerprint(folder: Path) -> str:
    """Of a folder without dataset.json: its index, and sizes and times of its tars."""
    if not list(folder.glob(f"**/{NV_META}")):
        if next(folder.rglob("*.tar"), None):
            raise DataError(
                f"{folder}: not indexed", f"python workflow_scripts/index_webdataset.py {shlex.quote(str(folder))}"
            )
        raw = sorted(path for path in folder.glob("*") if path.suffix.lower() in (*EXTENSIONS, ".json"))
        raise DataError(
            f"{folder}: no WebDataset in it",
            f"name {' or '.join(map(str, raw[:3]))}" if raw else "a webdatasets folder, or a file of records",
        )
    found: list[object] = []
    for source in source_folders(folder):
        found += [
            file_fingerprint(path) for path in sorted((source / NV_META).glob("*")) if path.suffix in (".yaml", ".json")
        ]
        found += [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(source.glob("*.tar"))]
    return fingerprint(found)


def _raw(path: Path, image_root: Path, limit: int | None, reading: Reading) -> Questions:
    digest = xxhash.xxh3_128()
    samples = list(islice(_records(path, image_root, digest, reading), limit))
    if not samples:
        raise DataError(f"{path}: no record in it", "a file with records to ask about")
    read = [] if reading == AS_GIVEN else [*reading]
    return Questions(samples, "all", fingerprint([digest.hexdigest(), limit, *read]))


def _records(path: Path, image_root: Path, digest: xxhash.xxh3_128, reading: Reading) -> Iterator[Sample[bytes]]:
    images = ImageRoot(image_root)
    with open(path, "rb") as file:
        for line in FORMATS[format_of(path)].read(file, 0, path.stat().st_size, digest.update):
            try:
                if (record := parse_json(line)) is None:
                    continue
                sample = parse_record(record, None, reading)
                pictures = [image if isinstance(image, bytes) else images.read(image) for image in sample.images]
                for picture in pictures:
                    digest.update(f"{check_image(picture)}{len(picture)}".encode())
                    digest.update(picture)
            except Rejected as rejected:
                raise DataError(
                    f"{path}: {line.word} {line.number:,}: {rejected}",
                    "mend or remove that record: all of a test set counts",
                ) from None
            yield sample._replace(id=sample.id or f"{line.word} {line.number}").with_images(pictures)


def require_positions(max_new_tokens: int, model: ModelConfig) -> None:
    """Raise SettingsError for answers that may be longer than what the model reads, question and answer together."""
    positions = model.language.max_position_embeddings
    if max_new_tokens >= positions:
        raise SettingsError(
            f"max_new_tokens: {max_new_tokens:,}: the model has {positions:,} positions, for question and answer",
            "max_new_tokens: 32 (evaluate.py: --max-new-tokens 32), or as many as an answer needs",
        )


def image_token_counts(export: Path, questions: list[Sample[bytes]]) -> list[int]:
    """How many tokens the pictures of each question become, with the image limits of `export`; from their headers alone."""
    limits = image_limits(export) or (MIN_PIXELS, MAX_PIXELS)
    return [sum(image_tokens(image_grid(data, *limits)) for data in question.images) for question in questions]
