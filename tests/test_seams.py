"""What the product relies on in other people's code beyond documented interfaces: one row a name, in seams.txt.

Notable:
- nothing is imported: the text is read from the installed source, so that patches, GPUs and other tests change nothing;
  sources are compared as `ast.unparse` writes them, on one line, without docstrings and annotations of parameters;
- a row fails when an upgrade changes what it quotes: read the new text, mend the product, then quote it anew;
- a row whose name the product no longer mentions fails too, and so does a private name of others without a row;
- rows of what is not installed are skipped, and those of an older release than the one quoted: a GPU machine's torch.
"""

import ast
import functools
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version

from helpers import ROOT

PRODUCT = [
    *(ROOT / "workflow_scripts").rglob("*.py"),
    *(ROOT / "workflow_scripts").rglob("*.jinja"),
    ROOT / "Snakefile",
    *(ROOT / "rules").glob("*.smk"),
]


class Seam(NamedTuple):
    name: str
    why: str
    place: str
    text: str
    distribution: str
    release: str


def read_table() -> list[Seam]:
    seams: list[Seam] = []
    release: list[str] = []
    for line in (Path(__file__).parent / "seams.txt").read_text().splitlines():
        if line.startswith("["):
            release = line.strip("[]").split()
        elif line.startswith("  "):
            seam, words = seams[-1], line.strip()
            seams[-1] = seam._replace(text=f"{seam.text} {words}".strip()) if seam.place else seam._replace(place=words)
        elif line and not line.startswith("#"):
            name, _, why = line.partition(": ")
            seams.append(Seam(name, why, "", "", *release))
    return seams


SEAMS = read_table()


@functools.cache
def source(module: str) -> ast.Module | None:
    """A module's source without docstrings and annotations of parameters."""
    for folder in sys.path:
        base = Path(folder, *module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py", base / "__init__.pyi"):
            if path.is_file():
                return _Bare().visit(ast.parse(path.read_bytes()))
    return None


class _Bare(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def _without_docstring(self, node):
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_Module = _without_docstring


def definitions(body: list, name: str) -> list[ast.AST]:
    """Where `name` is defined in a body, branches included."""
    found = []
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if getattr(node, "name", None) == name or any(isinstance(t, ast.Name) and t.id == name for t in targets):
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
            for field in ("body", "orelse", "handlers", "finalbody"):
                found += definitions(getattr(node, field, []), name)
    return found


def text_of(place: str, signature: bool) -> str | None:
    """The text of a place; None when it is gone."""
    module, _, qualified = place.partition(":")
    tree = source(module)
    nodes: list = [tree] if tree else []
    for name in qualified.split("."):
        nodes = [found for node in nodes for found in definitions(node.body, name)]
    if not nodes:
        return None
    texts = (f"({ast.unparse(node.args)})" if signature else ast.unparse(node) for node in nodes)
    return " ".join(" ".join(texts).split())


def fits(wanted: str, text: str) -> bool:
    pattern = ".*".join(re.escape(piece.strip()) for piece in wanted.split("…"))
    return (re.fullmatch if wanted.startswith("(") else re.search)(pattern, text) is not None


def identifier(seam: Seam) -> str:
    return f"{seam.name} of {seam.place.partition(':')[2]}"


@pytest.mark.parametrize("seam", SEAMS, ids=identifier)
def test_what_we_rely_on_beyond_documented_interfaces_is_as_it_was(seam):
    try:
        installed = importlib.metadata.version(seam.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{seam.distribution} is not installed")
    quoted = f"{seam.distribution} {seam.release}"
    if Version(installed).release < Version(seam.release).release:
        pytest.skip(f"quoted from {quoted}; {installed} is older")
    text = text_of(seam.place, signature=seam.text.startswith("("))
    assert text is not None, f"{seam.place}, there in {quoted}, is gone from {installed}; {seam.name}: {seam.why}"
    assert fits(seam.text, text), (
        f"{seam.place} has changed: {quoted} → {installed}\n  {seam.name}: {seam.why}\n"
        f"  wanted: {seam.text}\n  found:  {text[:3000]}"
    )


@functools.cache
def product() -> str:
    return "\n".join(path.read_text() for path in PRODUCT)


@pytest.mark.parametrize("name", sorted({seam.name for seam in SEAMS}))
def test_every_row_is_of_a_name_that_the_product_mentions(name):
    mentioned = re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9_])", product()) is not None
    assert mentioned, f"the product does not say {name} any more: rename its row in seams.txt, or strike it out"


def foreign_private_names() -> dict[str, str]:
    """Private names of others that the product imports, reads or replaces → where."""
    trees = {path: ast.parse(path.read_text()) for path in PRODUCT if path.suffix == ".py" and "hf" not in path.parts}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    own = {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.id for _, node in nodes if isinstance(node, ast.Name)}
    own |= {"_replace", "_asdict", "_fields"}  # public, whatever they look like: NamedTuple's
    own |= {node.attr for _, node in nodes if isinstance(node, ast.Attribute) and is_own(node.value)}
    found = {}
    for path, node in nodes:
        names = [node.attr] if isinstance(node, ast.Attribute) and not is_own(node.value) else []
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("llava_sft"):
            names = [alias.name for alias in node.names]
        found |= {name: path.name for name in names if re.match("_(?!_)", name) and name not in own}
    return found


def is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_every_private_name_of_others_has_a_row():
    named = {word for seam in SEAMS for word in (seam.name, *re.split("[.:]", seam.place))}
    missing = {name: path for name, path in foreign_private_names().items() if name not in named}
    assert missing == {}, "a row each in seams.txt, with what we rely on and why"
