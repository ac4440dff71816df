"""The command line, `ais-megatron`. Commands only parse arguments, start ranks and print. Other modules do the work."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import closing
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal

import typer

from ais_megatron.cluster.cuda_environment import prepare_cuda
from ais_megatron.cluster.exits import CHECK_FAILED, EXIT_REQUEUE, INTERRUPTED, USER_ERROR, Preempted
from ais_megatron.cluster.gpu_checks import gpu_problems
from ais_megatron.cluster.launcher import is_launched, ranks_here, run_ranks
from ais_megatron.config import Config, ConfigError, load_config
from ais_megatron.lm_harness import HarnessOptions, check_harness, run_harness
from ais_megatron.runs.folder import check_export_folder, check_output_file, check_run_folder, config_of
from ais_megatron.runs.inputs import input_problems

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GRPO on Megatron-Core with FP8 rollouts and adaptive importance sampling.",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="experiment as a YAML file, see configs/")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="change settings of the file, for example train.steps=10 rollout.quantization=none"),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run (run.dir)")]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, from the starting policy to the report. Starts its own ranks, or joins those of torchrun or srun."""
    loaded = load_config(config, overrides or [])
    if not is_launched():  # a slow rank would find the files that the first rank has begun to write
        check_run_folder(loaded)
    _run_distributed(loaded, _train)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Only make the starting policy (the warm start), and print its folder."""
    _run_distributed(load_config(config, overrides or []), _sft)


@app.command("eval")
def evaluate(
    target: Annotated[
        Path, typer.Argument(metavar="CONFIG|RUN", help="a YAML file evaluates its starting policy, a run folder its newest checkpoint")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="also write the result to this file, as JSON")] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="instead run lm-evaluation-harness on these tasks: names or YAML files, separated by commas"),
    ] = None,
    lm_eval_limit: Annotated[float | None, typer.Option(metavar="N", help="with --lm-eval: number of problems per task")] = None,
    lm_eval_tasks_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="with --lm-eval: a folder with further tasks")] = None,
    lm_eval_batch_size: Annotated[str, typer.Option(metavar="N|auto", help="with --lm-eval: number of prompts at a time")] = "8",
    apply_chat_template: Annotated[
        bool | None,
        typer.Option(help="with --lm-eval: wrap prompts in the tokenizer's chat template; default: if there is one", show_default=False),
    ] = None,
) -> None:
    """Measure pass@1 and pass@k on the sets of held-out problems (eval.sets), with the rollout engine."""
    if not target.exists():
        raise ConfigError(f"CONFIG|RUN={target}: no such file or folder; give a YAML file or the run.dir of a run")
    if out is not None:
        check_output_file("--out", out)
    if lm_eval is not None:
        options = HarnessOptions(lm_eval, lm_eval_limit, lm_eval_tasks_dir, lm_eval_batch_size, apply_chat_template)
        _run_harness(target, overrides or [], options, out)
        return
    loaded = load_config(config_of(target) if target.is_dir() else target, overrides or [])
    if not loaded.rollout.engine_traits.can_evaluate:
        raise ConfigError(
            f"rollout.engine={loaded.rollout.engine}: a recording has no responses of other weights; set rollout.engine=local"
        )
    _run_distributed(loaded, lambda config: _evaluate(config, target if target.is_dir() else None, out))


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(metavar="COMPARISON", help="comparison as a YAML file, see configs/compare_*.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="change settings of the comparison, for example seeds=[0] dir=runs/try"),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="ARM[/SEED]", help="do only these runs; may be repeated")] = None,
    results_of: Annotated[
        list[Path] | None,
        typer.Option(
            "--results", metavar="FILE", help="results.jsonl of another machine or day, whose runs count as finished; may be repeated"
        ),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="run nothing, only write table and figure of the runs that exist")] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="train nothing, only do missing final evaluations and write the report")
    ] = False,
    as_list: Annotated[
        bool, typer.Option("--list", help="only list the runs: name, base, folder and overrides, separated by tabs")
    ] = False,
) -> None:
    """Train every arm with every seed on every task, then write one table and one figure. Finished runs are not repeated."""
    from ais_megatron.comparison.config import load_comparison, select
    from ais_megatron.comparison.records import read_results
    from ais_megatron.comparison.report import write_comparison_report
    from ais_megatron.comparison.runs import result_of, run_cells

    comparison, cells = load_comparison(config, overrides or [])
    chosen = select(cells, only or [])
    if as_list:
        print("\n".join("\t".join([cell.name, str(cell.base), str(cell.folder), *cell.overrides]) for cell in chosen))
        return
    elsewhere = {name: result for file in results_of or [] for name, result in read_results(file, cells).items()}
    status = 0 if report else run_cells(comparison, config, chosen, may_train=not evaluate, elsewhere=elsewhere)
    if status:
        sys.exit(status)
    results = [elsewhere.get(cell.name) or result_of(cell, comparison) for cell in cells]
    print(write_comparison_report(comparison, results, " ".join(["ais-megatron compare", str(config), *(overrides or [])])))
    if any(not result.finished for result in results if result.cell in chosen):
        sys.exit(CHECK_FAILED)


@app.command()
def report(
    run: RunFolder,
    scaling: Annotated[bool, typer.Option("--scaling", help="RUN is the folder of a scaling experiment; write its table and plot")] = False,
) -> None:
    """Write the report of a run, finished or not, and print its path."""
    if scaling:
        from ais_megatron.comparison.scaling import write_scaling_report

        print(write_scaling_report(run))
        return
    from ais_megatron.runs.report import write_report

    print(write_report(run))


@app.command()
def layout(
    config: ConfigPath,
    overrides: Overrides = None,
    trainer_nodes: Annotated[str, typer.Option(metavar="HOST,HOST...")] = "localhost",
    rollout_nodes: Annotated[str, typer.Option(metavar="HOST,HOST...")] = "",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of each node; 0: run on CPUs")] = 8,
) -> None:
    """Print on which nodes a cluster job would run its ranks and SGLang servers, or why they do not fit. Starts nothing."""
    from ais_megatron.cluster.layout import layout_from_file

    trainers, servers = ([name for name in names.split(",") if name] for names in (trainer_nodes, rollout_nodes))
    print("\n".join(layout_from_file(config, overrides or [], trainers, servers, gpus_per_node).lines()))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="number of trainer GPUs; default: the fewest that the layout needs")] = None,
    rollout_gpus: Annotated[int | None, typer.Option(help="number of GPUs for SGLang servers; default: those of the configuration")] = None,
    gpu: Annotated[str, typer.Option(help="GPU model whose figures are assumed: h100 or h200")] = "h100",
    gpu_memory_gib: Annotated[float | None, typer.Option(help="memory of one GPU; default: that of the model (h100: 80)")] = None,
    reserve_gib: Annotated[float, typer.Option(help="part of the memory that torch cannot use: CUDA's context, kernels, NCCL")] = 3.0,
    workspace_gib: Annotated[float, typer.Option(help="workspaces of cuBLAS, cuDNN and Transformer Engine")] = 1.0,
    fragmentation: Annotated[
        float, typer.Option(help="memory that the allocator loses between blocks, as a share of the tensors' bytes")
    ] = 0.05,
    margin: Annotated[float, typer.Option(help="a layout fits only if its peak and this share of it fit")] = 0.15,
    peak_tflops: Annotated[float | None, typer.Option(help="dense BF16 peak of one GPU; default: that of the model")] = None,
    memory_gb_s: Annotated[float | None, typer.Option(help="memory bandwidth of one GPU; default: that of the model")] = None,
    nvlink_gb_s: Annotated[float, typer.Option(help="bandwidth of one GPU within a node, in one direction")] = 400.0,
    network_gb_s: Annotated[float, typer.Option(help="bandwidth of one GPU between nodes, in one direction")] = 45.0,
    gpus_per_node: Annotated[int, typer.Option()] = 8,
    mfu: Annotated[float, typer.Option(help="share of the peak that forward and backward passes reach")] = 0.4,
    decode_efficiency: Annotated[float, typer.Option(help="share of the memory bandwidth that decoding reaches")] = 0.6,
    prompt_tokens: Annotated[int, typer.Option(help="length of a typical prompt")] = 256,
    response_tokens: Annotated[int | None, typer.Option(help="length of a typical response; default: rollout.max_response_tokens")] = None,
    suggestions: Annotated[int, typer.Option(help="number of other layouts to list for the same GPUs")] = 5,
    train_ratio: Annotated[
        float | None, typer.Option(help="time of a forward and backward pass, divided by that of a forward pass; default: 3")
    ] = None,
    recompute_ratio: Annotated[float | None, typer.Option(help="the same with recomputed layers; default: 4")] = None,
    quantize_passes: Annotated[
        float | None, typer.Option(help="how often a sync's quantisation reads or writes the unquantised bytes; default: 3")
    ] = None,
    request_us: Annotated[float | None, typer.Option(help="CPU time of an HTTP request of the client; default: 250")] = None,
    hop_us: Annotated[float, typer.Option(help="latency of a message from node to node")] = 14.0,
    chunk_mib: Annotated[float, typer.Option(help="what a member of a broadcast receives before it passes it on")] = 0.5,
    bucket_ms: Annotated[float, typer.Option(help="what a server does for a bucket of a sync apart from receiving it")] = 20.0,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON of benchmarks/plan_calibration.py, whose measurements replace the defaults above"),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="find the fastest layout at each number of GPUs, and what stops scaling")] = False,
    sweep_gpus: Annotated[str, typer.Option(metavar="N,N...", help="GPUs of the sweep, of trainer and servers together")] = (
        "16,32,64,128,256,512,1024,2048,4096"
    ),
    responses: Annotated[str, typer.Option(metavar="N,N...", help="lengths of the sweep's responses")] = "4096,8192,16384,32768",
    out: Annotated[Path, typer.Option(metavar="DIR", help="folder for the sweep's sweep.md, sweep.json and sweep.png")] = Path("sweep"),
) -> None:
    """Estimate memory, traffic and time of a run from its configuration. Needs no GPU. Status 1 if the run cannot work or fit."""
    from ais_megatron.planning.calibration import read_calibration
    from ais_megatron.planning.cost import CARDS, Assumptions
    from ais_megatron.planning.plan import make_plan, print_plan, suggest, with_gpus

    if gpu not in CARDS:
        raise ConfigError(
            f"--gpu {gpu}: unknown; allowed: {', '.join(CARDS)} (describe others by --gpu-memory-gib, --peak-tflops and --memory-gb-s)"
        )
    measured = read_calibration(calibration) if calibration else {}
    chosen = {"train_ratio": train_ratio, "recompute_ratio": recompute_ratio, "quantize_passes": quantize_passes, "request_us": request_us}
    measured = {name: value for name, value in measured.items() if chosen[name] is None}
    given = measured | {name: value for name, value in chosen.items() if value is not None}
    assumed = Assumptions(
        **given,
        hop_us=hop_us,
        chunk_mib=chunk_mib,
        bucket_ms=bucket_ms,
        card=CARDS[gpu],
        gpu_memory_gib=gpu_memory_gib,
        peak_tflops=peak_tflops,
        memory_gb_s=memory_gb_s,
        nvlink_gb_s=nvlink_gb_s,
        network_gb_s=network_gb_s,
        gpus_per_node=gpus_per_node,
        mfu=mfu,
        decode_efficiency=decode_efficiency,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        rollout_gpus=rollout_gpus,
        reserve_gib=reserve_gib,
        workspace_gib=workspace_gib,
        fragmentation=fragmentation,
        margin=margin,
    )
    if sweep:
        from ais_megatron.planning.scale import sweep as find_points
        from ais_megatron.planning.scale_report import write_sweep

        loaded = load_config(config, overrides or [])
        points = find_points(loaded, assumed, _numbers("--sweep-gpus", sweep_gpus), _numbers("--responses", responses))
        print(write_sweep(out, loaded, assumed, points, measured) + f"\nwritten: {out}/sweep.md, sweep.json and sweep.png")
        return
    planned = make_plan(with_gpus(load_config(config, overrides or []), gpus), assumed)
    print_plan(planned, suggest(planned.config, assumed, planned.gpus, suggestions) if suggestions else [])
    if planned.problems:
        print("cannot run: " + "\ncannot run: ".join(planned.problems), file=sys.stderr, flush=True)
        sys.exit(CHECK_FAILED)


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to create")],
    step: Annotated[int | None, typer.Option(metavar="N", help="export the checkpoint of this step; default: the newest")] = None,
    shards_of: Annotated[
        float, typer.Option("--shards-of", metavar="GB", help="most gigabytes of weights in one file; a larger tensor has its own file")
    ] = 5.0,
    adapter: Annotated[bool, typer.Option("--adapter", help="only the factors of a LoRA run, as a PEFT folder")] = False,
) -> None:
    """Write a run's checkpoint as a Hugging Face folder (safetensors, config, tokenizer). Needs no GPU, and memory for a few tensors."""
    if not (isfinite(shards_of) and shards_of * 1e9 >= 1.0):
        raise ConfigError(
            f"--shards-of {shards_of:g}: not a size; allowed: more than 0. It is the most gigabytes of one file, for example 5"
        )
    check_export_folder(out)  # before torch is imported
    config_of(run)
    from ais_megatron.export.run import export_run

    export_run(run, out, step, int(shards_of * 1e9), adapter)
    print(out)


@app.command()
def serve(
    config: ConfigPath,
    overrides: Overrides = None,
    compile_only: Annotated[
        bool, typer.Option("--compile", help="only compile the servers' DeepGEMM kernels into SGLang's cache, and end")
    ] = False,
) -> None:
    """Run SGLang servers on this host until interrupted, print their addresses, and restart servers that die."""
    from ais_megatron.rollout.sglang.pool import compile_kernels
    from ais_megatron.rollout.sglang.pool import serve as run_servers

    loaded = load_config(config, overrides or [])
    if not loaded.rollout.engine_traits.has_servers:
        raise ConfigError(f"rollout.engine={loaded.rollout.engine}: this engine has no servers to run; set it to sglang")
    (compile_kernels if compile_only else run_servers)(loaded, Path(loaded.run.dir) / "servers")


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="also check what this experiment needs")] = None,
    overrides: Overrides = None,
    part: Annotated[Literal["all", "trainer", "servers"], typer.Option(help="part of the job that will run on this machine")] = "all",
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="folder shared by all nodes, in which --part trainer writes its versions and --part servers compares them"
        ),
    ] = None,
    local_ranks: Annotated[
        int | None, typer.Option(help="number of trainer ranks on this machine; default: as many as `train` starts")
    ] = None,
) -> None:
    """Show what is installed, and what each missing part switches off. With CONFIG, status 1 if a run of it would fail here."""
    from ais_megatron.cluster.doctor import print_checks, print_doctor
    from ais_megatron.cluster.needs import check_needs

    loaded = load_config(config, overrides or []) if config else None
    if os.environ.get("SLURM_PROCID", "0") == "0":  # only one node of an srun prints the table
        print_doctor()
    where = f"{socket.gethostname()}: " if int(os.environ.get("SLURM_NTASKS", "1")) > 1 else ""
    if loaded is None:
        return
    if not print_checks(check_needs(loaded, part, facts, local_ranks), where):
        sys.exit(CHECK_FAILED)
    print(f"{where}nothing that {config} needs is missing here", flush=True)


@app.command()
def keys(
    section: Annotated[str, typer.Argument(metavar="[SECTION]", help="for example rollout, train.optimizer or ais.tau")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="print all keys as the page docs/configuration.md")] = False,
) -> None:
    """Print every configuration key with its type, default, allowed values and what it does."""
    from ais_megatron.config.keys import all_keys, as_markdown, as_text, keys_of

    print(as_markdown() if markdown else as_text(keys_of(section) if section else all_keys(), shutil.get_terminal_size().columns))


def _numbers(option: str, text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"{option} {text}: must be whole numbers separated by commas, such as 16,64,256") from error


def _run_distributed(config: Config, work: Callable[[Config], None]) -> None:
    """Join the job if a launcher started this process as a rank. Otherwise start a job, in this process if it has only one rank."""
    prepare_cuda(config)
    if problems := gpu_problems(config, ranks_here() if is_launched() else None):
        raise ConfigError("\n".join(problems))
    if not is_launched() and (problems := input_problems(config)):
        raise ConfigError("\n".join(problems))
    if not is_launched() and config.parallel.local_world_size > 1:
        sys.exit(run_ranks(config.parallel.local_world_size, sys.argv[1:]))
    import torch
    import torch.distributed as dist

    from ais_megatron.distributed import barrier, init_process_group

    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    init_process_group(config.run.backend, config.run.timeout_minutes)
    work(config)
    barrier()
    dist.destroy_process_group()
    # gloo's threads outlive its groups, and sometimes abort a process that has finished. So exit without destroying them.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _train(config: Config) -> None:
    from ais_megatron.interruption import listen

    listen()  # before the slow imports; until here a signal just ends the process, and nothing is lost
    from ais_megatron.trainer import train

    train(config)


def _sft(config: Config) -> None:
    from ais_megatron.distributed import rank
    from ais_megatron.policy.parallel import initialize_parallel
    from ais_megatron.session import build_task
    from ais_megatron.sft import starting_policy

    if config.sft.steps == 0:
        raise ConfigError("sft.steps=0: there is no warm start to make; set it to 1 or more")
    initialize_parallel(config)
    folder = starting_policy(config, *build_task(config))
    if rank() == 0:
        print(f"starting policy: {folder}")


def _evaluate(config: Config, run: Path | None, out: Path | None = None) -> None:
    from ais_megatron.distributed import rank
    from ais_megatron.evaluation import Evaluator
    from ais_megatron.runs.folder import write_json_atomic
    from ais_megatron.runs.summary import scores_table
    from ais_megatron.session import build_session
    from ais_megatron.trainer import begin

    # An evaluation is not recorded, and nothing goes on beside it.
    changes = {"rollout": config.rollout.model_copy(update={"save_dir": None}), "eval": config.eval.model_copy(update={"blocking": True})}
    config = config.model_copy(update=changes)
    folder = _newest_checkpoint(run, config) if run else None
    session = build_session(config, from_checkpoint=run is not None)
    with closing(session.engine):
        begin(session, folder, with_optimizer=False)
        scores = Evaluator(session).evaluate()
    if rank() == 0:
        first, accuracy = config.evaluation_sets[0], scores[0].passes[1].mean
        name = first.name if config.eval.sets else "held-out"
        print(f"{name} pass@1: {accuracy:.4f}  ({first.num_prompts} problems, {first.samples} responses each)")
        print(scores_table({s.name: s.figures for s in scores}), flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            result = {"accuracy": accuracy, "num_prompts": first.num_prompts, "samples": first.samples}
            write_json_atomic(out, {**result, "sets": {s.name: s.figures for s in scores}})


def _run_harness(target: Path, overrides: list[str], options: HarnessOptions, out: Path | None) -> None:
    from ais_megatron.runs.folder import write_json_atomic

    if not target.is_dir():
        raise ConfigError(f"CONFIG|RUN={target}: --lm-eval measures the newest checkpoint of a run; give the run.dir of a run")
    if overrides:
        raise ConfigError(f"{overrides[0]}: --lm-eval takes no key=value, because the harness has its own settings; leave it out")
    if is_launched():
        raise ConfigError("--lm-eval: runs in one process; start it without torchrun or srun")
    check_harness(load_config(config_of(target)), options)
    results = run_harness(target, options)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(out, {"lm_eval": results})


def _newest_checkpoint(run: Path, config: Config) -> Path:
    from ais_megatron.policy import saver

    folder = saver.newest_on_all_ranks(run / "checkpoints")
    if folder is None:
        raise ConfigError(f"{run}: has no complete checkpoint yet; wait for the next one (checkpoint.every), or for the end of the run")
    saver.verify(folder, config.checkpoint)
    return folder


def main() -> None:
    """Entry point. An error that the user can correct is one message and status 2, on all ranks together. `exits` lists all statuses."""
    try:
        app()
    except (ValueError, RuntimeError) as error:
        if os.environ.get("RANK", "0") == "0":
            if isinstance(error, RuntimeError):
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(USER_ERROR)  # no clean-up at exit, because a process group would wait for ranks that have left
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped: {stop}", flush=True)
        os._exit(EXIT_REQUEUE)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
