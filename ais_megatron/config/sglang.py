"""The section `rollout.sglang`: where the SGLang servers are or how to start them, and how weights and requests reach them."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ais_megatron.config.section import Fraction, PositiveInt, Section

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class SGLangConfig(Section):
    """SGLang servers. If `servers` names their addresses, someone else has started them, for example with ``ais-megatron serve``.
    Otherwise the trainer's rank 0 starts `num_servers` of them on its own host, on ports `port`, `port` + 1, and so on."""

    servers: list[str] = Field([], description="addresses of running servers, as http://host:port; empty: the trainer starts its own")
    router: str | None = Field(
        None, description="address of an sglang-router that distributes the requests; weights still go to every address in servers"
    )
    num_servers: PositiveInt = Field(1, description="number of servers that the trainer starts if servers is empty")
    python: str = Field(
        "python",
        description="Python interpreter of the environment that has SGLang; it is a separate one, because SGLang pins its own torch",
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="device of the servers; cpu is slow, for tests")
    tp: PositiveInt = Field(1, description="tensor-parallel size of one server")
    ep: PositiveInt = Field(1, description="expert-parallel size of one server (MoE models)")
    host: str = Field("127.0.0.1", description="address that a server binds to; anything but loopback needs a key_file")
    port: PositiveInt = Field(30000, le=65535, description="port of the first server that is started; the others get the next ports")
    key_file: str | None = Field(
        None, description="file with the key that every request must carry; `serve` or the trainer creates it if it is missing"
    )
    mem_fraction: Fraction | None = Field(None, description="SGLang's --mem-fraction-static; empty: SGLang chooses")
    attention_backend: str | None = Field(None, description="SGLang's --attention-backend; empty: SGLang chooses (fa3 on Hopper)")
    max_running: PositiveInt | None = Field(None, description="SGLang's --max-running-requests of one server; empty: SGLang chooses")
    extra_args: list[str] = Field([], description="further arguments of sglang.launch_server, passed on unchanged")
    env: dict[str, str] = Field({}, description="further environment variables of the servers")
    transport: Literal["auto", "distributed", "tensor", "cuda_ipc", "disk"] = Field(
        "auto",
        description="how weights reach the servers. distributed: broadcast over NCCL, or gloo on CPUs. tensor: shared memory on the same "
        "host. cuda_ipc: memory of GPUs that trainer and servers share. disk: files in sync_dir. auto: tensor if all servers are on "
        "loopback, else distributed",
    )
    sync_dir: str | None = Field(None, description="transport=disk: a folder that trainer and servers share; empty: a folder in run.dir")
    pause: Literal["retract", "in_place"] = Field(
        "retract",
        description="what happens to requests in flight during a sync. retract: their KV is recomputed with the new weights. in_place: "
        "they keep their KV, and servers run without a prefix cache",
    )
    verify_tolerance: float = Field(
        1.0, gt=0.0, description="a sync fails if engine and trainer differ by more than this many nats per token on a few probe tokens"
    )
    max_concurrency: PositiveInt = Field(
        256,
        description="most requests in flight at one server, of all ranks together; at most max_running, if that is set. Further requests "
        "wait, and go to the first server that has room",
    )
    request_timeout_s: float = Field(
        600.0,
        gt=0.0,
        description="a server is given up after so many seconds without progress; a response may take longer while its server generates "
        "tokens, also if it waits in the server's queue. It is also the time limit for one request of a weight sync",
    )
    startup_timeout_s: float = Field(
        3000.0,
        gt=0.0,
        description="time limit until a server answers for the first time; the first start compiles DeepGEMM kernels, which takes 10 to "
        "20 minutes",
    )
    recovery_timeout_s: float = Field(
        300.0, gt=0.0, description="how long a step waits for a server if none is left; then a checkpoint is saved and the run stops"
    )
    max_restarts: int = Field(3, ge=0, description="how many times a server that died is started again")
    max_dropped_fraction: Fraction = Field(
        0.05, description="the run stops if a larger share of a step's responses is dropped, because their log-probabilities are not finite"
    )

    @model_validator(mode="after")
    def _addresses(self) -> SGLangConfig:
        for url in [*self.servers, *([self.router] if self.router else [])]:
            if not url.startswith(("http://", "https://")) or url.endswith("/"):
                raise ValueError(f"address {url!r}: write http://host:port, without a path")
        if len(set(self.servers)) < len(self.servers):
            raise ValueError(f"servers={self.servers}: an address occurs twice; name each server once")
        if self.router and not self.servers:
            raise ValueError(f"router={self.router}: name the servers behind it in `servers` too; weights go to each of them")
        if self.transport == "cuda_ipc" and (self.device == "cpu" or self.servers or not self.is_loopback):
            wrong = "device=cpu" if self.device == "cpu" else f"servers={self.servers}" if self.servers else f"host={self.host}"
            raise ValueError(
                f"transport=cuda_ipc: not possible with {wrong}; only servers on GPUs, which the trainer starts itself on a loopback "
                "address, can open its memory. Set transport=auto"
            )
        if not self.is_loopback and not self.key_file:
            raise ValueError(
                f"host={self.host}: this address can be reached from other machines; set key_file to a file that only you can read, or "
                "host=127.0.0.1"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def resolved_transport(self) -> Literal["distributed", "tensor", "cuda_ipc", "disk"]:
        """The transport in use, with "auto" resolved: shared memory if all servers are on the trainer's host."""
        if self.transport != "auto":
            return self.transport
        hosts = [urlsplit(url).hostname for url in self.servers] or [self.host]
        return "tensor" if all(host in LOOPBACK for host in hosts) else "distributed"

    @property
    def weights_travel_over_nccl(self) -> bool:
        return self.device == "cuda" and self.resolved_transport == "distributed"


def ragged_shards(block: int, tp: int, expert_tp: int, heads: int, kv_heads: int, head_dim: int, mlp: int, expert_mlp: int) -> list[str]:
    """Shards that SGLang refuses to load as block-FP8 weights if a server splits a layer `tp` ways, one line each.

    The shards of a fused projection (q with k and v, gate with up), and of the layer that follows it, must consist of whole blocks
    of `block` rows and columns. This also holds for a single rank. A size of 0 means that the model has no such layer.

    Source: SGLang's Fp8LinearMethod.validate_block_quant_shapes and Fp8MoEMethod.create_weights.
    """
    kv_heads_each = max(kv_heads // tp, 1)  # if there are more ranks than KV heads, the heads are replicated
    shards = {
        f"num_attention_heads * head_dim / tp = {heads} * {head_dim} / {tp}": heads * head_dim / tp,
        f"KV heads of a shard * head_dim = {kv_heads_each} * {head_dim}": kv_heads_each * head_dim,
        f"intermediate_size / tp = {mlp} / {tp}": mlp / tp,
        f"moe_intermediate_size / (tp / ep) = {expert_mlp} / {expert_tp}": expert_mlp / expert_tp,
    }
    return [f"{text} = {size:g}" for text, size in shards.items() if size % block]


def graph_problems(sglang: SGLangConfig, kv_cache_is_fp8: bool) -> list[str]:
    """Attention backends that would keep the KV scales of the moment when their CUDA graphs were captured."""
    bakes_scales = kv_cache_is_fp8 and sglang.device == "cuda" and sglang.attention_backend in ("triton", "flashinfer")
    if not bakes_scales or "--disable-cuda-graph" in sglang.extra_args:
        return []
    return [
        f"rollout.sglang.attention_backend={sglang.attention_backend}: its CUDA graphs would keep the first KV scales forever; use fa3, "
        "set rollout.kv_cache=bf16, or add --disable-cuda-graph to rollout.sglang.extra_args"
    ]
