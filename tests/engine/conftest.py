"""A process group of one rank in this process, for tests of engines."""

import deepspeed
import pytest
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from tests.launcher import free_port


@pytest.fixture(scope="module")
def one_rank():
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**place, "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, str(value))
        patch.setattr(nn.functional, "linear", nn.functional.linear)  # which stage 3 replaces in the whole process
        patch.setattr(groups, "_WORLD_GROUP", None)  # DeepSpeed keeps the group of a process group that has ended
        deepspeed.init_distributed("gloo", verbose=False)
        yield
        dist.destroy_process_group()
