"""The plan against numbers by hand, and what it refuses. For bytes of real ranks see test_memory.py."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ais_megatron.config import ConfigError, load_config
from ais_megatron.planning.batches import Microbatching, microbatch_tokens, microbatching
from ais_megatron.planning.cost import GIB, Assumptions, forward_flops, servers_of, step_time, sync_bytes
from ais_megatron.planning.engine import engine_bytes, kv_bytes_per_token, pushed_bytes
from ais_megatron.planning.parameters import rank_counts, total_parameters
from ais_megatron.planning.plan import make_plan, suggest, with_gpus
from ais_megatron.planning.recurrent import state_bytes
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"
DENSE, MOE, TINY = (CONFIGS / f"{name}.yaml" for name in ("qwen3_8b_ais", "qwen3_30b_a3b_ais", "tiny_countdown"))


def test_copies_of_an_aligned_forward_pass_by_hand() -> None:
    """On CUDA they have two bytes per quantised weight, whether LoRA trains the layer or not, and they last."""
    aligned = ["policy.forward_precision=fp8_aligned", "model.transformer_impl=local"]
    plain, full, lora = (
        with_gpus(load_config(DENSE, [*extra]), 8)
        for extra in ([], aligned, [*aligned, "policy.lora.rank=8", "policy.lora.targets=[v_proj]", "sft.steps=1"])
    )
    quantized = 36 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    for config in (full, lora):
        memory = make_plan(config, Assumptions()).ranks[0]
        assert memory.aligned == 2 * quantized // config.parallel.tp
        assert memory.lasting == memory.weights + memory.gradients + memory.optimizer + memory.aligned
        assert memory.allocated["logprobs"] >= memory.lasting + 22 * 4096 * 12288 // 4  # while the largest matrix is quantised
    before, after = (make_plan(config, Assumptions()).ranks[0] for config in (plain, full))
    assert before.aligned == before.refresh == 0 and after.lasting - before.lasting == after.aligned
    norms = 2 * (2 * 4096 + 4096 + 1024)  # what a layer's norms save once more for each token, on four ranks
    assert after.activations - before.activations == 16384 * (36 * norms + 2 * 4096) // 4
    assert make_plan(with_gpus(load_config(MOE, aligned), 16), Assumptions()).ranks[0].aligned == 2 * 48 * (
        (2 * 2048 * 4096 + 2 * 2048 * 512) // 2 + 128 // 8 * 3 * 2048 * 768
    )


def test_qwen3_8b_by_hand() -> None:
    config = with_gpus(load_config(DENSE, ["parallel.pp=2", "model.recompute=full"]), None)
    a = config.architecture
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    assert total_parameters(a) == 36 * layer + 2 * 151936 * 4096 + 4096
    first, last = make_plan(config, Assumptions()).ranks
    assert first.gradients == 2 * first.weights and first.optimizer == 6 * first.weights  # DP 1: nothing to share
    # Recomputing: 18 layers' inputs over 4 ranks of the sequence, for the two microbatches that stage 0 holds, and one layer.
    inputs = 2 * 18 * 16384 * 4096 * 2 // 4
    assert inputs < first.activations < inputs + 3 * GIB
    assert last.logits == 2 * 2 * 37984 * 16384 + 4 * 4 * 2048 * 37984
    assert kv_bytes_per_token(config) == 36 * 2 * 8 * 128  # FP8
    assert sync_bytes(config).broadcast == total_parameters(a)  # half of it, two bytes each
    assert forward_flops(a, 1, 1000) == 1000 * (2 * (36 * layer + 151936 * 4096) + 2 * 36 * 4096 * 1000)


def test_an_engine_keeps_one_state_for_each_response_and_keys_of_few_layers() -> None:
    """By hand, for the tiny Qwen3.5: three layers with 4 states of 32 x 32 and BF16 inputs of 256 channels, and one layer with a cache."""
    config = load_config(CONFIGS / "tiny_qwen35_countdown.yaml")
    assert state_bytes(config) == 3 * (4 * 4 * 32 * 32 + 2 * 256 * 3)
    assert kv_bytes_per_token(config, cuda=False) == 1 * 2 * 2 * 32 * 4
    memory = make_plan(with_gpus(config, 2), Assumptions(prompt_tokens=20, response_tokens=10)).ranks[0]
    assert memory.kv_cache == 128 * (30 * 512 + state_bytes(config))


def test_lora_keeps_gradients_and_moments_of_the_factors_only() -> None:
    whole, lora = (with_gpus(load_config(DENSE, ["policy.lora.rank=64", "sft.steps=1"][: 2 * n]), None) for n in (0, 1))
    tp, layers = lora.parallel.tp, 36 // lora.parallel.pp
    q, kv, mlp, hidden = 4096, 1024, 12288, 4096
    columns = 3 * hidden + (q + 2 * kv) // tp + 2 * (hidden + mlp // tp)  # A whole, B split
    rows = q // tp + hidden + mlp // tp + hidden  # A split, B whole
    first, before = make_plan(lora, Assumptions()).ranks[0], make_plan(whole, Assumptions()).ranks[0]
    assert first.gradients == 4 * layers * 64 * (columns + rows)
    assert first.weights == before.weights + first.gradients // 2
    assert first.optimizer == 12 * -(-layers * 64 * (columns + rows) // lora.parallel.dp)
    assert first.peak < before.peak


def test_a_sync_of_factors_leaves_out_the_frozen_weights() -> None:
    lora = ["policy.lora.rank=16", "sft.steps=1", "policy.lora.targets=[k_proj]", "parallel.tp=4", "parallel.pp=2"]
    merged, adapter = (with_gpus(load_config(DENSE, [*lora, f"rollout.lora_sync={sync}"]), 8) for sync in ("merged", "adapter"))
    factors = 2 * 36 * 16 * ((4096 + 4096) + 2 * (4096 + 1024))  # SGLang's layer also gets factors for Q and V, which are zero
    sync = sync_bytes(adapter)
    assert (sync.gathered, sync.broadcast, sync.pushed, sync.buckets) == (factors * 3 // 8, factors // 2, 4 * factors // 3, 1)
    assert engine_bytes(adapter) == engine_bytes(merged) + 3 * factors


def test_data_parallelism_shares_the_optimizer_and_experts_have_their_own() -> None:
    layout = ["parallel.tp=4", "parallel.pp=2", "model.recompute=none"]
    config = with_gpus(load_config(MOE, layout), 32)
    assert config.parallel.dp == 4
    counts = rank_counts(config.architecture, config.parallel, 0)
    memory = make_plan(config, Assumptions()).ranks[0]
    assert memory.optimizer == 12 * (counts.dense // 4 + counts.expert // 2)  # 16 ranks of a stage hold 8 sets of experts twice
    assert with_gpus(load_config(MOE, layout), None).parallel.dp == 2  # the fewest over which 8 sets of experts fit


def test_fp8_halves_what_is_pushed_and_what_servers_hold() -> None:
    fp8, bf16 = (with_gpus(load_config(DENSE, [f"rollout.quantization={q}"]), None) for q in ("fp8_e4m3", "none"))
    assert 0.5 < pushed_bytes(fp8) / pushed_bytes(bf16) < 0.6  # embedding and head stay BF16
    assert engine_bytes(fp8, 2) == -(-pushed_bytes(fp8) // 2)
    tokens = [servers_of(c, Assumptions(rollout_gpus=8)).kv_tokens for c in (fp8, bf16)]
    assert tokens[0] > 2 * tokens[1]
    assert step_time(fp8, Assumptions(rollout_gpus=8)).generate < step_time(bf16, Assumptions(rollout_gpus=8)).generate


def test_embedded_engine_holds_a_second_dequantised_copy() -> None:
    config = with_gpus(load_config(TINY, ["rollout.quantization=fp8_e4m3"]), None)
    assert engine_bytes(config) > 4 * total_parameters(config.architecture)
    assert make_plan(config, Assumptions()).ranks[0].engine_weights == engine_bytes(config)


def test_refusals_name_the_limit_and_suggestions_fit() -> None:
    assumed = Assumptions(rollout_gpus=8)
    plan = make_plan(with_gpus(load_config(DENSE, ["parallel.tp=1", "parallel.pp=1", "parallel.sequence_parallel=false"]), None), assumed)
    (problem,) = plan.problems
    assert "--gpu-memory-gib 80" in problem and "phase train" in problem and "parallel.tp=1" in problem
    assert suggest(plan.config, assumed, 1) == []
    found = suggest(plan.config, assumed, 8)
    assert len(found) == 5 and all(p.gpus == 8 and not p.problems and p.peak * 1.15 <= 77 * GIB for p in found)
    shown = [float(f"{p.time.total:.3g}") for p in found]
    assert shown == sorted(shown)
    small = with_gpus(load_config(DENSE, ["parallel.pp=2", "model.recompute=full"]), None)
    assert make_plan(small, Assumptions(gpu_memory_gib=30.0, rollout_gpus=8)).problems == []  # 23 GiB and 15 % of them, 3 in reserve
    (problem,) = make_plan(small, Assumptions(gpu_memory_gib=29.0, rollout_gpus=8)).problems
    assert "with --margin 0.15 26.8" in problem and "less --reserve-gib 3 is 26" in problem
    assert make_plan(small, Assumptions(gpu_memory_gib=29.0, rollout_gpus=8, margin=0.0)).problems == []
    tight = make_plan(with_gpus(load_config(DENSE, ["rollout.sglang.mem_fraction=0.1"]), 8), assumed).problems
    assert len(tight) == 1 and "rollout.sglang.tp=1 mem_fraction=0.1" in tight[0] and "KV cache of 0 tokens" in tight[0]


def test_colocated_servers_take_turns_with_the_trainer() -> None:
    """On a card of 80 GiB a server has 0.4 of them in its turn, and in the trainer's what 3 GiB of reserve stand for."""
    turns = ["rollout.ahead=0", "rollout.colocated=true", "rollout.sglang.max_restarts=0", "rollout.sglang.transport=tensor"]
    fraction = "rollout.sglang.mem_fraction="
    assumed = Assumptions(rollout_gpus=8)
    apart, colocated = (
        make_plan(with_gpus(load_config(DENSE, ["rollout.ahead=0", *keys]), 8), assumed).ranks[0]
        for keys in ([], [*turns, f"{fraction}0.4"])
    )
    away = apart.gradients + apart.optimizer
    assert away > 10 * GIB and colocated.allocated["train"] == apart.allocated["train"]
    assert [apart.allocated[phase] - colocated.allocated[phase] for phase in ("generate", "sync", "train")] == [away, away, 0]
    beside = {phase: size - colocated.allocated[phase] * (1 + colocated.fragmentation) for phase, size in colocated.phases.items()}
    workspaces = colocated.workspaces
    assert beside["generate"] == pytest.approx(32 * GIB + workspaces, abs=2) and beside["train"] == pytest.approx(
        3 * GIB + workspaces, abs=2
    )
    by_handles = make_plan(with_gpus(load_config(DENSE, [*turns[:3], "rollout.sglang.transport=cuda_ipc", f"{fraction}0.4"]), 8), assumed)
    contexts = [by_handles.ranks[0].phases[phase] - colocated.phases[phase] for phase in ("generate", "train")]
    assert contexts == [GIB // 2, GIB // 2], "rank 0 has a context on each GPU"

    (problem,) = make_plan(with_gpus(load_config(DENSE, [*turns, f"{fraction}0.85"]), 8), assumed).problems
    words = re.search(
        r"in phase (\w+) .* 77\. ([\d.]+) GiB are missing\. Lower rollout.sglang.mem_fraction=0.85 by at least ([\d.]+)", problem
    )
    assert words is not None, problem
    worst = make_plan(with_gpus(load_config(DENSE, [*turns, f"{fraction}0.85"]), 8), assumed).ranks[0]
    missing = 1.15 * max(worst.phases["generate"], worst.phases["sync"]) / GIB - 77
    assert words[1] == "sync" and float(words[2]) == pytest.approx(missing, abs=0.05) and float(words[3]) >= missing / 80 - 0.005
    smaller = 0.85 - float(words[3]) - 0.01
    assert make_plan(with_gpus(load_config(DENSE, [*turns, f"{fraction}{smaller:.2f}"]), 8), assumed).problems == []


# GPUs that train and that generate, as the sbatch files ask for nodes of 8
SHIPPED = {"qwen3_8b_ais": (8, 8), "qwen3_30b_a3b_ais": (16, 16)}


def nodes_of(sbatch: Path) -> tuple[int, int]:
    """(trainer, rollout) nodes that a job file asks for."""
    text = sbatch.read_text()
    trainers = int(re.search(r"AIS_TRAINER_NODES:-(\d+)", text)[1])
    return trainers, int(re.search(r"--nodes=(\d+)$", text, re.M)[1]) - trainers


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_layouts_are_the_fastest_that_fit(name: str) -> None:
    gpus, rollout_gpus = SHIPPED[name]
    assert nodes_of(ROOT / "slurm" / f"{name}.sbatch") == (gpus // 8, rollout_gpus // 8)
    assumed = Assumptions(rollout_gpus=rollout_gpus)
    plan = make_plan(with_gpus(load_config(CONFIGS / f"{name}.yaml"), gpus), assumed)
    assert plan.problems == [] and plan.peak * 1.15 <= 77 * GIB
    assert (plan.config.rollout.ahead, plan.config.run.backend) == (1, "cuda")
    fastest = suggest(plan.config, assumed, gpus)
    assert plan.time.total <= 1.02 * min(p.time.total for p in fastest)
    assert plan.time.trainer <= 1.02 * fastest[0].time.trainer, "where generation decides, the trainer has the most slack"


def test_every_line_of_the_scaling_grid_fits() -> None:
    lines = [line.split("\t") for line in (ROOT / "slurm" / "scaling_grid.tsv").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 10
    for _, name, trainers, rollouts, overrides in lines:
        config = with_gpus(load_config(DENSE, overrides.split()), 8 * int(trainers))
        assert make_plan(config, Assumptions(rollout_gpus=8 * int(rollouts))).problems == [], name


def test_microbatches_are_rounded_on_cuda_and_a_long_row_is_one() -> None:
    """1024 responses over two ranks; 16384 tokens hold three rows of 4352, on CUDA of 4225 tokens too."""
    config = with_gpus(load_config(DENSE), 8)
    assert microbatching(config, 4225, cuda=True) == Microbatching(count=171, rows=3, width=4352, computed=512)
    assert microbatching(config, 300, cuda=True) == Microbatching(count=16, rows=32, width=384, computed=512)
    assert microbatching(config, 300, cuda=False) == Microbatching(count=10, rows=54, width=300, computed=512)
    assert microbatching(config, 4000, cuda=True).rows == 4
    assert microbatch_tokens(config, 16000, cuda=True) == 16384
    assert microbatch_tokens(config, 20001, cuda=True) == 20096  # 157 x 128
    assert microbatch_tokens(config, 20001, cuda=False) == 20001
    budgets = (load_config(DENSE, [f"train.tokens_per_microbatch={budget}"]) for budget in (2048, 4352))
    memories = [make_plan(with_gpus(config, 8), Assumptions()).ranks[0] for config in budgets]
    assert memories[0].activations == memories[1].activations, "one row of 4352 either way"


def test_packed_rows_are_not_rounded() -> None:
    config = with_gpus(load_config(DENSE, ["train.packing=true"]), 8)
    assert microbatching(config, 4225, cuda=True) == Microbatching(count=171, rows=3, width=4225, computed=512)
    assert microbatching(config, 300, cuda=True) == Microbatching(count=10, rows=54, width=300, computed=512)
    padded = with_gpus(load_config(DENSE), 8)
    short = Assumptions(prompt_tokens=100, response_tokens=200)
    ratio = make_plan(config, short).time.train / make_plan(padded, short).time.train
    assert 0.75 < ratio < 0.82, "300 tokens instead of 384"


def test_context_parallel_ranks_have_their_part_of_a_row() -> None:
    """A row of 33024 tokens on four ranks, in chunks of 4128; a rank's part is rounded to 65 x 128 tokens."""
    layout = ["parallel.tp=2", "parallel.pp=2", "parallel.cp=4", "rollout.max_response_tokens=32768", "model.recompute=full"]
    config = with_gpus(load_config(DENSE, layout), 16)
    assert microbatch_tokens(config, 33024, cuda=True) == 16384, "less than a microbatch may have"
    assert microbatch_tokens(with_gpus(load_config(DENSE, [*layout, "parallel.cp=1"]), 16), 33024, cuda=True) == 33024
    assert microbatching(config, 33024, cuda=True) == Microbatching(count=1024, rows=1, width=33280, computed=1024)
    one, four = (make_plan(with_gpus(load_config(DENSE, [*layout, f"parallel.cp={cp}"]), 16), Assumptions()).ranks[0] for cp in (1, 4))
    assert one.activations * 0.45 < four.activations < one.activations * 0.55
    assert four.weights == one.weights and four.optimizer == one.optimizer, "both are spread over dp * cp ranks"
    for plan in suggest(config, Assumptions(rollout_gpus=8), 16):
        assert plan.config.parallel.cp == 4 and plan.gpus == 16


def test_responses_of_32k_tokens() -> None:
    """A row has 256 + 32768 tokens, twice the budget of a microbatch. A token has 36 layers x 2 x 8 heads x 128 bytes of KV cache."""
    long = ["rollout.max_response_tokens=32768"]
    eight = Assumptions(rollout_gpus=8)
    config = with_gpus(load_config(DENSE, [*long, "model.recompute=full"]), 8)
    plan = make_plan(config, eight)
    assert not plan.problems
    assert microbatching(config, 33024, cuda=True) == Microbatching(count=512, rows=1, width=33024, computed=512)
    vocabulary = 151936 // 4
    assert plan.ranks[0].logits == 2 * 2 * 33024 * vocabulary + 4 * 4 * 2048 * vocabulary
    assert plan.servers.kv_per_token == 73728
    assert plan.servers.kv_tokens == (int(80 * GIB * 0.85) - plan.servers.weights) // 73728
    assert plan.servers.concurrency == plan.servers.kv_tokens // 33024 == 26
    waves, step = 5, 26 * (256 + 16384) * 73728 / (3350e9 * 0.6)  # 1024 responses on 8 servers; seconds to read the KV cache
    assert waves * 32768 * step < plan.time.generate < 1.5 * waves * 32768 * step
    (problem,) = make_plan(with_gpus(load_config(DENSE, long), 8), eight).problems
    assert "set model.recompute=full, or lower rollout.max_response_tokens: the longest row has 33024 tokens" in problem
    small = with_gpus(load_config(DENSE, [*long, "model.recompute=full", "rollout.sglang.mem_fraction=0.13"]), 8)
    (problem,) = make_plan(small, Assumptions(rollout_gpus=8, response_tokens=4096)).problems
    assert re.search(r"KV cache of \d+ tokens, fewer than the 33024 tokens of a prompt and the longest response", problem)
    with pytest.raises(ConfigError, match="max_position_embeddings=40960; lower it"):
        load_config(DENSE, ["rollout.max_response_tokens=40960"])


def test_generation_ahead_overlaps_in_time_and_in_memory() -> None:
    for ahead in (0, 1):
        time = make_plan(with_gpus(load_config(DENSE, [f"rollout.ahead={ahead}"]), 8), Assumptions(rollout_gpus=8)).time
        assert time.trainer == time.logprobs + time.train + time.gradients + time.optimizer
        expected = max(time.generate, time.trainer) if ahead else time.generate + time.trainer
        assert time.total == expected + time.sync
    apart, beside = (make_plan(with_gpus(load_config(TINY, [f"rollout.ahead={ahead}"]), None), Assumptions()).ranks[0] for ahead in (0, 1))
    assert apart.kv_cache > 0
    for phase in ("logprobs", "train", "collect"):
        assert beside.allocated[phase] - apart.allocated[phase] == apart.kv_cache
    for phase in ("generate", "sync"):
        assert beside.allocated[phase] == apart.allocated[phase]


def test_assumed_workspaces_and_losses_are_part_of_every_phase() -> None:
    config = with_gpus(load_config(DENSE), 8)
    plain, real = (make_plan(config, a).ranks[0] for a in (Assumptions(workspace_gib=0.0, fragmentation=0.0), Assumptions()))
    assert plain.phases == plain.allocated == real.allocated and plain.lost == plain.workspaces == 0
    assert real.phases == {name: size + GIB + int(0.05 * size) for name, size in plain.phases.items()}
    on_cpu = make_plan(with_gpus(load_config(DENSE, ["run.backend=cpu"]), 8), Assumptions()).ranks[0]
    assert on_cpu.phases == on_cpu.allocated


def test_gpus_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"--gpus 10: parallel.tp=4 \* pp=1"):
        with_gpus(load_config(DENSE), 10)
    with pytest.raises(ConfigError, match="prompts_per_step=64: must be a multiple of parallel.dp=3"):
        with_gpus(load_config(DENSE), 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_gpus": -3}, "--rollout-gpus -3: not possible; allowed: 1 or more. Give such a number, or leave the option out"),
        ({"rollout_gpus": 0}, "--rollout-gpus 0: not possible; allowed: 1 or more"),
        ({"gpu_memory_gib": -1.0}, "--gpu-memory-gib -1: not possible; allowed: more than 0"),
        ({"gpu_memory_gib": 2.0}, "--reserve-gib 3: leaves nothing of --gpu-memory-gib 2"),
        ({"peak_tflops": 0.0, "memory_gb_s": math.inf}, "--peak-tflops 0: .*more than 0.*\n--memory-gb-s inf: not possible"),
        ({"nvlink_gb_s": 0.0}, "--nvlink-gb-s 0: "),
        ({"network_gb_s": -45.0}, "--network-gb-s -45: "),
        ({"gpus_per_node": 0}, "--gpus-per-node 0: "),
        ({"mfu": 40.0}, "--mfu 40: not possible; allowed: more than 0, at most 1 .a share of 1, not percent"),
        ({"mfu": math.nan}, "--mfu nan: "),
        ({"decode_efficiency": 0.0}, "--decode-efficiency 0: "),
        ({"prompt_tokens": 0}, "--prompt-tokens 0: "),
        ({"response_tokens": -1}, "--response-tokens -1: "),
        ({"reserve_gib": -3.0}, "--reserve-gib -3: not possible; allowed: 0 or more"),
        ({"workspace_gib": math.nan}, "--workspace-gib nan: "),
        ({"fragmentation": 1.5}, "--fragmentation 1.5: "),
        ({"margin": -0.15}, "--margin -0.15: not possible; allowed: 0 or more, at most 1"),
    ],
)
def test_assumptions_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Assumptions(**options)


@pytest.mark.parametrize("options", [["--rollout-gpus", "-3"], ["--gpus", "-8"], ["--gpus", "0"], ["--suggestions", "-1"]])
def test_the_command_refuses_numbers_that_make_no_sense(options: list[str]) -> None:
    command = [sys.executable, "-m", "ais_megatron", "plan", str(DENSE), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {' '.join(options)}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("memory", "status"), [("80", 0), ("10", 1)])
def test_command(memory: str, status: int) -> None:
    command = [sys.executable, "-m", "ais_megatron", "plan", str(DENSE), "--gpus", "8", "--gpu-memory-gib", memory, "--suggestions", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == status, done.stderr
    words = " ".join(done.stdout.split())
    assert f"H100 SXM 80 GB, {memory} GiB" in words and "a layout fits if its peak and a margin of 15% fit" in words
    assert all(f in words for f in ("peak of train", "cuDNN workspaces (assumed)", "lost between blocks (assumed)", "(rollout.ahead=1)"))
    assert ("cannot run: parallel.tp=4" in done.stderr) == (status == 1)


def test_needs_no_torch() -> None:
    code = (
        "import sys; from ais_megatron import config; from ais_megatron.planning import plan as p, cost as c;"
        "x = p.with_gpus(config.load_config(sys.argv[1]), None);"
        "p.print_plan(p.make_plan(x, c.Assumptions()), p.suggest(x, c.Assumptions(), 8, 1)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(DENSE)], check=True, stdout=subprocess.DEVNULL, timeout=240)
