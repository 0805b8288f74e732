"""Convert a checkpoint between Hugging Face and Megatron-Core (torch_dist), one tensor in memory at a time.

convert_checkpoint.py hf2mcore LLaVA-OneVision-1.5-4B-Base LLaVA-OneVision-1.5-4B-Base_mcore_tp1_pp1 --model 4b
convert_checkpoint.py mcore2hf output/stage2_sft_vqa/iter_0000800 exported --model tiny
"""

import argparse
from pathlib import Path

from llava_sft.checkpoint.start import MARKER, SIDECARS, is_megatron, newest_checkpoint
from llava_sft.errors import exits_cleanly
from llava_sft.files import file_fingerprint, fingerprint, read_json, write_json
from llava_sft.model.config import load_model_config


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=["hf2mcore", "mcore2hf"])
    parser.add_argument("source", type=Path, help="Hugging Face folder | run directory, iter_0000400 or release folder")
    parser.add_argument("target", type=Path, help="folder to write; it appears only when it is whole")
    parser.add_argument("--model", required=True, help="config/models/<model>.yaml, or a path")
    parser.add_argument("--sidecars", type=Path, help="mcore2hf: folder with config and tokenizer (beside the source)")
    parser.add_argument("--min-pixels", type=int, default=3136, help="mcore2hf: written for inference")
    parser.add_argument("--max-pixels", type=int, default=1_000_000, help="mcore2hf: written for inference")
    parser.add_argument("--done", type=Path, help="also write the marker here")
    args = parser.parse_args()
    path = Path(args.model)
    model = load_model_config(path if path.suffix == ".yaml" else Path("config/models") / f"{args.model}.yaml")

    if args.direction == "mcore2hf":
        args.sidecars = args.sidecars or (args.source if is_megatron(args.source) else args.source.parent) / SIDECARS
        args.source = newest_checkpoint(args.source)

    # What the result depends on. When it is the same as last time there is nothing to do, and torch is not imported.
    depends = {
        "direction": args.direction,
        "source": source_fingerprint(args.source),
        "model": model.model_dump(),
        "pixels": [args.min_pixels, args.max_pixels] if args.direction == "mcore2hf" else None,
    }
    marker = args.target / MARKER
    if marker.is_file() and read_json(marker).get("depends") == fingerprint(depends):
        print(f"{args.target}: made from the same source, nothing to convert")
        if args.done:
            write_json(args.done, read_json(marker))
        return

    from llava_sft.checkpoint.convert import hf2mcore, mcore2hf

    if args.direction == "hf2mcore":
        done = hf2mcore(args.source, args.target, model)
    else:
        done = mcore2hf(args.source, args.target, args.sidecars, model, args.min_pixels, args.max_pixels)
    done["depends"] = fingerprint(depends)
    write_json(marker, done)
    if args.done:
        write_json(args.done, done)
    print(
        f"{args.source} → {args.target}: {done['tensors']} tensors, {done['parameters']:,} parameters, {done['dtype']}"
    )


def source_fingerprint(source: Path) -> str:
    """Names, sizes and times of the weight files, and the content of what describes them."""
    if not source.is_dir():
        return "missing"
    files = sorted(path for path in source.iterdir() if path.is_file())
    small = [path for path in files if path.name in ("config.json", ".metadata", "model.safetensors.index.json")]
    weights = [path for path in files if path.suffix in (".safetensors", ".distcp")]
    return fingerprint(
        [
            [file_fingerprint(path) for path in small],
            [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weights],
        ]
    )


if __name__ == "__main__":
    main()
