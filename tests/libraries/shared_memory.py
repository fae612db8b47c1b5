"""A rank that joins its job by DeepSpeed alone: reports the shared memory that is left of its job, and removes it."""

import os
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from tests.launcher import leave, report

deepspeed.init_distributed("gloo", verbose=False)
deepspeed.comm.all_reduce(torch.ones(4))
dist.barrier()
files = sorted(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer*_{os.environ['MASTER_PORT']}_{dist.get_rank()}"))
report(files=[file.name for file in files])
dist.barrier()
for file in files:
    file.unlink()
leave()
