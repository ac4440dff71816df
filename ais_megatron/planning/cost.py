"""Estimates the seconds and the traffic of a GRPO step for `ais-megatron plan`, from the configuration and stated assumptions.

    decode step  max(bytes of weights and KV cache read / (bandwidth x efficiency), FLOPs / peak) + latency of each layer
    diffusion    instead of decode steps: passes over whole canvases, max(bytes of weights read, FLOPs) + latency (`planning.diffusion`)
    passes       FLOPs / (GPUs x peak x MFU) x (1 + pipeline bubble) + traffic of tensor, context and expert parallelism, not overlapped
    gradients    reduce-scatter in FP32 and all-gather of the weights over DP, not overlapped (our DDP does not overlap)
    sync         gather within the trainer, quantise, send to the servers, one after the other. The servers form one chain, as in NCCL's
                 broadcast: bytes / network + buckets x (requests to all servers + hops along the chain + the servers' own work)

FLOPs per token are 2 per active parameter in the forward pass, 4 in the backward pass, 2 more if layers are recomputed, and those of
attention, of which a causal model computes half. These estimates are for choosing a layout, and every constant is an option of the
command. `planning.memory` computes the memory. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, isfinite, log2
from typing import Literal

from ais_megatron.config import Architecture, Config, ConfigError
from ais_megatron.planning.batches import microbatching
from ais_megatron.planning.diffusion import generation_flops, passes
from ais_megatron.planning.engine import adapter_bytes, engine_bytes, kv_bytes_per_token, pushed_bytes
from ais_megatron.planning.parameters import dtype_bytes, layer_counts, quantized_counts, rank_counts, total_parameters
from ais_megatron.planning.recurrent import state_bytes

GIB = 2**30
SERVER_MEM_FRACTION = 0.88  # if rollout.sglang.mem_fraction is empty; SGLang's own choice depends on the card
PCIE_GB_S, DISK_GB_S = 25.0, 2.0  # bandwidth of rollout.sglang.transport=tensor and =disk
NVLINK_HOP_US = 3.4  # of a message within a node, in NCCL's protocol for large messages (its tuning tables)


@dataclass(frozen=True)
class Card:
    """A GPU, with figures from its vendor's data sheet. TFLOP/s are dense peaks."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    memory_gb_s: float
    fp32_tflops: float
    """Without TF32, as the embedded engine multiplies quantised weights."""


CARDS = {
    "h100": Card("H100 SXM 80 GB", 80.0, 989.0, 1979.0, 3350.0, 67.0),
    "h200": Card("H200 SXM 141 GB", 139.0, 989.0, 1979.0, 4800.0, 67.0),
}


# (least, most) allowed value of each assumption. Those in POSITIVE must be above 0. nan and inf are never allowed.
LIMITS = {
    "gpu_memory_gib": (0.0, inf),
    "peak_tflops": (0.0, inf),
    "memory_gb_s": (0.0, inf),
    "nvlink_gb_s": (0.0, inf),
    "network_gb_s": (0.0, inf),
    "gpus_per_node": (1, inf),
    "mfu": (0.0, 1.0),
    "decode_efficiency": (0.0, 1.0),
    "latency_us": (0.0, inf),
    "prompt_tokens": (1, inf),
    "response_tokens": (1, inf),
    "rollout_gpus": (1, inf),
    "reserve_gib": (0.0, inf),
    "workspace_gib": (0.0, inf),
    "fragmentation": (0.0, 1.0),
    "margin": (0.0, 1.0),
    "expert_load": (1.0, inf),
    "train_ratio": (1.0, inf),
    "recompute_ratio": (1.0, inf),
    "quantize_passes": (0.0, inf),
    "request_us": (0.0, inf),
    "hop_us": (0.0, inf),
    "chunk_mib": (0.0, inf),
    "bucket_ms": (0.0, inf),
}
POSITIVE = {"gpu_memory_gib", "peak_tflops", "memory_gb_s", "nvlink_gb_s", "network_gb_s", "mfu", "decode_efficiency"}


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about what the configuration does not say.

    Raises:
        ConfigError: numbers outside of their `LIMITS`. One message lists all of them as options of `ais-megatron plan`.
    """

    card: Card = CARDS["h100"]
    gpu_memory_gib: float | None = None
    """None: the card's."""
    peak_tflops: float | None = None
    """Dense BF16; None: the card's."""
    memory_gb_s: float | None = None
    """Memory bandwidth; None: the card's."""
    nvlink_gb_s: float = 400.0
    """Bandwidth of one GPU within a node, in one direction."""
    network_gb_s: float = 45.0
    """Bandwidth of one GPU between nodes, in one direction."""
    gpus_per_node: int = 8
    mfu: float = 0.4
    """Share of the peak that forward and backward passes reach."""
    decode_efficiency: float = 0.6
    """Share of the memory bandwidth that decoding reaches."""
    latency_us: float = 20.0
    """Latency of one layer in a decode step, for kernels and tensor parallelism."""
    prompt_tokens: int = 256
    """Length of a typical prompt."""
    response_tokens: int | None = None
    """Length of a typical response; None: `rollout.max_response_tokens`."""
    rollout_gpus: int | None = None
    """GPUs of the SGLang servers; None: those of the servers that the configuration names."""
    reserve_gib: float = 3.0
    """Memory outside of torch's allocator: CUDA's context, kernels and NCCL's buffers."""
    workspace_gib: float = 1.0
    """Workspaces of cuBLAS, cuDNN and Transformer Engine."""
    fragmentation: float = 0.05
    """Memory that the allocator loses between blocks, as a share of the tensors' bytes."""
    margin: float = 0.15
    """A layout fits only if its peak and this share of it fit."""
    expert_load: float = 1.25
    """Tokens of the busiest rank's experts, divided by the mean."""
    train_ratio: float = 3.0
    """Time of a forward and backward pass, divided by that of a forward pass."""
    recompute_ratio: float = 4.0
    """The same if layers are recomputed."""
    quantize_passes: float = 3.0
    """How often a sync's quantisation reads or writes the bytes of the unquantised weights."""
    request_us: float = 250.0
    """CPU time of an HTTP request on the client's one event loop."""
    hop_us: float = 14.0
    """Latency of a message from one node to the next."""
    chunk_mib: float = 0.5
    """Bytes that a member of a broadcast receives before it passes them on."""
    bucket_ms: float = 20.0
    """What a server does for a bucket apart from receiving it."""

    def __post_init__(self) -> None:
        problems = [problem for name in LIMITS if (problem := _limit_problem(name, getattr(self, name)))]
        if not problems and self.reserve_gib >= self.memory:
            problems = [
                f"--reserve-gib {self.reserve_gib:g}: leaves nothing of --gpu-memory-gib {self.memory:g}; allowed: less than the memory. "
                "Lower the reserve, or raise the memory"
            ]
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def memory(self) -> float:
        """GiB of one GPU."""
        return self.card.memory_gib if self.gpu_memory_gib is None else self.gpu_memory_gib

    @property
    def flops(self) -> float:
        return (self.peak_tflops or self.card.bf16_tflops) * 1e12

    @property
    def bandwidth(self) -> float:
        return (self.memory_gb_s or self.card.memory_gb_s) * 1e9

    def link(self, ranks: int) -> float:
        """Bytes per second of one GPU within a group of `ranks` neighbouring ranks."""
        return (self.nvlink_gb_s if ranks <= self.gpus_per_node else self.network_gb_s) * 1e9


def _limit_problem(name: str, value: float | None) -> str | None:
    """What is wrong with an assumption, or None. (The value None is an option that was left out.)"""
    least, most = LIMITS[name]
    if value is None or (isfinite(value) and least <= value <= most and not (name in POSITIVE and value == 0.0)):
        return None
    allowed = f"more than {least:g}" if name in POSITIVE else f"{least:g} or more"
    if most < inf:
        allowed += f", at most {most:g} (a share of 1, not percent)"
    return f"--{name.replace('_', '-')} {value:g}: not possible; allowed: {allowed}. Give such a number, or leave the option out"


@dataclass(frozen=True)
class Servers:
    """The rollout engines: SGLang servers, or the embedded engines of the ranks."""

    gpus: int
    """GPUs of all engines together."""
    tp: int
    """Tensor-parallel size of one engine."""
    weights: int
    """Bytes of weights on one GPU."""
    kv_per_token: int
    """Bytes of KV cache for one token on one GPU."""
    kv_tokens: int
    """Tokens that the KV cache of one engine holds."""
    concurrency: int
    """Responses that one engine decodes at the same time."""

    @property
    def engines(self) -> int:
        return self.gpus // self.tp


@dataclass(frozen=True)
class SyncBytes:
    """The traffic of one weight sync, in bytes."""

    gathered: int
    """What each trainer rank receives over TP and EP."""
    broadcast: int
    """What each trainer rank receives from other pipeline stages."""
    pushed: int
    """What every GPU of an engine receives. Factors of LoRA travel as base64, in which 3 bytes take 4."""
    buckets: int
    """Number of buckets, approximately."""


@dataclass(frozen=True)
class StepTime:
    """The seconds of each phase of a step."""

    generate: float
    logprobs: float
    train: float
    gradients: float
    optimizer: float
    sync: float
    trainer: float
    """All phases between generation and the sync."""
    total: float
    """The whole step. With `rollout.ahead=1` generation and the trainer's phases overlap, and the slower one counts."""
    tokens_per_second: float


def row_tokens(config: Config, assumed: Assumptions) -> tuple[int, int]:
    """(prompt, response) tokens of a typical sequence. A diffusion model always reads whole canvases."""
    if config.architecture.family.is_diffusion:
        return assumed.prompt_tokens, config.rollout.max_response_tokens
    return assumed.prompt_tokens, assumed.response_tokens or config.rollout.max_response_tokens


def longest_row(config: Config, assumed: Assumptions) -> int:
    """Tokens of a typical prompt with the longest response."""
    prompt, response = row_tokens(config, assumed)
    return prompt + max(response, config.rollout.max_response_tokens)


def active_parameters(a: Architecture) -> int:
    """Number of parameters that multiply one token: only the chosen experts, and the head but not the embedding."""
    dense, expert = layer_counts(a)
    if a.is_moe:
        expert = expert // a.num_experts * a.num_experts_per_tok
    return dense + expert + a.vocab_size * a.hidden_size


def forward_flops(a: Architecture, rows: int, length: int) -> float:
    """FLOPs of a forward pass over `rows` sequences of `length` tokens. Causal attention computes half of the square."""
    attention = (4 if a.family.is_diffusion else 2) * len(a.attention_layers) * a.query_size * length
    recurrent = 6 * (a.num_hidden_layers - len(a.attention_layers)) * a.linear_key_head_dim * a.linear_value_size  # decay, correct, read
    return rows * length * (2.0 * active_parameters(a) + attention + recurrent)


def servers_of(config: Config, assumed: Assumptions) -> Servers:
    """The engines that generate. With the local engine these are the trainer's own ranks, each with all weights."""
    rollout, parallel = config.rollout, config.parallel
    row = sum(row_tokens(config, assumed))
    if rollout.engine_traits.is_embedded:
        gpus, tp, pool = parallel.model_parallel_size * (parallel.dp or 1), 1, rollout.max_batch * row
        kv, limit = kv_bytes_per_token(config), rollout.max_batch
    else:
        sglang = rollout.sglang
        gpus, tp = assumed.rollout_gpus or sglang.tp * (len(sglang.servers) or sglang.num_servers), sglang.tp
        kv, limit = kv_bytes_per_token(config), sglang.max_running or sglang.max_concurrency
        fraction = SERVER_MEM_FRACTION if sglang.mem_fraction is None else sglang.mem_fraction
        pool = int(max(0.0, assumed.memory * GIB * fraction - engine_bytes(config, tp)) // kv)
    rows = rollout.prompts_per_step * rollout.group_size
    concurrency = max(1, min(limit, pool // row, ceil(rows / max(1, gpus // tp))))
    return Servers(gpus, tp, engine_bytes(config, tp), kv, pool, concurrency)


def generate_parts(config: Config, assumed: Assumptions, servers: Servers) -> dict[str, float]:
    """Seconds of generation by cause: one prefill per group, then waves of decode steps. All responses have the typical length."""
    if config.architecture.family.is_diffusion:
        return _diffusion_parts(config, assumed, servers)
    a, rollout = config.architecture, config.rollout
    prompt, response = row_tokens(config, assumed)
    prefill = forward_flops(a, rollout.prompts_per_step, prompt) / (servers.gpus * assumed.flops * assumed.mfu)
    quantized, _ = quantized_counts(a, config.rollout.weight_block)
    is_local, fp8 = rollout.engine_traits.is_embedded, rollout.quantization != "none"
    width = (4 if is_local else 1) if fp8 else dtype_bytes(config)  # the local engine multiplies with dequantised FP32 copies
    touched = 1.0
    if a.is_moe:
        touched = 1.0 - (1.0 - a.num_experts_per_tok / a.num_experts) ** servers.concurrency
    experts = layer_counts(a)[1]
    weights = width * (quantized - experts * (1.0 - touched)) + dtype_bytes(config) * (total_parameters(a) - quantized)
    states = 2 * state_bytes(config) / servers.tp  # read and written for every token
    cache = servers.concurrency * ((prompt + response / 2) * servers.kv_per_token + states)
    speed = assumed.bandwidth * assumed.decode_efficiency
    flops = servers.concurrency * 2.0 * active_parameters(a) / servers.tp / (assumed.flops * assumed.mfu)
    waves = ceil(rollout.prompts_per_step * rollout.group_size / (servers.engines * servers.concurrency))
    steps, read = waves * response, weights / servers.tp / speed + cache / speed
    parts = {"prefill": prefill, "latency of layers": steps * a.num_hidden_layers * assumed.latency_us * 1e-6}
    if flops > read:
        return parts | {"FLOPs of decoding": steps * flops}
    return parts | {"reading weights": steps * weights / servers.tp / speed, "reading the KV cache": steps * cache / speed}


def _diffusion_parts(config: Config, assumed: Assumptions, servers: Servers) -> dict[str, float]:
    """`generate_parts` of a diffusion model in embedded engines: waves of passes over whole canvases."""
    a, rollout = config.architecture, config.rollout
    is_quantised, (quantized, _) = rollout.quantization != "none", quantized_counts(a, rollout.weight_block)
    weights = (4 if is_quantised else dtype_bytes(config)) * quantized + dtype_bytes(config) * (total_parameters(a) - quantized)
    flops = generation_flops(config, assumed.prompt_tokens, sum(layer_counts(a)))
    # The engine multiplies with FP32 copies of quantised weights.
    slower = assumed.card.bf16_tflops / assumed.card.fp32_tflops if is_quantised or dtype_bytes(config) == 4 else 1.0
    waves = ceil(rollout.prompts_per_step * rollout.group_size / (servers.engines * servers.concurrency))
    steps = waves * passes(config)
    compute = waves * servers.concurrency * (slower * flops.layers + flops.rest) / (assumed.flops * assumed.mfu)
    read = steps * weights / (assumed.bandwidth * assumed.decode_efficiency)
    parts = {"latency of layers": steps * a.num_hidden_layers * assumed.latency_us * 1e-6}
    return parts | ({"FLOPs of denoising": compute} if compute > read else {"reading weights": read})


def generate_seconds(config: Config, assumed: Assumptions, servers: Servers) -> float:
    """Seconds of generation; see `generate_parts`."""
    return sum(generate_parts(config, assumed, servers).values())


def pass_parts(config: Config, assumed: Assumptions, flops_share: float, sends: int) -> dict[str, float]:
    """Seconds of one pass over the whole batch, by cause.

    flops_share: FLOPs of the pass, divided by those of a forward pass. sends: the same for the collectives of a layer."""
    a, parallel = config.architecture, config.parallel
    split = microbatching(config, sum(row_tokens(config, assumed)), config.run.backend != "cpu")
    rows = split.computed * config.train.updates_per_batch  # rows of one data-parallel rank, including padding rows
    compute = flops_share * forward_flops(a, rows, split.width) / (parallel.model_parallel_size * assumed.flops * assumed.mfu)
    layer_bytes = rows * split.width / parallel.cp * a.hidden_size * dtype_bytes(config) * a.num_hidden_layers / parallel.pp
    parts = {"FLOPs of the trainer": compute, "tensor parallelism": 0.0, "expert parallelism": 0.0}
    if parallel.tp > 1:
        sent = 2 * 2 * (parallel.tp - 1) / parallel.tp * layer_bytes / assumed.link(parallel.tp)  # two all-reduces
        parts["tensor parallelism"] = sends * sent
    if parallel.cp > 1:  # keys and values of the other ranks
        keys = rows * split.width * 2 * a.kv_size // parallel.tp * dtype_bytes(config) * a.num_hidden_layers / parallel.pp
        sent = keys * (parallel.cp - 1) / parallel.cp / assumed.link(parallel.tp * parallel.cp)
        parts["context parallelism"] = sends * sent
    spread = parallel.ep * parallel.etp
    if spread > 1:
        routed = layer_bytes / parallel.tp * a.num_experts_per_tok * (spread - 1) / spread
        parts["expert parallelism"] = sends * 2 * routed / assumed.link(spread)  # to the experts and back
    return parts | {"pipeline bubble": sum(parts.values()) * (parallel.pp - 1) / split.count}


def pass_seconds(config: Config, assumed: Assumptions, flops_share: float, sends: int) -> float:
    """Seconds of one pass over the whole batch; see `pass_parts`."""
    return sum(pass_parts(config, assumed, flops_share, sends).values())


def sync_bytes(config: Config) -> SyncBytes:
    a, parallel, e = config.architecture, config.parallel, dtype_bytes(config)
    if factors := adapter_bytes(config):  # the frozen weights travel only once
        gathered = factors * (parallel.tp - 1) // parallel.tp // parallel.pp
        buckets = ceil(factors / (config.rollout.sync_bucket_mb * 2**20))
        return SyncBytes(gathered, factors * (parallel.pp - 1) // parallel.pp, 4 * factors // 3, buckets)
    experts = layer_counts(a)[1]
    dense, shards = total_parameters(a) - experts, parallel.ep * parallel.etp
    gathered = e * (dense * (parallel.tp - 1) // parallel.tp + experts * (shards - 1) // shards) // parallel.pp
    whole = e * total_parameters(a)
    buckets = ceil(whole / (config.rollout.sync_bucket_mb * 2**20))
    return SyncBytes(gathered, whole * (parallel.pp - 1) // parallel.pp, pushed_bytes(config), buckets)


Route = Literal["chain", "tree", "direct"]


def sync_parts(config: Config, assumed: Assumptions, moved: SyncBytes, servers: Servers, route: Route = "chain") -> dict[str, float]:
    """Seconds of a sync, by cause.

    route: how the broadcast reaches the servers. chain: each GPU passes chunks on to the next one, as NCCL does. tree: two binary trees
    over the nodes, each with half of the bytes. direct: the trainer sends to one server after the other. Only the chain is implemented.
    """
    parallel, rollout = config.parallel, config.rollout
    inside = max(parallel.tp, parallel.ep * parallel.etp)
    export = moved.gathered / assumed.link(inside) + moved.broadcast / assumed.link(parallel.model_parallel_size)
    parts = {"gathering in the trainer": export, "quantising": 0.0}
    if rollout.quantization != "none" and rollout.lora_sync != "adapter":
        quantized = assumed.quantize_passes * dtype_bytes(config) * total_parameters(config.architecture)
        parts["quantising"] = quantized / assumed.bandwidth
    if rollout.engine_traits.is_embedded:
        return parts | {"bytes to the engines": moved.pushed / assumed.bandwidth}
    transport = rollout.sglang.transport
    if transport in ("tensor", "cuda_ipc", "disk"):
        speed = {"tensor": PCIE_GB_S, "cuda_ipc": assumed.nvlink_gb_s / servers.gpus, "disk": DISK_GB_S / 2}[transport] * 1e9
        return parts | {"bytes to the servers": moved.pushed / speed}  # rank 0 fills one GPU after the other; a disk writes, then reads
    network = assumed.network_gb_s * 1e9
    nodes, chunk = ceil(servers.gpus / assumed.gpus_per_node), assumed.chunk_mib * 2**20
    hop = assumed.hop_us * 1e-6 + chunk / network
    hop_inside = NVLINK_HOP_US * 1e-6 + chunk / (assumed.nvlink_gb_s * 1e9)
    fill = {
        "chain": nodes * hop + (servers.gpus - nodes) * hop_inside,
        "tree": 2 * ceil(log2(nodes + 1)) * hop + (min(servers.gpus, assumed.gpus_per_node) - 1) * hop_inside,
        "direct": hop + (servers.tp - 1) * hop_inside,
    }[route]
    return parts | {
        "bytes to the servers": moved.pushed / network * (servers.engines if route == "direct" else 1),
        # One for every bucket, and after the sync each rank asks every server which weights it has.
        "requests to all servers": (moved.buckets + 1) * servers.engines * assumed.request_us * 1e-6,
        "hops of the broadcast": moved.buckets * fill,
        "the servers' own work": moved.buckets * assumed.bucket_ms * 1e-3,
    }


def sync_seconds(config: Config, assumed: Assumptions, moved: SyncBytes, servers: Servers) -> float:
    """Seconds of a sync; see `sync_parts`."""
    return sum(sync_parts(config, assumed, moved, servers).values())


def step_time(config: Config, assumed: Assumptions) -> StepTime:
    """Estimate the seconds of each phase of a step. `parallel.dp` must be set."""
    a, parallel, rollout = config.architecture, config.parallel, config.rollout
    dp, recompute = parallel.dp or 1, config.model.recompute == "full"
    servers = servers_of(config, assumed)
    generate = generate_seconds(config, assumed, servers)
    logprobs = 0.0 if config.ais.lag else pass_seconds(config, assumed, 1.0, 1)
    logprobs += pass_seconds(config, assumed, 1.0, 1) if config.objective.kl_coefficient else 0.0
    train = pass_seconds(config, assumed, assumed.recompute_ratio if recompute else assumed.train_ratio, 3 if recompute else 2)
    counts = max((rank_counts(a, parallel, stage) for stage in (0, parallel.pp - 1)), key=lambda c: c.all)
    replicas, updates = dp * parallel.cp, config.train.updates_per_batch
    ring = (4 + dtype_bytes(config)) * counts.all * (replicas - 1) / replicas
    gradients = updates * ring / assumed.link(parallel.model_parallel_size * dp)
    optimizer = (
        updates * 40.0 * counts.all / replicas / assumed.bandwidth
    )  # reads and writes master weights and moments, and gradient, norm and weight
    sync = sync_seconds(config, assumed, sync_bytes(config), servers)
    trainer = logprobs + train + gradients + optimizer
    total = max(generate, trainer) + sync if rollout.ahead else generate + trainer + sync
    tokens = rollout.prompts_per_step * rollout.group_size * (assumed.response_tokens or rollout.max_response_tokens)
    return StepTime(generate, logprobs, train, gradients, optimizer, sync, trainer, total, tokens / total)
