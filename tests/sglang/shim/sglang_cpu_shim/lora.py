"""LoRA adapters without CUDA: SGLang page-locks its small tensors of offsets and ranks, for which torch needs an accelerator."""

from types import ModuleType
from typing import Any

import torch


def install() -> None:
    """Plugin: these tensors stay in ordinary memory where there is no CUDA."""
    if torch.cuda.is_available():
        return
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    layers.torch = torch_backend.torch = Unpinned("torch")
    torch.Tensor.pin_memory = lambda tensor, *args: tensor


class Unpinned(ModuleType):
    """torch, whose constructors ignore `pin_memory`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)

    @staticmethod
    def zeros(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **kwargs)
