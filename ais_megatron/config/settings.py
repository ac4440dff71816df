"""The sections of the configuration that have no file of their own, from `run` to `metrics`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ais_megatron.config.architecture import Architecture
from ais_megatron.config.section import Fraction, PositiveInt, Section

MOST_STEPS = 10_000  # in a range, so that a typing error does not fill the memory


def _steps(value: object) -> object:
    """The steps of a range such as ``3-5``, or of a single number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+)-(\d+)", value.strip())
    if found is None or not 0 <= int(found[2]) - int(found[1]) < MOST_STEPS:
        raise ValueError(f"{value!r}: not a range of steps; write the first and the last one, such as 3-5, or a list, such as [3, 20]")
    return list(range(int(found[1]), int(found[2]) + 1))


OFF = BeforeValidator(lambda value: "off" if value is False else value)  # YAML reads an unquoted off as false


class RunConfig(Section):
    dir: str = Field(
        "runs/default", description="run folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, report/, summary.json"
    )
    seed: int = Field(0, description="random seed of weights, puzzles, prompt order and sampling")
    resume: bool = Field(
        False, description="true: continue from the newest checkpoint in run.dir. false: start a new run; run.dir must not hold one yet"
    )
    backend: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the policy; auto: cuda if this node has a GPU for each of its ranks, else cpu"
    )
    timeout_minutes: float = Field(60.0, gt=0.0, description="if a collective waits longer than this for another rank, the job ends")
    watchdog_minutes: float = Field(
        0.0,
        ge=0.0,
        description="if a step takes longer than this, the stacks of all ranks are written to logs/ and the job ends with status 124; 0: "
        "off",
    )
    profile_steps: Annotated[list[PositiveInt], BeforeValidator(_steps)] = Field(
        [],
        description="steps to profile, as a list or a range such as 3-5: every rank writes a trace and a table of operators to "
        "run.dir/profile; empty: none. Profiled steps take longer",
    )
    profiler: Literal["trace", "nsys"] = Field(
        "trace",
        description="trace: torch.profiler. nsys: no files; the steps and their phases are NVTX ranges for "
        "`nsys profile --capture-range=cudaProfilerApi`",
    )


class ParallelConfig(Section):
    tp: PositiveInt = Field(1, description="tensor-parallel size")
    pp: PositiveInt = Field(1, description="pipeline-parallel size")
    cp: PositiveInt = Field(1, description="context-parallel size: over how many ranks the tokens of each row are spread")
    ep: PositiveInt = Field(1, description="expert-parallel size (MoE models): over how many ranks the experts are spread")
    etp: PositiveInt = Field(1, description="tensor-parallel size within an expert (MoE models)")
    dp: PositiveInt | None = Field(
        None, description="data-parallel size; empty: number of ranks / (tp * pp * cp), or 1 without torchrun or srun"
    )
    sequence_parallel: bool = Field(False, description="split norms and residuals along the sequence within a tensor-parallel group")

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that hold one copy of the model: tp * pp * cp."""
        return self.tp * self.pp * self.cp

    @property
    def local_world_size(self) -> int:
        """Number of ranks that `train` starts by itself if no launcher has started any."""
        return self.model_parallel_size * (self.dp or 1)


class ModelConfig(Section):
    path: str | None = Field(None, description="Hugging Face checkpoint folder to start from; empty: random weights for model.architecture")
    architecture: Architecture | None = Field(
        None, description="sizes of the model; needed without model.path, otherwise read from its config.json"
    )
    adapter: str | None = Field(
        None,
        description="PEFT folder of LoRA factors to start from, which belong to model.path; empty: factors that change nothing yet",
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="precision of parameters and activations; master weights are always FP32")
    recompute: Literal["none", "full"] = Field("none", description="full: recompute each layer's activations in the backward pass")
    transformer_impl: Literal["auto", "transformer_engine", "local"] = Field(
        "auto",
        description="which layers the policy uses. auto: Transformer Engine's on CUDA if it is installed (with run.backend=cuda it must "
        "be), else local. local: Megatron's own layers with torch's kernels",
    )


class TokenizerConfig(Section):
    kind: Literal["sentencepiece", "hf"] = Field(
        "sentencepiece", description="sentencepiece: a small tokenizer, trained at the start if path is empty. hf: a Hugging Face tokenizer"
    )
    path: str | None = Field(
        None, description="sentencepiece: a .model file; empty: train one on text of the task. hf: a folder; empty: model.path"
    )


class MoEConfig(Section):
    """Load balancing and routing of a MoE policy. No effect on a dense one."""

    aux_coefficient: float = Field(1e-3, ge=0.0, description="coefficient of the load-balancing loss; alpha does not scale this loss")
    z_coefficient: float = Field(0.0, ge=0.0, description="coefficient of the router z-loss")
    routing_replay: bool = Field(
        False, description="the trainer uses the experts that the rollout engine chose; needs rollout.return_routed_experts=true"
    )


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0.0, description="highest learning rate, reached after the warm-up")
    min_lr_ratio: Fraction = Field(1.0, description="learning rate at the end, as a share of lr")
    warmup_steps: int = Field(0, ge=0, description="number of updates in which the learning rate grows linearly to lr")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="how the learning rate falls after the warm-up")
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled weight decay of AdamW")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Adam: decay of the moving average of the gradients")
    beta2: float = Field(0.98, ge=0.0, lt=1.0, description="Adam: decay of the moving average of the squared gradients")
    eps: float = Field(1e-8, gt=0.0, description="Adam: added to the denominator")
    grad_clip: float = Field(1.0, gt=0.0, description="a gradient with a larger norm is scaled down to this norm")


class TrainConfig(Section):
    steps: PositiveInt = Field(100, description="number of steps of the run; each generates one batch and trains on it")
    updates_per_batch: PositiveInt = Field(1, description="number of optimizer updates per batch; each uses an equal part of it")
    tokens_per_microbatch: PositiveInt = Field(16384, description="most tokens, padding included, in one forward pass of one rank")
    packing: bool = Field(
        False, description="rows of a microbatch are joined to one sequence without padding; on CUDA through Transformer Engine's kernels"
    )
    balance: bool = Field(
        False,
        description="data-parallel ranks exchange groups of the same update until all have about the same work; samples.jsonl then has "
        "only responses that the main rank kept",
    )
    share_prefixes: bool = Field(
        True,
        description="tokens with which rows begin alike, such as a group's prompt, go through the model once; on CPUs, for dense causal "
        "models in which every layer has attention",
    )
    max_skipped_updates: PositiveInt = Field(
        5, description="an update whose loss or gradient is not finite is skipped; this many of them in a row end the run"
    )
    logprob_chunk_tokens: PositiveInt = Field(
        2048, description="number of tokens whose logits, [chunk, vocab/tp], are held in float32 at a time"
    )
    optimizer: OptimizerConfig = OptimizerConfig()


class SFTConfig(Section):
    """Warm start: supervised training on the task's own worked solutions, through the same Megatron code."""

    steps: int = Field(0, ge=0, description="number of supervised steps before the run; 0: no warm start")
    batch_size: PositiveInt = Field(128, description="number of worked solutions per step, over all ranks")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    cache_dir: str = Field(
        ".cache/ais_megatron", description="folder of cached starting policies, each named by a hash of everything that determines it"
    )


class CalibrationConfig(Section):
    mode: Annotated[Literal["lagged", "fresh", "off"], OFF] = Field(
        "lagged",
        description="where the KV scales come from. lagged: from K and V in the old-logprob pass (with ais.lag=1 in the training pass), "
        "almost free. fresh: from an extra pass with the new weights. off: all scales are 1.0",
    )
    margin: float = Field(1.05, ge=1.0, description="factor on the measured largest absolute value of K and V")
    fresh_tokens: PositiveInt = Field(
        4096, description="fresh: number of tokens of recent rollouts that each data-parallel rank runs through the new weights"
    )


class CheckpointConfig(Section):
    """Checkpoints in ``run.dir/checkpoints``. A checkpoint is complete, with the size and checksum of every file in its manifest, or
    it is absent."""

    every: int = Field(0, ge=0, description="number of steps between checkpoints; 0: only at the end")
    keep: PositiveInt = Field(2, description="number of newest checkpoints to keep; older ones are deleted")
    keep_every: int = Field(0, ge=0, description="checkpoints of steps that are multiples of this are never deleted; 0: all may be deleted")
    async_save: bool = Field(False, description="write in the background, from a copy of this rank's share in CPU memory")
    verify: Literal["checksum", "size"] = Field("checksum", description="what is compared with the manifest before a checkpoint is loaded")
    on_damage: Literal["stop", "previous"] = Field(
        "stop",
        description="what run.resume does if the newest checkpoint is damaged. stop: end with an error. previous: move it aside and "
        "continue from the one before",
    )


class MetricsConfig(Section):
    progress_bar: bool = Field(True, description="show a progress bar on a terminal")
    tensorboard: bool = Field(False, description="also write TensorBoard events to run.dir")
    wandb: Annotated[Literal["off", "offline", "online"], OFF] = Field(
        "off", description="log every step to Weights & Biases. offline: write to disk, for a later upload"
    )
    wandb_project: str = Field("ais_megatron", description="name of the Weights & Biases project")
    samples_every: int = Field(
        10,
        ge=0,
        description="number of steps between those whose responses are written to samples.jsonl, with rewards, reasons and the "
        "log-probabilities of engine and trainer; also those of the first and the last step; 0: none",
    )
    samples: PositiveInt = Field(16, description="number of responses of such a step; about 20 bytes per token")
