"""Lists every key of the configuration with its type, default, allowed values and description. (No torch.)"""

from __future__ import annotations

import difflib
import json
import textwrap
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ais_megatron.config.errors import NAME, ConfigError
from ais_megatron.config.experiment import Config
from ais_megatron.config.section import Section

BOUNDS = {"ge": "from {}", "gt": "greater than {}", "le": "at most {}", "lt": "less than {}", "min_length": "at least {} of them"}
HEAD = """# Every configuration key

After this page you know every key that a YAML file or a `key=value` override may set. `ais-megatron keys rollout` prints one section in
the terminal. "Empty" is `null` in YAML.

This page is generated from `ais_megatron/config/`. Do not edit it: run `ais-megatron keys --markdown > docs/configuration.md`.
"""


@dataclass(frozen=True)
class Key:
    name: str
    """The whole key, such as ``rollout.top_p``."""
    type: str
    """The type in words, such as whole number, number, text, or true or false."""
    default: str
    """The default as YAML writes it; "required" if there is none, "empty" for null."""
    allowed: str
    """The words to choose from, or the bounds; "" if every value of the type is allowed."""
    description: str


def all_keys() -> list[Key]:
    """All keys, in the order of `Config`."""
    return _keys_of(Config, Config.model_construct(), "")


def keys_of(section: str) -> list[Key]:
    """The keys of a section such as ``rollout`` or ``train.optimizer``, or one key by its whole name.

    Raises:
        ConfigError: there is no such section or key. The message names the nearest one.
    """
    keys = all_keys()
    found = [key for key in keys if key.name == section or key.name.startswith(section + ".")]
    if not found:
        sections = sorted({name for key in keys for name in _sections(key.name)})
        nearest = difflib.get_close_matches(section, [*sections, *(key.name for key in keys)], n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(f"keys {section}: there is no such section or key; sections: {', '.join(sections)}{hint}")
    return found


def as_text(keys: list[Key], width: int) -> str:
    """Text for a terminal of `width` characters: one line with the facts of each key, and its description below."""
    lines = []
    for key in keys:
        joined = " " if key.type.endswith(" of") else ", "
        facts = [key.type + (joined + key.allowed if key.allowed else ""), key.default if key.default == "required" else f"= {key.default}"]
        lines += [f"{key.name}  {'  '.join(facts)}", textwrap.indent(textwrap.fill(key.description, max(width - 4, 40)), "    ")]
    return "\n".join(lines)


def as_markdown() -> str:
    """All keys as a page, one table for each section."""
    page, keys = [HEAD], all_keys()
    for section in dict.fromkeys(key.name.rpartition(".")[0] for key in keys):
        page += [f"## {section or 'At the top'}\n", "| key | type | default | allowed | what it does |", "|---|---|---|---|---|"]
        for key in keys:
            if key.name.rpartition(".")[0] == section:
                cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.allowed, key.description)
                page.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        page.append("")
    return "\n".join(page).rstrip("\n")


def _sections(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _keys_of(schema: type[BaseModel], values: BaseModel | None, prefix: str) -> list[Key]:
    """values: a section with its defaults, or None. They differ from the schema's if one schema serves two sections, as `OptimizerConfig`
    does."""
    keys = []
    for name, field in schema.model_fields.items():
        value = getattr(values, name, None) if values is not None else field.get_default(call_default_factory=True)
        section = _section_in(field.annotation)
        by_name = get_origin(field.annotation) is dict
        if section and not by_name:
            keys += _keys_of(section, value, f"{prefix}{name}.")
        else:
            required = values is None and field.is_required()
            default = "required" if required else _written(value)
            words, bounds = _allowed(field)
            keys.append(Key(prefix + name, _in_words(field.annotation), default, words or bounds, field.description or ""))
        if section and by_name:
            keys += _keys_of(section, None, f"{prefix}{name}.{NAME}.")
    return keys


def _section_in(annotation: Any) -> type[Section] | None:
    return next((t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, Section)), None)


def _written(value: Any) -> str:
    if value is None:
        return "empty"
    return value if isinstance(value, str) else json.dumps(value)


def _in_words(annotation: Any) -> str:
    origin, inside = get_origin(annotation), [a for a in get_args(annotation) if a is not type(None)]
    if origin is Annotated:
        return _in_words(inside[0])
    if origin in (Union, types.UnionType):
        words, empty = " or ".join(_in_words(a) for a in inside), type(None) in get_args(annotation)
        if empty:
            return f"empty or {words}" if words == "one of" else f"{words} or empty"
        return words
    if origin is Literal:
        return "one of" if len(inside) > 1 or isinstance(inside[0], int) else str(inside[0])
    if origin is list:
        return f"list of {_in_words(inside[0])}".replace("list of one of", "list of")
    if origin is dict:
        return "mapping"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[annotation]


def _allowed(field: FieldInfo) -> tuple[str, str]:
    """The words of a Literal and the bounds of a number, as text; each may be ""."""
    words: list[str] = []
    metadata = list(field.metadata)

    def visit(annotation: Any) -> None:
        if get_origin(annotation) is Literal and len(get_args(annotation)) > 1:
            words.extend(map(str, get_args(annotation)))
        elif get_origin(annotation) is Annotated:
            metadata.extend(part for extra in annotation.__metadata__ for part in getattr(extra, "metadata", [extra]))
        for inner in get_args(annotation):
            visit(inner)

    visit(field.annotation)
    limits = [text.format(f"{getattr(m, name):g}") for m in metadata for name, text in BOUNDS.items() if getattr(m, name, None) is not None]
    return ", ".join(words), ", ".join(sorted(limits, key=lambda text: text.startswith(("at most", "less"))))
