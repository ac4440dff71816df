"""Finds settings that contradict each other, before any process starts.

Every function checks the sections in its arguments and returns one line per problem. A line names the keys, their values and what
to change.
"""

from __future__ import annotations

from ais_megatron.config.architecture import Architecture
from ais_megatron.config.evaluation import EvalConfig, evaluation_sets
from ais_megatron.config.rollout import RolloutConfig
from ais_megatron.config.settings import (
    CalibrationConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RunConfig,
    SFTConfig,
    TokenizerConfig,
    TrainConfig,
)
from ais_megatron.config.sglang import graph_problems, ragged_shards
from ais_megatron.config.task import BUILTIN_TASKS, TaskConfig

SGLANG_QUANTIZATIONS = ("none", "fp8_e4m3")


def layout_problems(parallel: ParallelConfig, model: ModelConfig) -> list[str]:
    """Layouts of the model over ranks that Megatron would refuse, or with which it would compute wrong numbers."""
    arch, problems = model.architecture, []
    if parallel.sequence_parallel and parallel.tp == 1:
        problems.append("parallel.sequence_parallel=true: parallel.tp=1 leaves nothing to split; set it to false or raise parallel.tp")
    if arch is None:
        return problems
    problems += _expert_problems(parallel, arch, model.recompute)
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


def profile_problems(run: RunConfig, train: TrainConfig) -> list[str]:
    """Steps to profile that do not exist, and a profiler without a GPU."""
    problems = []
    if missing := [step for step in run.profile_steps if step > train.steps]:
        problems.append(
            f"run.profile_steps={run.profile_steps}: there is no step {missing[0]}, because train.steps={train.steps}; allowed: 1 to "
            f"{train.steps}. Choose other steps, or raise train.steps"
        )
    if run.profiler == "nsys" and run.backend == "cpu":
        problems.append("run.profiler=nsys: run.backend=cpu has nothing that NVTX ranges could mark; set run.profiler=trace")
    return problems


def replay_problems(moe: MoEConfig, rollout: RolloutConfig, arch: Architecture | None) -> list[str]:
    """Routing replay without recorded routes."""
    if not moe.routing_replay:
        return []
    if arch is not None and not arch.is_moe:
        return [
            f"moe.routing_replay=true: model.architecture.model_type={arch.model_type} has no experts to route to; set "
            "moe.routing_replay=false"
        ]
    if not rollout.return_routed_experts:
        return ["moe.routing_replay=true: the engine must report the experts it chose; set rollout.return_routed_experts=true too"]
    return []


def recording_problems(rollout: RolloutConfig) -> list[str]:
    """A replay without a folder, or a recording that would overwrite what is being replayed."""
    problems = []
    if rollout.engine_traits.replays and rollout.replay_dir is None:
        problems.append("rollout.engine=replay: set rollout.replay_dir to the rollout.save_dir of the run to replay")
    if not rollout.engine_traits.replays and rollout.replay_dir is not None:
        problems.append(
            f"rollout.replay_dir={rollout.replay_dir}: has no effect with rollout.engine={rollout.engine}; set rollout.engine=replay, or "
            "leave it out"
        )
    if rollout.replay_dir is not None and rollout.replay_dir == rollout.save_dir:
        problems.append(
            f"rollout.save_dir={rollout.save_dir}: is the folder that is being replayed (rollout.replay_dir); choose another folder"
        )
    return problems


def ahead_problems(rollout: RolloutConfig) -> list[str]:
    """Batches generated ahead that could not be used."""
    problems = []
    bound = rollout.max_staleness
    if bound is not None and bound < rollout.ahead and rollout.engine_traits.is_embedded:
        problems.append(
            f"rollout.max_staleness={bound}: rollout.engine={rollout.engine} generates between two updates, so with "
            f"rollout.ahead={rollout.ahead} every response is {rollout.ahead} versions old and would be dropped; raise the first, or lower "
            "the second"
        )
    return problems


def colocation_problems(rollout: RolloutConfig, evaluation: EvalConfig, model: ModelConfig) -> list[str]:
    """Settings with which servers and trainer cannot take turns on the same GPUs."""
    if not rollout.colocated:
        return []
    if not rollout.engine_traits.has_servers:
        return [
            f"rollout.colocated=true: rollout.engine={rollout.engine} has no servers that could share the trainer's GPUs; set "
            "rollout.engine=sglang, or rollout.colocated=false"
        ]
    sglang, problems = rollout.sglang, []
    for key, wrong, why, remedy in (
        ("rollout.ahead", rollout.ahead if rollout.ahead else None, "servers and trainer never work at the same time", "set it to 0"),
        ("eval.blocking", None if evaluation.blocking else "false", "nothing can be generated while a step trains", "set it to true"),
        (
            "rollout.lora_sync",
            "adapter" if rollout.lora_sync == "adapter" else None,
            "servers lose the frozen weights when they release their memory",
            "set it to merged",
        ),
        (
            "rollout.sglang.transport",
            "distributed" if sglang.resolved_transport == "distributed" else None,
            "NCCL does not join two processes on one GPU",
            "set it to tensor or cuda_ipc, with all servers on the trainer's host, or to disk",
        ),
        (
            "rollout.sglang.max_restarts",
            sglang.max_restarts or None,
            "a server that starts again would take memory in the trainer's turn",
            "set it to 0; a run without servers is saved and can be resumed",
        ),
        (
            "rollout.sglang.mem_fraction",
            "empty" if sglang.mem_fraction is None and sglang.device == "cuda" else None,
            "SGLang would take the memory that the trainer leaves free at that moment",
            "set it to the servers' share of the GPU; `ais-megatron plan` says whether it fits",
        ),
        (
            "rollout.sglang.servers",
            sglang.servers if sglang.servers and sglang.device == "cuda" else None,
            "a run that ends in the trainer's turn would leave them without memory for the next run",
            "leave it empty, so that the trainer starts its own",
        ),
        (
            "model.dtype",
            "fp32" if model.dtype == "fp32" and sglang.device == "cuda" else None,
            "the optimizer's parameters are then the model's own, and cannot be put away",
            "set it to bf16",
        ),
    ):
        if wrong is not None:
            problems.append(f"{key}={wrong}: not possible with rollout.colocated=true, because {why}; {remedy}, or rollout.colocated=false")
    return problems


def engine_problems(rollout: RolloutConfig, run: RunConfig, calibration: CalibrationConfig, arch: Architecture | None) -> list[str]:
    """Settings with which an SGLang server could not start or load the model."""
    if not rollout.engine_traits.has_servers:
        return []
    if arch is not None and arch.family.sglang_attention is None:
        return []  # another check says that the engine cannot have this family
    if rollout.quantization not in SGLANG_QUANTIZATIONS:
        return [
            f"rollout.quantization={rollout.quantization}: only the embedded engine emulates it; with rollout.engine=sglang use one of "
            f"{', '.join(SGLANG_QUANTIZATIONS)}, or set rollout.engine=local"
        ]
    if arch is None:
        return []
    sglang, problems = rollout.sglang, graph_problems(rollout.sglang, rollout.kv_cache_is_fp8)
    if rollout.shares_gpu_memory and run.backend == "cpu":
        problems.append("rollout.sglang.transport=cuda_ipc: run.backend=cpu has no CUDA memory to share; set rollout.sglang.transport=auto")
    if sglang.startup_timeout_s >= run.timeout_minutes * 60:
        problems.append(
            f"rollout.sglang.startup_timeout_s={sglang.startup_timeout_s:g}: must be shorter than "
            f"run.timeout_minutes={run.timeout_minutes:g}, because all other ranks wait that long at most while rank 0 waits for the "
            "servers; lower the first or raise the second"
        )
    if arch.num_attention_heads % sglang.tp:
        problems.append(f"rollout.sglang.tp={sglang.tp}: does not divide model.architecture.num_attention_heads={arch.num_attention_heads}")
    if arch.is_moe and arch.num_experts % sglang.ep:
        problems.append(f"rollout.sglang.ep={sglang.ep}: does not divide model.architecture.num_experts={arch.num_experts}")
    if not arch.is_moe and sglang.ep > 1:
        problems.append(f"rollout.sglang.ep={sglang.ep}: a dense model has no experts to spread; set rollout.sglang.ep=1")
    if rollout.quantization != "none" and (ragged := _ragged_shards(rollout.weight_block, arch, sglang.tp, sglang.ep)):
        smaller = [block for block in (64, 32) if block < rollout.weight_block and not _ragged_shards(block, arch, sglang.tp, sglang.ep)]
        works = [n for n in range(1, arch.num_attention_heads + 1) if arch.num_attention_heads % n == 0]
        works = [n for n in works if n >= sglang.ep and not _ragged_shards(rollout.weight_block, arch, n, sglang.ep)]
        remedies = [f"use one of {works}"] if works else []
        remedies += [f"set rollout.weight_block={smaller[0]}"] if smaller else []
        problems.append(
            f"rollout.sglang.tp={sglang.tp}: the shards of block-FP8 weights must be multiples of "
            f"rollout.weight_block={rollout.weight_block}, but {ragged[0]}; {', or '.join([*remedies, 'set rollout.quantization=none'])}"
        )
    if sglang.pause == "in_place" and rollout.kv_cache_is_fp8 and calibration.mode != "off":
        problems.append(
            "rollout.sglang.pause=in_place: would keep a KV cache that was quantised with the previous step's scales; set it to "
            "retract, or set rollout.kv_cache=bf16"
        )
    return problems


def _ragged_shards(block: int, arch: Architecture, tp: int, ep: int) -> list[str]:
    mlp, expert_mlp = (0, arch.moe_intermediate_size) if arch.is_moe else (arch.intermediate_size, 0)
    heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads
    return ragged_shards(block, tp, max(tp // ep, 1), heads, kv_heads, arch.head_dim, mlp, expert_mlp)


def _expert_problems(parallel: ParallelConfig, arch: Architecture, recompute: str) -> list[str]:
    """Requirements of expert parallelism. Megatron would fail on each of them later, with a less clear message."""
    if not arch.is_moe:
        return [
            f"parallel.{key}={size}: a dense model has no experts to spread; set parallel.{key}=1"
            for key, size in (("ep", parallel.ep), ("etp", parallel.etp))
            if size > 1
        ]
    problems = []
    if recompute == "full" and parallel.pp > 1:
        problems.append(
            f"model.recompute=full with parallel.pp={parallel.pp}: not supported for MoE models; set model.recompute=none or parallel.pp=1"
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        problems.append(f"parallel.tp={parallel.tp}: a MoE model needs parallel.sequence_parallel=true if parallel.tp > 1")
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
            "the number of ranks in one pipeline stage, over which the experts are spread"
        )
    return problems


def prompt_problems(task: TaskConfig, rollout: RolloutConfig, arch: Architecture | None) -> list[str]:
    """A limit of prompts that leaves too little room for a response."""
    if task.max_prompt_tokens is None or arch is None:
        return []
    room = arch.max_position_embeddings - rollout.max_response_tokens
    if 0 < room < task.max_prompt_tokens:  # batch_problems refuses a response that leaves no room at all
        return [
            f"task.max_prompt_tokens={task.max_prompt_tokens}: with rollout.max_response_tokens={rollout.max_response_tokens} this "
            f"exceeds model.architecture.max_position_embeddings={arch.max_position_embeddings}; allowed: 1 to {room}"
        ]
    return []


def batch_problems(rollout: RolloutConfig, train: TrainConfig, sft: SFTConfig, dp: int, arch: Architecture | None) -> list[str]:
    """Batches that cannot be divided evenly, and sequences that do not fit into the context."""
    problems = []
    if rollout.prompts_per_step % dp:
        problems.append(f"rollout.prompts_per_step={rollout.prompts_per_step}: must be a multiple of parallel.dp={dp}")
    if sft.steps and sft.batch_size % dp:
        problems.append(f"sft.batch_size={sft.batch_size}: must be a multiple of parallel.dp={dp}")
    responses = rollout.prompts_per_step * rollout.group_size // dp
    if responses % train.updates_per_batch:
        problems.append(
            f"train.updates_per_batch={train.updates_per_batch}: does not divide the {responses} responses of one data-parallel rank "
            f"(rollout.prompts_per_step * rollout.group_size / parallel.dp)"
        )
    elif train.balance and rollout.prompts_per_step // dp % train.updates_per_batch:
        problems.append(
            f"train.balance=true: train.updates_per_batch={train.updates_per_batch} does not divide the {rollout.prompts_per_step // dp} "
            "groups of one data-parallel rank (rollout.prompts_per_step / parallel.dp), so an update would have parts of groups; lower "
            "train.updates_per_batch, or set train.balance=false"
        )
    for key, optimizer, steps in (
        ("train", train.optimizer, train.steps * train.updates_per_batch),
        ("sft", sft.optimizer, sft.steps),
    ):
        if steps and optimizer.warmup_steps > steps:
            problems.append(
                f"{key}.optimizer.warmup_steps={optimizer.warmup_steps}: larger than the {steps} updates of {key}.steps; lower it"
            )
    if arch is not None and rollout.max_response_tokens >= arch.max_position_embeddings:
        problems.append(
            f"rollout.max_response_tokens={rollout.max_response_tokens}: leaves no room for a prompt within "
            f"model.architecture.max_position_embeddings={arch.max_position_embeddings}; lower it"
        )
    if rollout.return_routed_experts and arch is not None and not arch.is_moe:
        problems.append(
            f"rollout.return_routed_experts=true: model.architecture.model_type={arch.model_type} has no experts; "
            "set rollout.return_routed_experts=false"
        )
    return problems


def source_problems(model: ModelConfig, tokenizer: TokenizerConfig, task: TaskConfig) -> list[str]:
    """A model, a tokenizer or a task without its files."""
    problems = []
    if model.architecture is None:
        problems.append("model: no model is named; set model.path to a Hugging Face checkpoint folder, or describe model.architecture")
    if tokenizer.kind == "hf" and tokenizer.path is None and model.path is None:
        problems.append("tokenizer.kind=hf: set tokenizer.path (or model.path, whose tokenizer is then used)")
    problems += _template_problems(tokenizer, task, "task")
    builtin = BUILTIN_TASKS.get(task.name)
    if builtin is not None and builtin.needs_file and task.test_path is None:
        problems.append(f"task.name={task.name}: its problems come from files; set task.test_path (and task.train_path) to them")
    return problems


def _template_problems(tokenizer: TokenizerConfig, task: TaskConfig, section: str) -> list[str]:
    """Keys that need a chat template, with a tokenizer that has none."""
    if tokenizer.kind != "sentencepiece":
        return []
    settings = {"system_prompt": task.system_prompt, "template_kwargs": task.template_kwargs or None, "messages_key": task.messages_key}
    return [
        f"{section}.{key}={value!r}: needs a chat template, which tokenizer.kind=sentencepiece does not have; leave it out, or set "
        "tokenizer.kind=hf"
        for key, value in settings.items()
        if value is not None
    ]


def evaluation_problems(
    evaluation: EvalConfig, task: TaskConfig, rollout: RolloutConfig, tokenizer: TokenizerConfig, arch: Architecture | None
) -> list[str]:
    """Sets of problems that cannot be measured, and an engine that cannot do so beside the training."""
    problems = []
    if not evaluation.blocking and rollout.engine_traits.is_embedded:
        problems.append(
            f"eval.blocking=false: rollout.engine={rollout.engine} generates in the trainer's own ranks, so a step has to wait for it; set "
            "eval.blocking=true"
        )
    try:
        sets = evaluation_sets(evaluation, task, rollout.max_response_tokens)
    except ValueError as error:
        return [*problems, str(error)]
    for chosen in sets if evaluation.sets else []:  # (the one held-out set has only settings that are checked elsewhere)
        key, builtin = f"eval.sets.{chosen.name}", BUILTIN_TASKS.get(chosen.task.name)
        if builtin is not None and builtin.needs_file and chosen.task.test_path is None:
            problems.append(f"{key}.task: the problems of task.name={chosen.task.name} come from files; set {key}.task.test_path")
        if not _template_problems(tokenizer, task, "task"):  # otherwise the set may only have inherited them
            problems += _template_problems(tokenizer, chosen.task, f"{key}.task")
        if arch is not None and chosen.max_response_tokens >= arch.max_position_embeddings:
            problems.append(
                f"{key}.max_response_tokens={chosen.max_response_tokens}: leaves no room for a prompt within "
                f"model.architecture.max_position_embeddings={arch.max_position_embeddings}; lower it"
            )
    return problems
