"""The trainer's side of the house: everything that knows Megatron-Core.

Importing any part of it first makes Megatron importable: for a job on CPUs the CPU answers its questions about CUDA
(`cpu_backend`), and what it says about missing accelerator packages is left to ``ais-megatron doctor``.
"""

import logging
import warnings
from collections.abc import Callable

from ais_megatron.policy import cpu_backend

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
# Names of collectives that torch 2.13 renames and that Megatron, and torch 2.11, still use.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# Megatron 0.19's advice to change over to newer classes, which it repeats for every policy and every save.
_ADVICE = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: text not in record.getMessage()


for _module, _text in _ADVICE.items():
    logging.getLogger(_module).addFilter(_without(_text))
if cpu_backend.is_wanted():
    cpu_backend.install()
