"""--enable-return-routed-experts without CUDA: its host buffer is page-locked through the driver, which here is not there."""

import torch


def install() -> None:
    """Plugin: leave the buffer as ordinary memory where there is no CUDA."""
    if torch.cuda.is_available():
        return
    import sglang.srt.mem_cache.pool_host.common as common

    common._cuda_host_register = lambda *args, **kwargs: None
