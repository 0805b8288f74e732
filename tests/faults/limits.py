"""The limits that the docs name: damage that is known to go unnoticed, and why. One table; nothing else is excused."""

from typing import NamedTuple


class Limit(NamedTuple):
    """`kinds`, `uses`, `forms`: the cases it covers; empty means all. `mtime`: only where the date was kept (True), or not."""

    name: str
    kinds: tuple[str, ...]
    uses: tuple[str, ...]
    reason: str
    reason_zh: str
    forms: tuple[str, ...] = ()
    mtime: bool | None = None

    def covers(self, kind: str, use: str, form: str, keeps_mtime: bool) -> bool:
        return (
            kind in self.kinds
            and (not self.uses or use in self.uses)
            and (not self.forms or form in self.forms)
            and self.mtime in (None, keeps_mtime)
        )


LIMITS = [
    Limit(
        "a start checkpoint of your own",
        ("start weights", "start config, tokenizer, preprocessor"),
        ("convert", "convert again"),
        "A folder from elsewhere has no recorded checksums: anything that still parses and fits the model is accepted as it is.",
        "外来的文件夹没有记录过校验和：凡是能解析且与模型相符的内容，都按原样采用。",
    ),
    Limit(
        "what was found whole is not read again",
        ("converted weights", "converted .metadata, common.pt", "training tar", "held-out tar", "checkpoint shards"),
        ("train", "finish", "convert again", "index"),
        "A large file whose size, modification time and inode have not changed since its last verification is not read again by these "
        "steps. It is compared in full before a resume and an export, each sample is compared when it is read, and everything on "
        "request (`--verify`, `verify`).",
        "大小、日期和 inode 与上次校验时相同的大文件，这里不再重读；恢复训练和导出之前会完整比较，样本在读取时比较，也可按需全部比较（`--verify`、`verify`）。",
        mtime=True,
    ),
]
