"""One rank: `MoELayer.build` under DDP, two micro-batches a step, with and without DDP's broadcast of buffers."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ds_moe.moe import MoELayer
from tests.launcher import leave, report

KEYS = {"dim": 20, "width": 12, "experts": 7, "top_k": 2, "loss_free": {"rule": "proportional", "update_rate": 0.1}}


def built():
    torch.manual_seed(0)
    return MoELayer.build(**KEYS)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.randn(world, 2, 9, KEYS["dim"], generator=torch.Generator().manual_seed(1))
    for broadcast in (False, True):
        layer = built()
        wrapped = DistributedDataParallel(layer, broadcast_buffers=broadcast)
        for micro_batch in x[rank]:
            wrapped(micro_batch).square().sum().backward()
        layer.end_step()
        report(**{f"bias_{broadcast}": layer.gate.balancing.bias_E.tolist()})
        report(**{f"grad_{broadcast}": layer.gate.weight.grad.flatten().tolist()})
    leave()


if __name__ == "__main__":
    main()
