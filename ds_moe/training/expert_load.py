"""What the layers counted on each rank, added up over the ranks for the monitor."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe.moe.layer import MoELayer
from ds_moe.monitor.reports import RoutingReport

MOST_KINDS = 16  # a load of its own is kept for up to this many kinds of records
MOST_PAIRED_EXPERTS = 128  # (E, E) counts of co-activation are kept up to this many experts


def watch(layers: Sequence[MoELayer], kinds: int) -> None:
    """Have the layers tell `kinds` kinds of records apart, and the first count which experts serve the same tokens,
    where that is cheap."""
    for layer in layers:
        layer.load.kinds = kinds if kinds <= MOST_KINDS else 0
    if layers and layers[0].load.num_experts <= MOST_PAIRED_EXPERTS:
        layers[0].load.count_pairs = True


def counts_so_far(layers: Sequence[MoELayer]) -> list[Tensor | int]:
    """This rank's counts of each layer since the last report, for `reduce_load` to tell the last step's."""
    return [layer.load.counts_E for layer in layers]


def reduce_load(
    layers: Sequence[MoELayer], before_last_step: Sequence[Tensor | int], aux_loss: float, kinds: Sequence[str] = ()
) -> RoutingReport | None:
    """Expert loads since the last report, over all ranks; None for a dense model (collective)."""
    taken = [layer.load.take() for layer in layers]
    pairs = [(load, before) for load, before in zip(taken, before_last_step, strict=True) if load is not None]
    if not pairs:
        return None
    loads = [load for load, _ in pairs]
    counts_LCE = torch.stack(
        [
            torch.stack([n.counts_E, torch.zeros_like(n.counts_E) + n.image_E, n.counts_E - before, *n.kind_GE])
            for n, before in pairs
        ]
    )
    sums_L2 = torch.stack([torch.stack([n.entropy, n.entropy.new_zeros(()) + n.uncovered]).double() for n in loads])
    known_L2 = torch.tensor([[n.tokens, n.dropped] for n in loads], dtype=sums_L2.dtype, device=sums_L2.device)
    sums_L4 = torch.cat([known_L2, sums_L2], dim=1)
    dist.all_reduce(counts_LCE)
    dist.all_reduce(sums_L4)
    pairs_EE = loads[0].pairs_EE
    if pairs_EE is not None:
        dist.all_reduce(pairs_EE)
    tokens, dropped, entropy, uncovered = sums_L4.sum(0).tolist()
    counts_LCE = counts_LCE.cpu().numpy()
    assignments = float(counts_LCE[:, 0].sum()) + dropped
    balancings = [layer.gate.balancing for layer in layers if layer.gate.balancing is not None]
    norms = [balancing.bias_E.norm().item() for balancing in balancings]
    return RoutingReport(
        counts_LE=counts_LCE[:, 0],
        image_counts_LE=counts_LCE[:, 1],
        entropy_L=entropy / max(tokens, 1),
        aux_loss=aux_loss if layers[0].balancers else None,
        last_step_LE=counts_LCE[:, 2],
        kind_counts_LE=dict(zip(kinds, counts_LCE[:, 3:].swapaxes(0, 1), strict=False)),  # none above MOST_KINDS
        drop_rate=dropped / max(assignments, 1),
        uncovered=uncovered / max(tokens, 1),
        bias_norm=sum(norms) / len(norms) if norms else None,
        pairs_EE=None if pairs_EE is None else pairs_EE.cpu().numpy(),
    )
