"""Write the embedded data set and the model that learns it: handwritten digits as visual questions, in the LLaVA form
that users bring, and a Hugging Face checkpoint with random weights to start from."""

import contextlib
import shutil
from pathlib import Path

from llava_sft.command_line import Parser
from llava_sft.data.demo import chat_texts, write_demo
from llava_sft.embedded import DEMO_BYTES, DEMO_CHECKPOINT, EMBEDDED, check_demo
from llava_sft.errors import exits_cleanly
from llava_sft.files import read_json, write_json
from llava_sft.model.config import load_model_config
from llava_sft.model.tensors import parameter_count
from llava_sft.run.layout import RESOLVED, RESULTS, RUN_FILE
from llava_sft.workflow import Workflow


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--clean", action="store_true", help="remove what the embedded experiment made, and nothing else")
    what.add_argument("--output-dir", type=Path, help="gets train.jsonl, heldout.jsonl and images/ (the image root)")
    add("--checkpoint-dir", type=Path, help="gets the start checkpoint, in Hugging Face format")
    add("--model", type=Path, default="config/models/tiny.yaml", help="sizes of the start checkpoint")
    add("--seed", type=int, default=1, help="of the random weights")
    add("--done", type=Path, help="written when all is there")
    add("--config", nargs="*", default=[], metavar="KEY=VALUE", help="with --clean: as exp_dir=elsewhere")
    args = parser.parse_args()
    if args.clean:
        clean(dict(pair.partition("=")[::2] for pair in args.config))
        return

    check_demo(args.output_dir)
    counts = write_demo(args.output_dir)
    print(f"{args.output_dir}: {counts['train']:,} records for training, {counts['heldout']:,} held out")

    if args.checkpoint_dir:
        from llava_sft.model.tiny import write_tiny_checkpoint  # torch and transformers: seconds

        model = load_model_config(args.model)
        write_tiny_checkpoint(args.checkpoint_dir, chat_texts(args.output_dir / "train.jsonl"), model, args.seed)
        print(f"{args.checkpoint_dir}: {parameter_count(model):,} parameters, random weights")
    if args.done:
        write_json(args.done, {"records": counts})


def clean(overrides: dict[str, str]) -> None:
    """Remove the demo, and the data, runs and converted checkpoint of the embedded experiment. Raises DataError, before
    anything is removed, where somebody else's files stand in the demo's folder."""
    paths = Workflow(overrides, []).paths(EMBEDDED)
    demo, exp_dir = paths.demo, paths.settings.exp_dir
    assert demo  # the embedded experiment has one
    check_demo(demo)
    gone = [paths.data, paths.demo_done, paths.converted, paths.converted_done]
    gone += [demo / name for name in (*DEMO_BYTES, "images", DEMO_CHECKPOINT)]
    for results in sorted(exp_dir.glob(f"*{RESULTS}")):
        run_dir = results.with_name(results.name.removesuffix(RESULTS))
        notes = (read_json(run_dir / RUN_FILE, {}), read_json(results / RESOLVED, {}))
        if any(note.get("settings", {}).get("experiment") == EMBEDDED for note in notes):
            gone += [results, run_dir]
    for path in filter(None, gone):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty: it holds files of the user's
        demo.rmdir()


if __name__ == "__main__":
    main()
