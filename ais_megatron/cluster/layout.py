"""Decides which trainer ranks and which SGLang servers of a cluster job run on which node.

A trainer node runs one rank per GPU. A rollout node runs one server per `rollout.sglang.tp` GPUs, on the ports
`rollout.sglang.port`, + 1, and so on. The sbatch files ask for the layout before they start anything. A job that cannot work then
ends in its first seconds with a message, and not in its first step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ais_megatron.config import Config, ConfigError, load_config

LAYOUT_FILE = "layout.tsv"
MAX_PORT = 65535


@dataclass(frozen=True)
class PlacedServer:
    """One SGLang server."""

    node: str
    """Host name."""
    port: int
    gpus: tuple[int, ...]
    """Numbers of its GPUs within the node; empty on a CPU."""

    @property
    def url(self) -> str:
        return f"http://{self.node}:{self.port}"


@dataclass(frozen=True)
class Layout:
    trainer_nodes: tuple[str, ...]
    ranks_per_node: int
    servers: tuple[PlacedServer, ...]

    @property
    def num_workers(self) -> int:
        """Number of GPUs that trainer and servers use together; on CPUs the number of processes."""
        return len(self.trainer_nodes) * self.ranks_per_node + sum(max(len(server.gpus), 1) for server in self.servers)

    def lines(self) -> list[str]:
        """Lines for a shell script, tab-separated: ``trainer NODE RANKS`` and ``server NODE PORT GPUS`` ("-" for no GPUs)."""
        trainers = [f"trainer\t{node}\t{self.ranks_per_node}" for node in self.trainer_nodes]
        return trainers + [f"server\t{s.node}\t{s.port}\t{','.join(map(str, s.gpus)) or '-'}" for s in self.servers]


def read_layout(path: Path) -> Layout:
    """The inverse of `Layout.lines`."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    trainers = [row for row in rows if row[0] == "trainer"]
    servers = [PlacedServer(r[1], int(r[2]), () if r[3] == "-" else tuple(map(int, r[3].split(",")))) for r in rows if r[0] == "server"]
    return Layout(tuple(row[1] for row in trainers), int(trainers[0][2]), tuple(servers))


def layout_from_file(path: Path, overrides: list[str], trainer_nodes: list[str], rollout_nodes: list[str], gpus_per_node: int) -> Layout:
    """`lay_out` for a configuration file. The number of ranks then gives the data-parallel size, which is checked with everything else."""
    config = load_config(path, overrides)
    layout = lay_out(config, trainer_nodes, rollout_nodes, gpus_per_node)
    dp = len(trainer_nodes) * layout.ranks_per_node // config.parallel.model_parallel_size
    load_config(path, [*overrides, f"parallel.dp={dp}"])
    return layout


def lay_out(config: Config, trainer_nodes: list[str], rollout_nodes: list[str], gpus_per_node: int) -> Layout:
    """Place ranks and servers.

    Args:
        trainer_nodes, rollout_nodes: host names. There are no rollout nodes with an embedded engine, or if the configuration names
            its servers.
        gpus_per_node: 0 on a CPU. The number of ranks is then the product of the sizes in `parallel`, and a rollout node runs one
            server.

    Raises:
        ConfigError: nodes, GPUs and configuration do not fit together. One message lists all problems.
    """
    problems = [*_trainer_problems(config, len(trainer_nodes), gpus_per_node), *_rollout_problems(config, rollout_nodes, gpus_per_node)]
    twice = sorted(set(trainer_nodes) & set(rollout_nodes))
    if twice:
        problems.append(f"nodes {', '.join(twice)}: named as trainer and as rollout node; name each node once")
    if problems:
        raise ConfigError("\n".join(problems))
    ranks = gpus_per_node or config.parallel.local_world_size // len(trainer_nodes)
    sglang = config.rollout.sglang
    servers = [
        PlacedServer(node, sglang.port + i, tuple(range(i * sglang.tp, (i + 1) * sglang.tp)) if gpus_per_node else ())
        for node in rollout_nodes
        for i in range(_servers_per_node(config, gpus_per_node))
    ]
    return Layout(tuple(trainer_nodes), ranks, tuple(servers))


def _servers_per_node(config: Config, gpus_per_node: int) -> int:
    return gpus_per_node // config.rollout.sglang.tp if gpus_per_node else 1


def _trainer_problems(config: Config, num_nodes: int, gpus_per_node: int) -> list[str]:
    if num_nodes == 0:
        return ["no trainer nodes: a job needs at least one; name it with --trainer-nodes"]
    parallel = config.parallel
    copy = f"parallel.tp={parallel.tp} * parallel.pp={parallel.pp} * parallel.cp={parallel.cp}"
    if not gpus_per_node:
        ranks = parallel.local_world_size
        if ranks % num_nodes:
            return [f"{copy} * parallel.dp={parallel.dp or 1}: {ranks} ranks cannot be spread evenly over {num_nodes} trainer nodes"]
        return []
    ranks, copies = num_nodes * gpus_per_node, num_nodes * gpus_per_node // parallel.model_parallel_size
    nodes = f"{num_nodes} trainer nodes with {gpus_per_node} GPUs"
    if ranks % parallel.model_parallel_size:
        return [
            f"{copy} = {parallel.model_parallel_size} GPUs for one copy of the model: does not divide the {ranks} GPUs of {nodes}; "
            "change the number of trainer nodes, parallel.tp or parallel.pp"
        ]
    if parallel.dp not in (None, copies):
        return [
            f"parallel.dp={parallel.dp}: {nodes} have room for {copies} copies of the model ({copy}); set parallel.dp={copies} or leave "
            "it empty"
        ]
    return []


def _rollout_problems(config: Config, rollout_nodes: list[str], gpus_per_node: int) -> list[str]:
    rollout, sglang = config.rollout, config.rollout.sglang
    if rollout.engine_traits.is_embedded:
        unused = f"{len(rollout_nodes)} rollout nodes: rollout.engine=local generates on the trainer's ranks; set AIS_ROLLOUT_NODES=0"
        return [unused] if rollout_nodes else []
    if sglang.servers:
        return [f"rollout.sglang.servers={sglang.servers}: leave it empty, because the job starts its own servers"]
    if not rollout_nodes:
        return [
            "no rollout nodes: rollout.engine=sglang needs at least one for its servers; ask for more nodes in total than trainer nodes"
        ]
    problems = []
    if gpus_per_node and gpus_per_node % sglang.tp:
        allowed = [n for n in range(1, gpus_per_node + 1) if gpus_per_node % n == 0]
        problems.append(f"rollout.sglang.tp={sglang.tp}: does not divide the {gpus_per_node} GPUs of a rollout node; use one of {allowed}")
    last = sglang.port + _servers_per_node(config, gpus_per_node) - 1
    if last > MAX_PORT:
        problems.append(
            f"rollout.sglang.port={sglang.port}: the last server of a node would get port {last}; the largest is {MAX_PORT}; lower it"
        )
    return problems
