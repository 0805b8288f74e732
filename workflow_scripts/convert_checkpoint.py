"""Convert a checkpoint between Hugging Face and Megatron-Core (torch_dist), one tensor in memory at a time.

    convert_checkpoint.py hf2mcore LLaVA-OneVision-1.5-4B-Base LLaVA-OneVision-1.5-4B-Base_mcore_tp1_pp1 --model 4b
    convert_checkpoint.py mcore2hf output/stage2_sft_vqa/iter_0000800 exported --samples output/data/vqa/webdatasets
    convert_checkpoint.py mcore2peft output/stage2_sft_vqa/iter_0000800 adapter
    convert_checkpoint.py merge LLaVA-OneVision-1.5-4B-Instruct adapter other:0.5 merged
    convert_checkpoint.py verify exported

hf2mcore also takes a hub id (org/name or org/name@revision) and Megatron folders of the original project
(release/mp_rank_00/…); --part also Qwen3 and RICE-ViT as published. Of a PEFT folder it converts the base, with the pairs
beside it.
mcore2hf with --samples loads the export and compares it with the Megatron model before it gets its name.
merge adds the pairs of PEFT folders, each times the number behind it, to the base's weights: an adapter that is not named
is left out, and the base alone is the folder that it is.
verify compares every byte of an export, a converted folder, or a run's checkpoint with what was written.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

from llava_sft.checkpoint.architecture import model_to_export, with_start_positions
from llava_sft.checkpoint.hf_folder import ADAPTER
from llava_sft.checkpoint.hub import fetch
from llava_sft.checkpoint.peft import Adapter
from llava_sft.checkpoint.requests import base_to_merge, refuse_unmeant, trained_checkpoint, untrained_checkpoint
from llava_sft.checkpoint.start import Checkpoint, existing_checkpoint, is_legacy, named_parts, read_hf_config
from llava_sft.checkpoint.verify import MARKER, export_in, require_whole, verify
from llava_sft.command_line import Parser
from llava_sft.errors import READABLE, CheckpointError, SettingsError, exits_cleanly, many
from llava_sft.files import file_fingerprint, fingerprint, read_object, write_json
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.model.export_files import export_form, image_limits
from llava_sft.model.hf_config import model_of_config
from llava_sft.model.processing import MAX_PIXELS, MIN_PIXELS
from llava_sft.publish.card import write_card
from llava_sft.run.layout import ITERATION, RUN_FILE, SIDECARS
from llava_sft.settings.layers import load_model


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    directions = ["hf2mcore", "mcore2hf", "mcore2peft", "merge", "verify"]
    add("direction", choices=directions)
    add(
        "source",
        help="Hugging Face folder, org/name or org/name@revision | run directory, iter_0000400 or release folder",
    )
    direction = next((word for word in sys.argv[1:] if word in directions), "")
    if direction == "merge":
        add(
            "adapters",
            nargs="+",
            metavar="adapter[:number]",
            help="PEFT folder, and the factor for its pairs (default 1)",
        )
    # An optional one would count as left out where options stand before it, as in the rules.
    optional = "?" if direction == "verify" else None
    add("target", type=Path, nargs=optional, help="folder to write; it appears only when it is whole")
    add("--model", help="config/models/<model>.yaml, or a path (default: what run.json or config.json says)")
    add("--sidecars", type=Path, help="folder with config and tokenizer (default: in or beside the source)")
    add("--part", action="append", default=[], metavar="PART=FOLDER",
        help="hf2mcore: take language_model, vision_model or adapter from there; adapter=random")  # fmt: skip
    add("--base", default="", help="mcore2peft: written as the base's folder or hub id (default: as it was loaded)")
    add("--min-pixels", type=int, help="mcore2hf: written for inference (default: as in the training)")
    add("--max-pixels", type=int, help="mcore2hf: written for inference (default: as in the training)")
    add("--samples", type=Path,
        help="mcore2hf: WebDataset whose samples the export is compared on with the Megatron model")  # fmt: skip
    add("--parity", choices=["check", "cpu", "gpu", "skip"], default="check", help="mcore2hf: where to compare")
    add("--export-names", choices=["model", "published"], default="model",
        help="mcore2hf: spelling of the tensors' names, see config/config.yaml")  # fmt: skip
    add("--done", type=Path, help="also write the marker here")
    args = parser.parse_intermixed_args()  # the target comes after the options, behind a `--`
    refuse_unmeant(args, parser)
    if args.direction == "verify":
        folder = Path(args.source)
        made = export_in(folder) or (folder if (folder / MARKER).is_file() else existing_checkpoint(folder))
        print(verify(made))
        return
    done = {"mcore2peft": export_peft, "merge": merge_adapters}.get(args.direction, convert)
    done(args)


def export_peft(args: argparse.Namespace) -> None:
    from llava_sft.checkpoint.adapters import write_peft

    source = trained_checkpoint(args.source)
    sidecars = args.sidecars or source.parent / SIDECARS
    model = model_to_export(source, sidecars, named_model(args)) or model_of_folder(sidecars)
    base = write_peft(source, args.target, model, args.base)
    print(f"{args.source} → {args.target}: LoRA's pairs as PEFT loads them, beside {base}")
    if Checkpoint.of(base.partition(" ")[0]).kind not in ("hub", "huggingface"):
        print(
            f"warning: PEFT cannot load {base}; name a Hugging Face folder (mcore2hf makes one) or a hub id with --base"
        )


def merge_adapters(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.of(args.source)
    folder = base_to_merge(checkpoint)
    adapters = [numbered(each) for each in args.adapters]
    folders = [adapter.folder.resolve() for adapter, _ in adapters]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise SettingsError(f"{twice[0]}: named twice", f"{twice[0]}:2 counts it twice")
    if args.target.exists():
        raise SettingsError(
            f"{args.target}: exists already", "the folder to write comes last: name a new one, or delete this one"
        )
    base, lines = fetch(args.source) if checkpoint.kind == "hub" else (folder, [])
    model = named_model(args) or model_of_folder(base)
    for adapter, number in adapters:
        lines.append(
            f"{adapter.folder}: × {number:g}: rank {adapter.rank}, alpha {adapter.alpha:g}, beside "
            f"{many(len(adapter.beside(model)), 'weight')} of {adapter.base or 'a base that it does not name'}"
        )
    print("\n".join(lines), flush=True)
    said = [fingerprint(read_object(adapter.folder / ADAPTER)) for adapter, _ in adapters]
    weights = [[source_fingerprint(folder) for folder in (base, *folders)], [number for _, number in adapters], said]
    about = {
        "depends": fingerprint(weights),
        "base": args.source if checkpoint.kind == "hub" else base.resolve().name,
        "adapters": [[folder.name, number] for folder, (_, number) in zip(folders, adapters, strict=True)],
    }
    from llava_sft.checkpoint.convert import merge

    say_done(args, merge(base, adapters, args.target, model, *limits_of(base, base, args), args.export_names, about))
    write_card(args.target, args.target.name)


def numbered(word: str) -> tuple[Adapter, float]:
    """A PEFT folder, and the number behind its last colon."""
    path, _, number = word.rpartition(":")
    if not path or Path(word).is_dir():
        return Adapter.of(Path(word)), 1.0
    try:
        value = float(number)
    except ValueError:
        raise SettingsError(f"{word}: no such folder", "a PEFT folder, or ADAPTER:NUMBER") from None
    if not math.isfinite(value) or not value:
        raise SettingsError(f"{word}: nothing is merged {number} times", "another number, or leave the adapter out")
    return Adapter.of(Path(path)), value


def convert(args: argparse.Namespace) -> None:
    if args.sidecars and not (args.sidecars / "tokenizer.json").is_file():
        raise CheckpointError(
            f"--sidecars {args.sidecars}: no tokenizer.json in it", "the Hugging Face folder of the model"
        )
    done = to_megatron(args) if args.direction == "hf2mcore" else to_hugging_face(args)
    if args.done:
        write_json(args.done, done, sealed=True)


def to_megatron(args: argparse.Namespace) -> dict:
    """The marker of the converted folder, made anew only where what it depends on has changed."""
    parts = named_parts((each.partition("=")[::2] for each in args.part), "--part {}={}")
    checkpoint = Checkpoint.of(args.source)
    adapter = Adapter.of(checkpoint.folder) if checkpoint.kind == "peft" else None
    if adapter and parts:
        raise SettingsError(
            f"--part, and {args.source} is a PEFT folder", "merge it first (merge), or leave --part out"
        )
    checkpoint = checkpoint.base
    on_hub = checkpoint.kind == "hub"
    source = checkpoint.folder if on_hub else untrained_checkpoint(checkpoint)
    model = named_model(args)
    if model is None and not on_hub:
        model = model_of_folder(args.sidecars or source)
    beside = [adapter.folder] if adapter else []
    depends = depends_on(args.direction, [source, *beside, *(part.name for part in parts.values())], list(parts), model)
    if made := made_before(args.target, depends):
        return made

    from llava_sft.checkpoint.convert import hf2mcore

    fetched = {each.name: fetch(each.name) for each in (checkpoint, *parts.values()) if each.kind == "hub"}
    commits = [line for _, lines in fetched.values() for line in lines]
    print("".join(f"{line}\n" for line in commits), end="", flush=True)
    folders = {part: fetched.get(each.name, (each.name,))[0] for part, each in parts.items()}
    folder = fetched[checkpoint.name][0] if on_hub else source
    model = model or model_of_folder(args.sidecars or folder)
    done = hf2mcore(folder, args.target, model, args.sidecars, folders, adapter)
    return finish(args, done | {"source": args.source, "notes": commits + done["notes"]}, depends)


def to_hugging_face(args: argparse.Namespace) -> dict:
    """The marker of the export, made anew only where what it depends on has changed."""
    source = trained_checkpoint(args.source)
    sidecars = args.sidecars or source.parent / SIDECARS
    named = named_model(args)
    if not (sidecars / "config.json").is_file():
        raise CheckpointError(
            f"{sidecars}: no config.json in it: tokenizer and config of this checkpoint",
            "--sidecars with the Hugging Face folder of the model",
        )
    limits = limits_of(source, sidecars, args)
    model = model_to_export(source, sidecars, named) or model_of_folder(sidecars)
    export = [export_form(), *limits, args.parity, bool(args.samples), args.export_names]
    depends = depends_on(args.direction, [source], [], model, export)
    if made := made_before(args.target, depends):
        return made

    from llava_sft.checkpoint.convert import mcore2hf

    model = with_start_positions(model, source, sidecars)
    gate = None
    if args.samples:
        from llava_sft.evaluation.parity import check_parity

        gate = partial(check_parity, source, model, args.samples, args.parity)
    done = mcore2hf(source, args.target, sidecars, model, *limits, args.export_names, gate)
    finish(args, done, depends)
    write_card(args.target)
    return done


def depends_on(
    direction: str, sources: list[Path | str], parts: list[str], model: ModelConfig | None, export: list | None = None
) -> str:
    """What the result depends on. When it is the same as last time there is nothing to do, and torch is not imported."""
    return fingerprint(
        {
            "direction": direction,
            "source": [source_fingerprint(source) for source in sources],
            "parts": [part.removesuffix("_model") for part in parts],  # as they were called: what is made stays
            "model": model and model.model_dump(),
            "export": export,
        }
    )


def finish(args: argparse.Namespace, done: dict, depends: str) -> dict:
    done["depends"] = depends
    write_json(args.target / MARKER, done, sealed=True)
    say_done(args, done)
    return done


def say_done(args: argparse.Namespace, done: dict) -> None:
    facts = f"{many(done['tensors'], 'tensor')}, {done['parameters']:,} parameters, {done['dtype']}"
    print(f"{args.source} → {args.target}: {facts}")


def made_before(target: Path, depends: str) -> dict | None:
    """The marker of `target` when it was made from the same and still holds what was written; else it is made anew."""
    try:
        made = read_object(target / MARKER, {})
        if made.get("depends") != depends:
            return None
        require_whole(target)
        print(f"{target}: made from the same source, nothing to convert")
        return made
    except CheckpointError as error:
        print(f"{error.problem}: made anew", flush=True)
        return None


def limits_of(source: Path, sidecars: Path, args: argparse.Namespace) -> tuple[int, int]:
    """Least and most pixels of an image: as given, else as trained with, else as the start checkpoint's folder says."""
    run_file = source.parent / RUN_FILE
    settings = read_object(run_file, {}).get("settings")  # of the run, if it belongs to one
    trained = (settings.get("min_pixels"), settings.get("max_pixels")) if isinstance(settings, dict) else None
    known = trained or image_limits(sidecars)
    least, most = known or (MIN_PIXELS, MAX_PIXELS)
    least = args.min_pixels if args.min_pixels is not None else least
    most = args.max_pixels if args.max_pixels is not None else most
    if not (type(least) is int and type(most) is int and 0 < least <= most):
        raise SettingsError(
            f"image limits {least} to {most} pixels", "--min-pixels and --max-pixels, 0 < least <= most"
        )
    if known is None and None in (args.min_pixels, args.max_pixels):
        print(f"image limits: {least:,} to {most:,} pixels: neither run nor start checkpoint says any")
    elif known is not None and (least, most) != known:
        origin = run_file if trained else sidecars
        print(f"image limits: {least:,} to {most:,} pixels as given; {origin} says {known[0]:,} to {known[1]:,}")
    elif not trained and ITERATION.fullmatch(source.name):
        print(f"image limits: {least:,} to {most:,} pixels, from {sidecars}: {run_file}, the run's own, is not there")
    return least, most


def named_model(args: argparse.Namespace) -> ModelConfig | None:
    """The sizes that --model names."""
    if not args.model:
        return None
    return load_model_config(args.model) if args.model.endswith(".yaml") else load_model(args.model)


def model_of_folder(folder: Path) -> ModelConfig:
    """The sizes that config.json says."""
    config = read_hf_config(folder)
    try:
        return model_of_config(config, folder.name)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error.problem}", f"--model MODEL; or: {error.fix}") from None


def source_fingerprint(source: Path | str) -> str:
    """Names, sizes and times of the weight files, and the content of what describes them; a hub id stands for itself."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    try:
        files = sorted(path for path in folder.glob("*/*" if is_legacy(folder) else "*") if path.is_file())
        small = [
            path for path in files if path.name in ("config.json", ADAPTER, ".metadata", "model.safetensors.index.json")
        ]
        weights = [path for path in files if path.suffix in (".safetensors", ".distcp", ".pt")]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
        return fingerprint([[file_fingerprint(path) for path in small], stats])
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}", READABLE) from None


if __name__ == "__main__":
    main()
