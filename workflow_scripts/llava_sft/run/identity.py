"""Which run a run directory holds: one set of data, model, start checkpoint and settings (`run.json`).

The same run resumes from its newest whole checkpoint; another run in the same directory is refused with the difference
named.
"""

import contextlib
import itertools
from pathlib import Path
from typing import Any

from llava_sft.checkpoint.base import lora_of
from llava_sft.checkpoint.start import Start, copy_sidecars
from llava_sft.checkpoint.verify import SIDECARS_NOTE, require_whole, sidecars_damage
from llava_sft.checksums import note
from llava_sft.errors import DamagedFileError, RunError, many
from llava_sft.files import atomic_dir, fingerprint, write_json
from llava_sft.run.checkpoints import iterations_done, newest_whole
from llava_sft.run.layout import RUN_FILE, SIDECARS, checkpoint_dir, data_dir
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.settings.resolved import Resolved
from llava_sft.settings.schema import ABOUT

BUCKETS_ALIKE = range(2, 41)  # data-parallel replicas: `bucket_size` in megatron/config.py


def identity(resolved: Resolved) -> dict[str, Any]:
    """What makes a run this run and no other."""
    settings, given = resolved.settings, resolved.settings.model_fields_set
    return {
        "data": resolved.data.fingerprint,
        "start": resolved.start.fingerprint,
        # One that an earlier version's file does not name is a difference, for nobody knows what that version did; a
        # setting that is `later` stands at its default there.
        **{
            name: value
            for name, value in settings.dump().items()
            if ABOUT[name].identity and (name in given or ABOUT[name].later)
        },
        # Not the name alone, which `settings` holds: its file may have changed. Not the number of positions: no weight
        # depends on it, and earlier versions took it from that file where now the start checkpoint says it.
        "model": f"{resolved.model['name']}-{fingerprint(_computed(resolved.model))}",
    }


def _computed(model: dict[str, Any]) -> dict[str, Any]:
    return model | {"language": {k: v for k, v in model.get("language", {}).items() if k != "max_position_embeddings"}}


def read_run(run_dir: Path, iteration: int = 0) -> Resolved:
    """What run.json holds; where that is damaged or gone, the copy that the checkpoint of `iteration` keeps.

    Raises DamagedFileError; RunError where there is neither.
    """
    path = run_dir / RUN_FILE
    try:
        return Resolved.read(path)
    except (DamagedFileError, FileNotFoundError) as error:
        copy = data_dir(run_dir, iteration) / RUN_FILE
        if iteration and copy.is_file():
            print(f"warning: {path} is damaged or missing: {copy} is taken")
            return Resolved.read(copy)
        if isinstance(error, FileNotFoundError):
            raise RunError(
                f"{run_dir}: checkpoints without {RUN_FILE}: not a run of this workflow", "set another run_tag"
            ) from None
        weights = f"; or move it away and start another run from the weights: --config run_tag=next load={checkpoint_dir(run_dir, iteration)}"
        raise DamagedFileError(
            f"{path}: damaged: what the run was started with is not known",
            "restore it from a copy" + (weights if iteration else ""),
        ) from None


def refuse_other_run(run_dir: Path, resolved: Resolved) -> None:
    """Raise RunError, with the difference and both ways on, when `run_dir` holds steps of another run. Changes nothing."""
    done, train_iters = iterations_done(run_dir), resolved.settings.train_iters
    if not done:
        return
    run = read_run(run_dir, done)
    before, now = identity(run), identity(resolved)
    changed = [key for key in now if before.get(key) != now[key]]
    if not changed:
        refuse_layout(run_dir, done, run.settings, keeping_cut(run, resolved).settings)
    given = [key for key in changed if key not in resolved.why] or changed  # not what follows from them
    if given:
        differences = [
            _model_difference(run.model, resolved.model) if key == "model" else f"{key}: {before.get(key)} → {now[key]}"
            for key in given
        ]
        tag = propose_tag(run_dir, resolved, changed[0], now[changed[0]])
        raise RunError(
            f"{run_dir} holds {many(done, 'step')} of another run:\n    " + "\n    ".join(differences),
            f"restore the old value to continue this run, or start a separate one: --config run_tag={tag}",
        )
    if done > train_iters:
        raise RunError(
            f"train_iters {train_iters} is below the {many(done, 'step')} that {run_dir} has done",
            f"train_iters: {done} or more, or another run_tag",
        )


def _model_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first value that differs: of the file of config/models, or the start checkpoint's own."""
    if before.get("name") != now["name"]:
        return f"model: {before.get('name')} → {now['name']}"
    for side, values in _computed(before).items():
        theirs = _computed(now).get(side)
        if isinstance(values, dict) and isinstance(theirs, dict) and values != theirs:
            key = next(key for key in values | theirs if values.get(key) != theirs.get(key))
            return f"model {now['name']}: {side} {key}: {values.get(key)} → {theirs.get(key)}"
    return f"model: another {now['name']}"


def refuse_layout(run_dir: Path, done: int, before: ResolvedSettings, now: ResolvedSettings) -> None:
    """Raise RunError where a checkpoint of `before` cannot be continued by processes that share the model as `now` says.

    What is learned does not depend on the number of processes, nor does the position in the data. On CPUs the optimizer's
    state does not either. On GPUs it is kept in Megatron's buckets (`dp_reshardable`): they are those of one TP × PP, and
    the same for some numbers of replicas.
    """
    names = ["tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"]
    names += ["first_stage_layers"] if now.pipeline_model_parallel_size > 1 else []
    changed = [name for name in names if getattr(before, name) != getattr(now, name)]
    replicas = before.data_parallel_size, now.data_parallel_size
    if before.on_gpu != now.on_gpu:
        changed = ["gpus_per_node"]
    elif not now.on_gpu:
        return
    elif changed == [names[2]] and all(size in BUCKETS_ALIKE for size in replicas):
        changed = []
    next_run = f"another run from its weights: --config run_tag=next load={checkpoint_dir(run_dir, done)}"
    if changed:
        difference = ", ".join(f"{name}: {getattr(before, name)} → {getattr(now, name)}" for name in changed)
        raise RunError(
            f"{run_dir}: its {many(done, 'step', 'were')} trained on another layout: {difference}; the optimizer's state does not "
            "fit",
            f"the old layout, or {next_run}",
        )
    # Versions that did not write this setting had the vision tower shared out to the tensor-parallel ranks, too. Buckets
    # hold what is trained alone.
    earlier = "first_stage_layers" not in before.model_fields_set and "vision_model" in now.trainable_modules
    if earlier and now.tensor_model_parallel_size > 1 and done < now.train_iters:
        raise RunError(
            f"{run_dir}: its {many(done, 'step', 'were')} trained by an earlier version, which also cut the vision tower into "
            f"tensor_model_parallel_size ({now.tensor_model_parallel_size}) parts; the optimizer's state does not fit",
            next_run,
        )


def same_run(run_dir: Path, resolved: Resolved) -> tuple[Path, int] | None:
    """Another directory beside `run_dir`, which is not there yet, that holds this very run, and its steps: the experiment
    was renamed."""
    if run_dir.exists():
        return None
    now = identity(resolved)
    for path in sorted(run_dir.parent.glob(f"*/{RUN_FILE}")):
        with contextlib.suppress(DamagedFileError, OSError, RunError, KeyError):
            other = path.parent
            if other != run_dir and identity(read_run(other)) == now and (done := iterations_done(other)):
                return other, done
    return None


def keeping_cut(run: Resolved, resolved: Resolved) -> Resolved:
    """With the pipeline stages that `run` was trained on, where the settings do not say how the model is cut into them."""
    before, now = run.settings, resolved.settings
    if (
        "first_stage_layers" not in resolved.why
        or before.pipeline_model_parallel_size != now.pipeline_model_parallel_size
    ):
        return resolved
    settings = now.model_copy(update={"first_stage_layers": before.first_stage_layers})
    return resolved.model_copy(update={"settings": settings})


def open_run(run_dir: Path, resolved: Resolved) -> int:
    """Check that `run_dir` holds this run, or make it, and write run.json; return the step it resumes from.

    On a resume the run keeps the cut into pipeline stages and, unless lr_decay_iters is given, the length of its schedule:
    a run that is made longer goes on at its min_lr.
    Raises RunError when the directory holds another run; its files are then as they were.
    """
    refuse_other_run(run_dir, resolved)
    done = newest_whole(run_dir, deep=iterations_done(run_dir) != resolved.settings.train_iters)
    if done:
        resolved = keeping_cut(read_run(run_dir, done), resolved)
    if done and "lr_decay_iters" in resolved.why:
        length = read_run(run_dir, done).settings.lr_decay_iters
        if length != resolved.settings.lr_decay_iters:
            print(f"the learning rate keeps its schedule of {many(length, 'step')} and stays at min_lr after it")
            settings = resolved.settings.model_copy(update={"lr_decay_iters": length})
            resolved = resolved.model_copy(update={"settings": settings})
    resolved.write(run_dir / RUN_FILE)
    needs_base = resolved.settings.trained.lora is not None and done < resolved.settings.train_iters
    if needs_base and done:
        lora_of(checkpoint_dir(run_dir, done))  # raises where its base is gone, or another
    keep_sidecars(run_dir, resolved.start, done, needs_base)
    return done


def keep_sidecars(run_dir: Path, start: Start, done: int, needs_base: bool = False) -> None:
    """Copy the start checkpoint's tokenizer and config into the run, which the export takes them from."""
    sidecars = run_dir / SIDECARS
    if start.folder and (not done or needs_base):
        require_whole(start.folder)
    damage = sidecars_damage(sidecars)
    if done and sidecars.is_dir() and not damage:
        return  # before the first checkpoint they may be those of another run
    if damage and done:
        print(f"{sidecars}: {damage}: copied from {start.sidecars} again")
    with atomic_dir(sidecars) as folder:
        copy_sidecars(start.sidecars, folder)
        write_json(folder / SIDECARS_NOTE, note(folder, list(folder.iterdir())), sealed=True)


def propose_tag(run_dir: Path, resolved: Resolved, key: str, value: Any) -> str:
    """A free run_tag made of a setting that differs, like `lr5e-06`."""
    value = value if isinstance(value, int | float) else str(value)[:8]
    tag = f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}"
    tag = "".join(c if c.isalnum() or c in "._-" else "-" for c in tag)
    untagged = resolved.run_name.removesuffix(f"_{resolved.settings.run_tag}")
    tags = itertools.chain([tag], (f"{tag}-{number}" for number in itertools.count(2)))
    return next(tag for tag in tags if not run_dir.with_name(f"{untagged}_{tag}").exists())
