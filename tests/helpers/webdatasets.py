"""What the tests of conversion, index and inspection share: small raw data sets, converted in this process."""

import contextlib
import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from llava_sft.data.plan import plan_ranges
from llava_sft.data.shards import convert_range


def picture(name: str = "PNG", size: tuple[int, int] = (32, 28), mode: str = "RGB", **options: Any) -> bytes:
    image = Image.linear_gradient("L").resize(size).convert(mode)
    buffer = BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def record(number: int, images: list[str] | str | None = "a.png", **extra: Any) -> dict[str, Any]:
    count = 0 if images is None else len(images) if isinstance(images, list) else 1
    conversations = [
        {"from": "human", "value": "<image>\n" * count + f"Question {number}?"},
        {"from": "gpt", "value": f"Answer {number}."},
    ]
    return {"id": f"r{number}", **({} if images is None else {"image": images}), "conversations": conversations} | extra


class Raw:
    """A raw file and its image root under a folder; `convert` makes shards of it."""

    def __init__(self, folder: Path, records: list[Any], name: str = "raw.jsonl"):
        self.folder, self.path, self.images = folder, folder / name, folder / "images"
        self.images.mkdir(parents=True, exist_ok=True)
        (self.images / "a.png").write_bytes(picture())
        (self.images / "b.jpg").write_bytes(picture("JPEG", (40, 30)))
        self.wds, self.parts = folder / "wds", folder / "wds.parts"
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in records]
        self.path.write_bytes(b"".join(lines))

    def convert(self, prefix: str = "subtaskdata", range_bytes: int = 600, only: set[int] | None = None) -> list[dict]:
        return [
            convert_range(self.path, self.images, self.wds, self.parts, prefix, part)
            for part in plan_ranges(self.path, range_bytes)
            if only is None or part.number in only
        ]


def contents(*folders: Path) -> dict[str, bytes]:
    """Every file under some folders, by name."""
    return {str(path.relative_to(f)): path.read_bytes() for f in folders for path in f.rglob("*") if path.is_file()}


def read_with_energon(*paths: Path, full: bool = False) -> list[dict[str, list]]:
    """As stock energon reads sets with our cookers: 100 training samples, and the validation split.

    A sample is its key or, in full, [key, texts of its messages, number of images].
    """
    from megatron.energon import TaskEncoder, WorkerConfig, get_loader, get_train_dataset, get_val_dataset
    from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError

    from llava_sft.data.loader import VlmTaskEncoder

    class Encoder(TaskEncoder):
        decoder = None
        cookers = VlmTaskEncoder.cookers

        def batch(self, samples):
            return samples

    def show(sample):
        return [sample.__key__, [m["content"] for m in sample.messages], len(sample.images)] if full else sample.__key__

    read = []
    for path in paths:
        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        common = {"worker_config": config, "batch_size": 1, "task_encoder": Encoder()}
        train = get_loader(get_train_dataset(path, shuffle_buffer_size=8, max_samples_per_sequence=5, **common))
        batches = iter(train)
        read.append({"train": [show(next(batches)[0]) for _ in range(100)], "val": []})
        with contextlib.suppress(EmptyDatasetError):
            read[-1]["val"] = [show(batch[0]) for batch in get_loader(get_val_dataset(path, **common))]
    return read


def tar_of(path: Path, members: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def turns(number: int, images: int = 1) -> list[dict[str, str]]:
    question = "<image>" * images + f"Question {number}?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": f"Answer {number}."}]


def mix(path: Path, numbers: range, videos: int = 0) -> None:
    members: dict[str, Any] = {}
    for n in numbers:
        names = [["0_photo.JPG", "1_é b.c.png"], ["0_photo"], []][n % 3]
        key = f"{'image' if names else 'text'}_{n}"
        members |= {f"{key}.{name}": picture("JPEG" if "J" in name else "PNG") for name in names}
        members[f"{key}.json"] = {"texts": turns(n, len(names)), "media": key[:5].strip("_"), "name": names}
    for n in range(videos):
        members |= {
            f"video_{n}.0_v.mp4": b"v",
            f"video_{n}.json": {"texts": turns(n), "media": "video", "name": ["0_v.mp4"]},
        }
    tar_of(path, members)
