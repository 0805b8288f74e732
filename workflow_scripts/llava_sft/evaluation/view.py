"""A Hugging Face folder → a view of it that transformers and vLLM may load: nothing of the folder itself is executed.

Notable: an export's marker, which says what an export is, can be forged; so the code of every folder is this project's, whatever
lies in it. The files of an export have to be those that were written.
"""

import contextlib
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llava_sft.checkpoint.start import read_hf_config
from llava_sft.checkpoint.verify import is_export, require_whole
from llava_sft.errors import CheckpointError
from llava_sft.files import write_json
from llava_sft.model.export_files import image_limits, write_hf_sidecars
from llava_sft.model.hf_config import model_of_config
from llava_sft.model.processing import MAX_PIXELS, MIN_PIXELS
from llava_sft.model.tensors import check_tensors, hf_shapes


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[Path]:
    """A folder with links to the weights of `folder`, beside which the code, chat template and settings are this project's.

    Errors: CheckpointError for weights that are missing, damaged, or not of this model.
    """
    if is_export(folder):
        require_whole(folder)
    from llava_sft.checkpoint.hf_folder import INDEX, read_header, weight_files
    from llava_sft.checkpoint.safetensors_io import SafetensorsReader, old_name

    config = read_hf_config(folder)
    try:
        model = model_of_config(config, folder.name)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.problem}", error.fix) from None
    reader = SafetensorsReader(folder)
    wanted = hf_shapes(model)
    check_tensors({name: reader.shape(name) for name in reader.names()}, wanted, folder)
    # transformers makes random weights of those that it does not find: it knows these two spellings.
    files = weight_files(folder)
    file_of = {name: path.name for path in files for name in read_header(path)[0]}
    if not (wanted.keys() <= file_of.keys() or set(map(old_name, wanted)) <= file_of.keys()):
        raise CheckpointError(
            f"{folder}: its tensors are not named as in LLaVA-OneVision-1.5",
            f"convert and export it: convert_checkpoint.py hf2mcore {shlex.quote(str(folder))} output/NAME_mcore_tp1_pp1, "
            "then mcore2hf output/NAME_mcore_tp1_pp1 output/NAME",
        )
    dtype = str(reader.dtype(next(iter(wanted)))).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="model-") as temporary:
        view = Path(temporary) / "model"  # transformers keeps a copy of the code by this name: always the same one
        view.mkdir()
        write_hf_sidecars(view, folder, model, *(image_limits(folder) or (MIN_PIXELS, MAX_PIXELS)), dtype)
        # Those that were looked at, and no others: transformers would take a stale model.safetensors beside an index.
        for path in files:
            (view / (path.name if files[1:] else "model.safetensors")).symlink_to(path.resolve())
        if files[1:]:
            write_json(view / INDEX, {"metadata": {}, "weight_map": file_of})
        try:
            yield view
        except CheckpointError as error:  # the user knows of no view
            if str(view) not in error.problem:
                raise
            fix = f"delete {folder} and export again" if is_export(folder) else error.fix
            raise CheckpointError(error.problem.replace(str(view), str(folder)), fix) from error
