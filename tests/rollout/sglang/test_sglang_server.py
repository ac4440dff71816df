"""A server's command line, folder and environment by hand; its life and death with a stand-in that starts at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ais_megatron.rollout.sglang import patience
from ais_megatron.rollout.sglang.server import (
    SGLangServer,
    check_port,
    cores_of_ranks,
    http_status,
    server_command,
    server_environment,
    server_url,
)
from ais_megatron.rollout.sglang.server import write_model_folder as write
from tests.helpers.processes import is_running, wait_for
from tests.helpers.sglang import sglang_config


def test_command_on_a_cpu():
    config = sglang_config("moe", "fp8", python="/sg/python")
    assert server_command(config, Path("/m"), 30001) == (
        "/sg/python -m sglang.launch_server --model-path /m --load-format dummy --skip-tokenizer-init --skip-server-warmup "
        "--host 127.0.0.1 --port 30001 --tp-size 1 --ep-size 1 --context-length 512 --random-seed 0 --kv-cache-dtype fp8_e4m3 "
        "--attention-backend torch_native --max-running-requests 64 --enable-return-routed-experts "
        "--device cpu --disable-overlap-schedule --sleep-on-idle --max-total-tokens 32768"
    ).split(" ")


def test_a_cpu_server_limits_its_recurrent_states():
    """By itself SGLang 0.5.23 makes room for 148,544 of them here, which is 4.9 GB."""
    command = server_command(sglang_config("qwen3_5", "fp8", max_running=10), Path("/m"), 30001)
    assert command[-4:] == ["--max-total-tokens", "5120", "--max-mamba-cache-size", "30"]


def test_command_on_gpus():
    config = sglang_config(
        "dense",
        "bf16",
        device="cuda",
        tp=2,
        mem_fraction=0.5,
        attention_backend="fa3",
        max_running=128,
        extra_args=["--log-level", "warning"],
    )
    assert server_command(config, Path("/m"), 30003, index=3)[1:] == (
        "-m sglang.launch_server --model-path /m --load-format dummy --skip-tokenizer-init --skip-server-warmup "
        "--host 127.0.0.1 --port 30003 --tp-size 2 --ep-size 1 --context-length 512 --random-seed 0 --kv-cache-dtype auto "
        "--mem-fraction-static 0.5 --attention-backend fa3 --max-running-requests 128 --base-gpu-id 6 --log-level warning"
    ).split(" ")


def test_model_folder(tmp_path):
    dense = sglang_config("dense", "bf16")
    content = json.loads((write(dense.architecture, dense.rollout, tmp_path / "a") / "config.json").read_text())
    assert content["architectures"] == ["Qwen3ForCausalLM"] and content["torch_dtype"] == "bfloat16"
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 1e6
    assert "quantization_config" not in content and "num_experts" not in content
    moe = sglang_config("moe", "fp8")
    content = json.loads((write(moe.architecture, moe.rollout, tmp_path / "b") / "config.json").read_text())
    assert content["architectures"] == ["Qwen3MoeForCausalLM"] and content["num_experts"] == 8
    assert content["quantization_config"] == dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])


def test_environment_leaves_behind_what_belongs_to_the_trainer():
    sglang = sglang_config(env={"A": "ours"}, key_file="/k/key").rollout.sglang
    inherited = dict(PATH="/bin", RANK="0", MASTER_PORT="1", TORCHELASTIC_RUN_ID="x", PYTHONPATH=".", A="theirs")
    assert server_environment(sglang, inherited) == dict(
        PATH="/bin",
        A="ours",
        AIS_MEGATRON_KEY_FILE="/k/key",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        SGLANG_USE_CPU_ENGINE="1",
        OMP_NUM_THREADS="1",
    )


def test_ranks_of_a_server_on_a_cpu_share_its_cores():
    """SGLang by itself wants a NUMA node for each rank, and ends without one."""
    assert cores_of_ranks([0, 1, 2, 3, 6], 2) == "0,1|2,3"
    assert cores_of_ranks([4, 5], 2) == "4|5" and cores_of_ranks([4, 5], 3) == "4|5|4"
    sglang = sglang_config(quantization="none", tp=2).rollout.sglang
    assert server_environment(sglang, {})["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    chosen = {"SGLANG_CPU_OMP_THREADS_BIND": "0-3|4-7"}
    assert server_environment(sglang, chosen).items() >= chosen.items()


def test_addresses():
    assert server_url("127.0.0.1", 5) == "http://127.0.0.1:5"
    assert server_url("::1", 5) == "http://[::1]:5"
    assert server_url("0.0.0.0", 5) == f"http://{os.uname().nodename}:5"


def test_healthy_then_stopped_with_its_children(fake_sglang):
    fake = fake_sglang("healthy", key_file=None)
    with SGLangServer(fake.config, fake.folder / "s", fake.config.rollout.sglang.port) as server:
        server.wait_until_healthy(20)
        assert server.alive and http_status(server.url + "/model_info") == 200
        with pytest.raises(ValueError, match="rollout.sglang.port: 127.0.0.1:"):
            check_port("127.0.0.1", server.port)
        with pytest.raises(RuntimeError, match="is already running"):
            server.start()
    assert not server.alive and not any(is_running(pid) for pid in fake.pids())
    server.stop()


def test_the_key_is_wanted_and_stays_off_the_command_line(fake_sglang, tmp_path):
    fake = fake_sglang("healthy", key_file=str(tmp_path / "key"))
    with SGLangServer(fake.config, tmp_path / "s", fake.config.rollout.sglang.port) as server:
        server.wait_until_healthy(20)
        assert http_status(server.url + "/model_info") == 401
        assert http_status(server.url + "/model_info", server.key) == 200
        assert server.key not in Path(f"/proc/{fake.pids()[0]}/cmdline").read_text()
        assert server.key not in Path(f"/proc/{fake.pids()[0]}/environ").read_text()


def test_a_server_without_our_plugin_is_refused(fake_sglang, tmp_path):
    fake = fake_sglang("open", key_file=str(tmp_path / "key"))
    server = SGLangServer(fake.config, tmp_path / "s", fake.config.rollout.sglang.port)
    server.start()
    with pytest.raises(RuntimeError, match="answered a request without the key"):
        server.wait_until_healthy(20)
    assert not server.alive


def test_a_crash_is_reported_with_command_status_and_log(fake_sglang, tmp_path):
    fake = fake_sglang("crash")
    server = SGLangServer(fake.config, tmp_path / "s", fake.config.rollout.sglang.port)
    server.start()
    with pytest.raises(RuntimeError) as caught:
        server.wait_until_healthy(20)
    message = str(caught.value)
    assert "status 3 before" in message and "sglang.launch_server" in message and str(server.log_path) in message
    assert message.endswith("line 99") and "line 70\n" in message and "line 69\n" not in message
    server.stop()
    assert server.exit_status == 3


def test_an_interpreter_that_is_not_there(fake_sglang, tmp_path):
    fake = fake_sglang("healthy", python=str(tmp_path / "none"))
    server = SGLangServer(fake.config, tmp_path / "s", fake.config.rollout.sglang.port)
    server.start()
    with pytest.raises(RuntimeError, match="cannot be started"):
        server.wait_until_healthy(20)


def test_a_server_that_never_answers_is_stopped(fake_sglang, tmp_path):
    fake = fake_sglang("silent")
    server = SGLangServer(fake.config, tmp_path / "s", fake.config.rollout.sglang.port)
    server.start()
    wait_for((tmp_path / "pids").exists)
    with pytest.raises(RuntimeError, match="not healthy after 0.5 s"):
        server.wait_until_healthy(0.5)
    assert not any(is_running(pid) for pid in fake.pids())


@pytest.mark.parametrize(("device", "hint"), [("cuda", True), ("cpu", False)])
def test_waiting_says_for_what(fake_sglang, tmp_path, monkeypatch, capsys, device, hint):
    fake = fake_sglang("silent", device=device)
    server = SGLangServer(fake.config, tmp_path / "s", fake.config.rollout.sglang.port)
    monkeypatch.setattr(patience, "EVERY_S", 0.0)
    server.start()
    wait_for((tmp_path / "pids").exists)
    with pytest.raises(RuntimeError):
        server.wait_until_healthy(0.5)
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(
        f"waiting for SGLang server {server.url} for 0 s (at most 0 s, rollout.sglang.startup_timeout_s); {server.log_path}"
    )
    assert " ends with: started with -m sglang.launch_server" in said
    assert ("DeepGEMM" in said) == hint


@pytest.mark.parametrize("victim", ["parent", "guardian"])
def test_kill_9_leaves_nothing_behind(fake_sglang, tmp_path, victim):
    fake = fake_sglang("healthy")
    (tmp_path / "config.json").write_text(fake.config.model_dump_json())
    script = (
        "import sys, time, pathlib; from ais_megatron.config import Config; from ais_megatron.rollout.sglang.server import SGLangServer\n"
        "config = Config.model_validate_json(pathlib.Path(sys.argv[1], 'config.json').read_text())\n"
        "server = SGLangServer(config, pathlib.Path(sys.argv[1], 's'), config.rollout.sglang.port)\n"
        "server.start(); server.wait_until_healthy(20); print(server._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        guardian = int(parent.stdout.readline())
        server, child = fake.pids()
        os.kill({"parent": parent.pid, "guardian": guardian}[victim], signal.SIGKILL)
        wait_for(lambda: not is_running(server))
        if victim == "parent":
            wait_for(lambda: not is_running(child))
        else:  # the stand-in's child does not ask the kernel to follow its parent, as SGLang's do
            os.kill(child, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()
