"""What the tests run on the ranks of a virtual GPU machine, and again on CPU ranks to compare with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ais_megatron.batch import Batch, Prompt
from ais_megatron.config import Architecture, Config, build_config
from tests.helpers.engines import RECURRENT
from tests.helpers.policies import my_rows
from tests.helpers.runs import small, trained

TEMPERATURE = 1.3
DENSE: dict[str, Any] = {
    "vocab_size": 71,  # a prime: TP has to pad it
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
MOE = DENSE | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA = DENSE | {"model_type": "llama", "rope_scaling": {"original_max_position_embeddings": 32}, "tie_word_embeddings": True}
LLADA = DENSE | {"model_type": "llada", "num_key_value_heads": 4, "mask_token_id": 70}
QWEN35 = DENSE | RECURRENT | {"model_type": "qwen3_5", "num_hidden_layers": 4}
ARCHITECTURES = {"dense": DENSE, "moe": MOE, "llama": LLAMA, "qwen2": DENSE | {"model_type": "qwen2"}, "llada": LLADA, "qwen35": QWEN35}
# ranks, `parallel`, model.recompute
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "dense, one rank": (1, {}, "none"),
    "moe, one rank": (1, {}, "none"),
    "dense, TP2 x PP2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, "full"),
    "moe, TP2 x EP2": (4, {"tp": 2, "ep": 2, "sequence_parallel": True}, "none"),
}
# Of the other families, where a layout adds something: a stretched and tied model over stages, biases under sequence parallelism.
FAMILY_LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "llama, PP2": (2, {"pp": 2}, "none"),
    "qwen2, TP2": (2, {"tp": 2, "sequence_parallel": True}, "none"),
}
# Rows that are joined, or whose tokens several ranks share.
PACKED_LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "dense, packed TP2 x CP2": (4, {"tp": 2, "cp": 2, "sequence_parallel": True}, "none"),
    "dense, CP2": (2, {"cp": 2}, "none"),
    "moe, packed EP2": (2, {"ep": 2}, "full"),
}
# A masked diffusion model, and layers with a gated delta rule beside layers with attention.
UNLIKE_LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "llada, one rank": (1, {}, "none"),
    "llada, TP2 x PP2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, "full"),
    "qwen35, one rank": (1, {}, "none"),
    "qwen35, TP2 x PP2": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, "full"),
}
ALL_LAYOUTS = LAYOUTS | FAMILY_LAYOUTS | UNLIKE_LAYOUTS
TRAINED_LAYOUTS = ALL_LAYOUTS | PACKED_LAYOUTS


# Each row is a group of its own, so that ranks may share six rows as they like.
SINGLE = {"rollout": {"group_size": 1, "return_routed_experts": False}, "objective": {"advantages": "reward", "dynamic_sampling": False}}


def config_of(layout: str, **sections: Any) -> Config:
    kind, (_, parallel, recompute) = layout.split(",")[0], TRAINED_LAYOUTS[layout]
    model = {"architecture": ARCHITECTURES[kind], "dtype": "fp32", "recompute": recompute}
    # Two rows of 128 columns for each rank, as they are on a GPU, or two or three that are packed: several microbatches, but few.
    budget = 40 if "packed" in layout else 256
    data = {
        "model": model,
        "parallel": parallel,
        "rollout": {"max_response_tokens": 20, "temperature": TEMPERATURE, "quantization": "fp8_e4m3", "prompts_per_step": 4},
        "train": {"tokens_per_microbatch": budget, "logprob_chunk_tokens": 7, "packing": "packed" in layout},
        "objective": {"kl_coefficient": 0.01},
        "diffusion": {"block_length": 20, "steps": 5} if kind == "llada" else {},
    }
    for name, changes in sections.items():
        data[name] = data.get(name, {}) | changes if isinstance(changes, dict) else changes
    return build_config(data)


def batch_of(config: Config) -> Batch:
    """Six rows of different lengths; a MoE model's with what an engine might have routed, at a few tokens nothing. A diffusion model reads
    masks in place of the tokens in the loss, and of a token before them."""
    architecture, generator = config.architecture, torch.Generator().manual_seed(1)
    lengths = torch.tensor([17, 9, 12, 17, 5, 14])
    columns = torch.arange(17)
    real = columns < lengths[:, None]
    routes = None
    if architecture.is_moe:
        shape = (6, 17, architecture.num_hidden_layers)
        routes = torch.stack([torch.randint(0, 2, shape, generator=generator), torch.randint(2, 4, shape, generator=generator)], -1).int()
        routes[:, 3] = -1
    tokens = torch.randint(0, architecture.vocab_size, (6, 17), generator=generator) * real
    diffusion = architecture.family.is_diffusion
    return Batch(
        tokens=tokens,
        inputs=tokens.masked_fill(real & ((columns >= 3) | (columns == 1)), architecture.mask_token_id) if diffusion else None,
        repeats=torch.tensor([1, 2, 1, 3, 1, 1]) if diffusion else None,
        loss_mask=real & (columns >= 3),
        lengths=lengths,
        rollout_logprobs=torch.zeros(6, 17),
        advantages=torch.randn(6, generator=generator),
        rewards=torch.zeros(6),
        routed_experts=routes,
    )


def write_weights(folder: Path, kind: str) -> Path:
    """A Hugging Face folder of random weights: initialisation differs between devices and layouts, but this is the same everywhere."""
    from safetensors.torch import save_file

    from ais_megatron.models.family import tensors_of

    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, shape, _ in tensors_of(Architecture(**ARCHITECTURES[kind])):
        noise = 0.05 * torch.randn(shape, generator=generator)
        tensors[name] = noise + 1.0 if len(shape) == 1 and not name.endswith("bias") else noise
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def policy_of(config: Config, weights: Path):  # noqa: ANN201
    from ais_megatron.policy.parallel import initialize_parallel

    initialize_parallel(config)
    return another_policy(config, weights)


def another_policy(config: Config, weights: Path | None):  # noqa: ANN201
    """A further policy, in the groups of the first."""
    from ais_megatron.policy.policy import Policy

    return Policy(config, config.train.optimizer, 10, TEMPERATURE, None if weights is None else str(weights))


def libraries(rank: int, weights: Path) -> tuple[str, str]:
    """Megatron's version, and the class of the policy's first linear layer."""
    import megatron.core

    policy = policy_of(config_of("dense, one rank"), weights)
    return megatron.core.__version__, type(policy.model.decoder.layers[0].self_attention.linear_qkv).__name__


def off_policy(policy, rows: Batch) -> Batch:  # noqa: ANN001
    """The rows with rollout log-probabilities a little off the policy's."""
    generator = torch.Generator().manual_seed(2)
    wobble = 0.2 * torch.randn(rows.tokens.shape, generator=generator)
    return replace(rows, rollout_logprobs=(policy.logprobs(rows) + wobble) * rows.loss_mask)


def fp8_on_gpus() -> dict[str, Any]:
    """The section `policy` for Transformer Engine's FP8; on CPU ranks the default, because the stand-ins compute in plain precision."""
    from ais_megatron.distributed import device

    return {"forward_precision": "fp8_te" if device().type == "cuda" else "bf16"}


def delta_rules_of_fla(rank: int, layout: str, weights: Path) -> Counter[tuple[int, int, torch.dtype]]:
    """How FLA was called for log-probabilities."""
    from tests.virtual_cuda.flash_linear_attention import CALLS

    policy = policy_of(config_of(layout), weights)
    CALLS.clear()
    policy.logprobs(my_rows(batch_of(policy.config))[0])
    return Counter(CALLS)


def products_in_fp8(rank: int, layout: str, weights: Path) -> list[Counter[tuple[str, str | None, bool]]]:
    """What Transformer Engine multiplied for log-probabilities, and for an update."""
    from tests.virtual_cuda.transformer_engine import PRODUCTS

    policy = policy_of(config_of(layout, policy=fp8_on_gpus()), weights)
    rows, seen = my_rows(batch_of(policy.config))[0], []
    for run in (policy.logprobs, policy.sft_step):
        PRODUCTS.clear()
        run(rows)
        seen.append(Counter(PRODUCTS))
    return seen


def training(rank: int, layout: str, weights: Path, fp8: bool = False, lora: int = 0, aligned: str = "") -> dict[str, Any]:
    """Every kind of pass and update; returns numbers that do not depend on the device. lora: the rank of its factors. aligned: the
    `policy.forward_precision` of an aligned forward pass."""
    from ais_megatron.algorithm.ais import AISState
    from ais_megatron.runs.metrics import PhaseTimer
    from ais_megatron.update import lagged_update, update

    replay = layout.startswith("moe")
    options: dict[str, Any] = {"moe": {"routing_replay": True, "z_coefficient": 1e-3}} if replay else {}
    options |= SINGLE | {"rollout": SINGLE["rollout"] | {"return_routed_experts": replay}}
    if lora:
        options |= {"policy": {"lora": {"rank": lora}}, "sft": {"steps": 1}, "train": {"optimizer": {"lr": 1e-2, "warmup_steps": 0}}}
    if fp8:
        options["policy"] = options.get("policy", {}) | fp8_on_gpus()
    if aligned:
        options["policy"] = options.get("policy", {}) | {"forward_precision": aligned}
    config = config_of(layout, calibration={"mode": "fresh"}, **options)
    policy = policy_of(config, weights)
    rows, _ = my_rows(batch_of(config))
    result: dict[str, Any] = {"sft": policy.sft_step(rows)}
    logprobs, lagged = policy.logprobs_and_calibration(rows)
    assert logprobs.device.type == "cpu" and logprobs.dtype is torch.float32
    result["logprobs"] = logprobs * rows.loss_mask
    result["lagged scales"], result["fresh scales"] = lagged.scales.k_amax, policy.calibrate(rows).scales.v_amax
    result["reference"] = policy.reference_logprobs(rows) * rows.loss_mask
    rows = off_policy(policy, rows)
    outcome = update(policy, rows, AISState(), PhaseTimer(None))
    result["update"], result["alpha"] = outcome.metrics, outcome.alpha
    outcome = lagged_update(policy, rows, outcome.state, PhaseTimer(None))
    result["lagged update"], result["lagged D"] = outcome.metrics, outcome.diagnostics.divergence_severity
    return result


def objectives(rank: int, layout: str, weights: Path, names: list[tuple[str, str]]) -> dict[str, float]:
    """An update with each pair of objective and correction; returns its gradient's norm."""
    from ais_megatron.algorithm.ais import AISState
    from ais_megatron.runs.metrics import PhaseTimer
    from ais_megatron.update import update

    policy = policy_of(config_of(layout), weights)
    rows = off_policy(policy, my_rows(batch_of(policy.config))[0])
    norms = {}
    for objective, correction in names:
        wish = SINGLE["objective"] | {"name": objective}
        policy.config = config_of(
            layout, rollout=SINGLE["rollout"], objective=wish, correction=correction, train={"optimizer": {"lr": 1e-9}}
        )
        norms[f"{objective}/{correction}"] = update(policy, rows, AISState(), PhaseTimer(None)).metrics["grad_norm"]
    return norms


def checkpoints(rank: int, layout: str, weights: Path, folder: Path, fp8: bool = False) -> list[float]:
    """Saved as a whole and in the background, loaded into another policy; returns the largest difference of the weights after
    the next update, for each way of saving."""
    from ais_megatron.config import CheckpointConfig
    from ais_megatron.policy import checkpoint
    from ais_megatron.policy.saver import Saver, checkpoint_to_resume
    from ais_megatron.policy.training_state import TrainingState

    config, differences = config_of(layout, policy=fp8_on_gpus() if fp8 else {}), []
    saved = policy_of(config, weights)
    other = another_policy(config, None)
    rows, _ = my_rows(batch_of(config))
    saved.sft_step(rows)
    saved.logprobs_and_calibration(rows)  # a MoE model's balance is part of the state
    for in_background in (False, True):
        options = CheckpointConfig(async_save=in_background)
        where = folder / f"background-{in_background}"
        saver = Saver(saved, where, options, None, add_files=lambda folder: None)
        saver.save(TrainingState(step=1))
        saver.finish()
        state = checkpoint.load(other, checkpoint_to_resume(where, options), with_optimizer=True)
        assert state.step == 1
        saved.sft_step(rows)
        other.sft_step(rows)
        pairs = zip(saved.model.parameters(), other.model.parameters(), strict=True)
        differences.append(max(float((a - b).abs().max()) for a, b in pairs))
    return differences


def turns(rank: int, layout: str, weights: Path) -> float:
    """A policy that puts gradients and optimizer state away between updates, beside one that does not; returns the largest difference of
    their weights."""
    config = config_of(layout, model={"dtype": "bf16"})
    steady = policy_of(config, weights)
    resting = another_policy(config, weights)
    rows, _ = my_rows(batch_of(config))
    parts = resting.optimizer.chained_optimizers
    for number in range(3):
        if number:  # (a policy also rests before its first update, when there are no moments yet)
            steady.sft_step(rows)
            resting.sft_step(rows)
        logprobs = resting.logprobs(rows)
        resting.rest()
        held = [t for p in parts for group in p.optimizer.param_groups for t in group["params"]]
        held += [t for p in parts for own in p.optimizer.state.values() for t in own.values() if isinstance(t, torch.Tensor)]
        assert {t.device.type for t in held} == {"cpu"}
        buffers = resting.ddp.buffers + resting.ddp.expert_parallel_buffers
        assert {b.grad_data.untyped_storage().size() for b in buffers} == {0}
        assert torch.equal(resting.logprobs(rows), logprobs), "weights can be used meanwhile"
        resting.wake()
        assert all(t.device.type == "cuda" for p in parts for group in p.optimizer.param_groups for t in group["params"])
    steady.sft_step(rows)
    resting.sft_step(rows)
    pairs = zip(steady.model.parameters(), resting.model.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def engine_and_files(rank: int, layout: str, weights: Path, folder: Path) -> dict[str, Any]:
    """Weights to a server's bucket, to the embedded engine, and through a Hugging Face folder into a new policy."""
    from ais_megatron.distributed import device
    from ais_megatron.policy.hf_export import save_hf
    from ais_megatron.rollout.engine import SamplingParams
    from ais_megatron.rollout.local.engine import LocalEngine
    from ais_megatron.rollout.manifest import Manifest
    from ais_megatron.rollout.sglang.transport import FlatBucket
    from ais_megatron.session import denoising
    from ais_megatron.weight_sync import weight_stream

    config = config_of(layout)
    policy = policy_of(config, weights)
    rows, _ = my_rows(batch_of(config))
    scales = policy.logprobs_and_calibration(rows)[1].scales
    for_server = config.rollout.model_copy(update={"engine": "sglang"})
    manifest, num_bytes = Manifest.of(config.architecture, for_server, torch.float32), 0
    if not config.architecture.family.is_diffusion:  # which SGLang does not serve
        manifest.begin()
        for bucket in weight_stream(policy, for_server, scales):
            for name, tensor in bucket:
                manifest.take(name, tensor)
            flat = FlatBucket.of(bucket)
            flat.copy_into(torch.empty(flat.nbytes, dtype=torch.uint8, device=device()))
            num_bytes += flat.nbytes
        manifest.check_complete()
    engine = LocalEngine(config.architecture, config.rollout, eos_ids=(1,), pad_id=0, device=device(), dtype=torch.float32)
    engine.update_weights(weight_stream(policy, config.rollout, scales), 0)
    prompts = [Prompt(i, "", tuple(range(3, 8 + i)), {}) for i in range(3)]
    tokens = config.diffusion.block_length if config.architecture.family.is_diffusion else 6
    rollouts = engine.generate(prompts, SamplingParams(2, tokens, TEMPERATURE, seed=3, denoising=denoising(config, num_views=1)))
    folder /= device().type
    save_hf(policy.export_buckets(2**15), config.architecture, "fp32", folder)
    torch.distributed.all_reduce(torch.zeros(1, device=device()))  # rank 0 has written
    loaded = another_policy(config, folder)
    written, read = ({name: t.clone() for bucket in p.export_buckets(2**15) for name, t in bucket} for p in (policy, loaded))
    same = written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in written)
    return {
        "bytes for a server": num_bytes,
        "responses": torch.tensor([token for r in rollouts for token in r.token_ids]),
        "logprobs": torch.tensor([v for r in rollouts for v in r.rollout_logprobs]),
        "read back": same,
    }


def whole_run(rank: int, layout: str, folder: Path, ahead: int) -> list[dict[str, Any]]:
    """`train` for two steps, with warm start, checkpoint and evaluation; returns its rows on the first rank."""
    from ais_megatron.runs.metrics import read_metrics

    kind, (_, parallel, recompute) = layout.split(",")[0], LAYOUTS[layout]
    data = small(folder)
    architecture = data["model"]["architecture"]
    if kind == "moe":
        architecture |= {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    data["parallel"] = parallel
    data["model"] = {"architecture": architecture, "recompute": recompute}
    data["train"] |= {"steps": 2}
    data["rollout"] |= {"ahead": ahead, "return_routed_experts": kind == "moe"}
    data["moe"] = {"routing_replay": kind == "moe"}
    data["checkpoint"] = {"every": 1, "async_save": True}
    run_dir = trained(rank, build_config(data))
    return read_metrics(run_dir) if rank == 0 else []


def met(rank: int, fault: Callable[..., object], **arguments: Any) -> str:
    """What went wrong. (An error that left the rank would cost a new pool of them.)"""
    try:
        fault(**arguments)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fault_in_a_cat() -> None:
    """What killed every first forward pass: an empty CPU tensor beside CUDA ones."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cat([torch.zeros(0), torch.ones(2, device=device)])


def fault_in_a_collective() -> None:
    torch.distributed.all_reduce(torch.ones(2))


def fault_in_a_forward_pass(weights: Path) -> None:
    """The same where it stood: in what the log-probability pass returned to Megatron's schedule."""
    policy = policy_of(config_of("dense, one rank"), weights)
    with torch.no_grad():
        policy._run(batch_of(policy.config), lambda rows, index, logprobs, *_: (logprobs.sum(), rows.loss_mask.sum(), torch.zeros(0)), True)


def fault_in_a_backward_pass() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.full((3,), 2.0)

    Doubled.apply(torch.ones(3, device="cuda", requires_grad=True)).sum().backward()


def fault_in_a_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: torch.ones(2, device="cuda") + torch.ones(2)).result()


def fault_in_an_index() -> None:
    torch.zeros(3)[torch.zeros(2, dtype=torch.int64, device="cuda")]


def no_fault(rank: int) -> list[str]:
    """What CUDA allows: numbers and indices from the CPU, copies between devices. Returns the devices of the results."""
    x = torch.arange(4.0, device="cuda")
    results = [x + torch.tensor(1.0), x[torch.tensor([0, 2])], torch.zeros(4).copy_(x), x.cpu() + torch.ones(4), x.new_tensor([1.0])]
    return [str(result.device) for result in results]
