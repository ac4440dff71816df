"""A reward service of your own, over HTTP: any program that answers these requests can judge the responses, on any machine.

    python -m examples.reward_service --port 8700
    ais-megatron train configs/tiny_countdown.yaml run.dir=runs/served task.reward=http://127.0.0.1:8700/reward

It judges Countdown, and takes something off for parentheses. Set AIS_REWARD_KEY to the same secret for both commands, and the service
answers nobody else.
"""

from __future__ import annotations

import argparse
import hmac
import os

from aiohttp import web

from ais_megatron.config import TaskConfig
from ais_megatron.tasks.countdown import Countdown

COUNTDOWN = Countdown(TaskConfig(name="countdown"), seed=0)


async def reward(request: web.Request) -> web.Response:
    """The request has "truth", "response", "prompt" and "options" (`task.options`). Only "reward" must be in the answer."""
    key = os.environ.get("AIS_REWARD_KEY", "")
    if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), f"Bearer {key}".encode() if key else b""):
        return web.json_response({"error": "wrong key"}, status=401)
    body = await request.json()
    judged = COUNTDOWN.reward(body["truth"], body["response"])
    penalty = body["options"].get("penalty", 0.1) if judged.correct and "(" in body["response"] else 0.0
    return web.json_response(
        {"reward": judged.value - penalty, "well_formed": judged.well_formed, "correct": judged.correct, "reason": judged.reason}
    )


def make_app() -> web.Application:
    app = web.Application()
    app.router.add_post("/reward", reward)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A reward service for Countdown")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8700)
    arguments = parser.parse_args()
    web.run_app(make_app(), host=arguments.host, port=arguments.port)
