"""Checkpoints that several files of this folder use."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.engines import RECURRENT

LINEAR = {name: value for name, value in RECURRENT.items() if name.startswith("linear")}
ROPE = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0], "mrope_interleaved": True}


@pytest.fixture(scope="session")
def qwen35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of the language model alone, with weights far from their initial values."""
    vectors = ("norm.weight", "A_log", "dt_bias")
    return write_checkpoint(
        tmp_path_factory.mktemp("qwen3_5"),
        transformers.Qwen3_5ForCausalLM,
        lambda name: 0.3 if name.endswith(vectors) else 0.05,
        head_dim=16,
        tie_word_embeddings=False,
        full_attention_interval=2,
        rope_parameters=ROPE,
        **LINEAR,
    )
