"""`ais-megatron plan --sweep`: the fastest layout at each number of GPUs, and what stops the run from scaling further.

For each number of GPUs and length of responses, all GPUs are divided between trainer and SGLang servers: an eighth, a quarter or a half
train, and the others generate. The servers get the tensor and expert parallelism that generates fastest. The trainer gets the layout of
`plan.fitting_plans` with the shortest time, with context parallelism as long as slices of a row are not too short. Of all divisions the
one with the most response tokens per second is kept. The batch does not grow with the GPUs (strong scaling).

The bottleneck of a point is the phase that a step waits for longest, and in it the cause with the largest share (`cost.generate_parts`,
`pass_parts`, `sync_parts`). A length stops scaling at the GPUs beyond which twice as many give less than `WORTH_IT` times the throughput.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import log2
from typing import Any

from ais_megatron.config import Config, ConfigError
from ais_megatron.planning.cost import (
    GIB,
    Assumptions,
    Route,
    generate_parts,
    generate_seconds,
    longest_row,
    pass_parts,
    servers_of,
    sync_parts,
)
from ais_megatron.planning.plan import Plan, fitting_plans, make_plan, revised

SHARES = (8, 4, 2)
"""The trainer gets one of so many parts of the GPUs. Other shares would leave numbers of ranks that do not divide a batch."""
SERVER_SIZES = (1, 2, 4, 8)
CONTEXT_SIZES = (1, 2, 4, 8)
SHORTEST_SLICE = 1024
"""Tokens of a row on one rank. With shorter slices context parallelism is hardly ever the fastest, and the search would take longer."""
WORTH_IT = 1.4
ROUTES: tuple[Route, ...] = ("chain", "tree", "direct")


@dataclass(frozen=True)
class Point:
    """The fastest division of a number of GPUs, for responses of one length."""

    gpus: int
    response_tokens: int
    plan: Plan | None
    """The trainer's layout, with the servers; None if nothing fits."""
    causes: tuple[tuple[str, str, float], ...] = ()
    """(phase, cause, seconds) of everything that takes time, the longest first."""
    sync: tuple[float, ...] = ()
    """Seconds of a sync by each of `ROUTES`."""

    @property
    def tokens_per_second(self) -> float:
        return self.plan.time.tokens_per_second if self.plan else 0.0

    @property
    def critical(self) -> str:
        """The phase that a step waits for longest: generate, trainer or sync."""
        assert self.plan is not None
        time = self.plan.time
        return max(("generate", time.generate), ("trainer", time.trainer), ("sync", time.sync), key=lambda phase: phase[1])[0]

    @property
    def bottleneck(self) -> str:
        """The critical phase and its largest cause."""
        if self.plan is None:
            return "no layout fits into the memory"
        seconds, total = {c: s for phase, c, s in self.causes if phase == self.critical}, self.plan.time.total
        cause = max(seconds, key=lambda name: seconds[name])
        return f"{self.critical}: {cause} ({seconds[cause] / total:.0%} of a step)"


def sweep(config: Config, assumed: Assumptions, gpus: Sequence[int], lengths: Sequence[int]) -> list[Point]:
    """The points of a sweep, in the order of the lengths and then of the GPUs.

    Raises:
        ConfigError: the configuration has no SGLang servers, or numbers that it cannot have.
    """
    _check(config, gpus, lengths)
    points = []
    for length in lengths:
        sized = revised(config, rollout={"max_response_tokens": length}, parallel={"dp": 1, "ep": 1, "etp": 1})
        if isinstance(sized, str):
            raise ConfigError(f"--responses {length}: {sized}")
        trainers: dict[tuple[int, int, int], list[Plan]] = {}
        points += [_point(sized, replace(assumed, response_tokens=length), count, trainers) for count in gpus]
    return points


def _check(config: Config, gpus: Sequence[int], lengths: Sequence[int]) -> None:
    if not config.rollout.engine_traits.has_servers:
        raise ConfigError(
            f"--sweep: rollout.engine={config.rollout.engine} has no servers to divide the GPUs with; set rollout.engine=sglang"
        )
    for option, values in (("--sweep-gpus", gpus), ("--responses", lengths)):
        if not values or min(values) < 1:
            raise ConfigError(f"{option} {','.join(map(str, values))}: must be one or more numbers, each 1 or more")
    if min(gpus) < 2:
        raise ConfigError(f"--sweep-gpus {min(gpus)}: must be 2 or more, because some train and the others generate")


def _point(config: Config, assumed: Assumptions, gpus: int, trainers: dict[tuple[int, int, int], list[Plan]]) -> Point:
    best: Plan | None = None
    for training in sorted({gpus // share for share in SHARES if gpus % share == 0}):
        here = replace(assumed, rollout_gpus=gpus - training)
        served = _with_servers(config, here)
        if served is None:
            continue
        key = (training, served.rollout.sglang.tp, served.rollout.sglang.ep)
        if key not in trainers:  # the same GPUs train in several divisions
            trainers[key] = fitting_plans(served, here, training, _context_sizes(served, here))
        found = _fastest(trainers[key], generate_seconds(served, here, servers_of(served, here)))
        if found is not None:
            plan = make_plan(found.config, here)
            if not plan.problems and (best is None or plan.time.tokens_per_second > best.time.tokens_per_second):
                best = plan
    if best is None:
        return Point(gpus, config.rollout.max_response_tokens, None)
    sync = tuple(sum(sync_parts(best.config, best.assumed, best.sync, best.servers, route).values()) for route in ROUTES)
    return Point(gpus, config.rollout.max_response_tokens, best, _causes(best), sync)


def _with_servers(config: Config, assumed: Assumptions) -> Config | None:
    """The configuration with the servers that generate fastest on `assumed.rollout_gpus`; None if none fits."""
    found: list[tuple[float, int, Config]] = []
    gpus = assumed.rollout_gpus or 0
    for tp in (n for n in SERVER_SIZES if gpus % n == 0 and n <= assumed.gpus_per_node):
        for ep in (n for n in SERVER_SIZES if n <= tp and (n == 1 or config.architecture.is_moe)):
            sglang = config.rollout.sglang.model_dump() | {"tp": tp, "ep": ep}
            changed = revised(config, rollout={"sglang": sglang})
            if isinstance(changed, str):
                continue
            servers = servers_of(changed, assumed)
            if servers.kv_tokens >= longest_row(changed, assumed):
                found.append((generate_seconds(changed, assumed, servers), tp, changed))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def _context_sizes(config: Config, assumed: Assumptions) -> list[int]:
    return [cp for cp in CONTEXT_SIZES if cp == 1 or longest_row(config, assumed) >= cp * SHORTEST_SLICE]


def _fastest(plans: Sequence[Plan], generate: float) -> Plan | None:
    """The plan with the shortest step, beside servers that generate for so many seconds. If several have it, the one whose trainer needs
    the least time."""

    def seconds(plan: Plan) -> tuple[float, float, int]:
        time = plan.time
        step = max(generate, time.trainer) if plan.config.rollout.ahead else generate + time.trainer
        return step + time.sync, time.trainer, plan.peak

    return min(plans, key=seconds, default=None)


def _causes(plan: Plan) -> tuple[tuple[str, str, float], ...]:
    config, assumed, time = plan.config, plan.assumed, plan.time
    recompute = config.model.recompute == "full"
    update = pass_parts(config, assumed, assumed.recompute_ratio if recompute else assumed.train_ratio, 3 if recompute else 2)
    forward = pass_parts(config, assumed, 1.0, 1)
    passes = (not config.ais.lag) + bool(config.objective.kl_coefficient)
    trainer = {name: update[name] + passes * forward[name] for name in update}
    trainer |= {"reducing gradients": time.gradients, "optimizer step": time.optimizer}
    phases = {
        "generate": generate_parts(config, assumed, plan.servers),
        "trainer": trainer,
        "sync": sync_parts(config, assumed, plan.sync, plan.servers),
    }
    found = [(phase, cause, seconds) for phase, causes in phases.items() for cause, seconds in causes.items() if seconds > 0.0]
    return tuple(sorted(found, key=lambda entry: -entry[2]))


@dataclass(frozen=True)
class Limit:
    """Where responses of one length stop scaling."""

    response_tokens: int
    gpus: int | None
    """The last number of GPUs from which doubling was worth it; None if nothing fits."""
    why: str


def limits(points: Iterable[Point]) -> list[Limit]:
    """One for each length. Points of a length must be in the order of their GPUs."""
    by_length: dict[int, list[Point]] = {}
    for point in points:
        by_length.setdefault(point.response_tokens, []).append(point)
    return [_limit(length, group) for length, group in by_length.items()]


def _limit(length: int, points: Sequence[Point]) -> Limit:
    fitting = [point for point in points if point.plan is not None]
    if not fitting:
        return Limit(length, None, "no layout fits into the memory of so few GPUs")
    for before, after in zip(fitting, fitting[1:], strict=False):
        gain, more = after.tokens_per_second / before.tokens_per_second, after.gpus / before.gpus
        if gain < WORTH_IT ** log2(more):
            return Limit(length, before.gpus, f"{after.gpus} GPUs give {gain:.2f} times as much. {_reason(after)}")
    return Limit(length, fitting[-1].gpus, f"still worth it at the largest number here. {_reason(fitting[-1])}")


def _reason(point: Point) -> str:
    """The bottleneck in a sentence, with what could be done about it."""
    assert point.plan is not None
    plan, config = point.plan, point.plan.config
    advice = {
        "latency of layers": "A decode step takes this long for a single response too, so only shorter responses or faster kernels help",
        "reading weights": "Every decode step reads all weights, so only more responses per server (rollout.prompts_per_step) help",
        "requests to all servers": "Rank 0 asks every server for every bucket, so raise rollout.sync_bucket_mb or rollout.sglang.tp",
        "bytes to the servers": "Each GPU receives all weights",
        "hops of the broadcast": "A tree would have fewer hops in a row",
        "reducing gradients": "It does not shrink with more data parallelism",
    }
    cause = max(((c, s) for phase, c, s in point.causes if phase == point.critical), key=lambda entry: entry[1])[0]
    dp, prompts = config.parallel.dp or 1, config.rollout.prompts_per_step
    text = f"Bottleneck: {point.bottleneck}"
    if point.critical == "trainer" and dp == prompts:
        text += f". parallel.dp={dp} is rollout.prompts_per_step, and a data-parallel rank needs a prompt"
    text += f". {advice[cause]}" if cause in advice else ""
    servers = plan.servers
    slots = config.rollout.prompts_per_step * config.rollout.group_size
    if point.critical == "generate" and servers.engines > slots:
        text += f". {servers.engines} servers have {slots} responses to generate, so some are idle"
    return text + "."


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Every point as plain values. Seconds are of a step, and memory is of the fullest rank with a margin not added."""
    rows = []
    for point in points:
        row: dict[str, Any] = {"gpus": point.gpus, "response_tokens": point.response_tokens, "fits": point.plan is not None}
        if point.plan is not None:
            plan, p = point.plan, point.plan.config.parallel
            row |= {
                "trainer_gpus": plan.gpus,
                "rollout_gpus": plan.servers.gpus,
                "parallel": {key: getattr(p, key) for key in ("tp", "pp", "cp", "dp", "ep", "etp")},
                "recompute": plan.config.model.recompute,
                "server": {"tp": plan.servers.tp, "ep": plan.config.rollout.sglang.ep, "concurrency": plan.servers.concurrency},
                "peak_gib": plan.peak / GIB,
                "seconds": {name: getattr(plan.time, name) for name in ("generate", "trainer", "sync", "total")},
                "sync_seconds": dict(zip(ROUTES, point.sync, strict=True)),
                "tokens_per_second": point.tokens_per_second,
                "bottleneck": point.bottleneck,
                "causes": [{"phase": phase, "cause": cause, "seconds": seconds} for phase, cause, seconds in point.causes],
            }
        rows.append(row)
    return rows
