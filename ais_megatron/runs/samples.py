"""Responses that a person can read: ``samples.jsonl``, one line per response of the steps that `metrics.samples_every` chooses.

A line holds the prompt, the response with its tokens as pieces of text, log mu (the rollout engine's) and log pi_old (the trainer's) of
each token, the reward with its reason, and two marks of a response that went wrong:

    repetition    the share of the response's 4-grams of tokens that occurred earlier in it (seq-rep-4 of arXiv 1908.04319)
    garbled       whether more than 1 % of its characters cannot belong to a text

Log-probabilities are rounded to five decimals, which is a tenth of a typical FP8 error and makes the file much smaller.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import orjson

from ais_megatron.batch import Rollout
from ais_megatron.runs.folder import encode_json

SAMPLES_FILE = "samples.jsonl"
NGRAM = 4
GARBLED_SHARE = 0.01  # a response with a larger share of strange characters is garbled
DECIMALS = 5
# The replacement character, and what SentencePiece writes for an unknown token.
_STRANGE = {"\N{REPLACEMENT CHARACTER}", "\N{DOUBLE QUESTION MARK}"}
_STRANGE_CATEGORIES = {"Cc", "Cn", "Co", "Cs"}  # control characters, and code points that are unassigned, private or surrogates
_SPACES = dict.fromkeys(map(ord, "\n\r\t"))
_STEP = re.compile(rb'\{"step": ?(\d+)[,}]')

Sample = dict[str, Any]
Decode = Callable[[Sequence[int]], str]


class Judgement(Protocol):
    """What a sample needs of a reward."""

    @property
    def value(self) -> float: ...
    @property
    def well_formed(self) -> bool: ...
    @property
    def correct(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class TokenTexts:
    """The texts of single tokens, so that a page can shade each of them.

    Args:
        decode: of the tokenizer.
        anchor: a token with a visible text. Some tokenizers remove the space before the first token of a text, so every token is
            decoded behind this one.
    """

    def __init__(self, decode: Decode, anchor: int) -> None:
        self._decode, self._anchor = decode, anchor
        self._anchor_text = decode([anchor])
        self._known: dict[int, str] = {}

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text per token. A token without a text, such as the end of the sequence, has an empty one.

        With byte-level BPE a character can consist of several tokens. Then the first of them has the character, and the others are
        empty. Each token is decoded once in the life of this object, and each such group once more, so the cost is linear.
        """
        pieces = [self._text_of(token) for token in ids]
        start = 0
        while start < len(ids):
            end = start
            while end < len(ids) and "\N{REPLACEMENT CHARACTER}" in pieces[end]:
                end += 1
            if end - start > 1:
                pieces[start:end] = [self._after_anchor(ids[start:end]), *[""] * (end - start - 1)]
            start = end + 1
        return pieces

    def _text_of(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._after_anchor([token])
        return self._known[token]

    def _after_anchor(self, ids: Sequence[int]) -> str:
        text = self._decode([self._anchor, *ids])
        return text.removeprefix(self._anchor_text)


def sample_of(
    step: int,
    rollout: Rollout,
    reward: Judgement,
    advantage: float,
    old_logprobs: Sequence[float] | None,
    decode: Decode,
    texts: TokenTexts,
) -> Sample:
    """The line of one response.

    Args:
        step: number of the step that trains on it, from 1.
        old_logprobs: the trainer's, one per response token; None if they were not computed.
    """
    text = decode(rollout.token_ids)
    return {
        "step": step,
        "prompt_index": rollout.prompt.index,
        "prompt": rollout.prompt.text,
        "response": text,
        "reward": reward.value,
        "correct": reward.correct,
        "well_formed": reward.well_formed,
        "reason": reward.reason,
        "advantage": advantage,
        "finish_reason": rollout.finish_reason,
        "weight_version": rollout.weight_version,
        "length": len(rollout.token_ids),
        "repetition": round(repetition(rollout.token_ids), 4),
        "garbled": is_garbled(text, cut=rollout.finish_reason != "stop"),
        "tokens": texts.pieces(rollout.token_ids),
        "rollout_logprobs": _rounded(rollout.rollout_logprobs),
        "old_logprobs": None if old_logprobs is None else _rounded(old_logprobs),
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, DECIMALS) for value in values]


def encode_sample(sample: Sample) -> bytes:
    """The line of a sample in the file, with null for NaN. orjson is ten times as fast as json, and lines are long."""
    try:
        return orjson.dumps(sample)
    except TypeError:  # a text has surrogates, which UTF-8 cannot express
        return encode_json(sample).encode(errors="replace")


def repetition(token_ids: Sequence[int]) -> float:
    """1 - unique n-grams / n-grams, with n = 4: 0 for a response that never repeats itself, near 1 for a loop."""
    count = len(token_ids) - NGRAM + 1
    if count < 1:
        return 0.0
    return 1.0 - len(set(zip(*(token_ids[i : i + count] for i in range(NGRAM)), strict=True))) / count


def is_garbled(text: str, cut: bool = False) -> bool:
    """Whether a text holds bytes that are no UTF-8, unknown tokens or characters that nobody prints, as corrupt weights produce them.

    cut: the response was cut at its limit, so half a character at its end is no damage.
    """
    text = text.rstrip("\N{REPLACEMENT CHARACTER}") if cut else text
    if text.translate(_SPACES).isprintable() and not any(c in text for c in _STRANGE):
        return False  # the usual case, and fast
    strange = sum(c in _STRANGE or (ord(c) not in _SPACES and unicodedata.category(c) in _STRANGE_CATEGORIES) for c in text)
    return strange > GARBLED_SHARE * len(text)


def divergence(sample: Sample) -> float | None:
    """D of one response, the mean of exp(l) - 1 - l over its tokens; None without the trainer's log-probabilities."""
    if not sample["old_logprobs"]:
        return None
    ratios = [old - rollout for old, rollout in zip(sample["old_logprobs"], sample["rollout_logprobs"], strict=True)]
    return math.fsum(math.expm1(ratio) - ratio for ratio in ratios) / len(ratios)


def chosen_lines(path: Path, budget: int) -> tuple[list[Sample], list[int], list[int]]:
    """As many steps of the file as fit into `budget` bytes: the newest one, and earlier ones at equal distances.

    If not even the newest step fits, it is cut after the responses that do. One response is always read.

    Returns:
        (samples, numbers of the steps that they are from, numbers of all steps in the file).
    Raises:
        ValueError: a line is damaged. (An incomplete last line, which a crash can leave, is ignored.)
    """
    places = _places(path)
    steps, kept = sorted(places), list[int]()
    for stride in range(1, len(steps) + 1):
        kept = steps[::-1][::stride][::-1]
        if sum(size for step in kept for _, size in places[step]) <= budget:
            break
    samples: list[Sample] = []
    with path.open("rb") as file:
        for step in kept:
            for offset, size in places[step]:
                budget -= size
                if samples and budget < 0:
                    break
                file.seek(offset)
                samples.append(_parsed(path, file.read(size)))
    return samples, kept, steps


def _places(path: Path) -> dict[int, list[tuple[int, int]]]:
    """(offset, size) of the complete lines of each step, without reading them as JSON, because the file may have gigabytes."""
    places: dict[int, list[tuple[int, int]]] = {}
    for offset, line in _complete_lines(path):
        found = _STEP.match(line)
        step = int(found[1]) if found else int(_parsed(path, line)["step"])
        places.setdefault(step, []).append((offset, len(line)))
    return places


def _complete_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"}\n"):
                yield offset, line
            offset += len(line)


def _parsed(path: Path, line: bytes) -> Sample:
    try:
        sample = json.loads(line)
        if not isinstance(sample, dict) or "step" not in sample:
            raise ValueError("it has no step")
        return sample
    except ValueError as error:
        raise ValueError(f"{path}: a line is not a sample ({error}); delete the line that begins {line[:60]!r}") from error
