"""What lies around a run: files that a reader may want to open, and when, where and with what it was trained."""

import os
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llava_sft.checkpoint.verify import is_export
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.layout import TENSORBOARD, checkpoint_dir
from llava_sft.run.sessions import seconds, sessions


def links(page: Path, **targets: Path | None) -> dict[str, str]:
    """The targets that exist, by name, as addresses relative to the page."""
    there = {name.replace("_", " "): path for name, path in targets.items() if path and path.exists()}
    return {name: quote(os.path.relpath(path, page.parent)) for name, path in there.items()}


def newest_log(run_dir: Path) -> Path | None:
    return max(run_dir.glob("run_*.log"), default=None)


def provenance(run_dir: Path, found: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """{began, seconds, machine, commit, command, sessions}, None or empty where nothing says it."""
    noted, settings = sessions(run_dir), found["resolved"]["settings"]
    steps = [0, *(record["iteration"] for record in metrics)]
    lasted = sum((b - a) * (m.get("step_s") or 0) for a, b, m in zip(steps, steps[1:], metrics, strict=False))
    count = settings.get("gpus_per_node")
    devices = f"{count} GPU{'s' if count != 1 else ''}" if count else "CPU"
    result: dict[str, Any] = {"seconds": seconds(noted) or lasted, "sessions": len(noted), "machine": devices}
    result["command"] = (found["prediction"] or {}).get("command")
    if noted:
        last = noted[-1]
        if gpus := last["gpus"]:
            devices = " + ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus))
        nodes = f"{last['nodes']} × " if last["nodes"] > 1 else ""
        result |= {"machine": f"{nodes}{last['host']}, {devices}", "commit": last["commit"]}
        result["began"] = noted[0]["began"].replace("T", " ")
    result["machine"] += ", bf16" if settings.get("bf16") else ", float32"
    return result


def paths(run_dir: Path, export: Path | None, resolved: dict[str, Any]) -> dict[str, str]:
    """What a reader may want to open next, where it exists."""
    found = {"run": str(run_dir)}
    if step := iterations_done(run_dir):
        found["newest checkpoint"] = str(checkpoint_dir(run_dir, step))
    if export:
        found["export (Hugging Face)"] = str(export)
    found |= of_lora(found.get("newest checkpoint"), resolved)
    logs = sorted(run_dir.glob("run_*.log"))
    found |= {"log" if len(logs) == 1 else f"log {n}": str(path) for n, path in enumerate(logs, 1)}
    if (run_dir / TENSORBOARD).is_dir():
        found["TensorBoard"] = f"tensorboard --logdir {run_dir / TENSORBOARD}"
    if export and is_export(export):
        found["talk to it"] = chat_command(run_dir)
    return found


def of_lora(checkpoint: str | None, resolved: dict[str, Any]) -> dict[str, str]:
    """What LoRA's pairs stand beside, and the command that makes a PEFT folder of them; of a run without LoRA nothing."""
    settings, start = resolved["settings"], resolved.get("start", {})
    if not settings.get("lora_rank"):
        return {}
    found = {"base, which checkpoints need": str(start["folder"])} if start.get("folder") else {}
    if checkpoint and set(settings["trainable_modules"]) == set(settings["lora_modules"]):
        to_peft = f"python workflow_scripts/convert_checkpoint.py mcore2peft {shlex.quote(checkpoint)} adapter"
        found["adapter for PEFT"] = to_peft
    return found


def chat_command(run_dir: Path) -> str:
    return f"make chat RUN={shlex.quote(str(run_dir))}"
