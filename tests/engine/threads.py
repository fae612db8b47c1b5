"""A rank on a machine with 8 cores: reports its threads once it has joined its job, and its groups' time limits."""

import os

import torch
from torch.distributed import distributed_c10d

from ds_moe.engine.moe_binding import create_groups
from ds_moe.engine.start import share_patience, start_distributed
from tests.launcher import leave, report

os.sched_getaffinity = lambda _: set(range(8))
start_distributed(1, watchdog_s=9000.0)
create_groups(2)
limits = []
for _ in range(2):
    backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    limits.append([backend.options._timeout.total_seconds() for backend in backends])
    share_patience()
report(threads=torch.get_num_threads(), variable=os.environ["OMP_NUM_THREADS"], limits=limits)
report(port=os.environ["MASTER_PORT"])
leave()
