"""A copy of a state of the project in which a case runs, and which is as before after it."""

import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path


class Sandbox:
    """A copy of a state at a fixed path. What a case changes is written back in place."""

    def __init__(self, state: Path, root: Path):
        self.root, self.digests = root, {}
        shutil.copytree(state, root, symlinks=True)

    def settle(self) -> None:
        """What is there now is the state."""
        self.kept = {}
        for path in self.files():
            self.kept[path] = (os.readlink(path) if path.is_symlink() else path.read_bytes(), stamp(path))

    def files(self) -> list[Path]:
        return [p for top in ("output", "small") for p in (self.root / top).rglob("*") if p.is_symlink() or p.is_file()]

    def restore(self) -> None:
        for path in self.files():
            if path not in self.kept:
                path.unlink()
        for path in self.kept:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.is_symlink() and not isinstance(self.kept[path][0], str):
                path.unlink()
        for path, (data, state) in self.kept.items():
            if not os.path.lexists(path) or stamp(path) != state:
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(data, str):
                    path.unlink(missing_ok=True)
                    path.symlink_to(data)
                else:
                    with open(path, "r+b" if path.is_file() else "wb") as file:
                        file.write(data)
                        file.truncate()
                    os.utime(path, ns=(state[2], state[2]))
                self.kept[path] = (data, stamp(path))
        known = {folder for path in self.kept for folder in path.parents}
        for folder in sorted(
            (p for p in (self.root / "output").rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True
        ):
            if folder not in known:
                shutil.rmtree(folder, ignore_errors=True)
        (self.root / "output/logs").mkdir(exist_ok=True)

    def remove(self, patterns: tuple[str, ...]) -> None:
        for path in (p for pattern in patterns for p in self.root.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def untouched(self, name: str) -> bool:
        """Whether a shard of weights is as it was: its digest is made with another file, which may be the damaged one."""
        path = self.root / name
        return path.suffix == ".distcp" and path in self.kept and path.is_file() and stamp(path) == self.kept[path][1]

    def lost(self, damaged: str, without: tuple[str, ...]) -> list[str]:
        """Tars, and files of checkpoints that are whole, which are gone: neither there nor set aside."""
        step = next((part for part in Path(damaged).parts if part.startswith("iter_")), "-")
        there = None
        gone = []
        for path, (data, _) in self.kept.items():
            name = str(path.relative_to(self.root))
            precious = re.search(r"\.tar$|\.distcp$|dataloader/.*\.pt$", name) and name != damaged and step not in name
            precious = precious and not any(fnmatch(name, p) or fnmatch(name, f"{p}/*") for p in without)
            if not precious or (path.is_file() and path.stat().st_size == len(data)):
                continue
            there = there or {p.read_bytes() for p in self.files() if p.suffix == path.suffix}
            if data not in there:
                gone.append(name)
        return gone


def stamp(path: Path) -> tuple:
    status = os.lstat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
