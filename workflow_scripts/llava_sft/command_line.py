"""Options of a script, with one message for a wrong one: what it is, and which was meant. No usage of twenty lines before it.

Notable: an option of the same meaning in other programs (lmms-eval, vLLM, transformers, LLaMA-Factory) is known by name.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from llava_sft.errors import nearest, shown

WRONG_OPTION = 2  # exit code, as argparse has it
# By an option of other programs, ours of the same meaning, where the script has one of these.
ELSEWHERE = {
    "limit": ("samples",), "num-samples": ("samples",), "max-samples": ("samples",), "num-fewshot": (),
    "output-path": ("output",), "output-dir": ("output", "target"), "out": ("output", "target"), "save": ("target",),
    "save-dir": ("target", "output"), "save-path": ("target", "output"), "export-dir": ("target", "output"),
    "tasks": ("DATA",), "dataset-path": ("DATA",), "eval-dataset": ("DATA",), "data-path": ("DATA",),
    "model": ("EXPORT", "model"), "model-path": ("EXPORT", "model", "source"), "model-name-or-path": ("EXPORT", "model", "source"),
    "model-args": ("EXPORT",), "pretrained": ("EXPORT", "source"), "load": ("source",), "load-dir": ("source",),
    "hf-model": ("source",), "input": ("source",), "checkpoint": ("source", "EXPORT"), "ckpt": ("source", "EXPORT"),
    "max-tokens": ("max-new-tokens",), "max-length": ("max-new-tokens",), "gen-kwargs": ("max-new-tokens",),
    "metric": ("scores",), "metrics": ("scores",), "score": ("scores",), "bs": ("batch-size",),
    "per-device-eval-batch-size": ("batch-size",), "image-folder": ("image-root",), "image-dir": ("image-root",),
    "images": ("image", "image-root"), "image-path": ("image", "image-root"), "image-file": ("image",),
    "prompt": ("question",), "query": ("question",), "text": ("question",), "system-prompt": ("system",),
    "temp": ("temperature",), "torch-dtype": ("dtype",), "precision": ("dtype",), "server-port": ("port",),
    "repo": ("repository",), "repo-id": ("repository",), "hub-model-id": ("repository",), "hf-repo": ("repository",),
    "out-dir": ("output", "target"), "lang": ("language",), "exp": ("exp-dir",), "tokenizer": ("sidecars",),
    "tokenizer-path": ("sidecars",), "lora": ("adapters",), "adapter": ("adapters",), "adapter-name-or-path": ("adapters",),
}  # fmt: skip

# The same for what an option may be.
CHOICES = {
    "test": ("val",), "validation": ("val",), "dev": ("val",), "heldout": ("val",), "bf16": ("bfloat16",), "fp32": ("float32",),
    "gpu": ("cuda",), "hf": ("transformers",), "cn": ("zh",), "chinese": ("zh",), "english": ("en",), "mcore2huggingface": ("mcore2hf",),
    "megatron2hf": ("mcore2hf",), "hf2megatron": ("hf2mcore",), "huggingface2mcore": ("hf2mcore",), "lora2hf": ("mcore2peft",),
}  # fmt: skip


def at_home(args: Any) -> Any:
    """With `~` in paths as the home folder, which a shell leaves as it is in --output=~/folder."""
    for name, value in vars(args).items():
        home = Path(value).expanduser() if str(value).startswith("~/") else None
        if home and (isinstance(value, Path) or home.exists()):
            setattr(args, name, type(value)(str(home)))
    return args


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are a problem and a fix. Exit code 2."""

    def parse_args(self, *given: Any) -> Any:  # type: ignore[override]  # its overloads
        return at_home(super().parse_args(*given))

    def parse_intermixed_args(self, *given: Any) -> Any:  # type: ignore[override]
        return at_home(super().parse_intermixed_args(*given))

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\n  fix: {self.fix(message)}", file=sys.stderr, flush=True)
        sys.exit(WRONG_OPTION)

    def fix(self, message: str) -> str:
        """What to write instead of what argparse's own message is about."""
        all_of_them = f"{self.prog} --help lists what there is"
        if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
            options = [word.partition("=")[0] for word in found[1].split() if word.startswith("-")]
            meant = [self.meant(option) for option in options]
            if not options:
                return f"{self._call()}; what holds spaces stands in quotes; {all_of_them}"
            return "; ".join([*dict.fromkeys(filter(None, meant)), all_of_them])
        if found := re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message, re.DOTALL):
            choices = re.findall(r"[^\s,']+", found[3])
            near = next(
                (each for each in CHOICES.get(found[2].lower(), ()) if each in choices), nearest(found[2], choices)
            )
            return f"did you mean {near}? {all_of_them}" if near else f"one of these; {all_of_them}"
        if found := re.match(r"argument (\S+): invalid loads value", message):
            return f'JSON in quotes, as in {found[1]} \'{{"question": "q"}}\'; {all_of_them}'
        if found := re.match(r"argument (\S+): invalid (int|float) value", message):
            whole = found[2] == "int"
            return (
                f"a {'whole ' * whole}number in digits alone, as in `{found[1]} {64 if whole else 0.5}`; {all_of_them}"
            )
        if message.startswith("the following arguments are required"):
            # argparse says this before it says that an option is unknown, which may be the one that is missing.
            given = (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--"))
            unknown = [word for word in given if not any(own.startswith(word) for own in self._option_string_actions)]
            meant = [self.meant(option) for option in unknown]
            return "; ".join([*dict.fromkeys(filter(None, [*meant, self._call()])), all_of_them])
        return all_of_them

    def meant(self, option: str) -> str:
        """What an unknown option may have been meant as; empty where nothing is near."""
        own = {word.lstrip("-"): word for action in self._actions for word in action.option_strings if word[1:2] == "-"}
        places = {str(action.metavar or action.dest): action for action in self._actions if not action.option_strings}
        name = re.sub(r"[_.]+", "-", option.lstrip("-")).lower()
        for ours in ELSEWHERE.get(name, ()):
            if ours in own:
                return f"{option} is called {own[ours]} here"
            if ours in places:
                return f"{shown(option)[1:-1]} has no option here: {self._call()}"
        near = nearest(name, own)
        return f"{option}: perhaps {own[near]} is meant" if near else ""

    def _call(self) -> str:
        """How the script is called, without its options."""
        places = [
            action.metavar or action.dest
            for action in self._actions
            if not action.option_strings and action.nargs not in ("?", "*")
        ]
        return " ".join([self.prog, *map(str, places)]) if places else ""
