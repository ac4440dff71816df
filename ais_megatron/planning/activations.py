"""What a rank's passes over a microbatch hold: the tensors that layers save for the backward pass, and the worst moments of both passes.

The lists of saved tensors are those of Megatron's local layers with our norm and attention (policy/layers.py), recorded with torch's
saved-tensor hooks. tests/planning/test_plan.py compares them with real ranks. On CUDA the norms are fused, and attention saves tensors in
the model's dtype. That variant is derived and not measured. On a CPU without instructions for BF16 a BF16 model also keeps float32 copies
of inputs (policy/model.py), which are not counted: about 40 % more activations. No torch here.
"""

from __future__ import annotations

from math import ceil

from ais_megatron.config import Config
from ais_megatron.planning.aligned import copy_width, rounding_bytes, saved_bytes
from ais_megatron.planning.parameters import FP32, dtype_bytes, stage_layers
from ais_megatron.planning.recurrent import recurrent_saved, rule_transient
from ais_megatron.shapes import logprob_chunk

LOGPROB_CHUNKS_BACKWARD = 4  # FP32 tensors [chunk, vocab/tp] at the same time: log p and p, of this chunk and the previous one
LOGPROB_CHUNKS_FORWARD = 3


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
        saved += saved_bytes(config, tokens, 0, cuda, is_recurrent)
        return saved + tokens * e * 5 * a.intermediate_size // tp  # gate and up, silu(gate), up again, product
    routed = tokens // shard
    pairs = int(routed * a.num_experts_per_tok * parallel.etp * expert_load)
    saved += saved_bytes(config, tokens, pairs, cuda)
    saved += routed * (12 * a.num_experts_per_tok + 5 * a.num_experts) + 8 * pairs
    return saved + pairs * (e * (hidden + 6 * a.moe_intermediate_size // parallel.etp) + FP32)


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
