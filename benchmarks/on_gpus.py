"""The figures of a GPU machine, each set of them by one command. It needs no network, and any Python that has the packages.

    python benchmarks/on_gpus.py lora --seconds 300      # one H200: LoRA beside training the same parts in full
    python benchmarks/on_gpus.py two --seconds 900       # two GPUs: layouts, runs that are killed
    python benchmarks/on_gpus.py two_8b --seconds 1200   # two GPUs of 80 GB: 8B
    python benchmarks/on_gpus.py speed --seconds 1200    # one H200 with FlashAttention-4
    python benchmarks/on_gpus.py lora --read FOLDER      # on any machine: results/ from the figures of that one

Makes its data first. Nothing is begun once the seconds are over; what was measured by then lies in the folder, a file for each
process, written after each of its cases. `--show` prints the commands, which can be given one by one, too.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from results import DEADLINE, ROOT, seconds_left

SCRIPTS = ROOT / "workflow_scripts"
TESTS = "-m pytest -q -rs tests/test_gpu.py"
SETS = {  # name: (what is measured, what is made of it)
    "lora": (
        [
            "benchmarks/lora.py {data} --only long-language long-lora long-full --output {figures}/lora",
            f"{TESTS} -n 3 -k megatrons_layers",
        ],
        ["benchmarks/lora.py {data} --read {figures}/lora", "benchmarks/preflight.py gpu"],
    ),
    "two": (
        [
            "benchmarks/scaling.py {data} --only one tp2 pp2 --output {figures}/scaling",
            f"{TESTS} -n 3 -k two_gpus",
            # Tensor-parallel ranks want long chunks: beside one GPU with such.
            "benchmarks/scaling.py {data} --chunk 8192 --only tp2 one --packs 16 --loss-steps 3 --output {figures}/whole",
        ],
        [
            "benchmarks/scaling.py {data} --read {figures}/scaling",
            "benchmarks/scaling.py {data} --read {figures}/whole",
            "benchmarks/preflight.py errors",
        ],
    ),
    "two_8b": (
        [
            f"benchmarks/scaling.py {{data}} --model 8b --packs 16 --loss-steps 3 {how} --output {{figures}}/8b"
            for how in (
                """--only pp2 --values '{{"recompute_vision": "full"}}'""",
                "--only tp2",
                """--only dp2 --values '{{"recompute_language": "full"}}'""",
            )
        ]
        + [
            "benchmarks/scaling.py {data} --model 8b --layers 18 --packs 4 --output {figures}/8b_losses",
        ],
        [
            "benchmarks/scaling.py {data} --read {figures}/8b",
            "benchmarks/scaling.py {data} --read {figures}/8b_losses",
            "benchmarks/preflight.py errors",
        ],
    ),
    "speed": (
        [
            "benchmarks/training.py {data} --parts flash4 --output {figures}/speed",
            "benchmarks/training.py {data} --parts checkpoint 8b --output {figures}/speed",
            f"{TESTS} -n 8",
        ],
        ["benchmarks/training.py {data} --read {figures}/speed", "benchmarks/preflight.py gpu"],
    ),
}


def data_commands(folder: Path, records: int, longest: int | None = None) -> Iterator[list]:
    """Photographs as a WebDataset in FOLDER/wds, and a tokenizer in FOLDER/tokenizer."""
    longer = ["--longest", longest] if longest else []
    yield [ROOT / "benchmarks/make_photos.py", "--output-dir", folder / "photos", "--records", records, *longer]
    demo = ["--output-dir", folder / "demo", "--checkpoint-dir", folder / "tokenizer"]
    yield [SCRIPTS / "make_demo_vqa.py", *demo]
    made = ["--input", folder / "photos/train.jsonl", "--image-root", folder / "photos/images"]
    yield [SCRIPTS / "stage2_sftdata2webdataset.py", *made, "--output-dir", folder / "wds"]
    yield [SCRIPTS / "index_webdataset.py", folder / "wds"]


def run(command: list) -> int:
    paths = [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="nothing is begun after them")
    parser.add_argument("--folder", type=Path, default=Path("output/on_gpus"), help="for data and figures")
    parser.add_argument("--records", type=int, default=1000, help="of the data")
    parser.add_argument("--read", type=Path, help="such a folder, of another machine: write results/ from its figures")
    parser.add_argument("--show", action="store_true", help="print the commands, run none")
    args = parser.parse_args()
    os.environ[DEADLINE] = str(time.time() + args.seconds)
    folder = (args.read or args.folder).absolute()
    words = {"data": shlex.join([str(folder / "wds"), str(folder / "tokenizer")])}
    words |= {"figures": shlex.quote(str(folder / "figures"))}
    commands = [shlex.split(command.format(**words)) for command in SETS[args.set][bool(args.read)]]
    if not args.read and not (folder / "wds/.nv-meta").is_dir():
        longest = {"lora": 4000}.get(args.set)
        commands = [list(map(str, command)) for command in data_commands(folder, args.records, longest)] + commands
    failed = False
    for command in commands:
        shown = shlex.join(["python", *command]).replace(f"{ROOT}/", "")
        if args.show:
            print(shown)
        elif seconds_left() <= 0:
            print(f"not begun, the time is over: {shown}", flush=True)
        else:
            print(
                f"{args.seconds - seconds_left():.0f} s: {shown}" if args.seconds < float("inf") else shown, flush=True
            )
            failed |= bool(run(command))
    sys.exit(failed)


if __name__ == "__main__":
    main()
