"""README and docs/ taken apart: sections, blocks of code, what stands in backticks, numbers, links."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from helpers import ROOT

CHINESE = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w-])", re.ASCII)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass
class Section:
    """A heading and what stands under it, down to the next heading of any level."""

    level: int
    title: str
    prose: str = ""
    blocks: list[tuple[str, list[str]]] = field(default_factory=list)  # (language, lines)

    @property
    def spans(self) -> list[str]:
        """What stands in backticks, title included."""
        return sorted({" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.title + "\n" + self.prose)})

    @property
    def numbers(self) -> list[str]:
        """Numbers outside of backticks and links; of tables and lists each as often as it stands there."""
        text = LINK.sub("", re.sub(r"`[^`]+`", "", re.sub(r"^\d+\. ", "", self.title + "\n" + self.prose, flags=re.M)))
        rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
        rest = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
        return sorted(NUMBER.findall(rows)) + sorted(set(NUMBER.findall(rest)))


@cache
def sections(path: Path) -> list[Section]:
    found, block = [Section(0, "")], None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            if block is None:
                block = (line.strip().strip("`"), [])
            else:
                found[-1].blocks.append(block)
                block = None
        elif block is not None:
            block[1].append(line)
        elif heading := re.match(r"(#{1,6}) (.*)", line):
            found.append(Section(len(heading[1]), heading[2]))
        else:
            found[-1].prose += line + "\n"
    assert block is None, f"{path}: a block of code is not closed"
    return found[1:]


def english() -> list[Path]:
    """README and the documents, in English; `twin` is the Chinese one."""
    return [
        ROOT / "README.md",
        *(path for path in sorted((ROOT / "docs").glob("*.md")) if not path.stem.endswith("_zh")),
    ]


def twin(path: Path) -> Path:
    return path.with_name(f"{path.stem}_zh.md")


def comparable(block: tuple[str, list[str]]) -> list[str]:
    """A block's lines without what a translation changes: comments, labels of a diagram, what explains a tree of files."""
    language, lines = block
    if language == "mermaid":
        return [re.sub(r'"[^"]*"', '""', re.sub(r"·[^·\"]*", "·", line)) for line in lines]
    if language == "text":
        return [
            re.split(r"\s{2,}(?=\S)", line.strip())[0] if not line.startswith(("step", "error", "  fix")) else line
            for line in lines
        ]
    return [CHINESE.sub("", re.sub(r"(^|\s+)# .*", "", line)).rstrip() for line in lines]


def anchors(path: Path) -> list[str]:
    """As GitHub makes them of headings: lower case, no punctuation, spaces to dashes, a number where one repeats."""
    made: list[str] = []
    for section in sections(path):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", section.title).replace("`", "").strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        made.append(anchor if anchor not in made else f"{anchor}-{made.count(anchor)}")
    return made


def links(path: Path) -> list[str]:
    """Targets of the links in prose, addresses of the web left out."""
    return [
        to for section in sections(path) for to in LINK.findall(section.title + "\n" + section.prose) if "://" not in to
    ]


def commands(path: Path) -> list[str]:
    """The lines of blocks that name no language, continued lines joined, comments cut."""
    found = []
    for section in sections(path):
        for language, lines in section.blocks:
            if language == "" or language == "console":
                text = re.sub(r"\\\n\s*", "", "\n".join(lines))
                text = re.sub(r"'\{(.|\n)*?\}'", "'{…}'", text)  # the body of a request
                kept = [re.sub(r"\s+# .*", "", line).strip() for line in text.splitlines()]
                found += [line.removeprefix("$ ") for line in kept if line and (not language or line.startswith("$ "))]
    return found
