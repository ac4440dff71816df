"""Our SGLang plugin. It makes KV scales loadable and reads the access key from a file.

To use it, install this package beside SGLang. SGLang calls `install`, an entry point in the group ``sglang.srt.plugins``, early in each
of its processes. The plugin imports only the tables of model families from this package, and none of its dependencies. It is written
for SGLang 0.5.23. If a hooked name has moved, SGLang logs this and continues. `server` notices it, because it refuses a server that
answers without the key.

KV scales. Qwen3 and Qwen3-MoE build their attention without a quantization config, and so does every family with BF16 weights. Such an
attention has no `k_scale` and `v_scale` parameters. Pushed scales are then dropped with a warning, and the cache has scale 1.0. The
plugin attaches SGLang's own `BaseKVCacheMethod` after each attention is built. It also keeps the loaders from renaming the parameters.
The dense models would treat ``model.layers.N.self_attn.attn.k_scale`` as a checkpoint's name, turn it into ``….attn.attn.k_scale``,
and drop that as unknown. Everything else is SGLang's own code: the loaders of all update endpoints find the parameters, and
`process_weights_after_loading` runs after the initial load and at every /end_weight_update. Both write in place (`copy_`), so the
tensors keep their addresses. FlashAttention-3 reads them from inside captured CUDA graphs and sees new values. Triton and FlashInfer
pass the float `k_scale_float`, which a captured graph keeps forever, so with them CUDA graphs must be off.

Block scales. Llama's loader renames ``X.weight_scale_inv`` to a parameter that block-FP8 layers do not have, see `load_block_scales`.

LoRA. SGLang wraps a layer that can have factors, and its loaders look for ``qkv_proj.weight_scale_inv`` at the wrapper, which knows only
the weight. `share_parameters` gives it the layer's other parameters too. `/weights_checker` gets another action, see `report_adapters`.

Access key. ``--api-key`` would be visible in `ps`, in the log (SGLang logs its arguments) and in /server_info. So the key is read from
the file in AIS_MEGATRON_KEY_FILE when the HTTP app is set up. SGLang's own middleware gets it as user key and admin key. Every endpoint
except /health*, /ready* and /metrics* then needs ``Authorization: Bearer KEY``.
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
LORA_LAYER = "sglang.srt.lora.layers.BaseLayerWithLoRA.__init__"
CHECK_WEIGHTS = "sglang.srt.model_executor.model_runner.ModelRunner.check_weights"
LIST_ADAPTERS = "list_adapters"  # our action of /weights_checker
HTTP_SERVER = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"


def install() -> None:
    """Register the hooks in this process. The server's first process handles HTTP, and the processes that it spawns hold the model."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if multiprocessing.parent_process() is not None:
        for attention in {family.sglang_attention for family in FAMILIES.values()} - {None}:
            HookRegistry.register(f"{attention}.__init__", add_kv_scales, HookType.AFTER)
        HookRegistry.register(RENAME, keep_parameter_names, HookType.AROUND)
        HookRegistry.register(LLAMA_LOADER, load_block_scales, HookType.AROUND)
        HookRegistry.register(LORA_LAYER, share_parameters, HookType.AFTER)
        HookRegistry.register(CHECK_WEIGHTS, report_adapters, HookType.AROUND)
    elif os.environ.get(KEY_FILE_VARIABLE):
        HookRegistry.register(HTTP_SERVER, require_key, HookType.BEFORE)


def add_kv_scales(result: None, attention: Any, *args: Any, **kwargs: Any) -> None:
    """Hook after an attention's `__init__`: add `k_scale` and `v_scale` if the cache is FP8 and they are missing.

    A BF16 cache does not get them, because some backends would divide by them. Families that pass on their quantization config
    already have them.
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
        getattr(layer, name)._skip_weight_check = False  # so that /weights_checker shows whether a sync has set them


def keep_parameter_names(rename: Callable[..., str | None], name: str, params_dict: dict[str, Any]) -> str | None:
    """Hook around the loaders' renaming of checkpoint scales: a name that is already that of a parameter stays unchanged."""
    return name if name in params_dict else rename(name, params_dict)


def load_block_scales(load: Callable[..., object], model: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Hook around Llama's `load_weights`: the scales of block-FP8 weights are loaded by the loader that walks the modules, as for Qwen2.

    Llama's own loader treats ``X.weight_scale_inv`` as a per-tensor scale and renames it to ``X.weight_scale``. It finds no such
    parameter and drops the scale with a warning.
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


def share_parameters(result: None, wrapper: Any, base_layer: Any, *args: Any, **kwargs: Any) -> None:
    """Hook after the `__init__` of a layer with LoRA: the wrapper has all parameters of its layer, under the same names."""
    for name, parameter in base_layer.named_parameters(recurse=False):
        if not hasattr(wrapper, name):
            wrapper.register_parameter(name, parameter)


def report_adapters(check: Callable[..., Any], runner: Any, action: str, *args: Any, role: str, **kwargs: Any) -> Any:
    """Hook around `check_weights`: the action "list_adapters" gives the `digest` of the factors of every loaded adapter, by name."""
    if action != LIST_ADAPTERS:
        return check(runner, action, *args, role=role, **kwargs)
    manager = runner.lora_manager
    if manager is None:
        raise ValueError("this server was started without --enable-lora")
    held = {
        reference.lora_name: digest(tensor for layer in manager.loras[number].layers for tensor in layer.weights.values())
        for number, reference in manager.lora_refs.items()
    }
    place = runner._weight_checker._parallelism_info(role=role).model_dump()
    return {"checksums": held, "per_gpu_checksum": "", "parallelism_info": place}


def digest(tensors: Iterable[Tensor]) -> str:
    """A number that changes with any value: the sum of the squares of all bit patterns, modulo 2^64.

    It does not depend on the order of the tensors, nor on which of them are joined, nor on zeros. SGLang joins Q, K and V, and gate and up.
    """
    import torch

    patterns = {2: torch.int16, 4: torch.int32}
    total = 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(patterns[tensor.element_size()]).long()
        total += int((bits * bits).sum())
    return f"{total % 2**64:016x}"


def require_key(*args: Any, **kwargs: Any) -> None:
    """Hook before the HTTP app runs: refuse requests without the key. If the file cannot be read, the server ends."""
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
