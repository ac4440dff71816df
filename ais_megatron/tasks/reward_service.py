"""`task.reward=http://…` or `https://…`: a service that judges the responses.

A request is a POST with the JSON object {"truth", "response", "prompt", "options"}. The answer is a JSON object with the number "reward".
It may also have "well_formed" and "correct" (booleans) and "reason" (text).

Connection errors, timeouts, HTTP 429 and HTTP 5xx are tried again, after a time that doubles and has a random part, so that many ranks do
not come back at once. If the environment variable AIS_REWARD_KEY is set, it is sent as a bearer token.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from ais_megatron.config import TaskConfig
from ais_megatron.tasks.task import Attempt, Reward

if TYPE_CHECKING:
    import aiohttp

KEY_VARIABLE = "AIS_REWARD_KEY"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
JSON_HEADERS = {"Content-Type": "application/json"}


class ServiceError(RuntimeError):
    """The service gave no reward."""


class RewardService:
    """The service at `url`. Raises ValueError if the key in the environment cannot be sent."""

    def __init__(self, url: str, config: TaskConfig) -> None:
        self._url, self._config = url, config
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"{KEY_VARIABLE}: the key for task.reward={url} has characters that no HTTP header can hold; check its value")

    @property
    def patience_s(self) -> float:
        """The longest time for one response, with all tries."""
        return (self._config.reward_retries + 1) * (self._config.reward_timeout_s + LONGEST_WAIT_S)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Callable[[Attempt], Awaitable[Reward]]]:
        """A function that asks the service. It shares its connections with all calls of a batch."""
        import aiohttp

        headers = JSON_HEADERS | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        connector = aiohttp.TCPConnector(limit=self._config.reward_concurrency)
        timeout = aiohttp.ClientTimeout(total=self._config.reward_timeout_s)
        async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
            yield partial(self._ask, session)

    async def _ask(self, session: aiohttp.ClientSession, attempt: Attempt) -> Reward:
        """Raises ServiceError if there is no valid answer after all tries."""
        body = {"truth": attempt.truth, "response": attempt.response, "prompt": attempt.prompt, "options": self._config.options}
        data = json.dumps(body).encode()
        for number in range(1, self._config.reward_retries + 2):
            status, answer = await self._post(session, data)
            if 200 <= status < 300:
                return read_reward(answer)
            if status not in (0, 429) and status < 500:
                break
            if number <= self._config.reward_retries:
                await asyncio.sleep(_wait_s(number))
        hint = f"; set the environment variable {KEY_VARIABLE} to a valid key" if status in (401, 403) else ""
        raise ServiceError(f"{answer} ({number} {'try' if number == 1 else 'tries'}){hint}")

    async def _post(self, session: aiohttp.ClientSession, data: bytes) -> tuple[int, str]:
        """HTTP status and body; in place of an error's body what people should read, and status 0 if there was no answer."""
        import aiohttp

        try:
            # A redirect would turn the POST into a GET, and could take the key to another host.
            async with session.post(self._url, data=data, allow_redirects=False) as response:
                text = await response.text(errors="replace")
                return response.status, text if response.status < 300 else f"answered HTTP {response.status}: {_shortened(text)}"
        except TimeoutError:
            return 0, f"did not answer within task.reward_timeout_s={self._config.reward_timeout_s:g}"
        except (aiohttp.ClientError, OSError) as error:
            return 0, f"cannot be reached: {error or type(error).__name__}"


def read_reward(answer: str) -> Reward:
    """The reward in the body of an answer. Raises ServiceError if it has another form."""
    try:
        fields = json.loads(answer)
    except (ValueError, RecursionError):
        fields = None
    value = fields.get("reward") if isinstance(fields, dict) else None
    if not isinstance(value, int | float):
        raise ServiceError(f'answered {_shortened(answer)}; it must answer with a JSON object such as {{"reward": 1.0}}')
    found = {"well_formed": value > 0, "correct": value >= 1, "reason": ""}
    for name, default in found.items():
        given = fields.get(name)
        if given is not None and type(given) is not type(default):
            raise ServiceError(f"answered {name}={given!r}; it must be {'a text' if name == 'reason' else 'true or false'}")
        found[name] = default if given is None else given
    return Reward(float(value), bool(found["well_formed"]), bool(found["correct"]), str(found["reason"]))


def _wait_s(number: int) -> float:
    """Seconds before the next try, after `number` failed ones."""
    return min(FIRST_WAIT_S * 2 ** (number - 1), LONGEST_WAIT_S / 1.5) * random.SystemRandom().uniform(0.5, 1.5)


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 200 else repr(text[:200]) + "..."
