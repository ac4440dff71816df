"""What a Hugging Face chat template needs, found from its text. Neither torch nor transformers is imported.

A template is a Jinja program. A variable that it does not get counts as empty, so a misspelt `task.template_kwargs` would silently
change nothing, and a forgotten one would leave a hole in every prompt. Both are errors here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_ALWAYS_GIVEN = ("messages", "add_generation_prompt")  # by transformers' apply_chat_template
_OWN_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")  # of transformers; it changes nothing in the text


def read_chat_template(folder: str | Path) -> tuple[str | None, dict[str, str]]:
    """The chat template in the folder of a tokenizer, and its special tokens by name ("bos_token"). None without a template, or if the
    files cannot be read; then transformers says what is wrong with them."""
    try:
        settings = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
        tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in settings.items() if _is_token(name)}
        file = Path(folder) / "chat_template.jinja"
        found = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(found, list):  # several templates with names
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, {}
    return found, {name: token for name, token in tokens.items() if isinstance(token, str)}


def keyword_problems(template: str | None, template_kwargs: Mapping[str, Any], has_system_prompt: bool, where: str) -> list[str]:
    """`task.template_kwargs` that the template never reads, and settings that need a template.

    where: the key and value that name the tokenizer, for messages.
    """
    if template is None:
        settings = ["task.system_prompt"] * has_system_prompt + ["task.template_kwargs"] * bool(template_kwargs)
        return [
            f"{where}: this tokenizer has no chat template, so {' and '.join(settings)} cannot be used; leave them out, or give the "
            "tokenizer of a model that was trained to chat"
        ] * bool(settings)
    known = _variables(template)
    if known is None:
        return []
    readable = sorted(name for name in known if not _is_token(name)) or ["none"]
    problems = []
    for name in template_kwargs:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            problems.append(
                f"task.template_kwargs: the chat template of {where} never reads {name!r}; it reads {', '.join(readable)}{hint}"
            )
    return problems


def rendering_problems(
    template: str, tokens: Mapping[str, str], template_kwargs: Mapping[str, Any], system_prompt: str | None, where: str
) -> list[str]:
    """What the template says to a conversation of one question: its own refusal, or a variable that it writes but does not get.

    A template that fails in another way here may use what only transformers offers, and is not judged.
    """
    import jinja2

    own: set[str] = set()

    class Refusal(Exception):
        pass

    class WrittenButNotGiven(jinja2.Undefined):
        def __str__(self) -> str:
            name = self._undefined_name
            if not isinstance(name, str) or self._undefined_obj is not jinja2.runtime.missing or _is_token(name) or name in own:
                return ""  # a field that a turn lacks, a special token that this tokenizer lacks, or a variable that the template sets
            raise Refusal(f"{name!r} is not given")

    def raise_exception(message: str) -> None:
        raise Refusal(message)

    environment = _environment()
    environment.undefined = WrittenButNotGiven
    environment.globals["raise_exception"] = raise_exception
    turns = conversation([{"role": "user", "content": "1+1?"}], system_prompt)
    source = _OWN_TAG.sub("", template)
    try:
        own |= {name.name for name in environment.parse(source).find_all(jinja2.nodes.Name) if name.ctx == "store"}
        compiled = environment.from_string(source)
        compiled.render({**tokens, "tools": None, "documents": None, **template_kwargs}, messages=turns, add_generation_prompt=True)
    except (Refusal, jinja2.UndefinedError) as error:
        return [refusal(where, error, template_kwargs)]
    except Exception:
        pass
    return []


def refusal(where: str, error: Exception, template_kwargs: Mapping[str, Any]) -> str:
    """The message for a template that cannot be rendered."""
    given = ", ".join(template_kwargs) or "nothing"
    return (
        f"{where}: its chat template refuses the prompt: {error}; give the variables that it needs in task.template_kwargs "
        f"(now: {given}), and check task.system_prompt and the roles of the turns"
    )


def conversation(turns: Sequence[Mapping[str, Any]], system_prompt: str | None) -> list[Mapping[str, Any]]:
    """The turns, with the system prompt in front if they have none of their own."""
    has_own = any(turn["role"] in ("system", "developer") for turn in turns)
    return list(turns) if system_prompt is None or has_own else [{"role": "system", "content": system_prompt}, *turns]


def _variables(template: str) -> set[str] | None:
    """The variables that the template reads and that somebody can give; None for a template that Jinja cannot parse."""
    import jinja2
    from jinja2 import meta

    environment = _environment()
    try:
        return set(meta.find_undeclared_variables(environment.parse(_OWN_TAG.sub("", template)))) - set(_ALWAYS_GIVEN)
    except jinja2.TemplateError:
        return None


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja with what transformers offers to templates."""
    from datetime import datetime

    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals["raise_exception"] = None
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _is_token(name: str) -> bool:
    return name.endswith("_token")
