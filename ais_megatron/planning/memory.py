"""Computes the memory of a rank from the configuration alone, for `ais-megatron plan`.

    weights        dtype bytes per parameter, in DDP's one buffer; all parameters are views of it
    gradients      4 bytes per parameter that is trained (with LoRA the factors; `grad_reduce_in_fp32`), never sharded
    optimizer      8 bytes per parameter that is trained (two moments), or 12 in BF16 (and an FP32 master copy); sharded over DP x CP,
                   experts over their own DP group
    activations    the tensors that each layer saves for the backward pass, one by one, times the microbatches in flight
    logits         [tokens, vocab/tp] and their gradient, and FP32 chunks of `train.logprob_chunk_tokens` (policy/logprobs.py)
    workspaces     of cuBLAS, cuDNN and Transformer Engine, and what the allocator loses between blocks; assumed, not computed

A microbatch has `train.tokens_per_microbatch` tokens, or more if a single row is longer, padded to the shapes that the model uses
(`shapes`). With `rollout.ahead=1` the embedded engine generates during training, so its KV cache exists then too.

The lists of saved tensors are those of Megatron's local layers with our norm and attention (policy/model.py), recorded with torch's
saved-tensor hooks. tests/planning/test_plan.py compares them with real ranks. On CUDA the norms are fused, and attention saves tensors in
the model's dtype. That variant is derived and not measured. On a CPU without instructions for BF16 a BF16 model also keeps float32 copies
of inputs (policy/model.py), which are not counted: about 40 % more activations. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from ais_megatron.config import Architecture, Config, ParallelConfig
from ais_megatron.config.policy import adapter_targets, lora_targets, projection
from ais_megatron.models.family import Weight, parameters_of, shape_of
from ais_megatron.planning.aligned import copied_bytes, copy_width, refresh_bytes, rounding_bytes, saved_bytes
from ais_megatron.planning.diffusion import sampler_bytes
from ais_megatron.shapes import Shapes, logprob_chunk

LOGPROB_CHUNKS_BACKWARD = 4  # FP32 tensors [chunk, vocab/tp] at the same time: log p and p, of this chunk and the previous one
LOGPROB_CHUNKS_FORWARD = 3
FP32 = 4
SERVERS_TURN = ("generate", "sync")  # phases in which servers on the trainer's GPUs have their memory
CHUNK = 64  # of policy/gated_delta_net.py


@dataclass(frozen=True)
class Counts:
    """Number of parameters on one rank."""

    dense: int
    expert: int
    largest: int
    """Size of the largest parameter. Its gradient exists twice before it is added to the buffer."""

    @property
    def all(self) -> int:
        return self.dense + self.expert


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. Weights, gradients, optimizer, engine weights and workspaces last, all others exist in one phase only."""

    stage: int
    """The rank's pipeline stage."""
    weights: int
    gradients: int
    optimizer: int
    engine_weights: int
    """Weights of the embedded engine."""
    gathered: int
    """Responses of a model-parallel group while they are sent to all of its ranks."""
    batch: int
    """Microbatches on the device."""
    activations: int
    logits: int
    logprobs: int
    """The forward pass for old log-probabilities."""
    optimizer_step: int
    """Temporary tensors of the optimizer step."""
    kv_cache: int
    """KV cache of the embedded engine, and the states of its recurrent layers."""
    sync: int
    """Buckets of a weight sync."""
    sampler: int = 0
    """Passes of the embedded engine over the canvases of a diffusion model, and logits of its sampler."""
    aligned: int = 0
    """Quantised copies of the weights, for an aligned forward pass. They last, too."""
    refresh: int = 0
    """Temporary tensors while these copies are made, before a phase's first pass."""
    workspaces: int = 0
    fragmentation: float = 0.0
    """What the allocator loses between blocks, as a share of its bytes."""
    server: int = 0
    """What a server on the same GPU holds while it generates or gets weights (`rollout.colocated`)."""
    released: int = 0
    """What it still holds while the trainer works."""
    overlaps: bool = False
    """Generation runs on the same GPU at the same time as the other phases, except the sync."""

    @property
    def lasting(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.engine_weights + self.aligned

    @property
    def allocated(self) -> dict[str, int]:
        """The peak of each phase of a step, counting only tensors."""
        generation = self.kv_cache + self.sampler
        beside = generation if self.overlaps else 0
        parts = {
            "generate": generation,
            "collect": self.gathered + beside,
            "logprobs": max(self.batch + self.logprobs, self.refresh) + beside,
            "train": max(self.batch + max(self.activations + self.logits, self.optimizer_step), self.refresh) + beside,
            "sync": self.sync,
        }
        away = self.gradients + self.optimizer if self.server else 0  # in the servers' turn
        return {phase: self.lasting + size - (away if phase in SERVERS_TURN else 0) for phase, size in parts.items()}

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase of a step, with workspaces and fragmentation."""
        return {
            phase: size + self.workspaces + int(self.fragmentation * size) + (self.server if phase in SERVERS_TURN else self.released)
            for phase, size in self.allocated.items()
        }

    @property
    def lost(self) -> int:
        """What the allocator loses between blocks in the worst phase."""
        return int(self.fragmentation * max(self.allocated.values()))

    @property
    def peak(self) -> int:
        return max(self.phases.values())


@dataclass(frozen=True)
class Microbatching:
    """How the rows of a rank, all of the same length, are split into the microbatches of one update."""

    count: int
    """Number of microbatches."""
    rows: int
    """Rows of a full microbatch, padding included."""
    width: int
    """Columns of a microbatch, padding included."""
    computed: int
    """Rows of all microbatches, padding rows included."""


def shapes_of(config: Config, cuda: bool) -> Shapes:
    """The shapes of rows, which context-parallel ranks share in chunks."""
    parallel = config.parallel
    multiple = (parallel.tp if parallel.sequence_parallel else 1) * (2 * parallel.cp if parallel.cp > 1 else 1)
    return Shapes.on("cuda" if cuda else "cpu", multiple, parallel.cp)


def microbatching(config: Config, row: int, cuda: bool) -> Microbatching:
    """How policy/microbatches.py splits rows of `row` tokens. `parallel.dp` must be set."""
    rollout, train, shapes = config.rollout, config.train, shapes_of(config, cuda)
    rows = ceil(
        rollout.prompts_per_step * rollout.group_size * config.rows_per_response / (config.parallel.dp or 1) / train.updates_per_batch
    )
    budget = train.tokens_per_microbatch * config.parallel.cp
    if train.packing:
        full = max(budget // row, 1)
        return Microbatching(ceil(rows / full), full, row, rows)
    width = shapes.width(row)
    full = shapes.most_rows(budget // width)
    count = ceil(rows / full)
    return Microbatching(count, full, width, (count - 1) * full + shapes.rows(rows - (count - 1) * full))


def microbatch_tokens(config: Config, longest_row: int, cuda: bool) -> int:
    """Padded tokens of the largest microbatch on a rank: `train.tokens_per_microbatch`, or its part of a single row that is longer."""
    return max(config.train.tokens_per_microbatch, ceil(shapes_of(config, cuda).width(longest_row) / config.parallel.cp))


def dtype_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bf16" else FP32


def smallest_dp(parallel: ParallelConfig) -> int:
    """`parallel.dp`, or if it is empty the smallest size that expert parallelism allows."""
    if parallel.dp:
        return parallel.dp
    return next(dp for dp in range(1, parallel.ep * parallel.etp + 1) if not parallel.tp * parallel.cp * dp % (parallel.ep * parallel.etp))


def layer_counts(a: Architecture, tp: int = 1, ep: int = 1, etp: int = 1, layers: range | None = None) -> tuple[int, int]:
    """Number of (dense, expert) parameters of these layers on one rank; None: of all layers."""
    layers = range(a.num_hidden_layers) if layers is None else layers

    def count(table: tuple[Weight, ...], shards: int) -> int:
        return sum(prod(shape_of(weight, a)) // (1 if weight.tp_dim is None else shards) for weight in table)

    recurrent = sum(a.is_recurrent(layer) for layer in layers)
    dense = recurrent * count(a.family.recurrent_layer, tp) + (len(layers) - recurrent) * count(a.family.layer, tp)
    return dense, len(layers) * (a.num_experts // ep) * count(a.family.experts, etp)


def stage_layers(a: Architecture, parallel: ParallelConfig, stage: int) -> range:
    """The numbers of the layers of a pipeline stage."""
    count = a.num_hidden_layers // parallel.pp
    return range(stage * count, (stage + 1) * count)


def rank_counts(a: Architecture, parallel: ParallelConfig, stage: int) -> Counts:
    """Number of parameters on a rank of a pipeline stage."""
    dense, expert = layer_counts(a, parallel.tp, parallel.ep, parallel.etp, stage_layers(a, parallel, stage))
    vocabulary = ceil(a.vocab_size / parallel.tp) * a.hidden_size
    is_last = stage == parallel.pp - 1
    copies = (stage == 0) + (is_last and (not a.tie_word_embeddings or parallel.pp > 1))
    tables = ((a.family.layer, parallel.tp), (a.family.recurrent_layer, parallel.tp), (a.family.experts, parallel.etp))
    widest = max(sum(prod(shape_of(row, a)) for row in rows) // shards for table, shards in tables for rows in parameters_of(table))
    return Counts(dense + copies * vocabulary + is_last * a.hidden_size, expert, max(widest, copies * vocabulary // max(copies, 1)))


def factor_count(config: Config) -> int:
    """Number of parameters in the LoRA factors of a rank (policy/lora.py); 0 without LoRA."""
    a, parallel, lora = config.architecture, config.parallel, config.policy.lora
    total = 0
    for layer in stage_layers(a, parallel, 0):
        for row in lora_targets(lora, a, layer).values():
            out, width = shape_of(row, a)
            # Column-parallel layers split B, and row-parallel layers split A.
            total += width + out // parallel.tp if row.tp_dim == 0 else width // parallel.tp + out
    return lora.rank * total


def total_parameters(a: Architecture) -> int:
    return rank_counts(a, ParallelConfig(), 0).all


def layer_saved(config: Config, tokens: int, cuda: bool, expert_load: float, is_recurrent: bool = False) -> int:
    """Bytes that one layer saves for its backward pass of `tokens` tokens."""
    a, parallel, e = config.architecture, config.parallel, dtype_bytes(config)
    tp, shard = parallel.tp, parallel.tp if parallel.sequence_parallel else 1
    hidden, heads, kv_heads = a.hidden_size, a.num_attention_heads, a.num_key_value_heads
    q, kv = a.query_size, a.kv_size
    norm = e * hidden + FP32  # its input, and a factor for each token
    inputs = e * hidden  # the input of QKV, and that of the MLP or the router
    if cuda:
        attention = e * (q + 2 * kv) + e * (2 * q + kv) + FP32 * (2 * heads + kv_heads)  # QKV; rotated Q, K; output; statistics
    else:
        attention = e * (q + kv) + FP32 * (2 * q + 2 * kv) + FP32 * (2 * heads + kv_heads)  # Q, K; all in float32; statistics
    projection = e * q
    gate = (FP32 + e) * q if a.family.gated_attention else 0  # its sigmoid in float32, and what that multiplies
    saved = tokens * (2 * norm + 2 * inputs) // shard
    saved += recurrent_saved(config, tokens, cuda) if is_recurrent else tokens * (attention + projection + gate) // tp
    if not a.is_moe:
        saved += saved_bytes(config, tokens, 0, cuda)
        return saved + tokens * e * 5 * a.intermediate_size // tp  # gate and up, silu(gate), up again, product
    routed = tokens // shard
    pairs = int(routed * a.num_experts_per_tok * parallel.etp * expert_load)
    saved += saved_bytes(config, tokens, pairs, cuda)
    saved += routed * (12 * a.num_experts_per_tok + 5 * a.num_experts) + 8 * pairs
    return saved + pairs * (e * (hidden + 6 * a.moe_intermediate_size // parallel.etp) + FP32)


def recurrent_saved(config: Config, tokens: int, cuda: bool) -> int:
    """Bytes that a layer with a gated delta rule saves in place of what attention saves (policy/gated_delta_net.py), without its norms, its
    inputs and the MLP. On CUDA FLA's kernels are assumed, which keep Q, K, V, the decays and one matrix for each chunk."""
    a, e, tp = config.architecture, dtype_bytes(config), config.parallel.tp
    channels, value, heads = a.linear_qkv_size, a.linear_value_size, a.linear_num_value_heads
    keys = heads * a.linear_key_head_dim  # each key head is there once for every value head
    convolution = FP32 * channels + e * channels  # its input, and that of silu
    lengths = FP32 * 2 * a.linear_key_size  # Q and K, before they are scaled to length 1
    gated_norm = (FP32 + 2 * e) * value + FP32 * 2 * value  # normed values, and z with its silu
    if cuda:
        rule = e * (2 * keys + 2 * value) + FP32 * 4 * heads + e * heads * CHUNK
    else:
        states = 2 * keys * a.linear_value_head_dim // CHUNK
        rule = FP32 * (6 * heads * CHUNK + 5 * keys + 3 * value + states + 8 * heads)
    return tokens * (convolution + lengths + rule + gated_norm + e * value) // tp


def rule_transient(config: Config, tokens: int, cuda: bool) -> int:
    """Bytes of temporary tensors of a gated delta rule at the worst moment of a forward pass without gradient."""
    a = config.architecture
    keys, values = a.linear_num_value_heads * a.linear_key_head_dim, a.linear_value_size
    if cuda:  # FLA keeps the states at the beginnings of chunks
        return tokens * dtype_bytes(config) * (3 * keys + 2 * values + keys * a.linear_value_head_dim // CHUNK) // config.parallel.tp
    return FP32 * tokens * (5 * a.linear_num_value_heads * CHUNK + 7 * keys + 7 * values) // config.parallel.tp


def layer_transient(config: Config, tokens: int, expert_load: float) -> int:
    """Bytes of gradients and gathered inputs at the worst moment of a layer's backward pass."""
    a, parallel, e = config.architecture, config.parallel, dtype_bytes(config)
    gathered = e * a.hidden_size * tokens if parallel.sequence_parallel else 0
    if not a.is_moe:
        return gathered + tokens * e * 4 * a.intermediate_size // parallel.tp
    routed = tokens // (parallel.tp if parallel.sequence_parallel else 1)
    pairs = int(routed * a.num_experts_per_tok * parallel.etp * expert_load)
    return max(gathered, pairs * e * 2 * (a.hidden_size + a.moe_intermediate_size // parallel.etp))


def training_memory(config: Config, stage: int, tokens: int, in_flight: int, cuda: bool, expert_load: float) -> tuple[int, int]:
    """Bytes of (activations, logits) at the worst moment of forward and backward passes over microbatches of `tokens` tokens."""
    a, parallel, e = config.architecture, config.parallel, dtype_bytes(config)
    shard = parallel.tp if parallel.sequence_parallel else 1
    kinds = [a.is_recurrent(layer) for layer in stage_layers(a, parallel, stage)]
    saved_by = {kind: layer_saved(config, tokens, cuda, expert_load, kind) for kind in set(kinds)}
    one_layer = layer_transient(config, tokens, expert_load)  # a rule's gradients are fewer than what its layer's MLP has freed by then
    saved = sum(saved_by[kind] for kind in kinds)
    if config.model.recompute == "full":
        saved, one_layer = len(kinds) * (e * a.hidden_size * tokens // shard), one_layer + max(saved_by.values())
    body = in_flight * saved
    if stage < parallel.pp - 1:
        return body + one_layer, 0
    norm = copy_width(config, cuda) if config.policy.is_aligned else 0
    head = tokens * (2 * e + norm) * a.hidden_size // shard
    vocabulary, chunk = logits_shape(config, tokens, cuda)
    logits = e * vocabulary * tokens
    in_head = 2 * logits + LOGPROB_CHUNKS_BACKWARD * FP32 * chunk * vocabulary
    # Without pipelining, one of them and the head's weight gradient still exist in the layers' backward pass (measured).
    in_layer = logits + e * vocabulary * a.hidden_size if parallel.pp == 1 else 0
    if head + in_head >= one_layer + in_layer:
        return body + head, in_head
    return body + one_layer, in_layer


def logprob_memory(config: Config, stage: int, tokens: int, cuda: bool, expert_load: float) -> int:
    """Bytes of a forward pass without gradient over one microbatch of `tokens` tokens, at the worst moment of a layer or the head."""
    a, parallel, e = config.architecture, config.parallel, dtype_bytes(config)
    if a.is_moe:
        routed = tokens // (parallel.tp if parallel.sequence_parallel else 1)
        pairs = int(routed * a.num_experts_per_tok * parallel.etp * expert_load)
        copies = 6 if parallel.etp > 1 else 2  # copies of the routed tokens: sorted and summed; with ETP also gathered and scattered
        mlp = e * pairs * (copies * a.hidden_size + 5 * a.moe_intermediate_size // parallel.etp)
    else:
        mlp = max(5 * e * tokens * a.intermediate_size // parallel.tp, rounding_bytes(config, tokens))
        if any(a.is_recurrent(layer) for layer in stage_layers(a, parallel, stage)):
            mlp = max(mlp, rule_transient(config, tokens, cuda))
    residuals = 4 * tokens // parallel.tp + tokens if parallel.sequence_parallel else 4 * tokens  # four sharded tensors and a gathered one
    layer = mlp + e * a.hidden_size * residuals
    if stage < parallel.pp - 1:
        return layer
    vocabulary, chunk = logits_shape(config, tokens, cuda)
    head = e * vocabulary * tokens + LOGPROB_CHUNKS_FORWARD * FP32 * chunk * vocabulary
    return max(layer, head + 2 * e * a.hidden_size * tokens // (parallel.tp if parallel.sequence_parallel else 1))


def logits_shape(config: Config, tokens: int, cuda: bool) -> tuple[int, int]:
    """Columns of the logits on one rank, and the number of their rows that are in FP32 at a time."""
    vocabulary = ceil(config.architecture.vocab_size / config.parallel.tp)
    return vocabulary, min(logprob_chunk(config.train.logprob_chunk_tokens, vocabulary, "cuda" if cuda else "cpu"), tokens)


def quantized_counts(a: Architecture, block: int) -> tuple[int, int]:
    """Number of (parameters, blocks of `block` rows and columns) in all projections that FP8 rollouts quantise."""
    family, layers, attention = a.family, a.num_hidden_layers, len(a.attention_layers)
    tables = ((family.layer, attention), (family.recurrent_layer, layers - attention), (family.experts, layers * a.num_experts))
    shapes = [(*shape_of(weight, a), times) for table, times in tables for weight in table if weight.quantized]
    return sum(n * k * times for n, k, times in shapes), sum(ceil(n / block) * ceil(k / block) * times for n, k, times in shapes)


ADAPTER_PLACES = 3  # on a server: --max-loras-per-batch of rollout/sglang/server.py


def adapter_bytes(config: Config) -> int:
    """Bytes of LoRA's factors as a server gets them, if they are sent by themselves (`rollout.lora_sync=adapter`); otherwise 0."""
    a, lora = config.architecture, config.policy.lora
    if config.rollout.lora_sync == "merged":
        return 0
    rows = {projection(row): row for row in a.family.layer}
    per_layer = sum(sum(shape_of(rows[name], a)) for name in adapter_targets(lora, a))
    return dtype_bytes(config) * a.num_hidden_layers * lora.rank * per_layer


def pushed_bytes(config: Config) -> int:
    """Bytes of a full set of weights as the engine receives it: FP8 weights and their scales, all other weights, and KV scales."""
    a, e = config.architecture, dtype_bytes(config)
    total, (quantized, blocks) = total_parameters(a), quantized_counts(a, config.rollout.weight_block)
    if config.rollout.quantization == "none":
        size = e * total
    else:
        size = quantized + FP32 * blocks + e * (total - quantized)
    has_scales = config.rollout.kv_cache_is_fp8 and (config.calibration.mode != "off" or config.rollout.engine_traits.keeps_kv_scales)
    return size + (2 * FP32 * len(a.attention_layers) if has_scales else 0)


def engine_bytes(config: Config, tp: int = 1) -> int:
    """Bytes of a rollout engine's weights on one of its `tp` GPUs. The local engine also keeps FP8 weights dequantised to FP32."""
    a = config.architecture
    size = pushed_bytes(config)
    if config.rollout.engine_traits.is_embedded and config.rollout.quantization != "none":
        size += FP32 * quantized_counts(a, config.rollout.weight_block)[0]
    return ceil((size + ADAPTER_PLACES * adapter_bytes(config)) / tp)


def kv_bytes_per_token(config: Config, cuda: bool = True) -> int:
    """Bytes of KV cache for one token on one GPU of the engine. The local engine stores it in its compute dtype. A diffusion model has
    none."""
    a, rollout = config.architecture, config.rollout
    if a.family.is_diffusion:
        return 0
    if rollout.engine_traits.is_embedded:
        return len(a.attention_layers) * 2 * a.kv_size * (dtype_bytes(config) if cuda else FP32)
    heads = max(a.num_key_value_heads // rollout.sglang.tp, 1)  # if there are more GPUs than KV heads, the heads are replicated
    return len(a.attention_layers) * 2 * heads * a.head_dim * (1 if rollout.kv_cache_is_fp8 else 2)


def state_bytes(config: Config) -> int:
    """Bytes that an engine keeps of one response in layers with a gated delta rule, whatever its length, if it is not spread over GPUs."""
    a = config.architecture
    state = FP32 * a.linear_num_value_heads * a.linear_key_head_dim * a.linear_value_head_dim
    inputs = dtype_bytes(config) * a.linear_qkv_size * max(a.linear_conv_kernel_dim - 1, 0)
    return (a.num_hidden_layers - len(a.attention_layers)) * (state + inputs)


def sync_memory(config: Config) -> int:
    """Bytes of buckets on a trainer rank during a sync: gathered shards, whole tensors, quantised and flattened tensors, FP32 blocks."""
    a, e = config.architecture, dtype_bytes(config)
    mlp = a.moe_intermediate_size if a.is_moe else a.intermediate_size
    entry = (
        e * a.hidden_size * max(a.vocab_size, 2 * mlp * (config.parallel.ep if a.is_moe else 1))
    )  # the largest tensor, which is never split
    bucket = max(int(config.rollout.sync_bucket_mb * 2**20), entry)
    fp32 = 0 if config.rollout.quantization == "none" else 3 * FP32 * a.hidden_size * max(mlp, a.query_size)
    return 3 * min(bucket, e * total_parameters(a)) + fp32


def route_bytes(config: Config) -> int:
    """Bytes of the routes of one token, in `batch.routes_dtype`."""
    a = config.architecture
    if not config.rollout.return_routed_experts:
        return 0
    return a.num_hidden_layers * a.num_experts_per_tok * (1 if a.num_experts <= 2**7 else 2 if a.num_experts <= 2**15 else 4)


def batch_memory(config: Config, tokens: int) -> int:
    """Bytes of microbatches of `tokens` padded tokens on the device: ids, mask, log-probabilities, positions and routes, and what a
    diffusion model reads. Each microbatch is moved there when it is needed, and context-parallel ranks have its whole rows."""
    return tokens * (8 + 1 + FP32 + 8 + (8 if config.architecture.family.is_diffusion else 0) + route_bytes(config))


def gathered_memory(config: Config, row: int) -> int:
    """Bytes on the device while the ranks of a model-parallel group exchange their responses: all responses, and a second copy of the
    rank's own. With dynamic sampling the whole job is one group."""
    parallel, rollout = config.parallel, config.rollout
    assert parallel.dp is not None, "set parallel.dp first (`with_gpus`)"
    group = parallel.model_parallel_size * (parallel.dp if config.objective.resolved.dynamic_sampling else 1)
    if group == 1:
        return 0
    rows = rollout.prompts_per_step * rollout.group_size * config.rows_per_response
    tokens = row * rows * group // (parallel.model_parallel_size * parallel.dp)
    read = 4 if config.architecture.family.is_diffusion else 0
    return (tokens + tokens // group) * (4 + 1 + FP32 + read + route_bytes(config))


def rank_memory(
    config: Config,
    stage: int,
    *,
    prompt_tokens: int,
    response_tokens: int,
    cuda: bool,
    expert_load: float,
    workspaces: int = 0,
    fragmentation: float = 0.0,
    server: int = 0,
    released: int = 0,
) -> RankMemory:
    """The memory of a rank of a pipeline stage. `parallel.dp` must be set. Responses have `response_tokens` tokens, and the longest one has
    `rollout.max_response_tokens`.

    expert_load: tokens of the busiest rank's experts, divided by the mean. workspaces, fragmentation: see `RankMemory`.
    """
    a, parallel, rollout, e = config.architecture, config.parallel, config.rollout, dtype_bytes(config)
    assert parallel.dp, "the caller sets parallel.dp"
    counts, factors = rank_counts(a, parallel, stage), factor_count(config)
    trained = Counts(factors, 0, factors) if config.policy.lora.rank else counts
    replicas = parallel.dp * parallel.cp
    expert_replicas = parallel.tp * replicas // (parallel.ep * parallel.etp)
    dense, expert = ceil(trained.dense / replicas), ceil(trained.expert / expert_replicas)
    row, longest = prompt_tokens + response_tokens, prompt_tokens + max(response_tokens, rollout.max_response_tokens)
    in_flight = min(parallel.pp - stage, microbatching(config, row, cuda).count)
    tokens = microbatch_tokens(config, longest, cuda)
    activations, logits = training_memory(config, stage, tokens, in_flight, cuda, expert_load)
    local = rollout.engine_traits.is_embedded
    engine_ranks = parallel.model_parallel_size * parallel.dp
    decoding = min(rollout.max_batch, ceil(rollout.prompts_per_step * rollout.group_size / engine_ranks))
    per_token, per_response = kv_bytes_per_token(config, cuda), state_bytes(config)
    waves = [(decoding, row - prompt_tokens)]  # responses at a time, and their tokens
    for chosen in config.evaluation_sets if config.eval.sets else []:
        responses = min(rollout.max_batch, ceil(chosen.num_prompts * chosen.samples / engine_ranks))
        waves.append((responses, chosen.max_response_tokens))
    cached = max(count * ((prompt_tokens + size) * per_token + per_response) for count, size in waves)
    sampler = max(sampler_bytes(config, count, prompt_tokens, size, cuda) for count, size in waves) if a.family.is_diffusion else 0
    return RankMemory(
        stage=stage,
        weights=e * (counts.all + factors),
        gradients=FP32 * trained.all,
        optimizer=(12 if e == 2 else 8) * (dense + expert),
        engine_weights=engine_bytes(config) if local else 0,
        gathered=gathered_memory(config, longest),
        batch=batch_memory(config, in_flight * tokens * parallel.cp),
        activations=activations,
        logits=logits,
        logprobs=logprob_memory(config, stage, tokens, cuda, expert_load) + (e * trained.all if config.objective.kl_coefficient else 0),
        optimizer_step=FP32 * (dense + expert),  # torch's AdamW updates all parameters at once
        kv_cache=cached if local else 0,
        sampler=sampler,
        sync=sync_memory(config),
        aligned=copied_bytes(config, cuda),
        refresh=refresh_bytes(config, cuda),
        workspaces=workspaces,
        fragmentation=fragmentation,
        server=server,
        released=released,
        overlaps=local and rollout.ahead > 0,
    )
