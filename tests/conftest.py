"""Settings of every test process and of the processes it starts (they inherit the environment)."""

import os

# Before torch, DeepSpeed or tokenizers are imported: one thread a process (tests start several), no network, quiet.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")

from importlib.metadata import version

import pytest
import torch

from ds_moe.engine import cpu as ops

CUDA = torch.cuda.is_available()
# On a machine with GPUs, too, DeepSpeed trains on the CPU, which tolerances and numbers of ranks are made for. A test
# that is marked `gpu` gives the processes that it starts DS_ACCELERATOR=cuda.
os.environ["DS_ACCELERATOR"] = "cpu"
torch.set_num_threads(1)
ops.use_environment()  # without the op that `make` compiled, the first launch of a test would compile for 100 s


def pytest_report_header():
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "peft"))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def show(capsys):
    """`show(text)` prints past pytest's capture: for the tables a reader of the test run should see."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", flush=True)

    return show
