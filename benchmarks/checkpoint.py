"""Checkpoint conversion, both ways, against `cp` of the same bytes, at full size with random weights; bits compared.

    python benchmarks/checkpoint.py --model 8b --folder /scratch       # needs three times the checkpoint's size

Times include writing through to the disk (`cp` is followed by a sync of the copied folder), start from files that are
not in the page cache, and are those of whole commands, imports included.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch

from llava_sft.checkpoint.safetensors_io import SafetensorsReader, old_name, write_safetensors
from llava_sft.files import read_json
from llava_sft.model.config import load_model_config
from llava_sft.model.export_files import write_hf_sidecars
from llava_sft.model.tensors import hf_shapes, parameter_count
from llava_sft.model.tiny import train_tokenizer
from results import ROOT, row, timed, write_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder is made and removed in it")
    parser.add_argument("--old-names", action="store_true", help="spell the tensors as transformers 4.53 does")
    args = parser.parse_args()
    work = args.folder / f"checkpoint-benchmark-{args.model}"
    work.mkdir(parents=True)
    try:
        write_results("checkpoint", measure(work, args.model, args.old_names))
    finally:
        shutil.rmtree(work)


def measure(work: Path, size: str, old_names: bool) -> list[dict]:
    model = load_model_config(ROOT / f"config/models/{size}.yaml")
    hf, mcore, back = work / "hf", work / "hf_mcore_tp1_pp1", work / "back"
    hf.mkdir()
    train_tokenizer(["a b"], 300, 2048).save_pretrained(hf)
    write_hf_sidecars(hf, hf, model, 3136, 1_000_000)
    torch.manual_seed(1)
    spell = old_name if old_names else str
    shapes = {spell(name): shape for name, shape in hf_shapes(model).items()}
    stream = ((name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1)) for name, shape in shapes.items())
    write_safetensors(hf, shapes, torch.bfloat16, stream)

    rows = []
    gigabytes = 2 * parameter_count(model) / 1e9
    settings = {"model": size, "dtype": "bfloat16", "gigabytes": round(gigabytes, 1), "old_names": old_names}
    for direction, source, target in (("hf2mcore", hf, mcore), ("mcore2hf", mcore, back)):
        forget(source)
        copied = timed("bash", "-c", f"cp -r {source} {work}/copy && sync -f {work}/copy && sync {work}/copy/*").seconds
        shutil.rmtree(work / "copy")
        forget(source)
        script, model_file = ROOT / "workflow_scripts/convert_checkpoint.py", ROOT / f"config/models/{size}.yaml"
        seconds, peak, _ = timed(sys.executable, script, direction, source, target, "--model", model_file)
        peak /= 1000
        note = f"{seconds:.1f} s against {copied:.1f} s, {gigabytes / seconds:.2f} GB/s"
        note += "; HF → Megatron → HF: the same bits"  # else the comparison below ends it
        rows.append(row("checkpoint_vs_cp", seconds / copied, "x", 1.3, "lower", note, direction=direction, **settings))
        rows.append(row("checkpoint_peak_gb", peak, "GB", 2, "lower", "", direction=direction, **settings))
    shutil.rmtree(mcore)
    before, after = SafetensorsReader(hf), SafetensorsReader(back)
    assert before.names() == after.names(), "names differ"
    different = [name for name in before.names() if not torch.equal(before.read(name), after.read(name))]
    assert not different and read_json(back / "config.json")["dtype"] == "bfloat16", different
    return rows


def forget(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


if __name__ == "__main__":
    main()
