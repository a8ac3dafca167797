"""Pyro's examples and tutorials, read from a checkout: nothing of theirs is copied."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import pyro

REPOSITORY = "https://github.com/pyro-ppl/pyro"
RELEASE = "1.9.2"
# What examples import for plots, downloads and devices; it need not be installed.
OPTIONAL = frozenset(
    [
        *("corner", "horovod", "ipywidgets", "lightning", "matplotlib", "pandas", "pytorch_lightning", "seaborn"),
        *("sklearn", "torchvision", "visdom", "wget", "wordcloud", "zuko"),
    ]
)


def checkout(path: str | None, cache: Path) -> Path:
    """Returns a checkout of Pyro: the one given, else a shallow clone of the release, made once."""
    if path is not None:
        return Path(path)
    if not cache.exists():
        subprocess.run(["git", "clone", "--depth", "1", "--branch", RELEASE, REPOSITORY, str(cache)], check=True)
    return cache


def version(root: Path) -> str:
    """Names a checkout: its commit, or where it is no repository the version that its package states."""
    found = subprocess.run(["git", "-C", str(root), "describe", "--tags", "--always"], capture_output=True, text=True)
    if (root / ".git").exists() and found.returncode == 0:
        return found.stdout.strip()
    lines = (root / "pyro" / "__init__.py").read_text().splitlines()
    return next(line.split('"')[1] for line in lines if line.startswith("version_prefix"))


class Absent(types.ModuleType):
    """Stands for a module that an example imports for plots or downloads, and that is not installed."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class AbsentFinder:
    """Finds optional modules that no other finder found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in OPTIONAL:
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Leaves the module empty."""


@contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Imports from a folder first, and empty modules for optional ones that are not installed.

    What came from either is taken out of ``sys.modules`` again, and the random state and the root logger are put back.
    """
    state, known, finder = pyro.util.get_rng_state(), set(sys.modules), AbsentFinder()
    log = logging.getLogger()
    level, handlers = log.level, list(log.handlers)
    sys.path.insert(0, str(folder))
    sys.meta_path.append(finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            file = getattr(sys.modules[name], "__file__", None) or ""
            if isinstance(sys.modules[name], Absent) or file.startswith(str(folder)):
                del sys.modules[name]
        pyro.util.set_rng_state(state)
        log.setLevel(level)
        log.handlers[:] = handlers


def module(path: Path) -> Any:
    """Imports an example."""
    spec = importlib.util.spec_from_file_location(f"pyro_example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    with importing(path.parent):
        spec.loader.exec_module(loaded)
    return loaded


def notebook(path: Path, *markers: str, whole: bool = False, **known: Any) -> dict[str, Any]:
    """Runs the cells of a notebook that contain one of the markers, in order.

    Args:
        path: The notebook.
        markers: Strings, at least one of which a cell contains.
        whole: Whether to run all of these cells, not only their definitions. Imports of all cells are made anyhow.
        known: Names that the cells find.

    Returns:
        The names that the cells made.
    """
    names: dict[str, Any] = dict(known)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    with importing(path.parent):
        for cell in cells:
            if cell["cell_type"] != "code":
                continue
            lines = "".join(cell["source"]).splitlines()
            source = "\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in lines)
            chosen = any(marker in source for marker in markers)
            body = [node for node in ast.parse(source).body if _wanted(node, chosen, whole)]
            exec(compile(ast.Module(body, []), str(path), "exec"), names)
    return names


def _wanted(node: ast.stmt, chosen: bool, whole: bool) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return True
    return chosen and (whole or isinstance(node, (ast.FunctionDef, ast.ClassDef)))
