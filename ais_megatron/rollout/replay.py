"""The replay engine: it generates nothing, and returns the recorded responses of another run (`recording`).

It is for training again on the same samples, to debug a step or to compare corrections and objectives. Responses to training prompts
are found by the prompt's number alone, so a run may replay a recording from any other layout. Responses to held-out prompts are found
by their number and the version of the weights. Rewards, lengths and held-out accuracy are therefore those of the recorded run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ais_megatron.batch import Bucket, Prompt, Rollout
from ais_megatron.config.evaluation import PROMPTS_PER_SET
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.recording import FORMAT, FORMAT_VERSION, SUFFIX

_OPEN_FILES = 4  # number of files whose contents are kept, because a rank's prompts come from few files at a time

_Key = tuple[int, int]


@dataclass(frozen=True)
class _Contents:
    """The contents of one file: the tokens of the prompts, and their responses in the same order."""

    prompt_tokens: list[tuple[int, ...]]
    responses: list[list[tuple[dict[str, Any], tuple[int, ...], tuple[float, ...], Tensor | None]]]


class ReplayEngine:
    """A `RolloutEngine`, which documents the methods.

    Args:
        folder: the `rollout.save_dir` of the run to replay.
    Raises:
        ValueError: nothing was recorded there, or a file is damaged or has another format. The message names the file.
    """

    takes_updates_while_generating = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._version = -1
        self._headers = {path: _read_header(path) for path in folder.glob(f"*{SUFFIX}")}
        if not self._headers:
            raise ValueError(f"rollout.replay_dir={folder}: holds no recorded responses; give the rollout.save_dir of an earlier run")
        self._places: dict[_Key, tuple[Path, int]] = {}
        for path, header in sorted(self._headers.items(), key=lambda item: item[1]["written"]):  # later ones replace earlier ones
            for number, prompt in enumerate(header["prompts"]):
                self._places[_key(prompt["index"], header["version"])] = (path, number)
        self._contents: dict[Path, _Contents] = {}
        self._lock = Lock()

    @property
    def version(self) -> int:
        return self._version

    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        """Ignore the weights. Every rank still has to take part in gathering them."""
        for _ in buckets:
            pass
        self._version = version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return the recorded responses. Raises `ValueError` if the recording has no responses to exactly these tokens with this
        sampling."""
        if self._version < 0:
            raise RuntimeError("the replay engine has no weight version yet; call update_weights before generate")
        return [rollout for prompt in prompts for rollout in self._replayed(prompt, sampling)]

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Rollout]]:
        return []

    def close(self) -> None:
        self._contents.clear()

    def _replayed(self, prompt: Prompt, sampling: SamplingParams) -> list[Rollout]:
        place = self._places.get(_key(prompt.index, self._version))
        if place is None:
            raise ValueError(self._why_missing(prompt.index))
        path, number = place
        recorded = self._headers[path]["sampling"]
        for name, asked in asdict(sampling).items():
            if recorded.get(name) != asked:
                raise ValueError(
                    f"prompt {prompt.index}: this run samples with {name}={asked}, but {path} was recorded with "
                    f"{recorded.get(name)}; replay with the recorded run's rollout, eval and run.seed settings"
                )
        contents = self._open(path)
        if contents.prompt_tokens[number] != prompt.token_ids:
            raise ValueError(
                f"prompt {prompt.index}: its tokens in {path} are different; replay with the recorded run's task, tokenizer and run.seed"
            )
        return [_rollout(prompt, *response) for response in contents.responses[number]]

    def _why_missing(self, index: int) -> str:
        where = f"rollout.replay_dir={self._folder}: holds no responses to"
        if index >= 0:
            known = [i for version, i in self._places if i >= 0]
            of = f"prompts {min(known)} to {max(known)}" if known else "held-out prompts only"
            return f"{where} prompt {index}, but to {of}; lower train.steps, or keep the recorded rollout and objective settings"
        versions = sorted({version for version, i in self._places if i < 0})
        return (
            f"{where} held-out prompt {(-1 - index) % PROMPTS_PER_SET} at weight version {self._version}, but at versions {versions}; "
            "keep the recorded eval settings and train.steps"
        )

    def _open(self, path: Path) -> _Contents:
        with self._lock:  # a step and an evaluation may ask at the same time
            if path not in self._contents:
                if len(self._contents) >= _OPEN_FILES:
                    del self._contents[next(iter(self._contents))]
                self._contents[path] = _read_contents(path, self._headers[path])
            return self._contents[path]


class SavedResponses:
    """Recorded responses to training prompts, each of which is given away once."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[tuple[int, ...], dict[str, Any], list[Rollout]]] = {}

    @classmethod
    def of(cls, paths: Sequence[Path], oldest: int) -> SavedResponses:
        """The responses in the files of `write_rollouts`, without those of groups that have tokens of a version below `oldest`.

        Raises:
            ValueError: a file is damaged.
        """
        saved = cls()
        for path in paths:
            header = _read_header(path)
            contents = _read_contents(path, header)
            for about, tokens, responses in zip(header["prompts"], contents.prompt_tokens, contents.responses, strict=True):
                rollouts = [_rollout(Prompt(about["index"], "", tokens, {}), *response) for response in responses]
                if min(rollout.weight_version for rollout in rollouts) >= oldest:
                    saved._found[about["index"]] = (tokens, header["sampling"], rollouts)
        return saved

    def take(self, prompt: Prompt, sampling: SamplingParams) -> list[Rollout] | None:
        """The responses to exactly this prompt with exactly this sampling, or None."""
        tokens, sampled, rollouts = self._found.pop(prompt.index, ((), {}, []))
        if tokens != prompt.token_ids or sampled != asdict(sampling):
            return None
        return [replace(rollout, prompt=prompt) for rollout in rollouts]


def _rollout(
    prompt: Prompt, about: dict[str, Any], tokens: tuple[int, ...], logprobs: tuple[float, ...], experts: Tensor | None
) -> Rollout:
    return Rollout(
        prompt=prompt,
        token_ids=tokens,
        rollout_logprobs=logprobs,
        finish_reason=about["finish_reason"],
        weight_version=about["weight_version"],
        routed_experts=experts,
        version_spans=tuple((int(version), int(count)) for version, count in about["version_spans"]),
    )


def _key(index: int, version: int) -> _Key:
    """The key of a response. A training prompt is answered once in a run, a held-out prompt (negative index) once per version."""
    return (version if index < 0 else 0, index)


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[FORMAT])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a recording of responses, or damaged ({error}); delete it, or record again") from error
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: is has format version {header['format_version']}, but this version of ais_megatron reads {FORMAT_VERSION}; record "
            "again"
        )
    return header


def _read_contents(path: Path, header: dict[str, Any]) -> _Contents:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({error}); record again") from error
    prompts, responses = header["prompts"], header["rollouts"]
    prompt_tokens = [tuple(part.tolist()) for part in tensors["prompt_tokens"].split([p["num_tokens"] for p in prompts])]
    counts = [r["num_tokens"] for r in responses]
    tokens, logprobs = (tensors[name].split(counts) for name in ("tokens", "logprobs"))
    routed: list[Tensor | None] = [None] * len(responses)
    if "routed_experts" in tensors:
        parts = iter(tensors["routed_experts"].split([r["num_routed"] for r in responses if r["num_routed"] is not None]))
        routed = [None if r["num_routed"] is None else next(parts) for r in responses]
    flat = [(r, tuple(t.tolist()), tuple(p.tolist()), e) for r, t, p, e in zip(responses, tokens, logprobs, routed, strict=True)]
    size = len(responses) // len(prompts)
    return _Contents(prompt_tokens, [flat[i * size : (i + 1) * size] for i in range(len(prompts))])
