"""The experiment as data: one YAML file plus ``key=value`` overrides becomes one frozen `Config`.

OmegaConf merges the file and the overrides; pydantic checks names, types and every combination that can be judged
without starting a process. Whatever is wrong is reported in one `ConfigError` whose lines name the key, the value
received, what is allowed and what to change. Nothing here imports torch, so a typo costs milliseconds, not a cluster.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from ais_megatron import doors
from ais_megatron.algorithm_config import (
    AISConfig,
    CorrectionName,
    CorrectionOptions,
    Level,
    ObjectiveConfig,
    algorithm_problems,
    weight_level,
)
from ais_megatron.engine_traits import ENGINES, EngineTraits
from ais_megatron.section import Fraction, PositiveInt, Section
from ais_megatron.sglang_config import FP8_BLOCK, SGLangConfig, graph_problems, ragged_shards

OFF = BeforeValidator(lambda value: "off" if value is False else value)  # what YAML makes of an unquoted off
SUPPORTED_MODEL_TYPES = ("qwen3", "qwen3_moe")
SGLANG_QUANTIZATIONS = ("none", "fp8_e4m3")


class BuiltinTask(NamedTuple):
    module: str
    """Of ais_megatron.tasks."""
    attribute: str
    """The class in it."""
    needs_file: bool = False
    """Its questions are written, not generated."""


BUILTIN_TASKS = {
    "countdown": BuiltinTask("countdown", "Countdown"),
    "sudoku": BuiltinTask("sudoku", "Sudoku"),
    "gsm8k": BuiltinTask("gsm8k", "GSM8K", needs_file=True),
    "math500": BuiltinTask("math500", "Math500", needs_file=True),
}


class ConfigError(ValueError):
    """The configuration cannot be used; the message says which keys, and what to write instead."""


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


class Architecture(Section):
    """A Qwen3 model under the names of its Hugging Face ``config.json``."""

    model_type: Literal["qwen3", "qwen3_moe"] = Field("qwen3", description="qwen3: dense; qwen3_moe: experts in every layer")
    vocab_size: PositiveInt = Field(description="rows of the embedding; the tokenizer may have fewer tokens")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    intermediate_size: PositiveInt = Field(description="width of a dense layer's MLP")
    num_hidden_layers: PositiveInt = Field(description="number of transformer layers")
    num_attention_heads: PositiveInt = Field(description="query heads of a layer")
    num_key_value_heads: PositiveInt = Field(description="key and value heads of a layer; divides num_attention_heads")
    head_dim: PositiveInt = Field(description="width of one head")
    max_position_embeddings: PositiveInt = Field(32768, description="longest prompt with its response, in tokens")
    rms_norm_eps: float = Field(1e-6, description="added to the mean square in every RMS norm")
    rope_theta: float = Field(1_000_000.0, description="base of the rotary embedding's frequencies")
    tie_word_embeddings: bool = Field(False, description="the output layer uses the embedding's weights")
    initializer_range: float = Field(0.02, description="standard deviation of random starting weights")
    num_experts: int = Field(0, ge=0, description="qwen3_moe: experts in every layer; 0 in a dense model")
    num_experts_per_tok: int = Field(0, ge=0, description="qwen3_moe: experts that each token is sent to")
    moe_intermediate_size: int = Field(0, ge=0, description="qwen3_moe: width of one expert's MLP")
    norm_topk_prob: bool = Field(True, description="the chosen experts' probabilities are scaled to sum 1")

    @property
    def is_moe(self) -> bool:
        return self.model_type == "qwen3_moe"

    @model_validator(mode="after")
    def _experts(self) -> Architecture:
        sizes = dict(
            num_experts=self.num_experts, num_experts_per_tok=self.num_experts_per_tok, moe_intermediate_size=self.moe_intermediate_size
        )
        for name, size in sizes.items():
            if self.is_moe != (size > 0):
                raise ValueError(f"{name}={size}: must be {'1 or more' if self.is_moe else '0'} with model_type={self.model_type}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}")
        return self

    @model_validator(mode="after")
    def _heads(self) -> Architecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        return self


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


class TaskConfig(Section):
    name: str = Field(
        "countdown", description="countdown, sudoku, gsm8k or math500; or a class of your own as module:Class (docs/extending.md)"
    )
    reward: str | None = Field(
        None,
        description="a function of your own as module:function, which judges in place of the task (docs/extending.md); empty: the task's",
    )
    options: dict[str, Any] = Field({}, description="anything that your own class or function reads; built-in tasks take no options")
    train_path: str | None = Field(None, description="JSONL file or HF-datasets folder; empty: puzzles generated from run.seed")
    test_path: str | None = Field(None, description="held-out file; empty: generated puzzles that never occur in training")
    max_number: PositiveInt = Field(99, description="countdown: largest number and target that is generated")
    empty_cells: PositiveInt = Field(8, le=16, description="sudoku: cells left empty in generated puzzles")
    format_weight: Fraction = Field(0.1, description="share of the reward given for a well-formed answer alone")

    @field_validator("name")
    @classmethod
    def _known_task(cls, name: str) -> str:
        if doors.is_own(name):
            doors.check("task.name", name, "class")
        elif name not in BUILTIN_TASKS:
            nearest = difflib.get_close_matches(name, BUILTIN_TASKS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"task.name={name!r}: unknown task; allowed: {', '.join(BUILTIN_TASKS)}, or module:Class{hint}")
        return name

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, reward: str | None) -> str | None:
        if reward is not None:
            doors.check("task.reward", reward, "function")
        return reward

    @model_validator(mode="after")
    def _options_have_a_reader(self) -> TaskConfig:
        if self.options and not doors.is_own(self.name) and self.reward is None:
            raise ValueError(
                f"task.options={self.options}: nothing reads them, because task.name={self.name} is built in and task.reward is empty; "
                "leave task.options out, or name code of your own"
            )
        return self


class RolloutConfig(Section):
    engine: Literal["local", "sglang", "replay"] = Field(
        "local", description="local: embedded in each rank; sglang: servers, see rollout.sglang; replay: none, responses from replay_dir"
    )
    save_dir: str | None = Field(None, description="folder that every response is recorded in, for a later replay; empty: none")
    replay_dir: str | None = Field(None, description="engine=replay: the save_dir of an earlier run")
    quantization: Annotated[
        Literal["none", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"],
        BeforeValidator(lambda v: {"fp8": "fp8_e4m3", "bf16": "none", None: "none"}.get(v, v)),
    ] = Field(
        "fp8_e4m3",
        description="none: BF16 weights; fp8_e4m3 (or fp8), fp8_e5m2: block-128x128 weights, 1x128 activations; fp4_e2m1: blocks of "
        "1x32 for both. Local engine only: fp8_e5m2, fp4_e2m1",
    )
    kv_cache: Literal["auto", "bf16", "fp8_e4m3"] = Field("auto", description="auto: FP8 exactly when the weights are quantised")
    prompts_per_step: PositiveInt = Field(32, description="prompts of one step, over all ranks")
    group_size: PositiveInt = Field(8, description="responses sampled for each prompt")
    max_response_tokens: PositiveInt = Field(48, description="a response is cut at this length")
    temperature: float = Field(1.0, gt=0.0, description="of sampling; log-probabilities are those at this temperature")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="sample only from the likeliest tokens that hold this probability; 1: from all")
    top_k: int = Field(0, ge=0, description="sample only from so many of the likeliest tokens; 0: no limit")
    max_batch: PositiveInt = Field(256, description="responses that one engine decodes side by side")
    return_routed_experts: bool = Field(False, description="MoE models: every response carries the experts the engine chose for it")
    sync_bucket_mb: float = Field(64.0, gt=0.0, description="bytes of weights in flight during a weight sync, in MiB")
    ahead: int = Field(0, ge=0, le=1, description="1: the next batch is generated while this one trains, with weights one step older")
    sglang: SGLangConfig = SGLangConfig()

    @property
    def engine_traits(self) -> EngineTraits:
        return ENGINES[self.engine]

    @property
    def kv_cache_is_fp8(self) -> bool:
        return self.kv_cache == "fp8_e4m3" or (self.kv_cache == "auto" and self.quantization != "none")


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


class Config(Section):
    run: RunConfig = RunConfig()
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    correction: CorrectionName = Field(
        "ais", description="what is done about the mismatch of rollouts and trainer; none: nothing; ais: as much as each batch needs"
    )
    correction_options: CorrectionOptions = CorrectionOptions()
    ais: AISConfig = AISConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    moe: MoEConfig = MoEConfig()
    train: TrainConfig = TrainConfig()
    sft: SFTConfig = SFTConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        algorithm = algorithm_problems(
            self.correction, self.ais, self.correction_options, self.objective, self.train.updates_per_batch, self.rollout.group_size
        )
        problems = [*_layout_problems(self), *_batch_problems(self), *algorithm, *_source_problems(self), *_replay_problems(self)]
        problems += [*_engine_problems(self), *_recording_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def weight_level(self) -> Level:
        """What one importance weight stands for: a token, or a response by its product or its geometric mean."""
        return weight_level(self.correction, self.ais, self.correction_options, self.objective)

    @property
    def architecture(self) -> Architecture:
        assert self.model.architecture is not None  # _source_problems refuses a config without one
        return self.model.architecture


def _layout_problems(config: Config) -> list[str]:
    parallel, arch = config.parallel, config.model.architecture
    problems = []
    if parallel.sequence_parallel and parallel.tp == 1:
        problems.append(
            "parallel.sequence_parallel=true: there is nothing to shard with parallel.tp=1; set it to false or raise parallel.tp"
        )
    if parallel.cp > 1:  # Megatron would run, and every rank would attend to whole rows as if they were its slice: wrong numbers
        problems.append(
            f"parallel.cp={parallel.cp}: context parallelism does not work yet, because rows are not cut into slices; set parallel.cp=1 "
            "(for long rows raise parallel.tp with parallel.sequence_parallel=true, or parallel.pp)"
        )
    if arch is None:
        return problems
    problems += _expert_problems(parallel, arch, config.model.recompute)
    for key, heads in (("num_attention_heads", arch.num_attention_heads), ("num_key_value_heads", arch.num_key_value_heads)):
        if heads % parallel.tp:
            allowed = [n for n in range(1, heads + 1) if arch.num_attention_heads % n == 0 and arch.num_key_value_heads % n == 0]
            problems.append(f"parallel.tp={parallel.tp}: does not divide model.architecture.{key}={heads}; use one of {allowed}")
    if arch.num_hidden_layers % parallel.pp:
        allowed = [n for n in range(1, arch.num_hidden_layers + 1) if arch.num_hidden_layers % n == 0]
        layers = f"model.architecture.num_hidden_layers={arch.num_hidden_layers}"
        problems.append(f"parallel.pp={parallel.pp}: does not divide {layers}; use one of {allowed}")
    for key, size in (("hidden_size", arch.hidden_size), ("intermediate_size", 0 if arch.is_moe else arch.intermediate_size)):
        if size % parallel.tp:
            problems.append(f"parallel.tp={parallel.tp}: does not divide model.architecture.{key}={size}")
    return problems


def _replay_problems(config: Config) -> list[str]:
    if not config.moe.routing_replay:
        return []
    if config.model.architecture is not None and not config.model.architecture.is_moe:
        return [f"moe.routing_replay=true: there is no routing with model.architecture.model_type={config.model.architecture.model_type}"]
    if not config.rollout.return_routed_experts:
        return ["moe.routing_replay=true: the engine must tell its routing; set rollout.return_routed_experts=true too"]
    return []


def _recording_problems(config: Config) -> list[str]:
    rollout, problems = config.rollout, []
    if rollout.engine_traits.replays and rollout.replay_dir is None:
        problems.append("rollout.engine=replay: set rollout.replay_dir to the rollout.save_dir of the run to replay")
    if not rollout.engine_traits.replays and rollout.replay_dir is not None:
        problems.append(
            f"rollout.replay_dir={rollout.replay_dir}: without effect on rollout.engine={rollout.engine}; set rollout.engine=replay"
        )
    if rollout.replay_dir is not None and rollout.replay_dir == rollout.save_dir:
        problems.append(f"rollout.save_dir={rollout.save_dir}: is what is being replayed (rollout.replay_dir); choose another folder")
    return problems


def _engine_problems(config: Config) -> list[str]:
    """What an SGLang server could not load."""
    rollout, arch = config.rollout, config.model.architecture
    if not rollout.engine_traits.has_servers:
        return []
    if rollout.quantization not in SGLANG_QUANTIZATIONS:
        return [
            f"rollout.quantization={rollout.quantization}: only the embedded engine emulates it; with rollout.engine=sglang use one of "
            f"{', '.join(SGLANG_QUANTIZATIONS)}, or set rollout.engine=local"
        ]
    if arch is None:
        return []
    sglang, problems = rollout.sglang, graph_problems(rollout.sglang, rollout.kv_cache_is_fp8)
    if sglang.startup_timeout_s >= config.run.timeout_minutes * 60:
        problems.append(
            f"rollout.sglang.startup_timeout_s={sglang.startup_timeout_s:g}: the other ranks wait for the first one, which waits for the "
            f"servers, only run.timeout_minutes={config.run.timeout_minutes:g}; lower the one or raise the other"
        )
    if arch.num_attention_heads % sglang.tp:
        problems.append(f"rollout.sglang.tp={sglang.tp}: does not divide model.architecture.num_attention_heads={arch.num_attention_heads}")
    if arch.is_moe and arch.num_experts % sglang.ep:
        problems.append(f"rollout.sglang.ep={sglang.ep}: does not divide model.architecture.num_experts={arch.num_experts}")
    if not arch.is_moe and sglang.ep > 1:
        problems.append(f"rollout.sglang.ep={sglang.ep}: a dense model has no experts to spread; set rollout.sglang.ep=1")
    if rollout.quantization != "none" and (ragged := _ragged_shards(arch, sglang.tp, sglang.ep)):
        works = [n for n in range(1, arch.num_attention_heads + 1) if arch.num_attention_heads % n == 0]
        works = [n for n in works if n >= sglang.ep and not _ragged_shards(arch, n, sglang.ep)]
        remedy = f"use one of {works}" if works else "no value works for this architecture: make its sizes multiples of 128"
        problems.append(
            f"rollout.sglang.tp={sglang.tp}: block-FP8 weights are cut at multiples of {FP8_BLOCK}, but {ragged[0]}; {remedy}, "
            "or set rollout.quantization=none"
        )
    if sglang.pause == "in_place" and rollout.kv_cache_is_fp8 and config.calibration.mode != "off":
        problems.append(
            "rollout.sglang.pause=in_place: would keep a KV cache that was quantised with the previous step's scales; use retract, "
            "or rollout.kv_cache=bf16"
        )
    return problems


def _ragged_shards(arch: Architecture, tp: int, ep: int) -> list[str]:
    mlp, expert_mlp = (0, arch.moe_intermediate_size) if arch.is_moe else (arch.intermediate_size, 0)
    return ragged_shards(tp, max(tp // ep, 1), arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim, mlp, expert_mlp)


def _expert_problems(parallel: ParallelConfig, arch: Architecture, recompute: str) -> list[str]:
    """What expert parallelism asks for; Megatron would fail on each of these later and less clearly."""
    if not arch.is_moe:
        return [
            f"parallel.{key}={size}: a dense model has no experts to spread; set parallel.{key}=1"
            for key, size in (("ep", parallel.ep), ("etp", parallel.etp))
            if size > 1
        ]
    problems = []
    if recompute == "full" and parallel.pp > 1:
        problems.append(f"model.recompute=full with parallel.pp={parallel.pp}: not supported for MoE models; set one of them to none or 1")
    if parallel.tp > 1 and not parallel.sequence_parallel:
        problems.append(f"parallel.tp={parallel.tp}: a MoE model needs parallel.sequence_parallel=true with it")
    if arch.num_experts % parallel.ep:
        problems.append(f"parallel.ep={parallel.ep}: does not divide model.architecture.num_experts={arch.num_experts}")
    if arch.moe_intermediate_size % parallel.etp:
        problems.append(
            f"parallel.etp={parallel.etp}: does not divide model.architecture.moe_intermediate_size={arch.moe_intermediate_size}"
        )
    replicas = parallel.tp * parallel.cp * (parallel.dp or 1)
    if parallel.dp and replicas % (parallel.ep * parallel.etp):
        problems.append(
            f"parallel.ep={parallel.ep} * parallel.etp={parallel.etp}: does not divide parallel.tp * parallel.cp * parallel.dp={replicas}, "
            "the ranks of one pipeline stage over which experts are spread"
        )
    return problems


def _batch_problems(config: Config) -> list[str]:
    rollout, train, arch = config.rollout, config.train, config.model.architecture
    problems = []
    dp = config.parallel.dp or 1
    if rollout.prompts_per_step % dp:
        problems.append(f"rollout.prompts_per_step={rollout.prompts_per_step}: must be a multiple of parallel.dp={dp}")
    if config.sft.steps and config.sft.batch_size % dp:
        problems.append(f"sft.batch_size={config.sft.batch_size}: must be a multiple of parallel.dp={dp}")
    responses = rollout.prompts_per_step * rollout.group_size // dp
    if responses % train.updates_per_batch:
        problems.append(
            f"train.updates_per_batch={train.updates_per_batch}: does not divide the {responses} responses of one data-parallel rank "
            f"(rollout.prompts_per_step * rollout.group_size / parallel.dp)"
        )
    for key, optimizer, steps in (
        ("train", train.optimizer, train.steps * train.updates_per_batch),
        ("sft", config.sft.optimizer, config.sft.steps),
    ):
        if steps and optimizer.warmup_steps > steps:
            problems.append(f"{key}.optimizer.warmup_steps={optimizer.warmup_steps}: longer than the {steps} updates of {key}.steps")
    if arch is not None and rollout.max_response_tokens >= arch.max_position_embeddings:
        problems.append(
            f"rollout.max_response_tokens={rollout.max_response_tokens}: leaves no room for a prompt within "
            f"model.architecture.max_position_embeddings={arch.max_position_embeddings}"
        )
    if rollout.return_routed_experts and arch is not None and not arch.is_moe:
        problems.append(
            f"rollout.return_routed_experts=true: model.architecture.model_type={arch.model_type} has no experts; "
            "set rollout.return_routed_experts=false"
        )
    return problems


def _source_problems(config: Config) -> list[str]:
    model, tokenizer, task = config.model, config.tokenizer, config.task
    problems = []
    if model.architecture is None:
        problems.append("model: set model.path to a Hugging Face checkpoint folder, or describe model.architecture")
    if tokenizer.kind == "hf" and tokenizer.path is None and model.path is None:
        problems.append("tokenizer.kind=hf: set tokenizer.path (or model.path, whose tokenizer is then used)")
    builtin = BUILTIN_TASKS.get(task.name)
    if builtin is not None and builtin.needs_file and task.test_path is None:
        problems.append(f"task.name={task.name}: its questions are not generated; set task.test_path (and task.train_path) to its files")
    return problems


def read_architecture(folder: str | Path) -> Architecture:
    """The `Architecture` in a Hugging Face checkpoint folder's ``config.json``; `ConfigError` if it is missing or another model's."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path={folder}: there is no {path.name} in it; give the folder of a Hugging Face checkpoint")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path={folder}: {path} is not valid JSON ({error})") from error
    if raw.get("model_type") not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model.path={folder}: model_type={raw.get('model_type')!r} is not supported; allowed: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    rope = raw.get("rope_parameters") or {}
    raw.setdefault("rope_theta", rope.get("rope_theta", 1_000_000.0))
    if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
        raise ConfigError(f"model.path={folder}: scaled RoPE ({rope or raw['rope_scaling']}) is not supported; allowed: default")
    raw.setdefault("num_experts", raw.get("num_local_experts", 0))  # how transformers 5 writes it
    if raw["model_type"] == "qwen3_moe" and (raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1):
        raise ConfigError(f"model.path={folder}: a MoE model with dense layers among its sparse ones is not supported")
    try:
        return Architecture(**{k: v for k, v in raw.items() if k in Architecture.model_fields})
    except ValidationError as error:
        raise ConfigError(f"model.path={folder}: {path} does not describe a Qwen3 model\n" + explain(error)) from error


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides in order, and check everything.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), wrong type, impossible combination.
    """
    return build_config(read_yaml(path, overrides))


def read_yaml(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """A YAML file with ``key=value`` overrides applied in order, unchecked.

    Raises:
        ConfigError: a file that cannot be read or is not a mapping, or an override that is not ``key=value``.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    bad = [item for item in overrides if "=" not in item or item.startswith("=")]
    if bad:
        raise ConfigError(f"override {bad[0]!r}: write key=value, for example train.steps=10")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: expected a mapping of sections, got {type(loaded).__name__}")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(merged, resolve=True)
    except ConfigError:
        raise
    except (OmegaConfBaseException, OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # PyYAML's errors share no public base class with OmegaConf's
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        raise


def build_config(data: dict[str, Any]) -> Config:
    """Check a nested mapping and freeze it; see `load_config`. A given ``model.path`` supplies ``model.architecture``."""
    model = data.get("model")
    if isinstance(model, dict) and model.get("path"):
        data = {**data, "model": {**model, "architecture": read_architecture(model["path"]).model_dump()}}
    try:
        return Config(**data)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal `Config`."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        nested = next((t for t in _types_in(field.annotation) if isinstance(t, type) and issubclass(t, Section)), None)
        keys += [prefix + name] + (_known_keys(nested, prefix + name + ".") if nested else [])
    return keys


def _types_in(annotation: Any) -> list[Any]:
    return [annotation, *getattr(annotation, "__args__", ())]


def explain(error: ValidationError, schema: type[BaseModel] = Config) -> str:
    """pydantic's findings about a `schema` as lines of `key: what is wrong, what is allowed`."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if not _is_union_member(part))
        if item["type"] == "extra_forbidden":
            nearest = _nearest_key(key, schema)
            lines.append(f"{key}: unknown key" + (f"; did you mean {nearest}?" if nearest else ""))
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
            names_itself = not key or message.startswith((f"{key}=", f"{key}."))
            lines.append(message if names_itself else f"{key}: {message}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing; set it")
        else:
            lines.append(f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "\n".join(lines)


def _is_union_member(part: str | int) -> bool:
    """Whether pydantic put this into a location to say which type of ``float | Literal["auto"]`` did not match; it is no key."""
    return part == "float" or str(part).startswith("literal[")


def _nearest_key(key: str, schema: type[BaseModel]) -> str | None:
    known = _known_keys(schema)
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if close:
        return siblings[close[0]]
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    close = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return close[0] if close else None
