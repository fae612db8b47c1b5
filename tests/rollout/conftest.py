"""Fake servers, and a client that does not wait long between two looks at them."""

import pytest

from ds_moe.rollout import requests as requests_module
from ds_moe.rollout import server as server_module
from ds_moe.rollout import servers as servers_module
from tests.rollout.fake_vllm import FakeVllm


@pytest.fixture
def impatient(monkeypatch):
    """The same rules with shorter pauses."""
    for module in (requests_module, servers_module):
        monkeypatch.setattr(module, "FIRST_S", 0.005)
    monkeypatch.setattr(requests_module, "TICK_S", 0.01)
    monkeypatch.setattr(server_module, "AGAIN_S", 0.01)


@pytest.fixture
def fake():
    with FakeVllm() as one:
        yield one


@pytest.fixture
def other():
    with FakeVllm() as one:
        yield one
