"""Modules that are imported but not used, on a machine that does not have them: importing them works, and little else."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


def stand_in_for(*names: str) -> None:
    """Let each of these packages be imported, with anything in it, where it is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            sys.meta_path.append(_Finder(name))


class _Name(int):
    """An attribute of a module that is not there: a number where one is expected, a decorator where it is called as one."""

    def __getattr__(self, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(0)

    def __getitem__(self, item: object) -> _Name:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


class _Module(types.ModuleType):
    __path__: list[str] = []
    __version__ = "3.6.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(0)


class _Finder:
    """Answers `import name` and `import name.anything`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = name == self._name or name.startswith(self._name + ".")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...
