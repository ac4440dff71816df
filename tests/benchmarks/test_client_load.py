"""The load test of the SGLang client, at a size of seconds: 64 requests on 4 unreliable servers in two processes."""

from __future__ import annotations

import gc
import importlib
import logging

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("client_load")


def test_nothing_is_lost_or_doubled_and_no_work_is_repeated_but_what_failed(module, caplog):
    with caplog.at_level(logging.WARNING):
        load = module.run(
            requests=64, servers=4, concurrency=16, failing=0.25, median_tokens=16, seconds_per_token=0.005, processes=2, seed=3
        )
        gc.collect()
    assert (load.responses, load.wrong, load.doubled) == (64, 0, 0)
    servers = load.servers
    assert servers["refused"] > 0 and servers["closed"] > 0, "the servers were to fail in both ways"
    assert servers["answered"] == 64 and servers["in_flight"] == servers["dropped"] == 0
    assert servers["received"] == 64 + servers["refused"] + servers["closed"], "one lost connection is not the loss of a server"
    assert load.cpu_s > 0.0 and load.tokens >= 64 * 4
    assert not [record for record in caplog.records if "never retrieved" in record.message or "not used for now" in record.message]


def test_reliable_servers_get_every_request_once_and_many_at_the_same_time(module):
    load = module.run(requests=64, servers=4, concurrency=16, failing=0.0, median_tokens=4, seconds_per_token=0.05, processes=2)
    assert (load.responses, load.wrong, load.doubled) == (64, 0, 0)
    assert load.servers["received"] == load.servers["answered"] == 64
    assert 16 < load.most_in_flight <= 64


def test_a_response_that_was_swapped_would_be_noticed(module, monkeypatch):
    monkeypatch.setattr(module, "digits_of", lambda seed: [1, 2, 3, 4])
    load = module.run(requests=8, servers=1, concurrency=8, failing=0.0, median_tokens=4, seconds_per_token=0.001, processes=1)
    assert load.wrong == 8
