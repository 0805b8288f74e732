"""Write the embedded data set and the model that learns it: handwritten digits as visual questions, in the LLaVA form
that users bring, and a Hugging Face checkpoint with random weights to start from."""

import argparse
from pathlib import Path

from llava_sft.data.demo import chat_texts, write_demo
from llava_sft.errors import exits_cleanly
from llava_sft.files import write_json
from llava_sft.model.config import load_model_config
from llava_sft.paths import check_demo


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output-dir", type=Path, required=True, help="gets train.jsonl, heldout.jsonl and images/ (the image root)")
    add("--checkpoint-dir", type=Path, help="gets the start checkpoint, in Hugging Face format")
    add("--model", type=Path, default="config/models/tiny.yaml", help="sizes of the start checkpoint")
    add("--seed", type=int, default=1, help="of the random weights")
    add("--done", type=Path, help="written when all is there")
    args = parser.parse_args()

    check_demo(args.output_dir)
    counts = write_demo(args.output_dir)
    print(f"{args.output_dir}: {counts['train']:,} records for training, {counts['heldout']:,} held out")

    if args.checkpoint_dir:
        from llava_sft.model.tiny import write_tiny_checkpoint  # torch and transformers: seconds

        model = load_model_config(args.model)
        write_tiny_checkpoint(args.checkpoint_dir, chat_texts(args.output_dir / "train.jsonl"), model, args.seed)
        print(f"{args.checkpoint_dir}: {model.parameter_count():,} parameters, random weights")
    if args.done:
        write_json(args.done, {"records": counts})


if __name__ == "__main__":
    main()
