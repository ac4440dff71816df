"""`ais-megatron plan`: estimates the memory, traffic and time of a run without any GPU, and lists layouts that fit.

    memory of a rank = (weights + gradients + optimizer + (embedded engine) + the worst of its phases) (1 + fragmentation) + workspaces
    it fits if         memory (1 + margin) <= the card's memory - reserve

`make_plan` judges one configuration. `suggest` tries every layout of the same GPUs that the configuration's checks allow. Memory is
computed tensor by tensor (`planning.memory`). Seconds follow from the assumptions that the output names (`planning.cost`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from pydantic import ValidationError

from ais_megatron.config import Config, ConfigError
from ais_megatron.planning.cost import (
    GIB,
    Assumptions,
    Servers,
    StepTime,
    SyncBytes,
    longest_row,
    row_tokens,
    servers_of,
    step_time,
    sync_bytes,
)
from ais_megatron.planning.memory import SERVERS_TURN, RankMemory, rank_memory
from ais_megatron.planning.parameters import smallest_dp, total_parameters

if TYPE_CHECKING:
    from rich.table import Table

PEER_CONTEXT = GIB // 2  # rank 0's CUDA context on each GPU that it fills (rollout.sglang.transport=cuda_ipc)
POWERS = (1, 2, 4, 8, 16, 32, 64)
COMPONENTS = (
    ("weights", "weights"),
    ("gradients", "gradients, FP32"),
    ("optimizer", "optimizer, sharded over DP"),
    ("engine_weights", "engine weights"),
    ("aligned", "quantised copies of the weights (aligned forward pass)"),
    ("refresh", "logprobs, train: temporaries while these are made"),
    ("gathered", "collect: responses that are exchanged"),
    ("batch", "microbatches on the device"),
    ("activations", "train: activations"),
    ("logits", "train: logits, their gradient, FP32 chunks"),
    ("optimizer_step", "train: temporaries of the optimizer step"),
    ("logprobs", "logprobs: forward pass"),
    ("kv_cache", "generate: KV cache"),
    ("sampler", "generate: passes over canvases, logits of the sampler"),
    ("sync", "sync: buckets"),
    ("workspaces", "cuBLAS, cuDNN workspaces (assumed)"),
    ("lost", "lost between blocks (assumed)"),
)


@dataclass(frozen=True)
class Plan:
    """The estimate for one configuration."""

    config: Config
    """The configuration, with `parallel.dp` filled in."""
    assumed: Assumptions
    ranks: list[RankMemory]
    """One rank of each pipeline stage."""
    servers: Servers
    sync: SyncBytes
    time: StepTime
    problems: list[str]
    """Why it cannot run; empty if it can."""

    @property
    def gpus(self) -> int:
        return self.config.parallel.model_parallel_size * (self.config.parallel.dp or 1)

    @property
    def peak(self) -> int:
        return max(rank.peak for rank in self.ranks)


def with_gpus(config: Config, gpus: int | None) -> Config:
    """The configuration with `parallel.dp` set, for `gpus` trainer GPUs or (None) by `smallest_dp`.

    Raises:
        ConfigError: the GPUs cannot be divided into copies of the model, or the rest of the configuration does not allow that dp.
    """
    parallel = config.parallel
    dp = smallest_dp(parallel) if gpus is None else gpus // parallel.model_parallel_size
    if gpus is not None and (dp < 1 or gpus % parallel.model_parallel_size or parallel.dp not in (None, dp)):
        raise ConfigError(
            f"--gpus {gpus}: parallel.tp={parallel.tp} * pp={parallel.pp} * cp={parallel.cp} * dp={parallel.dp or 'any'} needs "
            f"{'' if parallel.dp else 'a multiple of '}{parallel.local_world_size}"
        )
    planned = revised(config, parallel={"dp": dp})
    if isinstance(planned, str):
        raise ConfigError(planned)
    return planned


def revised(config: Config, **sections: dict[str, object]) -> Config | str:
    """The configuration with some keys changed, or the message of the error if it is not valid."""
    data = config.model_dump()
    for name, changes in sections.items():
        data[name] |= changes
    try:
        return Config(**data)
    except ValidationError as error:
        return "\n".join(str(item.get("ctx", {}).get("error", item["msg"])) for item in error.errors())


def make_plan(config: Config, assumed: Assumptions) -> Plan:
    """Estimate one configuration. `config.parallel.dp` must be set (`with_gpus`)."""
    prompt, response = row_tokens(config, assumed)
    cuda = config.run.backend != "cpu"
    peer = PEER_CONTEXT if config.rollout.colocated and config.rollout.shares_gpu_memory else 0
    ranks = [
        rank_memory(
            config,
            stage,
            prompt_tokens=prompt,
            response_tokens=response,
            cuda=cuda,
            expert_load=assumed.expert_load,
            workspaces=int(assumed.workspace_gib * GIB) if cuda else 0,
            fragmentation=assumed.fragmentation if cuda else 0.0,
            # A released server keeps a CUDA context and what torch's allocator does not manage, as the trainer does.
            server=int((config.rollout.sglang.mem_fraction or 0.0) * assumed.memory * GIB) + peer if config.rollout.colocated else 0,
            released=int(assumed.reserve_gib * GIB) + peer if config.rollout.colocated else 0,
        )
        for stage in range(config.parallel.pp)
    ]
    servers = servers_of(config, assumed)
    problems = [*_rank_problems(config, assumed, ranks), *_server_problems(config, assumed, servers)]
    return Plan(config, assumed, ranks, servers, sync_bytes(config), step_time(config, assumed), problems)


def _rank_problems(config: Config, assumed: Assumptions, ranks: list[RankMemory]) -> list[str]:
    worst = max(ranks, key=lambda rank: rank.peak)
    limit = assumed.memory - assumed.reserve_gib
    if worst.peak * (1.0 + assumed.margin) <= limit * GIB:
        return []
    phase = max(worst.phases, key=lambda name: worst.phases[name])
    missing = worst.peak / GIB * (1.0 + assumed.margin) - limit
    parallel = config.parallel
    return [
        f"parallel.tp={parallel.tp} pp={parallel.pp} cp={parallel.cp} dp={parallel.dp} ep={parallel.ep} etp={parallel.etp}: a rank of "
        f"stage {worst.stage} needs {worst.peak / GIB:.1f} GiB in phase {phase} ({worst.lasting / GIB:.1f} GiB of them all the time), with "
        f"--margin {assumed.margin:g} {worst.peak / GIB * (1.0 + assumed.margin):.1f}; --gpu-memory-gib {assumed.memory:g} less "
        f"--reserve-gib {assumed.reserve_gib:g} is {limit:g}. {_remedy(config, assumed, phase, missing)}"
    ]


def _remedy(config: Config, assumed: Assumptions, phase: str, missing: float) -> str:
    """missing: GiB that the card lacks."""
    if config.rollout.colocated and phase in SERVERS_TURN:
        return (
            f"{missing:.1f} GiB are missing. Lower rollout.sglang.mem_fraction={config.rollout.sglang.mem_fraction:g} by at least "
            f"{missing / assumed.memory:.2f}, or set rollout.colocated=false"
        )
    if phase == "sync":
        return "Lower rollout.sync_bucket_mb, or raise parallel.tp, pp or dp"
    if phase == "generate" and config.architecture.family.is_diffusion:
        return "Lower rollout.max_batch, rollout.max_response_tokens or diffusion.block_length"
    if phase == "generate":
        return "Lower rollout.max_batch or rollout.max_response_tokens, or set rollout.engine=sglang"
    recompute = "set model.recompute=full, " if config.model.recompute == "none" else ""
    keys = "parallel.tp, pp, ep or dp (--gpus)" if config.architecture.is_moe else "parallel.tp, pp or dp (--gpus)"
    longest, budget = longest_row(config, assumed), config.train.tokens_per_microbatch
    if longest > budget:  # then a smaller budget would change nothing
        return (
            f"Raise {keys}, {recompute}or lower rollout.max_response_tokens: the longest row has {longest} tokens, more than "
            f"train.tokens_per_microbatch={budget}, and a row is never split"
        )
    return f"Raise {keys}, {recompute}or lower train.tokens_per_microbatch"


def _server_problems(config: Config, assumed: Assumptions, servers: Servers) -> list[str]:
    if not config.rollout.engine_traits.has_servers:
        return []
    sglang, row, problems = config.rollout.sglang, longest_row(config, assumed), []
    if servers.gpus % servers.tp:
        problems.append(f"--rollout-gpus {servers.gpus}: must be a multiple of rollout.sglang.tp={servers.tp}")
    if servers.kv_tokens < row:
        problems.append(
            f"rollout.sglang.tp={sglang.tp} mem_fraction={sglang.mem_fraction or 'empty'}: {servers.weights / GIB:.1f} GiB of weights on a "
            f"server's GPU leave a KV cache of {servers.kv_tokens} tokens, fewer than the {row} tokens of a prompt and the longest "
            f"response; --gpu-memory-gib is {assumed.memory:g}. Raise rollout.sglang.tp or rollout.sglang.mem_fraction, or use FP8"
        )
    return problems


def suggest(config: Config, assumed: Assumptions, gpus: int, count: int = 5) -> list[Plan]:
    """The `count` fastest layouts of `gpus` trainer GPUs that fit and that the configuration's checks allow.

    TP stays within a node and comes with sequence parallelism. Context parallelism is that of the configuration.

    Raises:
        ConfigError: `count` is negative.
    """
    if count < 0:
        raise ConfigError(f"--suggestions {count}: must be 0 or more; 0 lists none")
    # If generation decides (rollout.ahead=1), steps take the same time up to the sync. Then the layout whose trainer needs the least time
    # comes first.
    fitting = fitting_plans(config, assumed, gpus)
    return sorted(fitting, key=lambda plan: (float(f"{plan.time.total:.3g}"), plan.time.trainer, plan.peak))[:count]


def fitting_plans(config: Config, assumed: Assumptions, gpus: int, context: Sequence[int] | None = None) -> list[Plan]:
    """All layouts of `suggest`, in no order. context: the sizes of context parallelism to try; None: that of the configuration."""
    a, fitting = config.architecture, []
    experts = [n for n in POWERS if a.is_moe and a.num_experts % n == 0] or [1]
    stages = [n for n in range(1, a.num_hidden_layers + 1) if a.num_hidden_layers % n == 0]
    tensors = [n for n in POWERS if n <= min(gpus, assumed.gpus_per_node)]
    for tp, pp, cp in product(tensors, stages, context or (config.parallel.cp,)):
        dp = gpus // (tp * pp * cp)
        if gpus % (tp * pp * cp) or config.rollout.prompts_per_step % dp:
            continue  # the checks refuse it too, in much more time
        for ep, etp in product(experts, {1, tp} if a.is_moe else {1}):
            if tp * cp * dp % (ep * etp):
                continue
            layout: dict[str, object] = dict(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, etp=etp, sequence_parallel=tp > 1)
            for recompute in ("none", "full"):
                changed = revised(config, parallel=layout, model={"recompute": recompute})
                if isinstance(changed, str):
                    break
                if not (plan := make_plan(changed, assumed)).problems:
                    fitting.append(plan)
                    break  # if the layout fits without recomputation, recomputation only costs time
    return fitting


def print_plan(plan: Plan, suggestions: list[Plan]) -> None:
    """Print the plan as tables. The caller reports its problems."""
    from rich.console import Console

    console = Console(force_terminal=sys.stdout.isatty())
    config, assumed, parallel = plan.config, plan.assumed, plan.config.parallel
    prompt, response = row_tokens(config, assumed)
    layout = ", ".join(f"{key.upper()} {getattr(parallel, key)}" for key in ("tp", "pp", "cp", "dp", "ep", "etp"))
    console.print(
        f"{total_parameters(config.architecture) / 1e9:.3g} B parameters on {plan.gpus} trainer GPUs ({layout}), "
        f"{_engine_text(plan)}.\nAssumed: {assumed.card.name}, {assumed.memory:g} GiB, of which {assumed.reserve_gib:g} are kept in "
        f"reserve; a layout fits if its peak and a margin of {assumed.margin:.0%} fit; workspaces of {assumed.workspace_gib:g} GiB, "
        f"{assumed.fragmentation:.0%} lost between blocks; {assumed.flops / 1e12:g} TFLOP/s BF16 at MFU {assumed.mfu:g}, "
        f"{assumed.bandwidth / 1e9:g} GB/s at {assumed.decode_efficiency:g} in decoding, NVLink {assumed.nvlink_gb_s:g} and network "
        f"{assumed.network_gb_s:g} GB/s; prompts of {prompt} and responses of {response} tokens, the longest of "
        f"{config.rollout.max_response_tokens}; the busiest experts get "
        f"{assumed.expert_load:g} times the mean.",
        highlight=False,
    )
    for table in (_memory_table(plan), _time_table(plan)):
        console.print(table, highlight=False)
    if suggestions:
        console.print(_suggestion_table(suggestions))
    elif plan.problems:
        console.print(
            f"No layout of {plan.gpus} GPUs fits. Use more GPUs (--gpus), fewer tokens per microbatch, or a card with more memory."
        )


def _engine_text(plan: Plan) -> str:
    servers = plan.servers
    if not plan.config.rollout.engine_traits.can_evaluate:
        return "no rollout engine"
    if plan.config.rollout.engine_traits.is_embedded:
        how = "reads the canvases of" if plan.config.architecture.family.is_diffusion else "decodes"
        return f"each with an embedded engine that {how} {servers.concurrency} responses at the same time"
    return f"{servers.engines} SGLang servers with {servers.tp} GPUs each, {servers.concurrency} requests at the same time in each"


def _memory_table(plan: Plan) -> Table:
    from rich.table import Table

    unit, name = (GIB, "GiB") if plan.peak >= GIB else (2**20, "MiB")
    table = Table(title=f"Memory of a rank, {name}", title_justify="left")
    shown = plan.ranks if len(plan.ranks) <= 2 else [plan.ranks[0], plan.ranks[-1]]
    table.add_column("")
    for rank in shown:
        table.add_column(f"stage {rank.stage}", justify="right")
    for field, text in COMPONENTS:
        if any(getattr(rank, field) for rank in shown):
            table.add_row(text, *(f"{getattr(rank, field) / unit:.2f}" for rank in shown))
    table.add_section()
    for phase in plan.ranks[0].phases:
        table.add_row(f"peak of {phase}", *(f"{rank.phases[phase] / unit:.2f}" for rank in shown))
    if plan.config.rollout.engine_traits.has_servers:
        servers = plan.servers
        table.add_section()
        table.add_row("a server's GPU: weights", f"{servers.weights / unit:.2f}")
        table.add_row(f"its KV cache ({servers.kv_tokens:,} tokens)", f"{servers.kv_tokens * servers.kv_per_token / unit:.2f}")
    return table


def _time_table(plan: Plan) -> Table:
    from rich.table import Table

    time, sync = plan.time, plan.sync
    ahead = plan.config.rollout.ahead
    how = "generation runs beside the trainer (rollout.ahead=1)" if ahead else "one phase after the other (rollout.ahead=0)"
    table = Table(title=f"A step, estimated: {how}", title_justify="left")
    for column in ("phase", "seconds", "share"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for name in ("generate", "logprobs", "train", "gradients", "optimizer", "trainer", "sync"):
        seconds = getattr(time, name)
        table.add_row("trainer, all its phases" if name == "trainer" else name, f"{seconds:.3g}", f"{seconds / time.total:.0%}")
    table.add_row("step", f"{time.total:.3g}", f"{time.tokens_per_second:,.0f} response tokens/s")
    table.add_section()
    table.add_row("one sync, GiB: gathered over TP and EP", f"{sync.gathered / GIB:.2f}", "by each rank")
    table.add_row("broadcast over PP", f"{sync.broadcast / GIB:.2f}", "by each rank")
    table.add_row("pushed", f"{sync.pushed / GIB:.2f}", f"about {sync.buckets} buckets")
    return table


def _suggestion_table(plans: list[Plan]) -> Table:
    from rich.table import Table

    table = Table(title=f"Layouts of {plans[0].gpus} GPUs that fit, fastest first", title_justify="left")
    for column in ("parallel", "recompute", "peak GiB", "train s", "step s"):
        table.add_column(column, justify="left" if column in ("parallel", "recompute") else "right", no_wrap=column == "parallel")
    for plan in plans:
        p = plan.config.parallel
        names = [f"{key}={value}" for key in ("tp", "pp", "cp", "dp", "ep", "etp") if (value := getattr(p, key)) != 1]
        times = (f"{plan.time.train:.3g}", f"{plan.time.total:.3g}")
        table.add_row(" ".join(names) or "one GPU", plan.config.model.recompute, f"{plan.peak / GIB:.1f}", *times)
    return table
