"""Rules of the house that a program can keep: layers, size, safety, and a light command line."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import stateofgpt

PACKAGE = Path(stateofgpt.__file__).parent
PROJECT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "matplotlib",
    "sqlalchemy",
    "starlette",
    "uvicorn",
)
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load", "os.system")
FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "stateofgpt.")
    return [module.name for module in found if not module.name.endswith("__main__")]


def names(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def test_imports_run_one_way() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("module", modules())
def test_every_module_can_be_imported(module: str) -> None:
    importlib.import_module(module)


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["chat", "--help"], ["serv"]])
def test_the_command_line_imports_nothing_heavy_before_a_verb_is_chosen(command: list[str]) -> None:
    code = (
        "import sys\nfrom stateofgpt.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_importing_the_package_does_no_work() -> None:
    code = "import sys; before = set(sys.modules); import stateofgpt; print(len(set(sys.modules) - before))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


@pytest.mark.parametrize("path", FILES, ids=names)
def test_a_module_is_short_says_what_it_is_and_runs_nothing_it_was_given(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert len(source.splitlines()) <= 350, f"{path} has more than 350 lines"
    assert ast.get_docstring(tree) or not source.strip(), f"{path} has no docstring"
    assert list(_forbidden(tree)) == []


def _forbidden(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in FORBIDDEN_MODULES:
                yield module
            yield from (f"{module}.{a.name}" for a in node.names if f"{module}.{a.name}" in FORBIDDEN_CALLS)
        elif isinstance(node, ast.Call):
            if (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                yield called
            yield from (f"{called}({k.arg}=True)" for k in node.keywords if k.arg == "allow_pickle" and _true(k.value))


def _true(node: ast.expr) -> bool:
    return not (isinstance(node, ast.Constant) and node.value is False)


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "np.load('x', allow_pickle=True)",
        "def f():\n    exec('x')",
    ],
)
def test_the_search_for_unsafe_calls_finds_them(source: str) -> None:
    assert list(_forbidden(ast.parse(source)))


def test_the_search_for_unsafe_calls_lets_model_eval_pass() -> None:
    assert not list(_forbidden(ast.parse("model.eval()\nre.compile('x')\nnp.load('x', allow_pickle=False)")))


def test_every_dependency_has_one_exact_version() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    lines = (PROJECT / "constraints.txt").read_text().split()
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert {re.split(r"[<>=\[ ]", one)[0].lower() for one in wanted} <= pinned


def test_every_file_the_program_reads_of_itself_is_packed_with_it() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["*"]
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others and not others - packed
