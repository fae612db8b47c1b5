"""Settings of every test process and of the processes it starts (they inherit the environment)."""

import os
import sys
from pathlib import Path

# Before torch, DeepSpeed or tokenizers are imported: one thread a process (tests start several), no network, quiet.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
# The op that `make` compiled into this environment; without it the first launch of a test compiles for 100 s.
if sys.prefix != sys.base_prefix:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["DS_ACCELERATOR"] = "cpu"
torch.set_num_threads(1)


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
