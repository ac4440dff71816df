"""Configurations load, round-trip, and refuse what cannot work with a message that says what to change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ais_megatron.config import Config, ConfigError, build_config, dump_config, load_config
from ais_megatron.config.section import Section
from tests.helpers.paths import ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("compare_"))  # those: test_comparison
ARCHITECTURE = dict(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)

MOE = {
    "architecture": ARCHITECTURE
    | dict(model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, num_key_value_heads=4)
}

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000},
    "tie_word_embeddings": True,
}


def build(**sections: object) -> Config:
    model = {"architecture": ARCHITECTURE, **sections.pop("model", {})}
    return build_config({"model": model, **sections})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_survives_being_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the models that they name. A clone of the repository has none."""
    (folder := tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_overrides_apply_in_order_with_their_types(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(build()))
    config = load_config(path, ["train.steps=7", "ais.tau=1e-3", "task.name=sudoku", "train.steps=8", "rollout.quantization=fp8"])
    assert (config.train.steps, config.ais.tau, config.task.name, config.rollout.quantization) == (8, 1e-3, "sudoku", "fp8_e4m3")


def test_off_is_a_word_although_yaml_reads_it_as_false(tmp_path: Path) -> None:
    (path := tmp_path / "c.yaml").write_text(dump_config(build()))
    config = load_config(path, ["metrics.wandb=off", "calibration.mode=off"])
    assert (config.metrics.wandb, config.calibration.mode) == ("off", "off")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"ais": {"taau": 1}}, r"ais.taau: unknown key; did you mean ais.tau\?"),
        ({"trian": {}}, r"trian: unknown key; did you mean train\?"),
        ({"ais": {"temperature": 1}}, r"ais.temperature: unknown key; did you mean rollout.temperature\?"),
        ({"parallel": {"tp": 3}}, r"parallel.tp=3: does not divide .*num_attention_heads=4; use one of \[1, 2\]"),
        ({"parallel": {"tp": 4}}, r"parallel.tp=4: does not divide .*num_key_value_heads=2; use one of \[1, 2\]"),
        ({"parallel": {"pp": 3}}, r"parallel.pp=3: .*num_hidden_layers=4; use one of \[1, 2, 4\]"),
        ({"parallel": {"ep": 2}}, r"parallel.ep=2: a dense model"),
        ({"parallel": {"tp": 2}, "model": MOE}, r"parallel.tp=2: a MoE model needs parallel.sequence_parallel=true"),
        ({"parallel": {"ep": 3, "dp": 3}, "model": MOE}, r"parallel.ep=3: does not divide .*num_experts=8"),
        ({"parallel": {"ep": 4, "dp": 2}, "model": MOE}, r"parallel.ep=4 \* parallel.etp=1: does not divide .*=2"),
        ({"moe": {"routing_replay": True}}, r"moe.routing_replay=true: .*model.architecture.model_type=qwen3"),
        ({"moe": {"routing_replay": True}, "model": MOE}, r"moe.routing_replay=true: .*rollout.return_routed_experts=true"),
        ({"model": {"architecture": ARCHITECTURE | {"num_experts": 4}}}, r"num_experts=4: must be 0 with model_type=qwen3"),
        ({"parallel": {"sequence_parallel": True}}, r"parallel.sequence_parallel=true: .*parallel.tp=1"),
        ({"parallel": {"dp": 3}}, r"rollout.prompts_per_step=32: must be a multiple of parallel.dp=3"),
        ({"train": {"updates_per_batch": 3}}, r"train.updates_per_batch=3: does not divide the 256 responses"),
        ({"rollout": {"group_size": 1}}, r"rollout.group_size=1: .*always zero"),
        ({"rollout": {"max_response_tokens": 40_000}}, r"max_response_tokens=40000: .*max_position_embeddings=32768"),
        (
            {"train": {"balance": True, "updates_per_batch": 4}, "rollout": {"prompts_per_step": 2, "group_size": 8}},
            "train.balance=true: train.updates_per_batch=4 does not divide the 2 groups",
        ),
        (
            {"policy": {"forward_precision": "fp8_te"}, "run": {"backend": "cpu"}},
            r"fp8_te: run.backend=cpu has no FP8 tensor cores; use GPUs",
        ),
        (
            {"policy": {"forward_precision": "fp8_te"}, "model": {"architecture": ARCHITECTURE, "transformer_impl": "local"}},
            r"fp8_te: needs Transformer Engine's layers; set model.transformer_impl to auto",
        ),
        (
            {
                "policy": {"forward_precision": "fp8_te"},
                "parallel": {"tp": 2},
                "model": {"architecture": ARCHITECTURE | {"intermediate_size": 48}},
            },
            r"multiples of 16 on each of 2 ranks, but model.architecture.intermediate_size=48",
        ),
        (
            {"rollout": {"quantization": "int8"}},
            r"rollout.quantization='int8': input should be 'none', 'fp8_e4m3', 'fp8_e5m2', 'fp4_e2m1' or 'int4'",
        ),
        (
            {"rollout": {"quantization": "int4", "engine": "sglang"}},
            r"rollout.quantization=int4: only the embedded engine emulates it; .* none, fp8_e4m3",
        ),
        ({"train": {"steps": 0}}, r"train.steps=0: input should be greater than or equal to 1"),
        ({"train": {"steps": 5, "optimizer": {"warmup_steps": 9}}}, r"train.optimizer.warmup_steps=9: .*train.steps"),
        ({"task": {"name": "gsm8k"}}, r"task.name=gsm8k: .*task.test_path"),
        ({"ais": {"alpha_min": 0.8, "alpha_max": 0.5}}, r"ais.alpha_min=0.8 must not exceed alpha_max=0.5"),
        ({"ais": {"weight_cap": float("inf")}}, r"ais.weight_cap=inf: input should be a finite number"),
        ({"ais": {"tau": float("inf")}}, r"ais.tau=inf: input should be a finite number\nais.tau=inf: input should be 'auto'"),
        ({"train": {"optimizer": {"lr": float("nan")}}}, r"train.optimizer.lr=nan: input should be a finite number"),
        ({"model": {"architecture": ARCHITECTURE | {"rope_theta": float("inf")}}}, r"rope_theta=inf: input should be a finite number"),
        ({"ais": {"tau": 0}}, r"ais.tau=0.0 must be greater than 0, or auto"),
        ({"ais": {"lag": 1}, "train": {"updates_per_batch": 2}}, r"ais.lag=1: with train.updates_per_batch=2 "),
        ({"ais": {"lag": 1}, "correction_options": {"batch_normalise": True}}, r"ais.lag=1: correction_options.batch_normalise=true needs"),
        (
            {"ais": {"lag": 1}, "correction": "geo_rs", "objective": {"name": "dr_grpo"}},
            r"ais.lag=1: correction=geo_rs with objective.aggregation=constant",
        ),
        (
            {"correction": "icepop", "correction_options": {"level": "sequence"}},
            r"correction_options.level=sequence: correction=icepop weights single tokens only; use correction=mis",
        ),
        (
            {"correction": "k3_rs", "correction_options": {"level": "token"}},
            r"correction_options.level=token: correction=k3_rs rejects whole",
        ),
        (
            {"correction": "ais", "correction_options": {"level": "token"}},
            r"correction_options.level=token: correction=ais .*set ais.level",
        ),
        (
            {"correction": "mis", "correction_options": {"low": 3.0}},
            r"correction_options.low=3.0: must be below correction_options.high=2.0",
        ),
        ({"correction": "mask"}, r"correction='mask': input should be 'none', 'tis'"),
        ({"objective": {"name": "dapo", "advantages": "reward"}}, r"objective.dynamic_sampling=true: with objective.advantages=reward"),
        ({"eval": {"sets": {"a": {"sample": 3}}}}, r"^eval.sets.a.sample: unknown key; did you mean eval.sets.a.samples\?$"),
        ({"eval": {"sets": {"a b": {}}}}, r"eval.sets: the name 'a b' may only have letters, digits, _ and -; rename this set"),
        ({"eval": {"sets": {"a": {"task": {"test_pat": "x"}}}}}, r"eval.sets.a.task.test_pat: unknown key; did you mean test_path\?"),
        ({"eval": {"sets": {"a": {"task": {"name": "sudko"}}}}}, r"eval.sets.a.task.name='sudko': unknown task; .* mean sudoku\?"),
        ({"eval": {"sets": {"a": {"task": {"name": "math500"}}}}}, r"eval.sets.a.task: .* come from files; set eval.sets.a.task.test_path"),
        ({"eval": {"sets": {"a": {"ks": [2]}}}}, r"eval.sets.a.ks=\[2\]: pass@2 needs 2 responses per problem, but samples=1; raise"),
        ({"eval": {"sets": {"a": {"max_response_tokens": 40_000}}}}, r"eval.sets.a.max_response_tokens=40000: .*=32768; lower it"),
        ({"eval": {"blocking": False}}, r"eval.blocking=false: rollout.engine=local generates .*; set eval.blocking=true"),
        ({"objective": {"name": "ppo"}}, r"objective.name='ppo': unknown objective; allowed: grpo, dr_grpo, .*module:function$"),
        ({"tokenizer": {"kind": "hf"}}, r"tokenizer.kind=hf: set tokenizer.path"),
    ],
)
def test_refusals(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**sections)


def float_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Every key below `section` that takes a float, as in ``ais.tau``."""
    keys = []
    for name, field in section.model_fields.items():
        types = {field.annotation, *getattr(field.annotation, "__args__", ())}
        for nested in (t for t in types if isinstance(t, type) and issubclass(t, Section)):
            keys += float_keys(nested, f"{prefix}{name}.")
        keys += [prefix + name] if float in types else []
    return keys


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_key_takes_a_number_that_is_not_finite(tmp_path: Path, value: str) -> None:
    (path := tmp_path / "c.yaml").write_text(dump_config(build()))
    keys = float_keys(Config)
    assert {"ais.weight_cap", "ais.tau", "train.optimizer.lr", "model.architecture.rope_theta", "rollout.sglang.verify_tolerance"} <= {
        *keys
    }
    for key in keys:
        with pytest.raises(ConfigError, match=rf"^{key}='?{value}'?: input should be "):
            load_config(path, [f"{key}={value}"])


def test_one_word_is_enough_for_every_method() -> None:
    for correction in ("none", "tis", "mis", "icepop", "geo_rs", "k3_rs", "ais"):
        for objective in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "tbpo"):
            build(correction=correction, objective={"name": objective})
    assert build(rollout={"group_size": 1}, objective={"advantages": "reward"}).rollout.group_size == 1


def test_without_a_model() -> None:
    with pytest.raises(ConfigError, match="set model.path to a Hugging Face checkpoint folder, or describe model.architecture"):
        build_config({})


def test_architecture_comes_from_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **ARCHITECTURE, "rope_parameters": {"rope_theta": 5e5}}))
    config = build_config({"model": {"path": str(tmp_path)}})
    assert config.architecture.rope_theta == 5e5 and config.architecture.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no config.json"),
        ("{", "not valid JSON"),
        (json.dumps({"model_type": "gpt2"}), "model_type='gpt2' is not supported; allowed: qwen3, "),
        (json.dumps({"model_type": "llama", **ARCHITECTURE, "mlp_bias": True}), "mlp_bias=True in its config.json is not supported"),
        (json.dumps({"model_type": "qwen3", "vocab_size": 5}), "hidden_size: missing"),
        (json.dumps({"model_type": "qwen3", **ARCHITECTURE, "rope_scaling": {"type": "yarn"}}), "scaled RoPE"),
    ],
)
def test_checkpoints_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        build_config({"model": {"path": str(tmp_path)}})


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("a: [", [], "not valid YAML"),
        ("- 1", [], "expected a mapping"),
        ("run: {}", ["train.steps"], "write key=value"),
        (None, [], "does not exist"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: str | None, overrides: list[str], message: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


def test_a_typo_costs_no_torch() -> None:
    code = "import sys; from ais_megatron import config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sets_of_an_evaluation(tmp_path: Path) -> None:
    """What a set leaves out comes from the run, and overrides reach into a set that the file does not have."""
    (path := tmp_path / "config.yaml").write_text(
        "model: {architecture: " + json.dumps(ARCHITECTURE) + "}\n"
        "task: {name: countdown, max_number: 30, format_weight: 0.2}\n"
        "eval: {num_prompts: 40, temperature: 0.5, sets: {own: {}, other: {task: {name: sudoku}, temperature: 0, samples: 4}}}\n"
    )
    config = load_config(path, ["eval.sets.aime-24.samples=8", "eval.sets.aime-24.ks=[2,8]", "eval.sets.own.task.max_number=9"])
    own, other, aime = config.evaluation_sets
    assert (own.name, own.task.max_number, own.task.format_weight) == ("own", 9, 0.2)
    assert (own.num_prompts, own.samples, own.temperature, own.max_response_tokens, own.ks) == (40, 1, 0.5, 48, (1,))
    assert (other.task.name, other.task.format_weight, other.temperature, other.ks) == ("sudoku", 0.1, 0.0, (1, 4))
    assert (aime.name, aime.ks) == ("aime-24", (1, 2, 8)) and aime.task == config.task
    assert len({chosen.first_index for chosen in config.evaluation_sets}) == 3 and max(c.first_index for c in (own, other, aime)) < -1
    (path := tmp_path / "written.yaml").write_text(dump_config(config))
    assert load_config(path) == config
    (only,) = build_config({"model": {"architecture": ARCHITECTURE}, "eval": {"samples": 3}}).evaluation_sets
    assert (only.name, only.first_index, only.samples, only.top_p, only.ks) == ("held_out", -1, 3, 1.0, (1, 3))


def test_steps_to_profile() -> None:
    def steps(value: object, **run: object) -> list[int]:
        data = {"model": {"architecture": ARCHITECTURE}, "train": {"steps": 8}, "run": {"profile_steps": value, **run}}
        return build_config(data).run.profile_steps

    assert (steps("3-5"), steps([3, 8]), steps(2), steps([])) == ([3, 4, 5], [3, 8], [2], [])
    with pytest.raises(ConfigError, match=r"run.profile_steps=\[2, 9\]: there is no step 9, because train.steps=8; allowed: 1 to 8"):
        steps([2, 9])
    for wrong in ("5-3", "3..5", "soon", "1-99999999999"):
        with pytest.raises(ConfigError, match="run.profile_steps: .*not a range of steps; write the first and the last one"):
            steps(wrong)
    with pytest.raises(ConfigError, match="run.profile_steps.0=0"):
        steps(0)
    with pytest.raises(ConfigError, match="run.profiler=nsys: run.backend=cpu"):
        steps(1, profiler="nsys", backend="cpu")
