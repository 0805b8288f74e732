"""Pickles out of files that others may have written, read so that nothing in them is executed.

Notable:
- what PyTorch or Megatron will open by itself is gone through first, with stand-ins in place of everything that the pickle
  names: a pickle has no branches, so whoever reads it later meets the same names, all of them in the lists below;
- archives are listed by PyTorch's own reader, the one that later opens them; TorchScript is refused, since opening one
  runs its code.
"""

import io
import pickle
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from llava_sft.errors import READABLE, CheckpointError, DamagedFileError, shown
from llava_sft.files import read_json

_DTYPES = {str(x).removeprefix("torch.") for x in vars(torch).values() if isinstance(x, torch.dtype)}


def _names(**modules: str) -> set[tuple[str, str]]:
    return {(module.replace("__", "."), name) for module, names in modules.items() for name in names.split()}


# What `.metadata` describes tensors with. Calling any of them makes a value and does nothing else.
METADATA = {("torch", name) for name in _DTYPES} | _names(
    torch="Size",
    torch__serialization="_get_layout",
    torch__distributed__checkpoint__metadata="Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
    "BytesStorageMetadata ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    torch__distributed__checkpoint__filesystem="_StorageInfo",
    torch__distributed__checkpoint__planner="SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    collections="OrderedDict defaultdict",
    pathlib="Path PosixPath PurePosixPath",
)
METADATA |= {("torch.distributed.checkpoint.metadata", "TensorProperties._MEM_FORMAT_ENCODING")}
HARMLESS_BUILTINS = "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple"
# What Megatron and energon keep beside the weights: arguments, random states, the position in the data.
OBJECTS = {("torch", name) for name in _DTYPES} | _names(
    builtins=HARMLESS_BUILTINS,
    torch="Size device Generator",
    torch__storage="UntypedStorage",
    torch__serialization="_get_layout",
    collections="OrderedDict deque",
    argparse="Namespace",
    types="SimpleNamespace",
    pathlib="Path PosixPath PurePosixPath",
    signal="Signals",
    _io="BytesIO",
    io="BytesIO",
    _codecs="encode",
    numpy="ndarray dtype",
    numpy__core__multiarray="_reconstruct",
    megatron__core__enums="ModelType",
    megatron__core__transformer__enums="AttnBackend AttnMaskType CudaGraphModule CudaGraphScope "
    "InferenceCudaGraphScope LayerType ModelType",
    megatron__core__optimizer__optimizer_config="OptimizerConfig AdamOptimizerConfig",
    megatron__core__rerun_state_machine="RerunDiagnostic RerunMode RerunState",
    megatron__energon__flavors__webdataset__sample_loader="SliceState",
    megatron__energon__rng="SystemRngState WorkerRngState",
    megatron__energon__savable_loader="SavableCheckpoint SavableDataLoaderState SavableDatasetCheckpoint SavableDatasetState",
    megatron__energon__state="FlexState",
)
OBJECTS |= {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("numpy._core.multiarray", "_reconstruct"),
}


class _ReadOnlyType(type):
    def __setattr__(cls, name, value):
        raise pickle.UnpicklingError("it changes a class")


class StandIn(metaclass=_ReadOnlyType):
    """Any object that is no tensor: made and filled without effect."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def _ignore(self, *args):
        pass

    def __setstate__(self, state):
        pass

    __setitem__ = append = extend = add = _ignore


def python3_name(module: str, name: str) -> tuple[str, str]:
    """The name under which Python 3 would look up what a pickle of protocol 0 to 2 names."""
    return NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))


class _Checking(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: set[tuple[str, str]], archive: bool):
        self.stream = io.BytesIO(data)
        super().__init__(self.stream)
        self.allowed, self.archive = allowed, archive

    def find_class(self, module: str, name: str):
        wanted = python3_name(module, name)
        if wanted in self.allowed or (self.archive and module == "torch" and name.endswith("Storage")):
            return StandIn
        raise CheckpointError(
            f"it asks for {shown(f'{module}.{name}')}, which no checkpoint needs",
            "do not use this file: reading it would run code",
        )

    def persistent_load(self, pid):
        if not self.archive:
            raise pickle.UnpicklingError("a reference to another file")
        return StandIn()


class _Reading(pickle.Unpickler):
    """Reads `.metadata` once it is checked."""

    def find_class(self, module: str, name: str):
        if (module, name) not in METADATA:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def check_pickle(data: bytes, where: Path | str, allowed: set[tuple[str, str]], archive: bool = False) -> None:
    """Raise CheckpointError unless `data` is one pickle that names nothing but `allowed`. `archive`: of a `torch.save`."""
    unpickler = _Checking(data, allowed, archive)
    try:
        unpickler.load()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.problem}", error.fix) from None
    except Exception as error:  # unpickling damaged bytes raises almost anything
        raise damaged(where, error) from None
    if unpickler.stream.read(1):
        raise damaged(where, "more follows behind its end")


def damaged(where: Path | str, error: BaseException | str) -> CheckpointError:
    if isinstance(error, PermissionError | IsADirectoryError):
        return CheckpointError(f"{where}: cannot be read: {error.strerror}", READABLE)
    reason = error if isinstance(error, str) else (str(error).splitlines() or [type(error).__name__])[0][:200]
    return CheckpointError(f"{where}: damaged or cut off ({reason})", "copy the file again, or use another checkpoint")


def check_archive_members(file: Path | io.BytesIO, where: Path | str) -> Any:
    """PyTorch's reader of an archive that `torch.save` wrote. Raises CheckpointError for anything else."""
    try:
        if isinstance(file, io.BytesIO):
            file.seek(0)
            head = file.getvalue()[:4]
        else:
            head = _first_bytes(file, 4)
    except OSError as error:
        raise damaged(where, error) from None
    if head != b"PK\x03\x04":
        what = (
            "empty"
            if not head.strip(b"\0")
            else "not an archive of `torch.save`: a bare pickle, PyTorch's form before 1.6, or damaged"
        )
        raise CheckpointError(
            f"{where}: {what}", "copy the file again; or save it with torch.save of PyTorch 1.6 or later"
        )
    try:
        reader = torch._C.PyTorchFileReader(file if isinstance(file, io.BytesIO) else str(file))
        members = reader.get_all_records()
    except Exception as error:
        raise damaged(where, error) from None
    names = [member.lower() for member in members]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(
            f"{where}: a TorchScript archive: opening it would run its code",
            "do not use it; save the tensors with torch.save",
        )
    if len(names) != len(set(names)) or "data.pkl" not in members:
        raise CheckpointError(
            f"{where}: not as torch.save writes an archive (its members: {shown(names)})", "copy the file again"
        )
    return reader


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def check_archive(file: Path | io.BytesIO, where: Path | str) -> None:
    """Raise CheckpointError unless a `torch.save` archive holds tensors and the harmless objects of `OBJECTS` alone."""
    reader = check_archive_members(file, where)
    check_pickle(reader.get_record("data.pkl"), where, OBJECTS, archive=True)


def check_crc(path: Path) -> None:
    """Raise CheckpointError where a member of a `torch.save` archive is not what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong, filled = [], [member for member in archive.infolist() if member.file_size]
            for member in filled:
                if not _crc_is_right(archive, member):
                    wrong.append(member.filename)
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error, ValueError, RuntimeError) as error:
        raise damaged(path, error) from None
    if len(wrong) == len(filled) > 1:
        print(f"{path}: saved without checksums (torch.serialization.set_crc32_options): damage would not be noticed")
    elif wrong:
        raise damaged(path, f"{wrong[0]} does not hold what was written: another CRC32")


def _crc_is_right(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    expected = member.CRC
    member.CRC = None  # type: ignore[assignment]  # zipfile then leaves the comparing to us: it would stop at the first
    crc = 0
    with archive.open(member) as stream:
        while chunk := stream.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc == expected


# ------------------------------------------------------------------------------------ torch_dist checkpoints


def read_metadata(folder: Path) -> Metadata:
    """What `.metadata` of a torch_dist checkpoint says. Raises CheckpointError: missing, damaged, or not harmless."""
    path = folder / ".metadata"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no .metadata file: not a whole torch_dist checkpoint", "use another iter_ folder"
        ) from None
    except OSError as error:
        raise damaged(path, error) from None
    check_pickle(data, path, METADATA)
    try:
        metadata = _Reading(io.BytesIO(data)).load()
        _check_content(metadata)
    except Exception as error:
        raise damaged(path, error) from None
    return metadata


def _check_content(metadata: Metadata) -> None:
    """Raise ValueError or TypeError unless every entry has the form that PyTorch writes and stays in the folder."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"{type(metadata).__name__} in place of Metadata")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise TypeError(f"{shown(key)} is described by {type(entry).__name__}")
        for chunk in entry.chunks if isinstance(entry, TensorStorageMetadata) else ():
            sizes = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            if any(offset < 0 or size < 0 or offset + size > whole for offset, size, whole in sizes):
                raise ValueError(f"{shown(key)}: a piece lies outside the tensor")
            if MetadataIndex(key, chunk.offsets) not in metadata.storage_data:
                raise ValueError(f"{shown(key)}: where a piece of it is stored is not said")
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"{shown(key)}: {type(entry.properties.dtype).__name__} in place of a dtype")
            pieces = [torch.Size(chunk.sizes).numel() for chunk in entry.chunks]
            if sum(pieces) != torch.Size(entry.size).numel():
                raise ValueError(f"{shown(key)}: its pieces hold {sum(pieces):,} values, not {list(entry.size)}")
    for index, place in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{shown(str(place.relative_path))} is no file of this folder")
        if not (place.offset >= 0 and place.length > 0):
            raise ValueError(f"{shown(index.fqn)}: {place.length} bytes at {place.offset}")


def check_pickles(folder: Path, *archives: Path) -> None:
    """Raise CheckpointError unless Megatron can open a torch_dist checkpoint, and `archives`, without running code in them.

    Args:
        folder: `iter_0000400/` or `release/`; archives: of the data loader, say, written by `torch.save`.
    """
    metadata = read_metadata(folder)
    backend = folder / "metadata.json"  # without it Megatron takes the folder for one of another format
    try:
        kind = read_json(backend)["sharded_backend"]
    except (OSError, DamagedFileError, KeyError, TypeError) as error:
        raise damaged(backend, error) from None
    if kind != "torch_dist":
        raise CheckpointError(f"{backend}: sharded_backend {shown(kind)}, not torch_dist", "use another checkpoint")
    for path in [*sorted(folder.glob("*.pt")), *archives]:
        check_archive(path, path)
    for index, place in metadata.storage_data.items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            continue
        where = f"{folder / place.relative_path}: {shown(index.fqn)}"
        try:
            with open(folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                item = io.BytesIO(file.read(place.length))
        except OSError as error:
            raise damaged(where, error) from None
        check_archive(item, where)
