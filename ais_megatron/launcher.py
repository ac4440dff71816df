"""Starting the local ranks of a job when no launcher has, through torch's own elastic agent.

The agent gives each rank its variables and a rendezvous on the loopback interface, passes SIGINT and SIGTERM on, and ends
all ranks when one fails.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid


def is_launched() -> bool:
    """Whether torchrun or srun started this process as one rank of a job."""
    if "RANK" in os.environ:
        return True
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ


def run_ranks(num_ranks: int, arguments: list[str]) -> int:
    """Run ``python -m ais_megatron ARGUMENTS`` as `num_ranks` local ranks; returns the job's exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks have said what is wrong
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "ais_megatron", *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    except (SignalException, KeyboardInterrupt):
        return 130
    return 0
