"""Builds the rollout engine of a configuration, on every rank."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch

from ais_megatron.config import Config, doors
from ais_megatron.distributed import broadcast_text, device, rank, rank_consistent, shared_store
from ais_megatron.rollout.engine import RolloutEngine
from ais_megatron.rollout.local.engine import LocalEngine
from ais_megatron.rollout.recording import RecordingEngine
from ais_megatron.rollout.replay import ReplayEngine


def build_engine(config: Config, *, eos_ids: tuple[int, ...], pad_id: int) -> RolloutEngine:
    """An engine without weights. With `rollout.save_dir` it records what it generates. Collective.

    If `rollout.sglang.servers` is empty, the first rank starts servers on its host. It stops them when its engine is closed or its
    process ends.

    Raises:
        ValueError: a recording cannot be made or replayed, a port is taken, the key file cannot be used, or the engine cannot hold
            the model.
        RuntimeError: a server does not start. All ranks raise either error together.
    """
    name = config.rollout.engine
    engine = _own_engine(config, eos_ids, pad_id) if doors.is_own(name) else BUILDERS[name](config, eos_ids, pad_id)
    if config.rollout.save_dir is None:
        return engine
    with rank_consistent():
        return RecordingEngine(engine, Path(config.rollout.save_dir), rank(), continues=config.run.resume)


def _own_engine(config: Config, eos_ids: tuple[int, ...], pad_id: int) -> RolloutEngine:
    """An engine of the user's own class. Raises ValueError if it lacks members of `RolloutEngine`."""
    name = config.rollout.engine
    with rank_consistent():
        engine_class = doors.load("rollout.engine", name)
        needed = [member for member in dir(RolloutEngine) if not member.startswith("_")]
        if missing := sorted(member for member in needed if not hasattr(engine_class, member)):
            raise ValueError(
                f"rollout.engine={name!r}: the class lacks {', '.join(missing)}; see RolloutEngine in ais_megatron/rollout/engine.py"
            )
        return engine_class(config, eos_ids=eos_ids, pad_id=pad_id)


def _local_engine(config: Config, eos_ids: tuple[int, ...], pad_id: int) -> RolloutEngine:
    with rank_consistent():
        return LocalEngine(config.architecture, config.rollout, eos_ids=eos_ids, pad_id=pad_id, device=device(), dtype=_dtype(config))


def _replay_engine(config: Config, eos_ids: tuple[int, ...], pad_id: int) -> RolloutEngine:
    assert config.rollout.replay_dir is not None  # a configuration without it was refused
    with rank_consistent():
        return ReplayEngine(Path(config.rollout.replay_dir))


def _sglang_engine(config: Config, eos_ids: tuple[int, ...], pad_id: int) -> RolloutEngine:
    from ais_megatron.rollout.sglang.access_key import read_or_create_key
    from ais_megatron.rollout.sglang.adapter import Adapters
    from ais_megatron.rollout.sglang.client import SGLangEngine
    from ais_megatron.rollout.sglang.pool import ServerPool
    from ais_megatron.rollout.sglang.server import server_url
    from ais_megatron.rollout.sglang.transports import make_transport

    sglang = config.rollout.sglang
    run_id = broadcast_text(secrets.token_hex(4))
    urls = sglang.servers or [server_url(sglang.host, sglang.port + i) for i in range(sglang.num_servers)]
    pool = transport = None
    with rank_consistent():
        if rank() == 0:
            transport = make_transport(config, device(), run_id)
            if not sglang.servers:
                pool = ServerPool(config, Path(config.run.dir) / "servers")
                pool.start()
    with rank_consistent():
        key = read_or_create_key(sglang.key_file) if sglang.key_file else None
        return SGLangEngine(
            config.architecture,
            config.rollout,
            urls,
            eos_ids=eos_ids,
            dtype=_dtype(config),
            run_id=run_id,
            key=key,
            transport=transport,
            adapters=Adapters(config) if config.rollout.lora_sync == "adapter" else None,
            number=rank(),
            store=shared_store(),
            on_close=pool.stop if pool else lambda: None,
        )


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.model.dtype == "bf16" else torch.float32


# (config, eos_ids, pad_id) -> engine. `config.engines.ENGINES` has the properties that are needed before an engine exists.
BUILDERS = {"local": _local_engine, "sglang": _sglang_engine, "replay": _replay_engine}
