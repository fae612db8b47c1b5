"""ds_moe/engine/start.py: what needs no job."""

import os

import pytest

from ds_moe.engine import start


@pytest.mark.parametrize("name", sorted(start.ALLOCATOR))
def test_the_allocator_grows_its_blocks_unless_the_user_has_configured_it(name, monkeypatch):
    for variable in start.ALLOCATOR:
        monkeypatch.delenv(variable, raising=False)
    start.use_expandable_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:64")
    start.use_expandable_segments()
    assert {variable: os.environ.get(variable) for variable in start.ALLOCATOR if variable in os.environ} == {
        name: "max_split_size_mb:64"
    }


@pytest.mark.parametrize(("watchdog_s", "seconds"), [(0.0, 7200), (600.0, 7200), (9000.0, 18000)])
def test_collectives_wait_longer_than_the_watchdog(watchdog_s, seconds):
    assert start.patience(watchdog_s).total_seconds() == seconds > watchdog_s
