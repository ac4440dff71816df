"""The policy on Megatron-Core. Only this package imports Megatron.

Importing any module here first makes Megatron importable. In jobs on CPUs `cpu_backend` replaces what Megatron expects of CUDA.
Megatron's warnings about missing accelerator packages are hidden, because ``ais-megatron doctor`` reports these packages.
"""

import logging
import warnings
from collections.abc import Callable

from ais_megatron.policy import cpu_backend

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
# Collectives that torch 2.13 has renamed. Megatron and torch 2.11 still use the old names.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# Deprecation warnings of Megatron 0.19, which it repeats for every policy and every save.
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
