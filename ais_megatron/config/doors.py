"""Finds the user's own code, which a key of the configuration names as ``module:attribute``.

`check` runs when the configuration is read. It finds the module's source and looks for the name with `ast`. Nothing is imported,
so a wrong name is found in milliseconds and before any process starts. `load` imports the module, on every rank.

The working directory is searched first, as in ``python -m``, so that launcher and ranks find the same file.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

Kind = Literal["class", "function"]
Fields = TypeVar("Fields", bound=NamedTuple)


def is_own(name: str) -> bool:
    """Whether `name` is the user's own code, written as ``module:attribute``. Built-in names have no colon."""
    return ":" in name


def check(key: str, name: str, kind: Kind) -> None:
    """Find out, without an import, whether ``module:attribute`` exists and is the `kind` that `key` needs.

    A module without source (a compiled one) and a name that may come from ``import *`` pass this check. `load` checks them later.

    Raises:
        ValueError: the text is not module:attribute, the module or the attribute does not exist (the message names the nearest
            one), the source has a syntax error, or the attribute is a function where a class is needed, or the reverse.
    """
    module, _, attribute = name.partition(":")
    is_file = module.endswith(".py")
    if is_file or not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        hint = f"; here {module.removesuffix('.py').replace('/', '.')}:{attribute}" if is_file else ""
        raise ValueError(f"{key}={name!r}: write module:{kind}, for example my_code:{'MyTask' if kind == 'class' else 'my_' + kind}{hint}")
    defined, open_ended = _names(tree) if (tree := _tree(key, name)) is not None else ({}, True)
    if attribute not in defined:
        if open_ended:
            return
        raise ValueError(f"{key}={name!r}: module {module} has no {kind} {attribute}{_nearest(attribute, list(defined), module + ':')}")
    found = defined[attribute]
    if found is not None and found != kind:
        raise ValueError(f"{key}={name!r}: {attribute} is a {found} in module {module}; a {kind} is needed")


def load(key: str, name: str) -> Any:
    """Import the module of ``module:attribute`` and return the attribute.

    Raises:
        RuntimeError: the import failed; the user's own exception is its cause.
        ValueError: the module has no such attribute, or it cannot be called.
    """
    module, _, attribute = name.partition(":")
    _search_working_directory()
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        raise RuntimeError(f"{key}={name}: importing {module} failed with {type(error).__name__}: {error}") from error
    if not callable(found := getattr(imported, attribute, None)):
        raise ValueError(f"{key}={name!r}: module {module} has no class or function {attribute}")
    return found


def source_digest(name: str) -> str:
    """SHA-256 of the source file of ``module:attribute`` in hexadecimal digits, or "" if there is no source."""
    path = _source(_find(name.partition(":")[0]))
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def declared(key: str, name: str, member: str, default: Fields) -> Fields:
    """The tuple that the user's module assigns to ``attribute.member``, or `default` if there is no such line.

    The module is parsed, not imported.

    Args:
        default: a named tuple; the line calls its class.
    Raises:
        ValueError: unknown or too many arguments, or values that are not plain literals.
    """
    arguments = _literal_call(key, name, member)
    if arguments is None:
        return default
    try:
        return type(default)(*arguments[0], **arguments[1])
    except TypeError as error:
        raise ValueError(f"{key}={name!r}: its {member}: {error}; allowed: {', '.join(default._fields)}") from error


def _literal_call(key: str, name: str, member: str) -> tuple[list[Any], dict[str, Any]] | None:
    """The arguments of the line ``attribute.member = Anything(...)`` at the top level of the module, or None without such a line.

    Raises:
        ValueError: the line is not a call with plain values, so it cannot be read without running the module.
    """
    attribute, tree = name.partition(":")[2], _tree(key, name)
    for statement in tree.body if tree is not None else []:
        if not isinstance(statement, ast.Assign) or ast.unparse(statement.targets[0]) != f"{attribute}.{member}":
            continue
        try:
            call = statement.value
            if not isinstance(call, ast.Call):
                raise ValueError("not a call")
            return [ast.literal_eval(a) for a in call.args], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except ValueError as error:
            text = ast.unparse(statement)
            raise ValueError(
                f"{key}={name!r}: {text!r} must be one call whose arguments are plain numbers, texts, True or False"
            ) from error
    return None


def _tree(key: str, name: str) -> ast.Module | None:
    """The module's parsed source, or None for a module without source."""
    module = name.partition(":")[0]
    if (spec := _find(module)) is None:
        nearest = _nearest(module, _modules_beside(module), "")
        raise ValueError(f"{key}={name!r}: there is no module {module} in {os.getcwd()} or on Python's path{nearest}")
    if (path := _source(spec)) is None:
        return None
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{key}={name!r}: {path} is not valid Python: {error}") from error


def _search_working_directory() -> None:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()


def _find(module: str) -> ModuleSpec | None:
    """The module's spec, or None. `importlib.util.find_spec` would import its parent packages, and perhaps torch with them."""
    _search_working_directory()
    spec, folders, full = None, list(sys.path), ""
    for part in module.split("."):
        full = f"{full}.{part}" if full else part
        spec = PathFinder.find_spec(full, folders) or (_from_other_finders(full) if full == part else None)
        if spec is None:
            return None
        if spec.origin is None:  # a folder without __init__.py
            folders = [inner for folder in folders if os.path.isdir(inner := os.path.join(folder, part))]
        else:
            folders = list(spec.submodule_search_locations or [])
    return spec


def _from_other_finders(name: str) -> ModuleSpec | None:
    """The spec of a built-in module, or of a package from an editable installation."""
    found = (finder.find_spec(name, None) for finder in sys.meta_path if finder is not PathFinder and hasattr(finder, "find_spec"))
    return next((spec for spec in found if spec is not None), None)


def _source(spec: ModuleSpec | None) -> Path | None:
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") and Path(spec.origin).is_file() else None


def _names(tree: ast.Module) -> tuple[dict[str, Kind | None], bool]:
    """The names that the module defines at its top level, and whether it may define more through ``import *`` or ``__getattr__``.

    A name's kind is None if it is imported or assigned, because it may then be anything."""
    names: dict[str, Kind | None] = {}
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ClassDef):
            names[statement.name] = "class"
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            names[statement.name] = None if statement.decorator_list else "function"
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0]: None for alias in statement.names}
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {node.id: None for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return names, "*" in names or "__getattr__" in names


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements at the top level of the module, including those inside if, try and with."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, inner, []))
            for handler in getattr(statement, "handlers", []):
                yield from _statements(handler.body)


def _modules_beside(module: str) -> list[str]:
    """Names of modules that may have been meant: those in the package that `module` names, or in the working directory."""
    package, _, _ = module.rpartition(".")
    spec = _find(package) if package else None
    folders = list(spec.submodule_search_locations or []) if spec and spec.origin else [os.getcwd()]
    prefix = package + "." if spec and spec.origin else ""
    return [prefix + found.name for found in pkgutil.iter_modules(folders)]


def _nearest(name: str, known: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""
