"""What SGLang lacks for us, as a plugin that it finds by itself: loadable KV scales, and an access key that comes from a file.

Installing this package beside SGLang is all it takes: SGLang calls `install`, the entry point of the group
``sglang.srt.plugins``, early in each of its processes. Of this package only the tables of model families are imported there,
and nothing that it depends on. Written for SGLang 0.5.23; where a name that is hooked has moved, SGLang logs it and goes on, which `server`
notices: it refuses a server that answers without the key.

KV scales. Qwen3 and Qwen3-MoE build their attention without a quantization config, and every family does with BF16 weights. Such
an attention has no `k_scale` and `v_scale` parameters, and scales that are pushed are dropped with a warning: the cache then works
at scale 1.0. Here `BaseKVCacheMethod`, SGLang's own, is attached after each attention is built, and the parameters' own names are
let through: the dense models take ``model.layers.N.self_attn.attn.k_scale`` for a checkpoint's name, make ``….attn.attn.k_scale``
of it, and drop it as unknown.
From there everything is stock: the loaders of all update endpoints find the parameters, and `process_weights_after_loading`
runs after the initial load and at every /end_weight_update. Both write in place (`copy_`), so the tensors keep their addresses:
FlashAttention-3 reads them from inside captured CUDA graphs and sees new values. Triton and FlashInfer pass the float
`k_scale_float` instead, which a captured graph keeps for ever: with them graphs must be off.

Block scales. Llama's loader renames ``X.weight_scale_inv`` to a parameter that block-FP8 layers do not have; see `load_block_scales`.

Access key. ``--api-key`` would show in `ps`, in the log (SGLang logs its arguments) and in /server_info. So the key comes from
the file that AIS_MEGATRON_KEY_FILE names, is read at the moment the HTTP app is set up, and goes straight into SGLang's own
middleware as user key and admin key: every endpoint but /health*, /ready* and /metrics* wants ``Authorization: Bearer KEY``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ais_megatron.models.registry import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor

KEY_FILE_VARIABLE = "AIS_MEGATRON_KEY_FILE"

RENAME = "sglang.srt.model_loader.weight_utils.maybe_remap_kv_scale_name"
LLAMA_LOADER = "sglang.srt.models.llama.LlamaForCausalLM.load_weights"
HTTP_SERVER = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"


def install() -> None:
    """Register the hooks of this process: the server's first process speaks HTTP, the ones it spawns hold the model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if multiprocessing.parent_process() is not None:
        for attention in {family.sglang_attention for family in FAMILIES.values()}:
            HookRegistry.register(f"{attention}.__init__", add_kv_scales, HookType.AFTER)
        HookRegistry.register(RENAME, keep_parameter_names, HookType.AROUND)
        HookRegistry.register(LLAMA_LOADER, load_block_scales, HookType.AROUND)
    elif os.environ.get(KEY_FILE_VARIABLE):
        HookRegistry.register(HTTP_SERVER, require_key, HookType.BEFORE)


def add_kv_scales(result: None, attention: Any, *args: Any, **kwargs: Any) -> None:
    """After an attention's `__init__`: give it `k_scale` and `v_scale` if the cache is FP8 and it has none.

    They are left out of a BF16 cache, where some backends would divide by whatever is in them. Families that pass their
    quantization config on have them already.
    """
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
    from sglang.srt.runtime_context import get_model

    if not get_model().kv_cache_dtype.startswith("fp8"):
        return
    layer = attention.attn
    if layer.k_scale is None:
        layer.quant_method = BaseKVCacheMethod(None)
        layer.quant_method.create_weights(layer)
    for name in ("k_scale", "v_scale"):
        getattr(layer, name)._skip_weight_check = False  # so that /weights_checker tells whether a sync has brought them


def keep_parameter_names(rename: Callable[..., str | None], name: str, params_dict: dict[str, Any]) -> str | None:
    """Around the loaders' renaming of checkpoint scales: what already is a parameter's name stays as it is."""
    return name if name in params_dict else rename(name, params_dict)


def load_block_scales(load: Callable[..., object], model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Around Llama's `load_weights`: scales of block-FP8 weights go by the loader that walks the modules, as Qwen2's layers have it.

    Llama's own takes ``X.weight_scale_inv`` for a per-tensor scale, renames it to ``X.weight_scale``, finds no such parameter and
    drops it with a warning.
    """
    from sglang.srt.model_loader.auto_loader import AutoWeightsLoader

    scales: list[tuple[str, Tensor]] = []

    def others() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name.endswith(".weight_scale_inv"):
                scales.append((name, tensor))
            else:
                yield name, tensor

    load(model, others())
    AutoWeightsLoader(model).load_weights(iter(scales))


def require_key(*args: Any, **kwargs: Any) -> None:
    """Before the HTTP app runs: refuse requests without the key. An unreadable file ends the server rather than opening it."""
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import add_api_key_middleware

    key = read_key()
    add_api_key_middleware(app, api_key=key, admin_api_key=key)


def read_key() -> str:
    """The key in the file that AIS_MEGATRON_KEY_FILE names.

    Raises:
        RuntimeError: the file is missing, unreadable or empty.
    """
    path = Path(os.environ[KEY_FILE_VARIABLE])
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise RuntimeError(f"{KEY_FILE_VARIABLE}={path}: the key cannot be read ({error})") from error
    if not key:
        raise RuntimeError(f"{KEY_FILE_VARIABLE}={path}: the file is empty; put the key on its first line")
    return key
