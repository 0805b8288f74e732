"""All experiments of config/experiments/ side by side: settings, paths, and what two of them would both make. No torch."""

import contextlib
import os
import re
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from llava_sft.checkpoint.architecture import with_own_values
from llava_sft.checkpoint.start import read_hf_config
from llava_sft.checkpoint.verify import MARKER
from llava_sft.embedded import EMBEDDED
from llava_sft.errors import CheckpointError, SettingsError, SftError, shown
from llava_sft.files import read_json
from llava_sft.inputs import check_apart
from llava_sft.model.hf_config import parts_of_config
from llava_sft.paths import Paths
from llava_sft.settings.layers import experiments, load_model, load_settings


class Experiments:
    """The experiments under the `overrides` of `--config`, and what the profile of a `cluster` says of a training."""

    def __init__(self, overrides: dict[str, Any], cluster: dict[str, int]):
        self.overrides, self.cluster = overrides, cluster
        self.experiments, self.misnamed = experiments(), experiments(misnamed=True)

    @cache  # noqa: B019 (one object for the whole program)
    def paths(self, experiment: str) -> Paths:
        plain = self._plain(experiment)
        paths = Paths(plain.settings, self.demo, self._checkpoint_suffix(plain))
        check_apart(paths, self._made)
        for other in self.sound:
            if other.run_dir == paths.run_dir and other.settings.experiment != experiment:
                raise SettingsError(
                    f"{experiment} and {other.settings.experiment}: both runs would be {shown(str(paths.run_dir))}",
                    "rename one of the experiments, or change its run_tag",
                )
        return paths

    @cache  # noqa: B019
    def _plain(self, experiment: str) -> Paths:
        """As if there were no other experiment."""
        demo = self.demo if experiment != EMBEDDED else None
        return Paths(load_settings(experiment, self.overrides, self.cluster), demo)

    @cached_property
    def demo(self) -> Path | None:
        """The folder of the embedded data set."""
        try:
            return self._plain(EMBEDDED).demo if EMBEDDED in self.experiments else None
        except SftError:
            return None

    @cached_property
    def sound(self) -> list[Paths]:
        """Paths of every experiment with valid settings; mistakes of others are reported to those who ask for them."""
        sound = []
        for experiment in self.experiments:
            with contextlib.suppress(SftError):
                sound.append(self._plain(experiment))
        return sound

    @cached_property
    def _made(self) -> dict[Path, str]:
        """Folders whose files the rules make and delete, and whose they are."""
        made = {}
        for exp_dir in {paths.settings.exp_dir for paths in self.sound}:
            for paths in self.sound:
                name = paths.settings.experiment
                made[exp_dir / "data" / name] = f"the data of experiment {name}"
                made[exp_dir / paths.results.name] = f"the results of experiment {name}"
        return {Path(os.path.realpath(folder)): whose for folder, whose in made.items()}

    def _checkpoint_suffix(self, mine: Paths) -> str:
        """Ends the name of the start checkpoint's converted folder where another experiment would make another folder of
        that name. Who has made that folder keeps it."""
        if mine.converted is None:
            return ""
        others = [
            paths
            for paths in self.sound
            if paths.converted == mine.converted and paths.converted_from != mine.converted_from and _fits_model(paths)
        ]
        if not others:
            return ""
        marker = mine.converted / MARKER
        made_from = read_json(marker, {}).get("source") if marker.is_file() else None
        alone = all(paths.settings.load != mine.settings.load for paths in others)
        return "" if alone and made_from == mine.settings.load else mine.fingerprint_suffix

    def pattern(self, wildcard: str) -> str:
        """Regular expression of all values that the settings give `exp_dir`, `experiment`, `run_name` or `checkpoint`."""
        values = {
            "exp_dir": {str(paths.settings.exp_dir) for paths in self.sound},
            "experiment": set(self.experiments),
            "run_name": {paths.settings.run_name for paths in self.sound},
            "checkpoint": {
                paths.converted_stem + suffix
                for paths in self.sound
                if paths.converted_stem
                for suffix in ("", paths.fingerprint_suffix)
            },
            "demo": {str(self.demo.parent)} if self.demo else set(),
        }[wildcard]
        longest_first = sorted(values, key=lambda value: (-len(value), value))
        return "|".join(map(re.escape, longest_first)) or "(?!)"

    def converting(self, wildcards) -> Paths:
        """Paths of the experiment whose start checkpoint is converted to `{checkpoint}_mcore_tp1_pp1`; all of that name
        agree on what it is made from, or the model of the others is another."""
        named = []
        for plain in self.sound:
            if plain.converted_stem and lies_in(plain, wildcards):
                with contextlib.suppress(SftError):
                    paths = self.paths(plain.settings.experiment)
                    named += [paths] if paths.converted_stem == wildcards.checkpoint else []
        if named:
            return next((paths for paths in named if _fits_model(paths)), named[0])
        raise SettingsError(
            f"{wildcards.checkpoint}: no experiment loads this checkpoint",
            "ask for STEP_EXPERIMENT targets; `load` in config/experiments/ names checkpoints",
        )

    def of(self, wildcards) -> Paths:
        if hasattr(wildcards, "experiment"):
            found = [self.paths(wildcards.experiment)]
        else:
            named = [paths for paths in self.sound if paths.settings.run_name == wildcards.run_name]
            found = [self.paths(paths.settings.experiment) for paths in named if lies_in(paths, wildcards)]
        if found and lies_in(found[0], wildcards):
            return found[0]
        what = getattr(wildcards, "experiment", None) or wildcards.run_name
        raise SettingsError(f"{shown(what)}: no experiment makes this there", "ask for STEP_EXPERIMENT targets")


def lies_in(paths: Paths, wildcards) -> bool:
    return getattr(wildcards, "exp_dir", str(paths.settings.exp_dir)) == str(paths.settings.exp_dir)


def _fits_model(paths: Paths) -> bool:
    """Whether the experiment's model can be that of the Hugging Face folder it loads, as far as its config.json says."""
    settings, folder = paths.settings, paths.checkpoint.folder
    if settings.load_parts or not (folder / "config.json").is_file():
        return True
    try:
        model, found = load_model(settings.model), parts_of_config(read_hf_config(folder))
    except (SftError, KeyError, TypeError, ValueError, AttributeError):
        return True  # unknown: the conversion says what is wrong
    try:
        with_own_values(model, found, folder)
    except CheckpointError:
        return False
    return True
