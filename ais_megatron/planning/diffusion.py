"""What a masked diffusion model needs in the embedded engine (rollout/local/diffusion.py): memory of its sampler, and FLOPs of its passes.

Every pass reads whole canvases, of a prompt and `rollout.max_response_tokens` tokens, and there is no cache. A wave of responses takes
`diffusion.steps` passes that sample, and one for each mask under which it is scored. The head reads only the current block, or the
tokens that are scored.

    layer     the worst moment of a layer: in attention, or while the input of its last product is quantised. The logits of the last
              step still exist
    kept      the quantiser's last input and output, which exist between passes too
    sampler   FP64 tensors [rows, block, vocabulary]: logits, those without the mask token, noise, and noise times the temperature
    scores    FP32 tensors [tokens, vocabulary]: logits and log-probabilities of `LOGITS` numbers at a time

tests/planning/test_diffusion.py compares the bytes with a real engine on the CPU. On CUDA they are derived and not measured. No torch here.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from ais_megatron.config import Config
from ais_megatron.planning.aligned import ROUNDED_INPUT
from ais_megatron.planning.parameters import FP32, dtype_bytes

FP64 = 8
SAMPLER_LOGITS = 4
LOGITS = 1 << 26  # `_LOGITS` of rollout/local/diffusion.py


class Flops(NamedTuple):
    """FLOPs of generating one response."""

    layers: float
    """Products with the weights of layers, which the engine may quantise."""
    rest: float
    """Attention and the head."""


def passes(config: Config) -> int:
    """Forward passes for a wave of responses, those that score them included."""
    return sampling_passes(config) + config.rows_per_response


def sampling_passes(config: Config) -> int:
    diffusion, response = config.diffusion, config.rollout.max_response_tokens
    return response // diffusion.block_length * diffusion.steps_per_block(response)


def generation_flops(config: Config, prompt: int, layer_parameters: int) -> Flops:
    """FLOPs for a response to a prompt of `prompt` tokens. layer_parameters: those of all layers."""
    a, diffusion, response = config.architecture, config.diffusion, config.rollout.max_response_tokens
    width, sampling = prompt + response, sampling_passes(config)
    scored = response  # by each mask, or with a trajectory at most the tokens of all steps together
    scored *= config.rows_per_response if diffusion.likelihood == "one_step" else 1
    attention = 4.0 * len(a.attention_layers) * a.query_size * width * width
    head = 2.0 * a.vocab_size * a.hidden_size * (sampling * diffusion.block_length + scored)
    count = passes(config)
    return Flops(count * 2.0 * width * layer_parameters, count * attention + head)


def sampler_bytes(config: Config, rows: int, prompt: int, response: int, cuda: bool) -> int:
    """Bytes beside the weights at the worst moment of `rows` canvases of `prompt + response` tokens."""
    a, e = config.architecture, dtype_bytes(config)
    hidden, q, kv, mlp = a.hidden_size, a.query_size, a.kv_size, a.intermediate_size
    tokens, quantised = rows * (prompt + response), config.rollout.quantization != "none"
    block, steps = config.diffusion.block_length, config.diffusion.steps_per_block(config.rollout.max_response_tokens)
    one = FP64 * rows * a.vocab_size  # logits of one position
    of_last_step = one * (block + ceil(block / steps))  # all, and those of the revealed tokens once more
    sampler = one * (SAMPLER_LOGITS * block + ceil(block / steps))

    # Embeddings, the layer's input, the normed input and its quantised copy, and the tables of the rotary embedding.
    inputs = tokens * (hidden * (3 * e + (FP32 if quantised else 0)) + 2 * e * a.head_dim)
    product = tokens * (e * q if cuda else FP32 * (2 * q + 2 * kv))  # its output, on a CPU with Q, K and V in float32
    attention = tokens * e * (2 * q + 2 * kv) + max(product, tokens * ROUNDED_INPUT * q if quantised else 0)
    last = tokens * (e * hidden + mlp * (e + ROUNDED_INPUT if quantised else 3 * e))  # the residual, and what the last product reads
    layer = of_last_step + inputs + max(attention, last)

    kept = (e + FP32) * tokens * mlp if quantised else 0
    chunk = min(max(LOGITS // a.vocab_size, 1), rows * response)
    scores = e * hidden * (tokens + rows * response) + 2 * FP32 * chunk * a.vocab_size
    return max(layer, kept + sampler, kept + scores)
