"""The architecture as documented is the architecture on disk."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "shoal"
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
CORE = ["base", "plan", "wire", "net", "discovery", "link", "server", "client", "lab", "dashboard"]

FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
SIZE_EXCEPTIONS: dict[str, str] = {}
"""`path` or `path:function` that may be longer, with the reason."""

PRINTING = {"cli", "lab"}
"""Packages that talk to a person on stdout; everybody else logs."""

BANNED_WORDS = {"layer", "layers", "shard", "shards", "node", "nodes", "worker", "workers"}
BANNED_WORDS |= {"manager", "managers", "util", "utils", "misc"}
"""Not words of docs/glossary.md. Packages that face transformers may need `layer`."""

RING_WORDS = {"node", "nodes"}
"""What they mean in files about the ring is in the glossary."""


def toml() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path):
    for item in ast.walk(tree(path)):
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            yield item


def code_map() -> list[str]:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.partition("## Code map\n")[2].partition("\n##")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def layers() -> list[str]:
    contract = toml()["tool"]["importlinter"]["contracts"][0]
    return [part.strip() for layer in contract["layers"] for part in layer.split("|")]


def test_code_map_lists_every_package():
    assert sorted(code_map()) == PACKAGES


def test_code_map_is_in_the_order_of_the_layers():
    assert code_map() == layers()


def test_every_package_has_its_layer():
    assert sorted(layers()) == PACKAGES


def test_torch_ban_covers_the_core():
    contract = toml()["tool"]["importlinter"]["contracts"][1]
    assert contract["source_modules"] == [f"shoal.{package}" for package in CORE]
    assert "torch" in contract["forbidden_modules"]


def test_architecture_document_stays_short():
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= 250


def module_names(package: str) -> list[str]:
    paths = [path.relative_to(PACKAGE.parent) for path in (PACKAGE / package).rglob("*.py")]
    dotted = [".".join(path.with_suffix("").parts) for path in paths]
    return [module.removesuffix(".__init__") for module in dotted]


@pytest.mark.parametrize("packages", [[], CORE], ids=["shoal alone", "core"])
def test_importing_does_not_import_torch(packages):
    names = ["shoal", *(module for package in packages for module in module_names(package))]
    script = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


def test_every_module_has_a_docstring():
    assert [name(path) for path in SOURCES if not ast.get_docstring(tree(path))] == []


def test_only_cli_and_lab_print():
    prints = [
        f"{name(path)}:{item.lineno}"
        for path in SOURCES
        if path.relative_to(PACKAGE).parts[0] not in PRINTING
        for item in ast.walk(tree(path))
        if isinstance(item, ast.Call)
        and isinstance(item.func, ast.Name)
        and item.func.id == "print"
    ]
    assert prints == []


def body_lines(function):
    """Lines of code: a command's options and its help may be as long as they need to be."""
    first = function.body[1 if ast.get_docstring(function) and function.body[1:] else 0]
    return function.end_lineno - first.lineno + 1


def test_files_and_functions_stay_small():
    paths = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    sizes = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    large = {path for path, lines in sizes.items() if lines > FILE_LINES_MAX}
    large |= {
        f"{name(path)}:{function.name}"
        for path in paths
        for function in functions(path)
        if body_lines(function) > FUNCTION_LINES_MAX
    }
    assert large == set(SIZE_EXCEPTIONS), "split it, or list it in SIZE_EXCEPTIONS with the reason"


def words(identifier: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


def test_names_use_the_glossary():
    found = []
    for path in SOURCES:
        if path.relative_to(PACKAGE).parts[0] not in CORE:
            continue
        banned = BANNED_WORDS - (RING_WORDS if "ring" in words(path.stem) else set())
        for item in ast.walk(tree(path)):
            if isinstance(item, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                identifier = item.name
            elif isinstance(item, ast.arg):
                identifier = item.arg
            else:
                continue
            if words(identifier) & banned:
                found.append(f"{name(path)}:{item.lineno} {identifier}")
        if words(path.stem) & banned:
            found.append(name(path))
    assert found == [], "see docs/glossary.md for the word to use"
