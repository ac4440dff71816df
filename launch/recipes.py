"""nemo-run recipes: the experiments of configs/ on this machine, or on a Slurm cluster that you reach from here or by SSH.

    python launch/recipes.py tiny -y run.executor=local
    python launch/recipes.py qwen3_8b_ais -y run.executor=slurm run.executor.account=ACCOUNT job.model=/models/Qwen3-8B --dryrun
    python launch/recipes.py qwen3_30b_a3b_ais -y run.executor=slurm_ssh run.executor.tunnel.host=LOGIN run.executor.tunnel.user=ME \
        run.executor.tunnel.job_dir=/home/me/jobs job.workdir=/home/me/ais_megatron job.model=/models/Qwen3-30B-A3B --detach
    python launch/recipes.py compare -y run.executor=local job=qwen3_8b_job job.overrides="['train.steps=50']"
    python launch/recipes.py scaling -y run.executor=slurm run.executor.account=ACCOUNT job.model=/models/Qwen3-8B

`job` says what runs, and `run.executor` where. nemo-run needs an environment of its own (``pip install -r launch/requirements.txt``),
because it pins older releases of the trainer's packages. A job does not need nemo-run. It runs `job.python` in `job.workdir`. A job with
SGLang servers is a heterogeneous Slurm job with trainer nodes and rollout nodes. If any part ends, the whole job ends. The sbatch files in
slurm/ do without nemo-run, and check more before they start anything.
"""

# No `from __future__ import annotations`: nemo-run evaluates annotations outside this module.
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import fiddle as fdl
import nemo_run as run
import typer

ROOT = Path(__file__).resolve().parents[1]
RENDEZVOUS_PORT, SERVER_PORT = 29400, 30000


@dataclass
class Job:
    """One training run."""

    name: str = "run"
    config: str = ""
    """Configuration file, relative to `workdir`."""
    model: str = ""
    """Hugging Face checkpoint folder; empty: that of the configuration."""
    overrides: list[str] = field(default_factory=list)
    """key=value, as on the command line."""
    trainer_nodes: int = 1
    """Nodes that train, on Slurm."""
    rollout_nodes: int = 0
    """Nodes that generate, on Slurm."""
    gpus_per_node: int = 8
    """GPUs of a node, on Slurm; 0: every node runs `ranks_per_node` CPU ranks."""
    ranks_per_node: int = 1
    server_gpus: int = 1
    """Tensor-parallel size of one SGLang server."""
    workdir: str = str(ROOT)
    """The repository on the machine that runs the job."""
    python: str = ".venv/bin/python"
    """Interpreter that has ais_megatron, relative to `workdir`."""

    @property
    def arguments(self) -> list[str]:
        model = [f"model.path={self.model}", f"tokenizer.path={self.model}"] if self.model else []
        return [self.config, *model, *self.overrides]


# ---- jobs: classes, because `job.KEY=VALUE` on the command line starts from a class's defaults --------------------------------


@dataclass
class Tiny(Job):
    name: str = "tiny"
    config: str = "configs/tiny_countdown.yaml"
    overrides: list[str] = field(default_factory=lambda: ["run.backend=cpu"])
    trainer_nodes: int = 2
    gpus_per_node: int = 0


@dataclass
class Qwen3Dense(Job):
    name: str = "qwen3_8b_ais"
    config: str = "configs/qwen3_8b_ais.yaml"
    model: str = "models/Qwen3-8B"
    rollout_nodes: int = 1


@dataclass
class Qwen3MoE(Job):
    name: str = "qwen3_30b_a3b_ais"
    config: str = "configs/qwen3_30b_a3b_ais.yaml"
    model: str = "models/Qwen3-30B-A3B"
    trainer_nodes: int = 2
    rollout_nodes: int = 2
    server_gpus: int = 2


@dataclass
class Qwen35(Job):
    name: str = "qwen3_5_9b_ais"
    config: str = "configs/qwen3_5_9b_ais.yaml"
    model: str = "models/Qwen3.5-9B"
    overrides: list[str] = field(default_factory=lambda: ["policy.lora.rank=128", "policy.lora.alpha=64"])


@dataclass
class LLaDA(Job):
    name: str = "llada_8b_ais"
    config: str = "configs/llada_8b_ais.yaml"
    model: str = "models/LLaDA-8B-Instruct"
    overrides: list[str] = field(default_factory=lambda: ["policy.lora.rank=128", "policy.lora.alpha=64"])


@run.cli.factory
@run.autoconvert
def tiny_job() -> Job:
    return Tiny()


@run.cli.factory
@run.autoconvert
def qwen3_8b_job() -> Job:
    return Qwen3Dense()


@run.cli.factory
@run.autoconvert
def qwen3_30b_a3b_job() -> Job:
    return Qwen3MoE()


# ---- where: run.executor=local | slurm | slurm_ssh -----------------------------------------------------------------------


@run.cli.factory
@run.autoconvert
def local() -> run.LocalExecutor:
    return run.LocalExecutor()


@run.cli.factory
@run.autoconvert
def slurm(
    account: str = "default", partition: str | None = None, time: str = "24:00:00", container_image: str | None = None
) -> run.SlurmExecutor:
    """Submit from a login node. Nodes and tasks follow from the job. `signal` lets the ranks save before the time limit. A status other
    than 0 requeues the job, up to `retries` times."""
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        time=time,
        container_image=container_image,
        signal="USR1@600",
        retries=3,
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        monitor_group_job_wait_time=10,
    )


@run.cli.factory
@run.autoconvert
def slurm_ssh(
    host: str = "login", user: str = "", job_dir: str = "", account: str = "default", partition: str | None = None, time: str = "24:00:00"
) -> run.SlurmExecutor:
    """Submit from a workstation. nemo-run copies its scripts to `job_dir` on the cluster, where `job.workdir` must be the repository."""
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        time=time,
        signal="USR1@600",
        retries=3,
        tunnel=run.SSHTunnel(host=host, user=user, job_dir=job_dir),
        packager=run.Packager(),
        monitor_group_job_wait_time=10,
    )


# ---- what a job executes -------------------------------------------------------------------------------------------------


def trainer_script(job: Job, on_slurm: bool) -> run.Script:
    """On Slurm one task per rank. Elsewhere one process, which starts its ranks, and its servers if the configuration has any."""
    command = f"exec {shlex.join([job.python, '-m', 'ais_megatron', 'train', *job.arguments])} "
    command += 'run.dir="$AIS_RUN_DIR" $AIS_ENGINE $AIS_RESUME' if on_slurm else f"run.dir=runs/{shlex.quote(job.name)}"
    return run.Script(inline=f"cd {shlex.quote(job.workdir)} && {command}\n")


def server_script(job: Job) -> run.Script:
    """One task per server, each on its own GPUs. Servers ignore the signal that lets the ranks save."""
    first, last = f"SLURM_LOCALID * {job.server_gpus}", f"SLURM_LOCALID * {job.server_gpus} + {job.server_gpus - 1}"
    command = shlex.join([job.python, "-m", "ais_megatron", "serve", *job.arguments, "rollout.sglang.host=0.0.0.0"])
    lines = [f"cd {shlex.quote(job.workdir)} || exit 2", "trap '' USR1"]
    lines += [f"export CUDA_VISIBLE_DEVICES=$(seq -s, $(({first})) $(({last})))"] if job.gpus_per_node else []
    port = f'rollout.sglang.port="$(({SERVER_PORT} + SLURM_LOCALID))"'
    lines += [
        f'exec {command} run.dir="$AIS_RUN_DIR" rollout.sglang.tp={job.server_gpus} {port} rollout.sglang.key_file="$AIS_RUN_DIR/key"'
    ]
    return run.Script(inline="\n".join(lines) + "\n")


def servers_per_node(job: Job) -> int:
    if job.gpus_per_node % job.server_gpus:
        raise ValueError(f"job.server_gpus={job.server_gpus}: does not divide job.gpus_per_node={job.gpus_per_node}; choose a divisor")
    return max(job.gpus_per_node // job.server_gpus, 1)


def setup_lines(job: Job) -> str:
    """Lines that the batch script runs first. They export what all parts must agree on. After a requeue the run folder is the same."""
    trainers, rollouts = (
        ("$SLURM_JOB_NODELIST_HET_GROUP_0", "$SLURM_JOB_NODELIST_HET_GROUP_1") if job.rollout_nodes else ("$SLURM_JOB_NODELIST", "")
    )
    lines = [
        "export SLURM_EXPORT_ENV=ALL",
        f"export AIS_RUN_DIR={shlex.quote(job.workdir)}/runs/{shlex.quote(job.name)}-$SLURM_JOB_ID",
        'mkdir -p "$AIS_RUN_DIR"',
        f'export MASTER_ADDR=$(scontrol show hostnames "{trainers}" | head -n 1) MASTER_PORT={RENDEZVOUS_PORT}',
        'if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then export AIS_RESUME=run.resume=true; else export AIS_RESUME=; fi',
        "export AIS_ENGINE=",
    ]
    if rollouts:
        ports = " ".join(str(SERVER_PORT + i) for i in range(servers_per_node(job)))
        lines += [
            'set +vx; [ -s "$AIS_RUN_DIR/key" ] || (umask 077; od -An -tx1 -N32 /dev/urandom | tr -d " \\n" >"$AIS_RUN_DIR/key")',
            f'hosts=$(scontrol show hostnames "{rollouts}")',
            f'servers=$(for node in $hosts; do for port in {ports}; do echo "http://$node:$port"; done; done | paste -sd,)',
            'export AIS_ENGINE="rollout.sglang.servers=[$servers] rollout.sglang.key_file=$AIS_RUN_DIR/key"',
        ]
    return "\n".join(lines)


def add_job(experiment: run.Experiment, job: Job, executor: run.Executor) -> str:
    """Add the trainer and, on Slurm, its servers to the experiment. Returns the id for dependencies."""
    if not isinstance(executor, run.SlurmExecutor):
        return experiment.add(trainer_script(job, on_slurm=False), executor=executor.clone(), name=job.name)
    gpus = job.gpus_per_node or None
    trainer = executor.clone()
    if gpus:
        trainer.exclusive, trainer.mem = trainer.exclusive or True, trainer.mem or "0"
    trainer.nodes, trainer.ntasks_per_node, trainer.gpus_per_node = job.trainer_nodes, job.gpus_per_node or job.ranks_per_node, gpus
    trainer.setup_lines = setup_lines(job)
    if not job.rollout_nodes:
        return experiment.add(trainer_script(job, on_slurm=True), executor=trainer, name=job.name)
    rollout = trainer.clone()
    rollout.setup_lines = None
    rollout.nodes, rollout.ntasks_per_node, rollout.gpus_per_node = job.rollout_nodes, servers_per_node(job), gpus
    trainer.heterogeneous = rollout.heterogeneous = True
    return experiment.add([trainer_script(job, on_slurm=True), server_script(job)], executor=[trainer, rollout], name=job.name)


def launch(ctx: run.cli.RunContext, title: str, jobs: list[Job], after: run.Script | None = None) -> None:
    """Run all jobs, on Slurm at the same time, locally one after the other. `after` runs when all have ended, even if some failed."""
    executor = ctx.executor if getattr(ctx, "executor", None) is not None else local()
    executor = executor if isinstance(executor, run.Executor) else fdl.build(executor)
    ctx.executor = executor
    on_slurm = isinstance(executor, run.SlurmExecutor)
    with run.Experiment(title, executor=executor) as experiment:
        ids = [add_job(experiment, job, executor) for job in jobs]
        if after is not None:
            last = executor.clone()
            if on_slurm:
                last.dependency_type = "afterany"
            experiment.add(after, executor=last, name="report", dependencies=ids if on_slurm else None)
        ctx.launch(experiment, sequential=not on_slurm)
    if ctx.dryrun or ctx.detach:
        return
    failed = [
        name
        for name, status in experiment.status(return_dict=True).items()
        if str(status["status"]) not in ("SUCCEEDED", "AppState.SUCCEEDED")
    ]
    if failed:  # nemo-run would end with status 0
        raise RuntimeError(f"these jobs failed: {', '.join(failed)}; read their logs")


# ---- experiments ---------------------------------------------------------------------------------------------------------


@run.cli.entrypoint(namespace="ais_megatron", type="experiment")
def tiny(ctx: run.cli.RunContext, job: Tiny = Tiny()) -> None:
    """The tiny Countdown run on CPUs, for trying a cluster."""
    launch(ctx, "tiny", [job])


@run.cli.entrypoint(namespace="ais_megatron", type="experiment")
def qwen3_8b_ais(ctx: run.cli.RunContext, job: Qwen3Dense = Qwen3Dense()) -> None:
    """Qwen3-8B on GSM8K with FP8 rollouts and AIS."""
    launch(ctx, "qwen3_8b_ais", [job])


@run.cli.entrypoint(namespace="ais_megatron", type="experiment")
def qwen3_30b_a3b_ais(ctx: run.cli.RunContext, job: Qwen3MoE = Qwen3MoE()) -> None:
    """Qwen3-30B-A3B on GSM8K, with experts over 8 ranks and routing replay."""
    launch(ctx, "qwen3_30b_a3b_ais", [job])


@run.cli.entrypoint(namespace="ais_megatron", type="experiment")
def qwen3_5_9b_ais(ctx: run.cli.RunContext, job: Qwen35 = Qwen35()) -> None:
    """Qwen3.5-9B on GSM8K with LoRA. The ranks generate with embedded engines."""
    launch(ctx, "qwen3_5_9b_ais", [job])


@run.cli.entrypoint(namespace="ais_megatron", type="experiment")
def llada_8b_ais(ctx: run.cli.RunContext, job: LLaDA = LLaDA()) -> None:
    """LLaDA-8B on GSM8K with LoRA. The ranks generate with embedded engines."""
    launch(ctx, "llada_8b_ais", [job])


@run.cli.entrypoint(namespace="ais_megatron", type="experiment")
def compare(ctx: run.cli.RunContext, job: Job = Tiny(), corrections: list[str] = ["none", "tis", "ais"]) -> None:
    """The same run with several corrections, and without quantization as the reference."""
    variants = {"bf16": ["rollout.quantization=none", "correction=none"], **{name: [f"correction={name}"] for name in corrections}}
    jobs = [replace(job, name=f"{job.name}-{name}", overrides=[*job.overrides, *extra]) for name, extra in variants.items()]
    launch(ctx, "compare", jobs)


@run.cli.entrypoint(namespace="ais_megatron", type="experiment")
def scaling(ctx: run.cli.RunContext, job: Job = Qwen3Dense(), grid: str = "slurm/scaling_grid.tsv", steps: int = 6) -> None:
    """A short run for every line of a grid of nodes and layouts. For one report of all runs use slurm/scaling.sh."""
    lines = [line.split("\t") for line in (ROOT / grid).read_text().splitlines() if line and not line.startswith("#")]
    short = [f"train.steps={steps}", "train.optimizer.warmup_steps=0", "checkpoint.every=0", "eval.every=0"]
    jobs = [
        replace(
            job,
            name=f"scaling-{number:02d}-{series}-{name}",
            trainer_nodes=int(trainers),
            rollout_nodes=int(rollouts),
            overrides=[*job.overrides, *short, *extra[0].split()],
        )
        for number, (series, name, trainers, rollouts, *extra) in enumerate(lines, start=1)
    ]
    launch(ctx, "scaling", jobs)


EXPERIMENTS = (tiny, qwen3_8b_ais, qwen3_30b_a3b_ais, qwen3_5_9b_ais, llada_8b_ais, compare, scaling)

if __name__ == "__main__":
    app = typer.Typer(help=__doc__, rich_markup_mode=None)
    for experiment in EXPERIMENTS:
        experiment.cli_entrypoint.cli(app)
    app()
