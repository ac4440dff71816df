"""The trainer's side of the house: everything that knows Megatron-Core.

Importing any part of it first makes Megatron importable: for a job on CPUs the CPU answers its questions about CUDA
(`cpu_backend`), and what it says about missing accelerator packages is left to ``ais-megatron doctor``.
"""

import warnings

from ais_megatron.policy import cpu_backend

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
# Names of collectives that torch 2.13 renames and that Megatron, and torch 2.11, still use.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
if cpu_backend.is_wanted():
    cpu_backend.install()
