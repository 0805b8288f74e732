"""Ask a model about pictures, or talk with it: an export, a run, a checkpoint, or a model of the Hugging Face hub.

    chat.py output/stage2_sft_vqa --image digit.png                       a conversation on the terminal
    chat.py output/stage2_sft_vqa --image digit.png "Which digit is it?"  the answer alone on stdout; the rest on stderr
    chat.py output/stage2_sft_vqa --web                                   a page on http://127.0.0.1:7860

In a conversation: /image FILE… gives pictures to the next question, /reset begins another, /quit ends it (Ctrl-D too).
Ctrl-C ends an answer; once more, it ends the program.
"""

import argparse
import contextlib
import os
import shlex
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from llava_sft.chat.models import CHOICES, find_model
from llava_sft.chat.questions import Turn, checked, question, read_picture
from llava_sft.chat.web import check_page, serve
from llava_sft.checkpoint.verify import export_in
from llava_sft.command_line import Parser
from llava_sft.errors import INTERRUPTED, SettingsError, SftError, exits_cleanly
from llava_sft.evaluation.view import readable
from llava_sft.model.export_files import COLDEST, HOTTEST
from llava_sft.run.layout import RESULTS

if TYPE_CHECKING:
    from llava_sft.chat.answers import Model

COMMANDS = "/image FILE… gives pictures to the next question, /reset begins another conversation, /quit ends it"


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", help=CHOICES)
    add("question", nargs="?", help="asked alone; without it: a conversation")
    add("--image", action="append", default=[], metavar="FILE", help="a picture to ask about; may stand several times")
    add("--system", metavar="TEXT", help="system prompt (default: that of the training)")
    add("--max-new-tokens", type=int, default=1024, metavar="N", help="longest answer (default: 1024)")
    add("--temperature", type=float, default=0.0, metavar="T", help="above 0: answers vary (default: 0, the likeliest)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: as the weights are stored")
    add("--web", action="store_true", help="a page for this machine's browser, on 127.0.0.1")
    add("--port", type=int, default=7860, help="of the page (default: 7860)")
    args = parser.parse_intermixed_args()
    try:
        run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read the answer has ended; Python would write the rest once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(args: argparse.Namespace) -> None:
    if not args.model:
        made = sorted(str(path) for path in Path("output").glob(f"stage*{RESULTS}") if export_in(path))
        raise SettingsError("no model is named", f"one of {', '.join(made)}" if made else CHOICES)
    if args.max_new_tokens < 1 or not (args.temperature == 0 or COLDEST <= args.temperature <= HOTTEST):
        raise SettingsError(
            f"--max-new-tokens must be at least 1, --temperature 0 or {COLDEST} to {HOTTEST:g}",
            "the defaults: 1024 and 0",
        )
    if args.question is not None and not args.question.strip():
        raise SettingsError("the question is empty", "leave it out, for a conversation")
    pictures = [read_picture(path) for path in args.image]  # before an export is made
    first = [Turn("system", checked(args.system))] if args.system else []
    asked = question(args.question, pictures) if args.question is not None else None
    if args.web:
        if asked or pictures:
            raise SettingsError("--web takes no question and no --image", "leave them out: the page asks for both")
        check_page(args.port)
    elif not asked and sys.stdin is None:
        raise SettingsError("there is no question, and stdin is closed", 'chat.py MODEL "the question"')
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, TextIOWrapper):  # not closed, nor a stand-in
            stream.reconfigure(errors=errors)
    folder = find_model(args.model)
    print(f"{folder}: loading", file=sys.stderr, flush=True)

    from llava_sft.chat.answers import Model

    with contextlib.redirect_stdout(sys.stderr), readable(folder) as path:
        model = Model(path, args.device, args.dtype, args.max_new_tokens, args.temperature)
    print(f"{folder}: {model}", file=sys.stderr, flush=True)
    if args.web:
        serve(model, args.model, first, args.port)
    elif asked:
        if say(model, [*first, asked])[1]:
            sys.exit(INTERRUPTED)
    else:
        converse(model, first, pictures)


def say(model: "Model", turns: list[Turn]) -> tuple[str, bool]:
    """Print the answer as it comes; returns its text, and whether Ctrl-C ended it."""
    text, interrupted = "", False
    try:
        with contextlib.closing(model.answer(turns)) as pieces:
            for piece in pieces:
                text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    if model.was_cut and not interrupted:
        print("(cut: --max-new-tokens)", file=sys.stderr)
    return text.strip(), interrupted


def converse(model: "Model", first: list[Turn], pictures: list) -> None:
    """Answer line after line of stdin, each with all that was said before."""
    terminal, turns, interrupted = sys.stdin.isatty(), list(first), False
    if terminal:
        import readline

        readline.parse_and_bind("tab: complete")
        print(COMMANDS, file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            print("\n(Ctrl-C once more ends the conversation)", file=sys.stderr)
            continue
        interrupted = False
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                turns, pictures = list(first), []
            elif command == "/image":
                pictures = [*pictures, *map(read_picture, words(rest))]
                print(f"pictures for the next question: {len(pictures)}", file=sys.stderr)
            elif command.startswith("/"):
                raise SettingsError(f"{command}: no such command", COMMANDS)
            elif line:
                asked = question(line, pictures)
                text, interrupted = say(model, [*turns, asked])
                if text:
                    turns, pictures = [*turns, asked, Turn("assistant", text)], []
        except SftError as error:
            if not terminal:
                raise
            print(f"error: {error}", file=sys.stderr)


def words(text: str) -> list[str]:
    """File names as a shell or a file manager writes them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"/image {text}: {error}", "quote names that hold spaces or quotes") from None


if __name__ == "__main__":
    main()
