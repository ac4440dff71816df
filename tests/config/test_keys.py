"""`ais-megatron keys` and the page made from it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ais_megatron.config import Config, ConfigError
from ais_megatron.config.errors import known_keys
from ais_megatron.config.keys import all_keys, as_markdown, keys_of
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "configuration.md"


def test_every_key_is_there_and_described() -> None:
    keys = all_keys()
    names = [key.name for key in keys]
    sections = {name.rpartition(".")[0] for name in names} | {"model", "policy"}
    assert set(names) == set(known_keys(Config)) - sections and len(set(names)) == len(names)
    assert [key.name for key in keys if not key.description] == []


def test_what_the_schema_says() -> None:
    def facts(name: str) -> tuple[str, str, str]:
        (key,) = keys_of(name)
        return key.type, key.default, key.allowed

    assert facts("rollout.top_p") == ("number", "1.0", "greater than 0, at most 1")
    assert facts("rollout.quantization") == ("one of", "fp8_e4m3", "none, fp8_e4m3, fp8_e5m2, fp4_e2m1, int4")
    assert facts("objective.aggregation") == ("empty or one of", "empty", "token, sequence, constant")
    assert facts("model.architecture.head_dim") == ("whole number", "required", "from 1")
    assert facts("ais.tau") == ("number or auto", "0.0005", "")
    assert facts("parallel.dp") == ("whole number or empty", "empty", "from 1")
    assert facts("train.optimizer.lr")[1] == "1e-06" and facts("sft.optimizer.lr")[1] == "0.001", "one schema, two defaults"


def test_a_section_or_one_key_or_the_nearest() -> None:
    assert {key.name.rpartition(".")[0] for key in keys_of("rollout")} == {"rollout", "rollout.sglang"}
    assert {key.name.rpartition(".")[0] for key in keys_of("sft.optimizer")} == {"sft.optimizer"}
    for wrong, nearest in {"rolout": "rollout", "train.optimiser": "train.optimizer", "ais.weight_cup": "ais.weight_cap"}.items():
        with pytest.raises(ConfigError, match=rf"keys {wrong}: there is no such section or key; .*; did you mean {nearest}\?$"):
            keys_of(wrong)


def test_the_command_needs_no_torch() -> None:
    script = "import sys; sys.argv[1:] = ['keys', 'ais']; from ais_megatron.cli import app\n"
    script += "try: app()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "ais.alpha_max  number, from 0, at most 1  = 1.0\n    alpha is never larger than this\n" in done.stdout


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == as_markdown() + "\n", "run ais-megatron keys --markdown > docs/configuration.md"
