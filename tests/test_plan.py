"""The plan of the house: who may import whom, what stays light, and how long a file, a class and a function may be.

Notable: the lists of exceptions only ever shrink. An entry that is no exception any more fails with "strike it out".
"""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, SCRIPTS

# From the ground up: a package imports itself and what stands on lower floors, nothing beside or above it. A module that
# belongs lower than the rest of its package has an entry of its own.
FLOORS = [
    ["errors", "programs"],
    ["command_line", "files", "gpu_stack"],
    ["checksums", "embedded", "machine", "nodes", "progress", "run.layout", "settings.yaml_file"],
    ["model"],  # what LLaVA-OneVision-1.5 is: sizes, tokens, layers
    ["data"],
    ["checkpoint", "evaluation.scores", "report.pictures"],
    ["settings"],
    ["run", "sources"],  # run directories, read without Megatron
    ["preflight"],
    ["megatron"],  # the one wall of what is patched in Megatron and Transformer Engine
    ["paths", "training"],
    ["demo", "evaluation", "inputs", "migrate"],
    ["experiments"],
    ["locks", "workflow"],
    ["report"],  # pages know the house, the house knows no pages
    ["chat", "publish"],
]
# Module → what it imports from above or beside, and why it still does.
EXCEPTIONS = {}

LONGEST = {"file": 350, "class": 150, "function": 60}  # lines
# Files, and the classes and functions in them, that are longer.
TOO_LONG = [
    "tests/test_hf_model.py",
    "tests/test_hostile_checkpoint.py",
]

HEAVY = ("torch", "megatron", "transformer_engine", "transformers", "triton")  # seconds each, for every job


@functools.cache
def arrows() -> set[tuple[str, str]]:
    """(module, imported module) of all modules of the package, below `llava_sft.`."""
    package = SCRIPTS / "llava_sft"
    names = {path: ".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    modules = set(names.values())
    found = set()
    for path, name in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llava_sft":
                base = node.module.removeprefix("llava_sft").lstrip(".")
                inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
                found |= {(name, module) for module in (inner & modules or {base})}
            elif isinstance(node, ast.Import):
                found |= {
                    (name, a.name.removeprefix("llava_sft.")) for a in node.names if a.name.startswith("llava_sft.")
                }
    return found


def floor(module: str) -> int:
    names = module.split(".")
    for length in range(len(names), 0, -1):
        for number, inhabitants in enumerate(FLOORS):
            if ".".join(names[:length]) in inhabitants:
                return number
    pytest.fail(f"{module} stands on no floor: add {names[0]} to FLOORS")


def test_nothing_imports_what_stands_above_or_beside_it():
    upward = {
        (module, imported)
        for module, imported in arrows()
        if module.split(".")[0] != imported.split(".")[0] and floor(imported) >= floor(module)
    }
    assert upward - set(EXCEPTIONS) == set(), "these modules import from above: move what they need to a lower floor"
    assert set(EXCEPTIONS) - upward == set(), "these do not any more: strike them out of EXCEPTIONS"


def test_no_module_imports_itself_by_way_of_others():
    ends = {imported for _, imported in arrows()}
    left = {(module, imported) for module, imported in arrows() if module in ends}
    while True:  # what nobody imports, or what imports nothing, is in no circle
        starts, ends = {module for module, _ in left}, {imported for _, imported in left}
        kept = {(module, imported) for module, imported in left if module in ends and imported in starts}
        if kept == left:
            break
        left = kept
    assert left == set()


def test_scripts_and_rules_are_planned_and_started_without_torch_and_megatron():
    scripts = sorted(path.stem for path in SCRIPTS.glob("*.py"))
    snakefile = ["llava_sft.data.shards", "llava_sft.locks", "llava_sft.workflow"]
    assert all(f"from {module} import" in (ROOT / "Snakefile").read_text() for module in snakefile)
    check = (
        "import importlib, sys\n"
        "for module in sys.argv[1:]:\n"
        "    importlib.import_module(module)\n"
        f"    if loaded := [name for name in {HEAVY} if name in sys.modules]: sys.exit(f'{{module}} imports {{loaded}}')\n"
    )
    modules = [*snakefile, "snakemake_logger_plugin_llava_sft", *scripts]
    done = subprocess.run([sys.executable, "-c", check, *modules], cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def lengths(path: Path) -> dict[str, tuple[str, int]]:
    """Name → kind and lines of a Python file and of all classes and functions in it."""
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    found = {name: ("file", len(text.splitlines()))}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "class" if isinstance(child, ast.ClassDef) else "function"
                found[f"{name}:{prefix}{child.name}"] = (kind, (child.end_lineno or 0) - child.lineno + 1)
                inner = f"{prefix}{child.name}."
            walk(child, inner)

    if path.suffix == ".py":
        walk(ast.parse(text), "")
    return found


def test_files_classes_and_functions_are_short():
    paths = [path for folder in ("workflow_scripts", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found: dict[str, tuple[str, int]] = {}
    for path in [*paths, ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:
        found |= lengths(path)
    longer = {name: lines for name, (kind, lines) in found.items() if lines > LONGEST[kind]}
    assert {name: lines for name, lines in longer.items() if name not in TOO_LONG} == {}, f"at most {LONGEST} lines"
    assert set(TOO_LONG) - set(longer) == set(), "these are short now, or gone: strike them out of TOO_LONG"
