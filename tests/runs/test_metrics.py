"""Timers, the row file and its repair, sinks on main and other ranks, and the closing figures."""

import json
import os
import sys
import types

import pytest

from ais_megatron.config import Config, ConfigError, build_config
from ais_megatron.runs import metrics
from ais_megatron.runs.metrics import PhaseTimer, Sinks, read_evaluations, read_metrics, step_line
from ais_megatron.runs.summary import print_table, summarize
from tests.helpers.batches import ARCHITECTURE


def make_config(**metrics_section) -> Config:
    return build_config({"model": {"architecture": ARCHITECTURE}, "train": {"steps": 10}, "metrics": metrics_section})


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: ``clock.now = seconds``."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


def test_timer_accumulates_per_phase_and_starts_again(clock):
    timer = PhaseTimer()
    for seconds in (2.0, 0.5):
        with timer.phase("generate"):
            clock.now += seconds
    clock.now += 100.0  # outside any phase
    with timer.phase("train"):
        clock.now += 4.0
    assert timer.take() == {"time/generate": 2.5, "time/train": 4.0}
    assert timer.take() == {}


def test_timer_waits_for_the_device_within_the_phase(clock):
    def synchronize():
        clock.now += 3.0

    timer = PhaseTimer(synchronize)
    with timer.phase("train"):
        clock.now += 1.0
    assert timer.take() == {"time/train": 4.0}


def test_timer_refuses_nesting_unknown_names_and_taking_while_open():
    timer = PhaseTimer()
    with timer.phase("train"):
        with pytest.raises(AssertionError, match="'sync' begins inside phase 'train'"), timer.phase("sync"):
            pass
        with pytest.raises(AssertionError, match="still running"):
            timer.take()
    with pytest.raises(AssertionError, match="unknown phase"), timer.phase("trian"):
        pass


def test_timer_survives_an_exception(clock):
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer.phase("reward"):
        clock.now += 1.0
        raise KeyError("boom")
    with timer.phase("reward"):
        clock.now += 1.0
    assert timer.take() == {"time/reward": 2.0}


def test_rows_are_exact_ordered_and_null_for_nan(tmp_path):
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        sinks.log(1, {"loss": 0.1 + 0.2, "alpha": float("nan"), "step": 1, "lr": float("inf"), "note": "ü", "count": 3})
    expected = '{"step": 1, "alpha": null, "count": 3, "loss": 0.30000000000000004, "lr": null, "note": "ü"}\n'
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == expected
    assert read_metrics(tmp_path) == [{"step": 1, "alpha": None, "count": 3, "loss": 0.1 + 0.2, "lr": None, "note": "ü"}]


def test_each_row_is_one_write_of_a_whole_line(tmp_path, monkeypatch):
    written = []
    real_write = os.write
    monkeypatch.setattr(metrics.os, "write", lambda descriptor, data: written.append(data) or real_write(descriptor, data))
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        sinks.log(1, {"loss": 1.0})
        sinks.log(2, {"loss": 2.0})
    assert written == [b'{"step": 1, "loss": 1.0}\n', b'{"step": 2, "loss": 2.0}\n']


def test_a_short_write_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.os, "write", lambda descriptor, data: len(data) - 1)
    with Sinks(make_config(), tmp_path, is_main=True) as sinks, pytest.raises(RuntimeError, match="disk full"):
        sinks.log(1, {"loss": 1.0})


def test_the_row_and_the_call_must_agree_on_the_step(tmp_path):
    with Sinks(make_config(), tmp_path, is_main=True) as sinks, pytest.raises(AssertionError, match="row of step 2 logged as step 1"):
        sinks.log(1, {"step": 2})


def test_other_ranks_write_nothing(tmp_path, capsys):
    with Sinks(make_config(tensorboard=True), tmp_path, is_main=False) as sinks:
        sinks.truncate_after(0)
        sinks.log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_no_file_before_the_first_row(tmp_path):
    with Sinks(make_config(), tmp_path, is_main=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_truncate_keeps_rows_byte_for_byte_and_appending_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = '{"step": 1,   "loss": 1.50}\n'  # not how we write it, so that a re-encoding would show
    path.write_text(first + '{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 3.0}\n{"step": 4, "lo')
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        sinks.truncate_after(1)
        assert path.read_text() == first
        sinks.log(2, {"loss": 2.5})
        sinks.truncate_after(1)  # also with the file open
        sinks.log(2, {"loss": 2.25})
    assert path.read_text() == first + '{"step": 2, "loss": 2.25}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_never_swallows_the_next_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        sinks.log(2, {"loss": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("tail", [b"", b'{"step": 2', b'{"step": 2}', b"\xff\xfe", b"\x00\x00\n", b'{"step": \n'])
def test_reading_tolerates_a_torn_last_line(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + tail)
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_reading_names_a_damaged_line_in_the_middle(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 "):
        read_metrics(tmp_path)


def test_reading_a_run_without_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_one_plain_line_per_step_when_stdout_is_no_terminal(tmp_path, capsys):
    row = {"reward_mean": 0.5, "alpha": 0.25, "weight_reliability": 0.99, "divergence_severity": 2e-3}
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        sinks.log(1, {**row, "held_out_accuracy": 0.125, "tokens_per_second": 1234.5, "time/step": 8.04})
        sinks.log(2, row)
    assert capsys.readouterr().out == (
        "step  1/10  reward 0.500  held-out 12.5%  alpha 0.250  rho 0.990  D 2.0e-03  1,234 tokens/s  8.0 s\n"
        "step  2/10  reward 0.500  alpha 0.250  rho 0.990  D 2.0e-03\n"
    )


def test_the_line_shows_nan_and_leaves_out_what_is_missing():
    assert step_line(3, 100, {"alpha": float("nan"), "reward_mean": None}) == "step   3/100  alpha nan"


def test_tensorboard_gets_the_numbers_and_a_resumed_run_purges(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(tensorboard=True)
    with Sinks(config, tmp_path, is_main=True) as sinks:
        for step in (1, 2, 3):
            sinks.log(step, {"alpha": step / 4, "note": "text", "gap": None})
    with Sinks(config, tmp_path, is_main=True) as sinks:
        sinks.truncate_after(1)
        sinks.log(2, {"alpha": 0.75})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["alpha"]
    assert [(event.step, event.value) for event in events.Scalars("alpha")] == [(1, 0.25), (2, 0.75)]


class FakeWandb(types.ModuleType):
    """Records what wandb would have been told."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None):
        super().__init__("wandb")
        self.refusal, self.inits, self.logged, self.exit_codes, self.defined = refusal, [], [], [], []
        self.Settings = dict

    def init(self, **arguments):
        if self.refusal:
            raise self.Error(self.refusal)
        self.inits.append(arguments)
        return types.SimpleNamespace(
            url="https://wandb.test/run",
            log=self.logged.append,
            finish=lambda exit_code: self.exit_codes.append(exit_code),
            define_metric=lambda name, step_metric=None: self.defined.append((name, step_metric)),
        )


def install_wandb(monkeypatch, fake):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics, "find_spec", lambda name: object())


def test_wandb_is_resumed_by_the_stored_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    install_wandb(monkeypatch, fake)
    for step in (1, 2):
        with Sinks(make_config(wandb="online"), tmp_path, is_main=True) as sinks:
            sinks.log(step, {"alpha": 0.5})
    first, second = fake.inits
    assert first["id"] == second["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert (first["mode"], first["resume"], first["dir"], first["project"]) == ("online", "allow", str(tmp_path), "ais_megatron")
    assert fake.logged == [{"step": 1, "alpha": 0.5}, {"step": 2, "alpha": 0.5}]
    assert fake.defined[:2] == [("step", None), ("*", "step")]
    assert fake.exit_codes == [0, 0]


def test_wandb_is_told_of_a_failed_run_and_finished_once(tmp_path, monkeypatch):
    fake = FakeWandb()
    install_wandb(monkeypatch, fake)
    with pytest.raises(KeyError), Sinks(make_config(wandb="offline"), tmp_path, is_main=True) as sinks:
        raise KeyError("boom")
    sinks.close()
    assert fake.exit_codes == [1]
    assert fake.inits[0]["resume"] is None


def test_wandb_is_not_started_on_other_ranks(tmp_path, monkeypatch):
    fake = FakeWandb()
    install_wandb(monkeypatch, fake)
    Sinks(make_config(wandb="offline"), tmp_path, is_main=False).close()
    assert fake.inits == []


def test_wandbs_refusal_is_a_config_error(tmp_path, monkeypatch):
    install_wandb(monkeypatch, FakeWandb(refusal="no API key"))
    with pytest.raises(ConfigError, match="metrics.wandb=online: no API key; log in"):
        Sinks(make_config(wandb="online"), tmp_path, is_main=True)


@pytest.mark.parametrize("is_main", [True, False])
@pytest.mark.parametrize(("section", "package"), [({"wandb": "offline"}, "wandb"), ({"tensorboard": True}, "tensorboard")])
def test_a_missing_package_is_an_error_on_every_rank(tmp_path, monkeypatch, section, package, is_main):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"the package {package} is not installed; install"):
        Sinks(make_config(**section), tmp_path, is_main=is_main)


def test_secret_sounding_keys_stay_here():
    config = {"server": {"api_key": "s", "url": "u"}, "hf_token": "s", "list": [{"password": "s", "lr": 1.0}], "tokenizer": {"kind": "hf"}}
    kept = {"server": {"url": "u"}, "list": [{"lr": 1.0}], "tokenizer": {"kind": "hf"}}
    assert metrics._without_secrets(config) == kept
    ours = make_config().model_dump(mode="json")
    assert metrics._without_secrets(ours) == ours  # tokens_per_microbatch and its like are no secrets


def test_summary_by_hand():
    rows = [
        {"step": 1, "alpha": 0.2, "weight_reliability": 1.0, "divergence_severity": 1e-3, "num_response_tokens": 100, "time/step": 1.0},
        {"step": 2, "alpha": 0.4, "weight_reliability": 0.5, "divergence_severity": None, "num_response_tokens": 300, "time/step": 3.0},
        {"step": 3, "alpha": None, "num_response_tokens": 999},  # no seconds: its tokens must not count either
    ]
    assert summarize(rows, 0.25, 0.5, 61.0) == {
        "start_accuracy": 0.25,
        "final_accuracy": 0.5,
        "mean_alpha": pytest.approx(0.3, rel=1e-15),
        "mean_weight_reliability": 0.75,
        "mean_divergence_severity": 1e-3,
        "tokens_per_second": 100.0,
        "wall_seconds": 61.0,
    }


def test_summary_of_nothing_is_none_not_zero():
    summary = summarize([], None, None, 0.0)
    assert summary.pop("wall_seconds") == 0.0
    assert set(summary.values()) == {None}


def test_table_for_humans(capsys):
    print_table(summarize([{"step": 1, "alpha": 0.5}], 0.25, 0.375, 3725.4), "runs/a/report/index.html")
    out = capsys.readouterr().out
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if line.startswith("│")}
    assert lines["held-out pass@1 at the start"] == "25.0%"
    assert lines["change"] == "+12.5 points"
    assert lines["mean alpha"] == "0.500"
    assert lines["mean ESS ratio (weight reliability)"] == "-"
    assert lines["wall time (h:mm:ss)"] == "1:02:05"
    assert out.endswith("report: runs/a/report/index.html\n")
    assert "\x1b" not in out


def test_rows_are_json_that_any_strict_reader_accepts(tmp_path):
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        sinks.log(1, {"a": float("-inf"), "b": 1e-300})

    def refuse(word):
        raise AssertionError(word)

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == {"step": 1, "a": None, "b": 1e-300}


def test_an_evaluation_that_ends_after_its_step_is_logged_belongs_to_the_step(tmp_path, capsys):
    first, second = {"set": "a", "pass@1": 0.25, "held_out_accuracy": 0.25}, {"set": "b", "pass@1": float("nan")}
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        sinks.log_evaluation(0, [first, second], in_a_row=False)
        sinks.log(1, {"loss": 1.0})
        sinks.log(2, {"loss": 2.0})
        sinks.log_evaluation(1, [first | {"pass@1": 0.5, "held_out_accuracy": 0.5}], in_a_row=False)
        sinks.say("evaluation")
        assert sinks.has_evaluation(0, ["a", "b"]) and sinks.has_evaluation(1, ["a"])
        assert not sinks.has_evaluation(1, ["a", "b"]) and not sinks.has_evaluation(2, ["a"])
    assert "evaluation\n" in capsys.readouterr().out
    assert [(row["step"], row["set"], row["pass@1"]) for row in read_evaluations(tmp_path)] == [
        (0, "a", 0.25),
        (0, "b", None),
        (1, "a", 0.5),
    ]
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 1.0, "held_out_accuracy": 0.5, "eval/a/pass@1": 0.5},
        {"step": 2, "loss": 2.0},
    ]
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        sinks.truncate_evaluations_after(0)
        sinks.log_evaluation(1, [first], in_a_row=True)
    assert [row["step"] for row in read_evaluations(tmp_path)] == [0, 0, 1]


def test_a_run_of_an_earlier_version_has_its_evaluations_in_the_rows_of_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "alpha": 0.5}\n{"step": 2, "held_out_accuracy": 0.25}\n')
    with Sinks(make_config(), tmp_path, is_main=True) as sinks:
        assert sinks.has_evaluation(2, ["held_out"]) and not sinks.has_evaluation(1, ["held_out"])
    with Sinks(make_config(), tmp_path, is_main=False) as other:
        other.log_evaluation(3, [{"set": "a"}], in_a_row=False)
    assert read_evaluations(tmp_path) == []
