"""The sections of the configuration that have no file of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ais_megatron.config.architecture import Architecture
from ais_megatron.config.section import Fraction, PositiveInt, Section

OFF = BeforeValidator(lambda value: "off" if value is False else value)  # what YAML makes of an unquoted off


class RunConfig(Section):
    dir: str = Field("runs/default", description="run folder: config.yaml, metrics.jsonl, checkpoints/, report/, summary.json")
    seed: int = Field(0, description="seed of weights, puzzles, prompt order and sampling")
    resume: bool = Field(False, description="continue from the newest checkpoint in run.dir; otherwise run.dir must hold no run")
    backend: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the policy lives; auto: on GPUs where this node has one for each of its ranks, else on CPUs"
    )
    timeout_minutes: float = Field(60.0, gt=0.0, description="a collective that waits longer than this for another rank ends the job")
    watchdog_minutes: float = Field(
        0.0, ge=0.0, description="a step longer than this ends the job with the stacks of all ranks in logs/ (status 124); 0: off"
    )


class ParallelConfig(Section):
    tp: PositiveInt = Field(1, description="tensor-parallel size")
    pp: PositiveInt = Field(1, description="pipeline-parallel size")
    cp: PositiveInt = Field(1, description="context-parallel size; only 1 works yet, because nothing cuts the rows into slices")
    ep: PositiveInt = Field(1, description="expert-parallel size (MoE models): experts are spread over data-parallel ranks")
    etp: PositiveInt = Field(1, description="tensor-parallel size inside an expert (MoE models)")
    dp: PositiveInt | None = Field(None, description="data-parallel size; empty: whatever the number of ranks leaves, 1 without torchrun")
    sequence_parallel: bool = Field(False, description="shard norms and residuals over the sequence inside a TP group")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: tp * pp * cp."""
        return self.tp * self.pp * self.cp

    @property
    def local_world_size(self) -> int:
        """Ranks that `train` starts by itself when no launcher has."""
        return self.model_parallel_size * (self.dp or 1)


class ModelConfig(Section):
    path: str | None = Field(None, description="Hugging Face checkpoint folder to start from; empty: random weights of `architecture`")
    architecture: Architecture | None = Field(None, description="needed without `path`; with `path` it is read from its config.json")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="parameters and activations; master weights are FP32 in either case")
    recompute: Literal["none", "full"] = Field("none", description="full: recompute each layer's activations in the backward pass")
    transformer_impl: Literal["auto", "transformer_engine", "local"] = Field(
        "auto",
        description="layers of the policy; auto: Transformer Engine's on CUDA where it is installed, and run.backend=cuda insists on it; "
        "local: Megatron's own, with torch's kernels",
    )


class TokenizerConfig(Section):
    kind: Literal["sentencepiece", "hf"] = Field(
        "sentencepiece", description="sentencepiece: small and trained here if need be; hf: a Hugging Face tokenizer"
    )
    path: str | None = Field(None, description="sentencepiece: a .model file (empty: train one on generated text); hf: a folder")


class MoEConfig(Section):
    """Load balance and routing of a MoE policy; without effect on a dense one."""

    aux_coefficient: float = Field(1e-3, ge=0.0, description="weight of the load-balancing loss; never scaled by alpha")
    z_coefficient: float = Field(0.0, ge=0.0, description="weight of the router z-loss")
    routing_replay: bool = Field(False, description="the trainer uses the experts that the rollout engine chose")


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0.0, description="largest learning rate, reached after the warm-up")
    min_lr_ratio: Fraction = Field(1.0, description="learning rate at the end, as a share of lr")
    warmup_steps: int = Field(0, ge=0, description="updates in which the learning rate grows linearly to lr")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="how the learning rate falls after the warm-up")
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled weight decay of AdamW")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Adam: decay of the gradients' mean")
    beta2: float = Field(0.98, ge=0.0, lt=1.0, description="Adam: decay of the squared gradients' mean")
    eps: float = Field(1e-8, gt=0.0, description="Adam: added to the denominator")
    grad_clip: float = Field(1.0, gt=0.0, description="a larger norm of the whole gradient is scaled down to this one")


class TrainConfig(Section):
    steps: PositiveInt = Field(100, description="steps of the run: each generates one batch and trains on it")
    updates_per_batch: PositiveInt = Field(1, description="optimizer updates that a batch is divided into")
    tokens_per_microbatch: PositiveInt = Field(16384, description="padded tokens in one forward pass of one rank")
    max_skipped_updates: PositiveInt = Field(
        5, description="updates in a row with a loss or gradient that is not finite: each is skipped, the last ends the run"
    )
    logprob_chunk_tokens: PositiveInt = Field(2048, description="tokens whose [chunk, vocab/tp] logits are in float32 at a time")
    optimizer: OptimizerConfig = OptimizerConfig()


class SFTConfig(Section):
    """Warm start on the task's own worked solutions, through the same Megatron path."""

    steps: int = Field(0, ge=0, description="0: no warm start")
    batch_size: PositiveInt = Field(128, description="worked solutions of one step, over all ranks")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    cache_dir: str = Field(".cache/ais_megatron", description="starting policies, keyed by a hash of all that makes them")


class CalibrationConfig(Section):
    mode: Annotated[Literal["lagged", "fresh", "off"], OFF] = Field(
        "lagged",
        description="lagged: free, from the old-logprob pass (training pass if ais.lag=1); fresh: a pass with the new weights; off: 1.0",
    )
    margin: float = Field(1.05, ge=1.0, description="head-room on the measured amax")
    fresh_tokens: PositiveInt = Field(4096, description="fresh: tokens of recent rollouts that each DP rank runs through the new weights")


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="steps between held-out evaluations; 0: only at the start and the end")
    num_prompts: PositiveInt = Field(256, description="held-out problems of one evaluation; fewer if there are fewer")
    samples: PositiveInt = Field(1, description="responses per held-out prompt; pass@1 is their mean")
    temperature: float = Field(1.0, ge=0.0, description="0: greedy")


class CheckpointConfig(Section):
    """Checkpoints in ``run.dir/checkpoints``, each complete (every file in its manifest, with size and checksum) or absent."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: PositiveInt = Field(2, description="newest checkpoints that are kept; older ones are deleted")
    keep_every: int = Field(0, ge=0, description="checkpoints of steps that this divides are never deleted; 0: none of them")
    async_save: bool = Field(False, description="write in the background from a copy in CPU memory (one more of this rank's share)")
    verify: Literal["checksum", "size"] = Field("checksum", description="what of every file is compared with the manifest before loading")
    on_damage: Literal["stop", "previous"] = Field(
        "stop", description="run.resume with a damaged newest checkpoint: stop, or set it aside and continue from the one before"
    )


class MetricsConfig(Section):
    progress_bar: bool = Field(True, description="show a progress bar on a terminal")
    tensorboard: bool = Field(False, description="write TensorBoard events to run.dir too")
    wandb: Annotated[Literal["off", "offline", "online"], OFF] = Field(
        "off", description="send every row to Weights & Biases, or keep it for later"
    )
    wandb_project: str = Field("ais_megatron", description="project at Weights & Biases")
