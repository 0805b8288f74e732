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
        "Nobody noted a checksum of a folder that comes from elsewhere: what still parses and fits the model is taken as it is.",
        "外来的文件夹没有记录过校验和：凡是能解析且与模型相符的内容，都按原样采用。",
    ),
]
