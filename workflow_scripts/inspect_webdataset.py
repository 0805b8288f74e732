"""Look at a WebDataset: is it complete, does the index match the tars, what does it contain. Exit code 1 when it is broken."""

from pathlib import Path
from typing import Any

from llava_sft.command_line import Parser
from llava_sft.data.adopt import adopt_webdataset
from llava_sft.data.findings import IMAGES, INDEX, TokenCounter
from llava_sft.data.index import index_webdataset
from llava_sft.data.inspect import CHANGED, inspect_webdataset
from llava_sft.data.notes import way_out, without_images_like_it
from llava_sft.data.nv_meta import REINDEX, Dataset, source_folders
from llava_sft.data.plan import notes_of
from llava_sft.errors import DataError, exits_cleanly, many
from llava_sft.files import read_json, write_json, write_text
from llava_sft.model.processing import MAX_PIXELS, MIN_PIXELS
from llava_sft.report.inspection import inspection_page
from llava_sft.report.language import sayer, spoken

PROBLEMS_PRINTED = 10


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("wds_dir", type=Path, metavar="WDS_DIR", help="folder with the shards and .nv-meta")
    add("--parts-dir", type=Path, help="what the conversion noted (WDS_DIR.parts, if there)")
    add("--dataset", type=Path, metavar="DATASET.json", help="check the counts of this dataset file too")
    add("--json", type=Path, metavar="FILE", help="write the report as JSON")
    add("--html", type=Path, metavar="FILE", help="write the report as one self-contained page")
    add("--seed", type=int, default=0, help="of the gallery and of the images decoded (%(default)s)")
    add(
        "--language", choices=["auto", "en", "zh"], default="auto", help="of the page (%(default)s: that of the locale)"
    )
    add("--fix", action="store_true", help="write .nv-meta and .tar.idx anew first; no tar is touched")
    add("--tokenizer", type=Path, nargs="?", metavar="FOLDER", help="count tokens with this tokenizer.json")
    add("--seq-length", type=int, default=32768, help="… and what this length would cut (%(default)s)")
    add("--min-pixels", type=int, default=MIN_PIXELS, help="… with images of at least (%(default)s)")
    add("--max-pixels", type=int, default=MAX_PIXELS, help="… and at most (%(default)s)")
    args = parser.parse_args()
    notes_dir = notes_of(args.wds_dir, args.parts_dir)
    if args.dataset and not args.dataset.is_file():
        raise DataError(
            f"dataset file {args.dataset} does not exist", "run index_webdataset.py, or leave --dataset out"
        )

    dataset = args.dataset and read_json(args.dataset)
    if args.fix:
        rebuild(args.wds_dir, notes_dir, dataset)
    tokens = None
    if args.tokenizer:
        tokens = TokenCounter(args.tokenizer, args.seq_length, args.min_pixels, args.max_pixels)
    report, gallery = inspect_webdataset(args.wds_dir, notes_dir, dataset, args.seed, tokens)
    if args.json:
        write_json(args.json, report, sealed=True)
    language = spoken(args.language)
    page = args.html and write_page(args.html, report, gallery, language)

    print_summary(report)
    if report["problems"]:
        first = "\n".join(f"  {p['where']}: {p['what']}" for p in report["problems"][:PROBLEMS_PRINTED])
        raise DataError(
            f"{args.wds_dir} is broken. The first problems:\n{first}" + (f"\nall: {page}" if page else ""),
            fix_of(args.wds_dir, report["problems"]),
        )
    say = sayer(language)
    print(
        say("%(folder)s is complete", folder=args.wds_dir)
        + (say("; see %(page)s", page=args.html) if args.html else "")
    )


def print_summary(report: dict[str, Any]) -> None:
    for split, counts in report["splits"].items():
        print(
            f"{split}: {many(counts['samples'], 'sample')} in {many(counts['shards'], 'shard')}, {counts['bytes'] / 1e6:,.1f} MB"
        )
    for name in ("tokens", "turns", "images per sample", "answer length"):
        if values := report["distributions"].get(name):
            print(f"{name}: median {values['median']}, 95 % up to {values['p95']}, largest {values['max']}")
    if length := report["sequence_length"]:
        print(
            f"seq_length {length['seq_length']:,}: {many(length['cut'], 'sample')} cut, {length['left_out']:,} left out"
        )
    for what, counts in report["duplicates"].items():
        if counts["repeated"]:
            print(f"duplicates: {many(counts['repeated'], what, 'repeat')} an earlier one")
    if rejects := report["rejects"]:
        print(f"rejects: {rejects['rejected']:,} of {many(rejects['read'], 'record')}")
    for key, row in report["unread"].items():
        print(f"note: not read: the key {key} of {many(row['records'], 'record')} ({row['example']})")
    for note in report["notes"]:
        print(f"note: {note}")
    for check in report["checks"]:
        verdict = f"{check['problems']:,} wrong" if check["problems"] else "ok"
        print(f"{check['name']}: {check['looked_at']:,} checked, {verdict}")


def write_page(page: Path, report: dict[str, Any], gallery: list[dict[str, Any]], language: str) -> Path:
    """Write the page, and return where it lies: of a failed check it is `NAME.broken.html`, with the report as
    `NAME.broken.json` beside it, because Snakemake deletes what a failed rule wrote under the rule's own names."""
    broken = page.with_stem(f"{page.stem}.broken")
    broken_report = broken.with_suffix(".json")
    if report["ok"]:
        write_text(page, inspection_page(report, gallery, language))
        broken.unlink(missing_ok=True)
        broken_report.unlink(missing_ok=True)
        return page
    write_text(broken, inspection_page(report, gallery, language))
    write_json(broken_report, report, sealed=True)
    page.unlink(missing_ok=True)
    return broken


def fix_of(wds_dir: Path, problems: list[dict[str, str]]) -> str:
    """What mends the first problem; a tar whose bytes changed counts before what was read from it."""
    first = next((problem for problem in problems if problem["what"] == CHANGED), problems[0])
    name = first["where"].split(":")[0]
    folder = next((folder for folder in source_folders(wds_dir) if (folder / name).is_file()), None)
    if not name.endswith(".tar") or folder is None or first["check"] == INDEX:
        return REINDEX
    return (without_images_like_it if first["check"] == IMAGES else way_out)(folder, name)


def rebuild(wds_dir: Path, notes_dir: Path, dataset: Dataset | None) -> None:
    """Write the index anew; sources' weights and val_fraction are those of the dataset file, given or beside the folder."""
    if not notes_dir.is_dir():
        adopt_webdataset(wds_dir, wds_dir, max_reject_fraction=1)
        return
    beside = (read_json(wds_dir.with_name(name), {}) for name in (f"{wds_dir.name}.json", "dataset.json"))
    known: dict[str, Any] = dict(dataset or next(filter(None, beside), {}))
    plan = [{"name": name, "weight": weight} for name, weight in known.get("weights", {}).items()]
    split = known.get("split", {"val_fraction": 0.0, "split_seed": 0})
    index_webdataset(wds_dir, notes_dir, 1, plan, split["val_fraction"], split["split_seed"])


if __name__ == "__main__":
    main()
