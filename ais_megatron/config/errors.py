"""How mistakes in a configuration are reported: one line per key, with its value, what is allowed and what to change."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from ais_megatron.config.section import Section


class ConfigError(ValueError):
    """The configuration cannot be used. The message names the keys and says what to write instead."""


NAME = "NAME"
"""Stands in a key for a name that the user chooses, as in ``eval.sets.NAME.samples``."""


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        nested = next((t for t in _types_in(field.annotation) if isinstance(t, type) and issubclass(t, Section)), None)
        keys.append(prefix + name)
        if nested and get_origin(field.annotation) is dict:
            keys += [f"{prefix}{name}.{NAME}", *known_keys(nested, f"{prefix}{name}.{NAME}.")]
        elif nested:
            keys += known_keys(nested, prefix + name + ".")
    return keys


def _types_in(annotation: Any) -> list[Any]:
    return [annotation, *getattr(annotation, "__args__", ())]


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """pydantic's errors about a `schema`, one line each: the key, what is wrong and what is allowed."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if not _is_union_member(part))
        if item["type"] == "extra_forbidden":
            nearest = _nearest_key(key, schema)
            lines.append(f"{key}: unknown key" + (f"; did you mean {nearest}?" if nearest else ""))
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            names_itself = not key or message.startswith((f"{key}=", f"{key}."))
            names_a_key = re.match(r"\w+=", message) is not None  # of the section `key`, which has validated itself
            lines.append(message if names_itself else f"{key}.{message}" if names_a_key else f"{key}: {message}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing; this key has no default, set it")
        else:
            words = re.findall(r"'([^']*)'", item["msg"]) if item["type"] == "literal_error" else []
            close = difflib.get_close_matches(str(item["input"]), words, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            lines.append(f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}{hint}")
    return "\n".join(lines)


def _is_union_member(part: str | int) -> bool:
    """Whether this part of a pydantic location is no key, but a type of ``float | Literal["auto"]`` that did not match."""
    return part == "float" or str(part).startswith("literal[")


def _nearest_key(key: str, schema: type[BaseModel]) -> str | None:
    known = [_with_names_of(key, k) for k in known_keys(schema)]
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if close:
        return siblings[close[0]]
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return close[0] if close else None


def _with_names_of(key: str, known: str) -> str:
    """A known key, with the name that the user chose in `key` in place of `NAME`."""
    parts, given = known.split("."), key.split(".")
    if NAME in parts and given[: parts.index(NAME)] == parts[: parts.index(NAME)]:
        parts[parts.index(NAME)] = given[parts.index(NAME)] if len(given) > parts.index(NAME) else NAME
    return ".".join(parts)
