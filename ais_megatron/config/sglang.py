"""The section `rollout.sglang`: where SGLang servers are, or how to start them, and how weights and requests reach them."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ais_megatron.config.section import Fraction, PositiveInt, Section

FP8_BLOCK = 128
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class SGLangConfig(Section):
    """Servers are either named in `servers`, started by someone else with ``ais-megatron serve``, or started by the trainer's
    rank 0 on its own host (`num_servers` of them, on ports `port`, `port` + 1, …)."""

    servers: list[str] = Field([], description="base URLs, http://host:port; empty: the trainer starts its own")
    router: str | None = Field(None, description="an sglang-router that spreads the requests; weights still go to each of `servers`")
    num_servers: PositiveInt = Field(1, description="servers that the trainer starts itself, where `servers` is empty")
    python: str = Field("python", description="interpreter of the environment that holds SGLang (it pins its own torch)")
    device: Literal["cuda", "cpu"] = Field("cuda", description="where servers run; cpu: for tests, slow")
    tp: PositiveInt = Field(1, description="tensor-parallel size of one server")
    ep: PositiveInt = Field(1, description="expert-parallel size of one server (MoE models)")
    host: str = Field("127.0.0.1", description="address to bind; anything but loopback needs a key_file")
    port: PositiveInt = Field(30000, le=65535, description="of the first server that the trainer starts; the others follow it")
    key_file: str | None = Field(None, description="file with the key that requests must carry; made if `serve` or the trainer finds none")
    mem_fraction: Fraction | None = Field(None, description="--mem-fraction-static; empty: SGLang's own choice")
    attention_backend: str | None = Field(None, description="--attention-backend; empty: SGLang's own choice (fa3 on Hopper)")
    max_running: PositiveInt | None = Field(None, description="--max-running-requests of one server; empty: SGLang's own choice")
    extra_args: list[str] = Field([], description="further arguments of sglang.launch_server, as they are")
    env: dict[str, str] = Field({}, description="further environment variables of the servers")
    transport: Literal["auto", "distributed", "tensor", "disk"] = Field(
        "auto", description="of weights: distributed (NCCL, gloo on CPUs), tensor (same host), disk (shared folder sync_dir)"
    )
    sync_dir: str | None = Field(None, description="transport=disk: a folder that trainer and servers share; empty: in run.dir")
    pause: Literal["retract", "in_place"] = Field(
        "retract", description="requests in flight during a sync: retract recomputes their KV, in_place keeps it (no prefix cache then)"
    )
    verify_tolerance: float = Field(
        1.0, gt=0.0, description="a sync is refused if engine and trainer differ by more nats per token on a few probe tokens"
    )
    max_concurrency: PositiveInt = Field(256, description="requests in flight at one server")
    request_timeout_s: float = Field(600.0, gt=0.0, description="for one response")
    startup_timeout_s: float = Field(
        3000.0, gt=0.0, description="until a server answers for the first time; compiling DeepGEMM kernels takes 10-20 minutes of it, once"
    )
    recovery_timeout_s: float = Field(300.0, gt=0.0, description="how long a step waits for a server when none is left")
    max_restarts: int = Field(3, ge=0, description="of one server that died, by whoever started it")
    max_dropped_fraction: Fraction = Field(0.05, description="share of responses without usable logprobs above which a run stops")

    @model_validator(mode="after")
    def _addresses(self) -> SGLangConfig:
        for url in [*self.servers, *([self.router] if self.router else [])]:
            if not url.startswith(("http://", "https://")) or url.endswith("/"):
                raise ValueError(f"address {url!r}: write http://host:port, without a path")
        if len(set(self.servers)) < len(self.servers):
            raise ValueError(f"servers={self.servers}: an address occurs twice")
        if self.router and not self.servers:
            raise ValueError(f"router={self.router}: name the servers behind it in `servers` too; weights go to each of them")
        if not self.is_loopback and not self.key_file:
            raise ValueError(f"host={self.host}: reachable from other machines, so set key_file to a file that only you can read")
        return self

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def resolved_transport(self) -> Literal["distributed", "tensor", "disk"]:
        """What "auto" stands for: shared memory where all servers are on the trainer's host."""
        if self.transport != "auto":
            return self.transport
        hosts = [urlsplit(url).hostname for url in self.servers] or [self.host]
        return "tensor" if all(host in LOOPBACK for host in hosts) else "distributed"

    @property
    def weights_travel_over_nccl(self) -> bool:
        return self.device == "cuda" and self.resolved_transport == "distributed"


def ragged_shards(tp: int, expert_tp: int, heads: int, kv_heads: int, head_dim: int, mlp: int, expert_mlp: int) -> list[str]:
    """What block-FP8 loading refuses when a server cuts a layer `tp` ways: shards of a fused projection (q with k and v, gate
    with up) and of what follows it that do not consist of whole 128-blocks. One rank is no exception. Sizes 0 are not there.

    Source: SGLang's Fp8LinearMethod.validate_block_quant_shapes and Fp8MoEMethod.create_weights.
    """
    kv_heads_each = max(kv_heads // tp, 1)  # with more ranks than KV heads they are replicated
    shards = {
        f"num_attention_heads * head_dim / tp = {heads} * {head_dim} / {tp}": heads * head_dim / tp,
        f"KV heads of a shard * head_dim = {kv_heads_each} * {head_dim}": kv_heads_each * head_dim,
        f"intermediate_size / tp = {mlp} / {tp}": mlp / tp,
        f"moe_intermediate_size / (tp / ep) = {expert_mlp} / {expert_tp}": expert_mlp / expert_tp,
    }
    return [f"{text} = {size:g}" for text, size in shards.items() if size % FP8_BLOCK]


def graph_problems(sglang: SGLangConfig, kv_cache_is_fp8: bool) -> list[str]:
    """Backends that would go on using the KV scales of the moment when their CUDA graphs were captured."""
    bakes_scales = kv_cache_is_fp8 and sglang.device == "cuda" and sglang.attention_backend in ("triton", "flashinfer")
    if not bakes_scales or "--disable-cuda-graph" in sglang.extra_args:
        return []
    return [
        f"rollout.sglang.attention_backend={sglang.attention_backend}: its CUDA graphs keep the first KV scales for ever; use fa3, "
        "rollout.kv_cache=bf16, or add --disable-cuda-graph to rollout.sglang.extra_args"
    ]
