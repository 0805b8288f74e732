"""Convert a checkpoint between Hugging Face and Megatron-Core (torch_dist), one tensor in memory at a time.

    convert_checkpoint.py hf2mcore LLaVA-OneVision-1.5-4B-Base LLaVA-OneVision-1.5-4B-Base_mcore_tp1_pp1 --model 4b
    convert_checkpoint.py mcore2hf output/stage2_sft_vqa/iter_0000800 exported --model tiny --samples output/data/vqa/webdatasets

hf2mcore also takes a hub id (org/name@revision) and Megatron folders of the original project (release/mp_rank_00/…).
mcore2hf with --samples loads the export and compares it with the Megatron model before it gets its name.
"""

import argparse
from functools import partial
from pathlib import Path

from llava_sft.checkpoint.hub import download
from llava_sft.checkpoint.start import MARKER, PARTS, SIDECARS, is_hub, is_legacy, newest_checkpoint
from llava_sft.errors import SettingsError, exits_cleanly
from llava_sft.files import file_fingerprint, fingerprint, read_json, write_json
from llava_sft.model.config import load_model_config


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("direction", choices=["hf2mcore", "mcore2hf"])
    add("source", help="Hugging Face folder or org/name@revision | run directory, iter_0000400 or release folder")
    add("target", type=Path, help="folder to write; it appears only when it is whole")
    add("--model", required=True, help="config/models/<model>.yaml, or a path")
    add("--sidecars", type=Path, help="folder with config and tokenizer (default: in or beside the source)")
    add("--part", action="append", default=[], metavar="PART=FOLDER",
        help="hf2mcore: take language, vision or adapter from there; adapter=random")  # fmt: skip
    add("--min-pixels", type=int, default=3136, help="mcore2hf: written for inference")
    add("--max-pixels", type=int, default=1_000_000, help="mcore2hf: written for inference")
    add("--samples", type=Path,
        help="mcore2hf: WebDataset whose samples the export is compared on with the Megatron model")  # fmt: skip
    add("--parity", choices=["check", "cpu", "gpu", "skip"], default="check", help="mcore2hf: where to compare")
    add("--done", type=Path, help="also write the marker here")
    args = parser.parse_args()
    path = Path(args.model)
    model = load_model_config(path if path.suffix == ".yaml" else Path("config/models") / f"{args.model}.yaml")

    parts = {}
    for given in args.part:
        part, _, folder = given.partition("=")
        if part not in PARTS or not folder:
            raise SettingsError(f"--part {given}", f"--part PART=FOLDER, PART one of {', '.join(PARTS)}")
        parts[part] = folder
    source = args.source if is_hub(args.source) else newest_checkpoint(Path(args.source))
    if args.direction == "mcore2hf":
        args.sidecars = args.sidecars or source.parent / SIDECARS

    # What the result depends on. When it is the same as last time there is nothing to do, and torch is not imported.
    export = [args.min_pixels, args.max_pixels, args.parity, bool(args.samples)]
    depends = fingerprint(
        {
            "direction": args.direction,
            "source": [source_fingerprint(each) for each in (source, *parts.values())],
            "parts": list(parts),
            "model": model.model_dump(),
            "export": export if args.direction == "mcore2hf" else None,
        }
    )
    marker = args.target / MARKER
    if (made := read_json(marker, {})).get("depends") == depends:
        print(f"{args.target}: made from the same source, nothing to convert")
        if args.done:
            write_json(args.done, made)
        return

    from llava_sft.checkpoint.convert import hf2mcore, mcore2hf

    if args.direction == "hf2mcore":
        local = lambda name: download(name) if is_hub(str(name)) else name  # noqa: E731
        parts = {part: local(name) for part, name in parts.items()}
        done = hf2mcore(local(source), args.target, model, args.sidecars, parts)
        done["source"] = args.source
    else:
        gate = None
        if args.samples:
            from llava_sft.checkpoint.parity import check_parity

            gate = partial(check_parity, source, model, args.samples, args.parity)
        done = mcore2hf(source, args.target, args.sidecars, model, args.min_pixels, args.max_pixels, gate)
    done["depends"] = depends
    write_json(marker, done)
    if args.done:
        write_json(args.done, done)
    facts = f"{done['tensors']} tensors, {done['parameters']:,} parameters, {done['dtype']}"
    print(f"{args.source} → {args.target}: {facts}")


def source_fingerprint(source: Path | str) -> str:
    """Names, sizes and times of the weight files, and the content of what describes them; a hub id stands for itself."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    files = sorted(path for path in folder.glob("*/*" if is_legacy(folder) else "*") if path.is_file())
    small = [path for path in files if path.name in ("config.json", ".metadata", "model.safetensors.index.json")]
    weights = [path for path in files if path.suffix in (".safetensors", ".distcp", ".pt")]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return fingerprint([[file_fingerprint(path) for path in small], stats])


if __name__ == "__main__":
    main()
