"""The user's own task, reward and objective: found before anything starts, refused by name, and trained with."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ais_megatron.algorithm import objectives
from ais_megatron.algorithm.objectives import check_objective, surrogate
from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Config, ConfigError, TaskConfig, build_config, doors, dump_config, load_config
from ais_megatron.config.algorithm import ObjectiveConfig, ObjectivePreset
from ais_megatron.sft import cached_folder
from ais_megatron.tasks import make_task
from tests.helpers.paths import ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.runs import rows_of, run, small, trained, write

MODULE = """
import torch
from somewhere_that_does_not_exist import helper
from ais_megatron.algorithm.objectives import Surrogate
from ais_megatron.config.algorithm import ObjectivePreset

class MyTask: pass

def my_reward(truth, response, options): return 1.0

def my_objective(*args): pass

my_objective.preset = ObjectivePreset(0.3, aggregation="sequence", sequence_level=True)

def shouting(*args): pass

shouting.preset = ObjectivePreset(aggregation="loud")

def computed(*args): pass

class Remote: pass

Remote.traits = EngineTraits(has_servers=False, keeps_kv_scales=True)

class Bent: pass

Bent.traits = EngineTraits(servers=True)

computed.preset = ObjectivePreset(clip_low=1 / 3)

if True:
    Inner = 3
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module that cannot be imported, but can be read."""
    (tmp_path / "my_code.py").write_text(MODULE)
    (tmp_path / "bent.py").write_text("def f(:\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "tasks.py").write_text("class Deep: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    return tmp_path


def config_of(**sections: object) -> Config:
    return build_config({"model": small(Path())["model"], "rollout": {"max_response_tokens": 12}, **sections})


def test_names_are_found_without_an_import(code: Path) -> None:
    config = config_of(task={"name": "my_code:MyTask", "reward": "my_code:my_reward", "options": {"size": 3, "more": {"deep": [1]}}})
    assert config.task.options == {"size": 3, "more": {"deep": [1]}}
    assert config_of(task={"name": "pack.tasks:Deep"}).task.name == "pack.tasks:Deep"
    assert config_of(task={"name": "my_code:Inner"}), "an assignment may be anything"
    objective = config_of(objective={"name": "my_code:my_objective", "clip_high": 0.7})
    assert objective.objective.resolved == ObjectivePreset(0.3, 0.7, "sequence", "group_std", sequence_level=True)
    assert objective.weight_level == "geometric"
    assert config_of(objective={"name": "my_code:my_reward"}).objective.resolved == ObjectivePreset(), "GRPO's where there is none"
    assert "my_code" not in sys.modules
    (code / "c.yaml").write_text(dump_config(config))
    assert load_config("c.yaml") == config
    assert load_config("c.yaml", ["task.options.size=4", "task.options.more={deep: [2]}"]).task.options == {
        "size": 4,
        "more": {"deep": [2]},
    }


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": {"name": "sudokku"}}, r"^task.name='sudokku': unknown task; allowed: .*module:Class; did you mean sudoku\?$"),
        (
            {"task": {"name": "my_code:MyTusk"}},
            r"^task.name='my_code:MyTusk': module my_code has no class MyTusk; did you mean my_code:MyTask\?$",
        ),
        ({"task": {"name": "my_coda:MyTask"}}, r"there is no module my_coda in .*; did you mean my_code\?$"),
        ({"task": {"name": "pack.task:Deep"}}, r"there is no module pack.task in "),
        ({"task": {"name": "my_code:my_reward"}}, r"my_reward is a function in module my_code; a class is needed"),
        ({"task": {"name": "my_code.py:MyTask"}}, r"write module:class, .*; here my_code:MyTask$"),
        ({"task": {"name": "my_code:"}}, r"task.name='my_code:': write module:class"),
        ({"task": {"name": "bent:f"}}, r"bent.py is not valid Python: .*line 1"),
        (
            {"task": {"reward": "my_code:MyTask"}},
            r"^task.reward='my_code:MyTask': MyTask is a class in module my_code; a function is needed$",
        ),
        ({"task": {"reward": "my_code:reward"}}, r"has no function reward; did you mean my_code:my_reward\?$"),
        ({"task": {"option": {}}}, r"task.option: unknown key; did you mean task.options\?"),
        ({"task": {"options": {"size": 3}}}, r"^task.options=\{'size': 3\}: nothing reads them, because task.name=countdown is built in"),
        ({"objective": {"name": "grop"}}, r"^objective.name='grop': unknown objective; .*did you mean grpo\?$"),
        ({"objective": {"name": "my_code:my_objectiv"}}, r"has no function my_objectiv; did you mean my_code:my_objective\?$"),
        ({"objective": {"name": "my_code:shouting"}}, r"its preset: aggregation='loud': input should be 'token', 'sequence' or 'constant'"),
        ({"objective": {"name": "my_code:computed"}}, r"must be one call whose arguments are plain numbers"),
        ({"correction": "aiss"}, r"^correction='aiss': input should be .*; did you mean ais\?$"),
        ({"rollout": {"engine": "locale"}}, r"^rollout.engine='locale': unknown engine; allowed: .*module:Class; did you mean local\?$"),
        ({"rollout": {"engine": "my_code:Remotes"}}, r"module my_code has no class Remotes; did you mean my_code:Remote\?$"),
        ({"rollout": {"engine": "my_code:Bent"}}, r"its traits: .*'servers'; allowed: is_embedded, has_servers, "),
    ],
)
def test_what_cannot_work_is_refused_when_the_configuration_is_read(code: Path, sections: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**sections)


def test_a_misspelt_name_starts_nothing_and_leaves_no_run_folder(code: Path) -> None:
    write(code)
    script = "import sys; from ais_megatron.cli import main; sys.argv[1:] = ['train', 'config.yaml', 'task.name=my_code:MyTusk']\n"
    script += "try: main()\nfinally: print('torch' in sys.modules)\n"
    script = script.replace("from ais", "import os; os._exit = sys.exit\nfrom ais", 1)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "did you mean my_code:MyTask?" in done.stderr and done.stdout.strip() == "False" and done.returncode == 2, done.stderr
    assert not (code / "run").exists()


def test_code_that_fails_later_says_whose_it_is(code: Path) -> None:
    with pytest.raises(RuntimeError, match="task.name=my_code:MyTask: importing my_code failed with ModuleNotFoundError"):
        make_task(TaskConfig(name="my_code:MyTask"), 0)
    (code / "fails.py").write_text(
        "class Bare:\n    def __init__(self, config, seed): pass\n"
        "class Broken:\n    def __init__(self, config, seed): raise KeyError(config.options['what'])\n"
        "def wrong(truth, response, options): return options['verdict']\n"
    )
    with pytest.raises(ValueError, match="task.name=fails:Bare: the class lacks name, special_pieces, train_problem"):
        make_task(TaskConfig(name="fails:Bare"), 0)
    with pytest.raises(RuntimeError, match="creating the task failed with KeyError: 'this'"):
        make_task(TaskConfig(name="fails:Broken", options={"what": "this"}), 0)

    def judged(options: dict[str, object]) -> object:
        return make_task(TaskConfig(reward="fails:wrong", options=options), 0).reward({}, "text")

    assert judged({"verdict": 0.25}).value == 0.25 and judged({"verdict": 1}).correct and not judged({"verdict": 0}).well_formed
    for verdict in ("high", float("nan")):
        with pytest.raises(ValueError, match="task.reward=fails:wrong: returned .* for the response 'text'; return a finite number"):
            judged({"verdict": verdict})
    with pytest.raises(RuntimeError, match="task.reward=fails:wrong: raised KeyError: 'verdict' for the response 'text'"):
        judged({"other": 1})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("logprobs", "returned Tensor; return an ais_megatron.algorithm.objectives.Surrogate"),
        (
            "Surrogate(logprobs.sum(), logprobs, loss_mask)",
            r"its objective must be a tensor of shape \[batch, seq\], here \[2, 4\], got \[\]",
        ),
        ("Surrogate(logprobs / 0.0 * 0.0, logprobs, loss_mask)", "its objective is not finite"),
        ("Surrogate(old_logprobs, logprobs, loss_mask)", "does not depend on logprobs"),
        ("Surrogate(logprobs @ logprobs, logprobs, loss_mask)", "raised RuntimeError"),
    ],
)
def test_an_objective_is_tried_before_training(code: Path, returned: str, message: str) -> None:
    name = f"objective_{abs(hash(returned))}"
    (code / f"{name}.py").write_text(
        "from ais_megatron.algorithm.objectives import Surrogate\n"
        f"def f(logprobs, old_logprobs, advantages, loss_mask, clip_low, clip_high): return {returned}\n"
    )
    with pytest.raises((ValueError, RuntimeError), match=f"objective.name={name}:f: .*{message}"):
        check_objective(ObjectiveConfig(name=f"{name}:f"))


def test_padding_does_not_reach_an_objective_of_ones_own() -> None:
    mask = torch.tensor([[False, True, True]])
    poisoned = torch.tensor([[float("inf"), -1.0, -2.0]])
    logprobs = torch.tensor([[float("nan"), -1.0, -2.0]], requires_grad=True)
    j = surrogate("examples.soft_gate_objective:soft_gate", logprobs, poisoned, torch.tensor([2.0]), mask, 0.2, 0.3)
    j.objective.sum().backward()
    assert logprobs.grad.tolist() == [[0.0, 2.0, 2.0]], "on the policy the gate is open: A r"


def test_every_objective_is_in_both_tables() -> None:
    from ais_megatron.algorithm.correction import METHODS
    from ais_megatron.config.algorithm import OBJECTIVE_PRESETS, CorrectionName

    assert objectives.OBJECTIVES.keys() == OBJECTIVE_PRESETS.keys()
    assert set(METHODS) == set(CorrectionName.__args__)


def test_every_engine_is_in_both_tables() -> None:
    from ais_megatron.config import RolloutConfig
    from ais_megatron.config.engines import ENGINES
    from ais_megatron.rollout.build import BUILDERS

    assert ENGINES.keys() == BUILDERS.keys()
    assert all(RolloutConfig(engine=name).engine_traits == traits for name, traits in ENGINES.items())


def test_errors_of_a_users_task_name_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums.py").write_text(
        "from ais_megatron.tasks.streams import StreamTask\n"
        "class Sums(StreamTask):\n"
        "    def parse(self, row): pass\n"
        "    def reward(self, problem_truth, response): return 0.5 if response == 'half' else int(response)\n"
    )
    monkeypatch.chdir(tmp_path)
    task = make_task(TaskConfig(name="sums:Sums"), 0)
    assert task.name == "Sums" and task.reward({}, "half").value == 0.5 and task.reward({}, "1").correct
    with pytest.raises(RuntimeError, match="task.name=sums:Sums: raised ValueError: invalid literal .* for the response 'many'"):
        task.reward({}, "many")


def test_an_engines_traits_are_read_without_an_import(code: Path) -> None:
    from ais_megatron.config.engines import EngineTraits

    assert config_of(rollout={"engine": "my_code:Remote"}).rollout.engine_traits == EngineTraits(keeps_kv_scales=True)
    assert config_of(rollout={"engine": "my_code:MyTask"}).rollout.engine_traits == EngineTraits(is_embedded=True), "where there are none"


def refused_engine(rank: int, folder: str) -> str:
    import os

    from ais_megatron.rollout.build import build_engine

    os.chdir(folder)
    try:
        build_engine(config_of(rollout={"engine": "half:Half", "quantization": "none"}), eos_ids=(1,), pad_id=0)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_an_engine_that_lacks_a_method_is_refused_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("class Half:\n    version = -1\n    def generate(self, prompts, sampling): pass\n")
    for answer in ranks.run(2, refused_engine, folder=str(tmp_path)):
        assert "rollout.engine='half:Half': the class lacks close, probe, takes_updates_while_generating, update_weights; see" in answer


def test_a_cached_starting_policy_belongs_to_the_source_of_its_task(code: Path) -> None:
    ours, options = ({"name": "my_code:MyTask", "options": {"size": size}} for size in (1, 2))
    first = cached_folder(config_of(task=ours))
    assert first != cached_folder(config_of(task=options))
    assert first == cached_folder(config_of(task=ours | {"reward": "my_code:my_reward"})), "rewards play no part in a warm start"
    (code / "my_code.py").write_text(MODULE + "\n# changed\n")
    assert first != cached_folder(config_of(task=ours))


EXAMPLES = {
    "task": {"task": {"name": "examples.sorting_task:Sorting", "options": {"digits": 3}}},
    "reward": {
        "task": {"name": "sudoku", "reward": "examples.partial_credit_reward:right_cells"},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_response_tokens": 40},
    },
    "objective": {"objective": {"name": "examples.soft_gate_objective:soft_gate", "entropy_bonus": 0.1}},
    "engine": {"rollout": {"engine": "examples.plain_engine:PlainEngine", "quantization": "none", "prompts_per_step": 4, "group_size": 2}},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_trains(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """With one rank, as docs/extending.md says. One of them from the command line, where imports take longer than training."""
    config = write(tmp_path, parallel={"dp": 1}, train={"steps": 2, "optimizer": {"lr": 1e-3}}, **EXAMPLES[name])
    if name == "task":
        run("train", config)
    else:
        ranks.run(1, trained, config=load_config(config))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm"] > 0.0 for row in rows)
    assert all(0.0 <= row["reward_mean"] <= 1.0 for row in rows)
    assert load_config(tmp_path / "run" / "config.yaml") == load_config(tmp_path / "config.yaml")


@contextmanager
def example_service() -> Iterator[str]:
    """The URL of examples/reward_service.py, which runs as docs/extending.md says."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "examples.reward_service", "--port", str(port)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the service does not start"
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/reward"
    finally:
        process.terminate()
        process.wait()


def test_the_example_service_judges_and_trains(ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIS_REWARD_KEY", "secret")
    with example_service() as url:
        task = make_task(TaskConfig(reward=url, options={"penalty": 0.25}), 0)
        truth = {"numbers": [7, 5, 2], "target": 24}
        assert task.reward(truth, "<answer>(7+5)*2</answer>").value == 0.75
        assert task.reward({"numbers": [7, 5, 2], "target": 14}, "<answer>7+5+2</answer>").reason.endswith("it is 14, expected 14")
        monkeypatch.delenv("AIS_REWARD_KEY")
        with pytest.raises(RuntimeError, match="answered HTTP 401: .* set the environment variable AIS_REWARD_KEY to a valid key"):
            make_task(TaskConfig(reward=url), 0).reward(truth, "")
    with example_service() as url:
        ranks.run(2, trained, config=load_config(write(tmp_path, task={"reward": url}, train={"steps": 1})))
    (row,) = rows_of(tmp_path)
    assert row["grad_norm"] > 0.0 and row["reward_errors"] == 0


def half_fail(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float:
    assert len(response) % 2
    return 0.5 + len(response) / 1000


def test_metrics_leave_out_what_could_not_be_judged(ranks: RankPool, tmp_path: Path) -> None:
    task = {"reward": f"{__name__}:half_fail", "reward_errors": "drop"}
    ranks.run(
        2, trained, config=load_config(write(tmp_path, task=task, train={"steps": 1}, rollout={"prompts_per_step": 8, "group_size": 4}))
    )
    (row,) = rows_of(tmp_path)
    assert row["num_responses"] == 32 and 0 < row["reward_errors"] < 32
    assert 0.5 < row["reward_mean"] < 0.6 and row["well_formed"] == 1.0 and row["grad_norm"] > 0.0


def test_examples_by_hand() -> None:
    sorting = make_task(TaskConfig(name="examples.sorting_task:Sorting", options={"digits": 3}), 0)
    problem = sorting.train_problem(0)
    assert len(problem.text) == 4 and sorting.reward(problem.truth, problem.solution).value == 1.0
    assert sorting.reward({"sorted": "123"}, "<answer>132</answer>").value == pytest.approx(0.1)
    assert sorting.reward({"sorted": "123"}, "123").value == 0.0
    with pytest.raises(ValueError, match=r"task.options=\{'digit': 3\}: allowed: digits"):
        make_task(TaskConfig(name="examples.sorting_task:Sorting", options={"digit": 3}), 0)
    sudoku = make_task(TaskConfig(name="sudoku", reward="examples.partial_credit_reward:right_cells", options={"most": 0.8}), 0)
    truth = {"puzzle": "3102200002100320"}
    assert sudoku.reward(truth, "<answer>3142243142131324</answer>").correct
    assert sudoku.reward(truth, "<answer>3142243142131342</answer>").value == pytest.approx(0.8 * 14 / 16)
    assert sudoku.reward(truth, "3142243142131324").value == 0.0


def _trains_from_its_folder(rank: int, folder: str) -> str:
    import os

    os.chdir(folder)
    return doors.load("task.reward", "mine:judge")({}, "", {})


def test_ranks_find_the_module_in_their_working_directory(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judge(truth, response, options): return 0.5\n")
    assert ranks.run(2, _trains_from_its_folder, folder=str(tmp_path)) == [0.5, 0.5]


@pytest.mark.slow
def test_ranks_of_our_launcher_use_the_users_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def judge(truth, response, options): return 0.5\n")
    write(tmp_path, task={"reward": "mine:judge"}, train={"steps": 1}, sft={"steps": 0, "cache_dir": str(tmp_path / "cache")})
    script = "import sys; sys.path[:] = [p for p in sys.path if p]; from ais_megatron.cli import main; main()"  # as the entry point
    done = subprocess.run([sys.executable, "-c", script, "train", "config.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["reward_mean"] == 0.5
