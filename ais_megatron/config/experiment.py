"""The whole configuration: one frozen `Config` of all sections. Creating it checks how their settings fit together."""

from __future__ import annotations

from pydantic import Field, model_validator

from ais_megatron.config import checks
from ais_megatron.config.algorithm import (
    AISConfig,
    CorrectionName,
    CorrectionOptions,
    Level,
    ObjectiveConfig,
    algorithm_problems,
    measures_gradients,
    weight_level,
)
from ais_megatron.config.architecture import Architecture
from ais_megatron.config.diffusion import DiffusionConfig, diffusion_problems
from ais_megatron.config.evaluation import EvalConfig, EvaluationSet, evaluation_sets
from ais_megatron.config.policy import PolicyConfig, adapter_problems, lora_problems, precision_problems
from ais_megatron.config.recurrent import recurrent_problems
from ais_megatron.config.rollout import RolloutConfig
from ais_megatron.config.section import Section
from ais_megatron.config.settings import (
    CalibrationConfig,
    CheckpointConfig,
    MetricsConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    SFTConfig,
    TokenizerConfig,
    TrainConfig,
)
from ais_megatron.config.task import TaskConfig


class Config(Section):
    run: RunConfig = RunConfig()
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    correction: CorrectionName = Field(
        "ais",
        description="how the mismatch between rollout engine and trainer is corrected. none: not at all. tis: truncated importance "
        "weights in full. ais: truncated importance weights, as strongly as each batch needs. mis, icepop: tokens whose weight is too "
        "far from 1 are dropped. geo_rs, k3_rs: such responses are dropped",
    )
    correction_options: CorrectionOptions = CorrectionOptions()
    ais: AISConfig = AISConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    policy: PolicyConfig = PolicyConfig()
    moe: MoEConfig = MoEConfig()
    train: TrainConfig = TrainConfig()
    sft: SFTConfig = SFTConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        arch = self.model.architecture
        problems = [
            *checks.layout_problems(self.parallel, self.model),
            *checks.profile_problems(self.run, self.train),
            *checks.batch_problems(self.rollout, self.train, self.sft, self.parallel.dp or 1, arch),
            *checks.prompt_problems(self.task, self.rollout, arch),
            *algorithm_problems(
                self.correction, self.ais, self.correction_options, self.objective, self.train.updates_per_batch, self.rollout.group_size
            ),
            *checks.source_problems(self.model, self.tokenizer, self.task),
            *precision_problems(self.policy, self.model, self.rollout, self.parallel, self.run.backend),
            *lora_problems(self.policy.lora, self.model, arch, self.sft.steps),
            *adapter_problems(self.policy, self.rollout),
            *recurrent_problems(arch, self.parallel, self.train, self.policy, self.rollout),
            *checks.evaluation_problems(self.eval, self.task, self.rollout, self.tokenizer, arch),
            *checks.replay_problems(self.moe, self.rollout, arch),
            *checks.engine_problems(self.rollout, self.run, self.calibration, arch),
            *checks.recording_problems(self.rollout),
            *checks.colocation_problems(self.rollout, self.eval, self.model),
            *checks.ahead_problems(self.rollout),
            *diffusion_problems(self),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def weight_level(self) -> Level:
        """What an importance weight belongs to: a token, or a response (as the product or the geometric mean over its tokens)."""
        return weight_level(self.correction, self.ais, self.correction_options, self.objective)

    @property
    def rows_per_response(self) -> int:
        """Rows of a batch for each response: 1, or for a diffusion model the number of masks under which it is scored."""
        if not self.architecture.family.is_diffusion:
            return 1
        return self.diffusion.masks if self.diffusion.likelihood == "one_step" else self.diffusion.states

    @property
    def likelihood_temperature(self) -> float:
        """The temperature of all log-probabilities: the sampler's. One-step estimates are no probabilities of the sampler, and have 1."""
        is_one_step = self.architecture.family.is_diffusion and self.diffusion.likelihood == "one_step"
        return 1.0 if is_one_step else self.rollout.temperature

    @property
    def measures_gradients(self) -> bool:
        """Whether alpha needs sketches of the responses' gradients."""
        return measures_gradients(self.correction, self.ais, self.correction_options, self.objective)

    @property
    def evaluation_sets(self) -> list[EvaluationSet]:
        """What an evaluation measures: `eval.sets`, or the one held-out set."""
        return evaluation_sets(self.eval, self.task, self.rollout.max_response_tokens)

    @property
    def architecture(self) -> Architecture:
        assert self.model.architecture is not None  # source_problems refuses a config without one
        return self.model.architecture
