"""The engine that a configuration asks for, on every rank."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch

from ais_megatron.config import Config
from ais_megatron.distributed import broadcast_text, device, rank, rank_consistent
from ais_megatron.rollout.engine import RolloutEngine
from ais_megatron.rollout.local import LocalEngine


def build_engine(config: Config, *, eos_id: int, pad_id: int) -> RolloutEngine:
    """An engine without weights. Collective."""
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    if config.rollout.engine == "sglang":
        return _sglang(config, eos_id, dtype)
    with rank_consistent():
        return LocalEngine(config.architecture, config.rollout, eos_id=eos_id, pad_id=pad_id, device=device(), dtype=dtype)


def _sglang(config: Config, eos_id: int, dtype: torch.dtype) -> RolloutEngine:
    from ais_megatron.rollout.sglang_client import SGLangEngine
    from ais_megatron.rollout.sglang_server import ServerPool, model_config, read_or_create_key
    from ais_megatron.rollout.sglang_sync import make_transport

    sglang = config.rollout.sglang
    run_id = broadcast_text(secrets.token_hex(4))
    key, pool, transport = None, None, None
    with rank_consistent():
        if rank() == 0:
            key = read_or_create_key(Path(sglang.key_file)) if sglang.key_file else None
            pool = None if sglang.servers else ServerPool(config)
    with rank_consistent():
        if rank() != 0 and sglang.key_file:
            key = read_or_create_key(Path(sglang.key_file))
        urls = sglang.servers or [f"http://{sglang.host}:{sglang.port + i}" for i in range(sglang.num_servers)]
        if rank() == 0:
            transport = make_transport(config, urls, device(), model_config(config.architecture, config.rollout), run_id)
        return SGLangEngine(
            config.architecture,
            config.rollout,
            urls,
            eos_id=eos_id,
            dtype=dtype,
            run_id=run_id,
            key=key,
            transport=transport,
            number=rank(),
            pool=pool,
        )
