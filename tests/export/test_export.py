"""The export of a checkpoint: equal to the policy's weights under every layout, whole or not there at all, and small in memory."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ais_megatron.config import ConfigError, build_config, dump_config, load_config
from ais_megatron.export.checkpoint_reader import CheckpointReader
from ais_megatron.export.hf_folder import HFFolder
from ais_megatron.export.run import export_run
from ais_megatron.runs import checkpoint_files
from ais_megatron.tokenizer import HFTokenizer, SentencePieceTokenizer
from tests.helpers.paths import ROOT
from tests.helpers.policies import LAYOUTS, MOE_LAYOUTS, make_batch, make_config, make_policy, weights_of
from tests.helpers.ranks import RankPool
from tests.test_tokenizer import hf_folder

DENSE_LAYOUTS = {name: (world, dict(tp=tp, pp=pp, sequence_parallel=sp)) for name, (world, tp, pp, sp) in LAYOUTS.items()}


def saved(rank: int, path: Path, run: Path, parallel: dict[str, object], dtype: str, steps: list[int]) -> dict[str, Tensor]:
    """A run folder with checkpoints, each of other weights; returns the weights of the last one."""
    from ais_megatron.config import CheckpointConfig
    from ais_megatron.policy.saver import Saver
    from ais_megatron.policy.training_state import TrainingState

    config = make_config(path, dtype=dtype)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    policy = make_policy(config, path)

    def tokenizer(folder: Path) -> None:
        SentencePieceTokenizer.train(["0 1 2 3 4 5 6 7 8 9"], 40, [], folder / "tokenizer.model")

    saver = Saver(policy, run / "checkpoints", CheckpointConfig(keep=2), None, add_files=tokenizer)
    for step in steps:
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.5)
        saver.save(TrainingState(step=step))
    if rank == 0:
        (run / "config.yaml").write_text(dump_config(config))
    return weights_of(policy)


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype is theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("DP2", "TP2+SP", "PP2"))])
def test_a_dense_export_is_the_policy(ranks: RankPool, checkpoint: Path, layout: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    world, parallel = DENSE_LAYOUTS[layout]
    weights = ranks.run(world, saved, path=checkpoint, run=tmp_path / "run", parallel=parallel, dtype="fp32", steps=[3])[0]
    assert export_run(tmp_path / "run", tmp_path / "hf").name == "step_000003"
    assert_equal(read(tmp_path / "hf"), weights)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    original = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(1.5)
        tokens = make_batch().tokens
        assert ours.dtype is torch.float32 and torch.equal(ours(tokens).logits, original(tokens).logits)


@pytest.mark.parametrize("layout", ["EP2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ETP2", "TP2+ETP2+EP2", "PP2+EP2"))])
def test_an_export_of_experts_is_the_policy(ranks: RankPool, moe_checkpoint: Path, layout: str, tmp_path: Path) -> None:
    world, parallel = MOE_LAYOUTS[layout]
    arguments = dict(path=moe_checkpoint, run=tmp_path / "run", parallel=parallel, dtype="bf16", steps=[3])
    weights = ranks.run(world, saved, **arguments)[0]
    export_run(tmp_path / "run", tmp_path / "hf", shard_bytes=30_000)
    assert_equal(read(tmp_path / "hf"), weights)


@pytest.fixture(scope="module")
def run(ranks: RankPool, untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    ranks.run(1, saved, path=untied_checkpoint, run=folder, parallel={}, dtype="bf16", steps=[2, 4, 6])
    return folder


def test_shards_and_index(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "hf", shard_bytes=30_000)
    files = sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    assert files == [f"model-{number + 1:05d}-of-{len(files):05d}.safetensors" for number in range(len(files))] and len(files) > 3
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    held = {name: file for file in files for name in load_file(tmp_path / "hf" / file)}
    assert index["weight_map"] == held
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / "hf" / file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= 30_000
    eos = SentencePieceTokenizer.load(tmp_path / "hf" / "tokenizer.model").eos_id
    assert all(
        json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == eos for name in ("config.json", "generation_config.json")
    )
    export_run(run, tmp_path / "one")
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert_equal(read(tmp_path / "one"), read(tmp_path / "hf"))


def test_a_tensor_larger_than_a_shard_has_its_own_file(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "hf", shard_bytes=1)
    assert all(len(load_file(file)) == 1 for file in (tmp_path / "hf").glob("*.safetensors"))


def test_a_step_is_chosen_among_those_that_are_kept(run: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()  # an empty folder may exist
    assert export_run(run, tmp_path / "hf", step=4).name == "step_000004"
    export_run(run, tmp_path / "newest")
    norm = "model.norm.weight"
    assert torch.allclose(read(tmp_path / "newest")[norm].float(), 1.5 * read(tmp_path / "hf")[norm].float(), rtol=2e-2)
    with pytest.raises(ConfigError, match=r"--step 2: .* has no checkpoint of this step; it has those of 4, 6 "):
        export_run(run, tmp_path / "other", step=2)
    with pytest.raises(ConfigError, match="is not a run folder"):
        export_run(tmp_path, tmp_path / "other")
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="has no complete checkpoint yet"):
        export_run(tmp_path, tmp_path / "other")


def test_a_failure_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HFFolder.write

    def full(self: HFFolder, name: str, tensor: Tensor) -> None:
        if name == "lm_head.weight":
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, name, tensor)

    with monkeypatch.context() as patched:
        patched.setattr(HFFolder, "write", full)
        with pytest.raises(ConfigError, match=r"OUT=.*/hf: .*step_000006 could not be written \(.*No space left on device\); make room"):
            export_run(run, tmp_path / "hf")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(ConfigError, match=r"the export needs 0.00 GB, but the disk has only 0.00 GB left"):
            export_run(run, tmp_path / "hf")
    assert not any(tmp_path.iterdir())
    (tmp_path / "hf.partial").mkdir()  # what a killed export leaves
    (tmp_path / "hf.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    export_run(run, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and len(list((tmp_path / "hf").glob("*.safetensors"))) == 1


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    data = max((tmp_path / "run" / "checkpoints" / "step_000006").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        export_run(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_another_architecture_is_refused(run: Path) -> None:
    folder = run / "checkpoints" / "step_000006"
    architecture = load_config(run / "config.yaml").architecture
    deeper, wider = (architecture.model_copy(update=change) for change in ({"num_hidden_layers": 5}, {"intermediate_size": 128}))
    with pytest.raises(ValueError, match=r"layer_norm_weight has shape \(4, 64\), but the architecture"):
        list(CheckpointReader(folder, deeper).tensors())
    with pytest.raises(
        ValueError, match=r"linear_fc1.weight has shape \(4, 192, 64\), .* implies \(256, 64\) for model.layers.0.mlp.gate_proj"
    ):
        list(CheckpointReader(folder, wider).tensors())
    with pytest.raises(ValueError, match="not a distributed checkpoint"):
        CheckpointReader(run, architecture)


def made_up(run: Path, tokenizer: Path | None = None, scale: float = 1.0, **sizes: int) -> dict[str, Tensor]:
    """A run folder whose checkpoint torch wrote, with a tensor for each layer by its number. Returns what it holds."""
    import torch.distributed.checkpoint as dcp

    architecture = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    architecture |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=64) | sizes
    section = {} if tokenizer is None else {"tokenizer": {"kind": "hf", "path": str(tokenizer)}}
    config = build_config({"run": {"dir": str(run)}, "model": {"architecture": architecture, "dtype": "bf16"}, **section})
    a, h = config.architecture, config.architecture.hidden_size
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.weight": (a.query_size + 2 * a.kv_size, h),
        "self_attention.q_layernorm.weight": (a.head_dim,),
        "self_attention.k_layernorm.weight": (a.head_dim,),
        "self_attention.linear_proj.weight": (h, a.query_size),
        "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.weight": (2 * a.intermediate_size, h),
        "mlp.linear_fc2.weight": (h, a.intermediate_size),
    }
    shapes: dict[str, tuple[int, ...]] = {f"decoder.layers.{n}.{name}": s for n in range(a.num_hidden_layers) for name, s in layer.items()}
    shapes |= {"embedding.word_embeddings.weight": (a.vocab_size, h), "output_layer.weight": (a.vocab_size, h)}
    shapes |= {"decoder.final_layernorm.weight": (h,)}
    state = {name: (scale * torch.randn(shape)).to(torch.bfloat16) for name, shape in shapes.items()}
    folder = checkpoint_files.folder_of(run / "checkpoints", 1)
    folder.mkdir(parents=True)
    with warnings.catch_warnings(action="ignore"):  # that there is only one process
        dcp.save(dict(state), checkpoint_id=str(folder), no_dist=True)
    if tokenizer is None:
        SentencePieceTokenizer.train(["0 1 2 3 4 5 6 7 8 9"], 40, [], folder / "tokenizer.model")
    else:
        HFTokenizer(tokenizer).save(folder)
    checkpoint_files.write_manifest(folder, {})
    (run / "config.yaml").write_text(dump_config(config))
    return state


def test_layers_by_number_and_a_chat_template(tmp_path: Path) -> None:
    """The tokenizer comes from the checkpoint, because the one of the configuration may be gone."""
    tokenizer = hf_folder(tmp_path / "tokenizer", "{{ messages[0].content }}!", eos_token="<eos>")
    state = made_up(tmp_path / "run", tokenizer)
    shutil.rmtree(tokenizer)
    export_run(tmp_path / "run", tmp_path / "hf")
    weights = read(tmp_path / "hf")
    assert torch.equal(weights["model.layers.2.mlp.up_proj.weight"], state["decoder.layers.2.mlp.linear_fc1.weight"][48:])
    assert torch.equal(weights["model.layers.1.self_attn.o_proj.weight"], state["decoder.layers.1.self_attention.linear_proj.weight"])
    exported = HFTokenizer(tmp_path / "hf")
    assert exported.decode(exported.encode_prompt("hi")) == "hi!"
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == exported.eos_id


MEASURE = """
import resource, sys
from pathlib import Path
from ais_megatron.export.run import export_run

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small, large, out = map(Path, sys.argv[1:])
export_run(small, out / "small")  # imports what is imported late
before = peak()
export_run(large, out / "large", shard_bytes=50_000_000)
print(peak() - before, sorted({name.split(".")[0] for name in sys.modules} & {"megatron", "transformers"}))
"""


@pytest.mark.slow
def test_memory_is_less_than_two_shards(tmp_path: Path) -> None:
    """270 MB of weights in shards of 50 MB. Neither Megatron nor transformers is imported."""
    made_up(tmp_path / "small")
    sizes = dict(vocab_size=20_000, hidden_size=1024, intermediate_size=3072, num_hidden_layers=14, num_attention_heads=16)
    state = made_up(tmp_path / "large", **sizes)
    total = sum(tensor.nbytes for tensor in state.values())
    del state
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr
    grown, imported = done.stdout.split(" ", 1)
    files = [file.stat().st_size for file in (tmp_path / "out" / "large").glob("*.safetensors")]
    assert sum(files) > total > 250e6 and max(files) < 51e6
    assert int(grown) < 2 * max(files) + 30e6, f"{int(grown) / 1e6:.0f} MB"  # what the allocator keeps of freed tensors
    assert imported.strip() == "[]"
