"""A rank on a machine with 8 cores: reports its threads once it has joined its job."""

import os

import torch

from ds_moe.engine.start import start_distributed
from tests.launcher import leave, report

os.sched_getaffinity = lambda _: set(range(8))
start_distributed(1)
report(threads=torch.get_num_threads(), port=os.environ["MASTER_PORT"])
leave()
