"""Write one page with runs side by side: curves, settings that differ, accuracy on the same questions, answers that differ.

make compare RUNS=stage2_sft_vqa,stage2_sft_vqa_lr5e-06
"""

import argparse
import re
from pathlib import Path

from llava_sft.command_line import Parser
from llava_sft.data.stored import read_split
from llava_sft.errors import RunError, exits_cleanly, require_folder
from llava_sft.files import write_text
from llava_sft.report.answers import table
from llava_sft.report.charts import charts, vega
from llava_sft.report.figures import best_validation, measured
from llava_sft.report.html import points, refuse_others_page, render
from llava_sft.report.language import Say, sayer, spoken
from llava_sft.report.places import links
from llava_sft.report.runs import Run, against_first, differing_settings, numbered, read, same_questions
from llava_sft.run.layout import results_of

COLOURS = 6


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", metavar="A,B", help="names of runs, or their folders; the first is what the others are held against"
    )
    parser.add_argument("--exp-dir", type=Path, default=Path("output"), help="EXP_DIR (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="HTML", help="the page (EXP_DIR/compare_A_B.html)")
    parser.add_argument(
        "--language", choices=["auto", "en", "zh"], help="of the page (what the first run's settings say)"
    )
    args = parser.parse_args()
    names = [Path(name.strip()) for name in re.split("[,，]", args.runs) if name.strip()]
    if not all(name.is_dir() for name in names):
        require_folder(args.exp_dir)
    folders = [name if name.is_dir() else args.exp_dir / name for name in names]
    if not 2 <= len(set(folders)) == len(folders) <= COLOURS:
        raise RunError(
            f"RUNS={args.runs}: two to {COLOURS} different runs", "make compare RUNS=stage2_sft_a,stage2_sft_b"
        )
    runs = [read(folder) for folder in folders]
    language = spoken(args.language or runs[0].resolved.settings.report_language)
    output = args.output or args.exp_dir / f"compare_{'_'.join(folder.name for folder in folders)}.html"
    refuse_others_page(output)
    write_text(output, page(runs, folders, output, language))
    say = sayer(language)
    print(say("comparison: %(path)s", path=output))


def page(runs: list[Run], folders: list[Path], output: Path, language: str) -> str:
    say, names = sayer(language), [run.records.name for run in runs]
    ids = same_questions(runs)
    compared = against_first(runs, ids) if ids else []
    answers = None
    if ids:
        rows, data = [[run.rows[i] for i in ids] for run in runs], runs[0].resolved.data.path
        wanted, split = set(ids), read_split(data, runs[0].evaluation["split"])
        answers = table(
            rows, names, (each for name, each in numbered(split, lambda sample: sample.id) if name in wanted)
        )
    return render(
        "compare.html.j2",
        language,
        names=names,
        runs=[
            run._asdict() | measured(run.records.metrics) | {"best": best_validation(run.records.validations)}
            for run in runs
        ],
        reports=[links(output, report=results_of(folder) / "report.html").get("report") for folder in folders],
        headlines=[  # none where the runs have no question in common
            headline(names[0], name, found, say) for name, found in list(zip(names, compared, strict=bool(ids)))[1:]
        ],
        settings=differing_settings(runs),
        compared=compared,
        questions=len(ids),
        curves=charts([run.records for run in runs], say),
        answers=answers,
        vega=vega,
    )


def headline(first: str, name: str, found: dict, say: Say) -> str:
    low, high = found["interval_of_difference"]
    values = {
        "name": name,
        "first": first,
        "change": points(found["difference"]),
        "low": points(low),
        "high": points(high),
    }
    if low > 0:
        return say("%(name)s answers better than %(first)s: %(change)s points (%(low)s to %(high)s).", **values)
    if high < 0:
        return say("%(name)s answers worse than %(first)s: %(change)s points (%(low)s to %(high)s).", **values)
    return say(
        "Between %(name)s and %(first)s there is no difference that chance alone could not explain: %(change)s points "
        "(%(low)s to %(high)s).", **values,
    )  # fmt: skip


if __name__ == "__main__":
    main()
