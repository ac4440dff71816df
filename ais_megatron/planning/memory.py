"""Computes the memory of a rank from the configuration alone, for `ais-megatron plan`.

    weights        dtype bytes per parameter, in DDP's one buffer; all parameters are views of it (`parameters`)
    gradients      4 bytes per parameter that is trained (with LoRA the factors; `grad_reduce_in_fp32`), never sharded
    optimizer      8 bytes per parameter that is trained (two moments), or 12 in BF16 (and an FP32 master copy); sharded over DP x CP,
                   experts over their own DP group
    activations    the tensors that each layer saves for the backward pass, one by one, times the microbatches in flight (`activations`,
                   `recurrent`, `aligned`)
    logits         [tokens, vocab/tp] and their gradient, and FP32 chunks of `train.logprob_chunk_tokens` (policy/logprobs.py)
    batch          microbatches on the device, and responses on their way to all ranks of a group (`batches`)
    engine         weights and KV cache of the embedded engine, and buckets of a weight sync (`engine`, `diffusion`)
    workspaces     of cuBLAS, cuDNN and Transformer Engine, and what the allocator loses between blocks; assumed, not computed

The modules in brackets compute each part. `RankMemory` says which parts exist at the same time. With `rollout.ahead=1` the embedded
engine generates during training, so its KV cache exists then too. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ais_megatron.config import Config
from ais_megatron.planning.activations import logprob_memory, training_memory
from ais_megatron.planning.aligned import copied_bytes, refresh_bytes
from ais_megatron.planning.batches import batch_memory, gathered_memory, microbatch_tokens, microbatching
from ais_megatron.planning.diffusion import sampler_bytes
from ais_megatron.planning.engine import engine_bytes, kv_bytes_per_token, sync_memory
from ais_megatron.planning.parameters import FP32, Counts, dtype_bytes, factor_count, rank_counts
from ais_megatron.planning.recurrent import state_bytes

SERVERS_TURN = ("generate", "sync")  # phases in which servers on the trainer's GPUs have their memory


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
        aligned=copied_bytes(config, stage, cuda),
        refresh=refresh_bytes(config, stage, cuda),
        workspaces=workspaces,
        fragmentation=fragmentation,
        server=server,
        released=released,
        overlaps=local and rollout.ahead > 0,
    )
