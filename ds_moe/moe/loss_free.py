"""Auxiliary-loss-free balancing (Wang 2024, arXiv 2408.15664; DeepSeek-V3).

A bias takes part in the selection of experts, and never in their combine weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe.distributed import over_ranks

Rule = Literal["sign", "proportional"]


class SelectionBias(nn.Module):
    """One bias for each expert, added to what a router ranks experts by: the router's `balancing`. It never moves.

    `bias_E` is fp32 and saved with the model. Nothing here has a gradient.

    Args:
        num_experts: E, of a bias that starts at zero and is kept here, in fp32 whatever the model is cast to.
        holder, name: the module of a model whose own bias this is, and the name of its fp32 buffer, of E elements. It
            stays there, so that checkpoints and exports hold it where transformers looks for it.
    """

    balance_factor = 1.0

    def __init__(self, num_experts: int, holder: nn.Module | None = None, name: str = "bias_E") -> None:
        super().__init__()
        self.__dict__["_holder"] = holder  # no submodule: it is another module's
        self._name = name
        if holder is None:
            self._buffers[name] = torch.zeros(num_experts, dtype=torch.float32)  # register_buffer minds the property

    @property
    def bias_E(self) -> Tensor:
        holder = self if self._holder is None else self._holder
        return holder._buffers[self._name].view(-1)

    def forward(self, ranked_TE: Tensor) -> Tensor:
        """(T, E) fp32 scores (or logits) plus bias, to rank experts by. Combine weights come from the scores alone."""
        return ranked_TE.float() + self.balance_factor * self.bias_E

    def add(self, counts_E: Tensor) -> None:
        """Count a micro-batch; a bias that never moves need not."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelectionBias:
        """Move the bias to the model's device, but keep its dtype: bf16 would lose a step of 1e-3 on a bias of 0.5."""
        exact_E = self.bias_E
        super()._apply(fn, recurse)
        if self._holder is None:
            self._buffers[self._name] = exact_E.to(self.bias_E.device)
        return self


class LossFreeBalancing(SelectionBias):
    """A bias that moves towards an even load.

    `b_i += u * sign(mean(c) - c_i)` (rule `sign`), or `u * (mean(c) - c_i) / mean(c)` (`proportional`), then the mean
    of b is subtracted, so that it never drifts. c_i counts the assignments of real tokens to expert i since the last
    update, without those that a capacity limit refused. u is in units of the score and must be small against the
    differences between a token's scores (after a softmax of large logits, all but the first score are tiny).

    Args:
        num_experts, holder, name: as in `SelectionBias`.
        update_rate: u.
        balance_factor: factor of the bias where it is added to the scores.
        decay_from: share of the run after which u falls linearly to zero, because with a constant u the bias would
            oscillate by u for ever; 1: it never falls.
    """

    def __init__(
        self,
        num_experts: int,
        update_rate: float = 1e-3,
        balance_factor: float = 1.0,
        rule: Rule = "sign",
        decay_from: float = 0.8,
        holder: nn.Module | None = None,
        name: str = "bias_E",
    ) -> None:
        super().__init__(num_experts, holder, name)
        self.update_rate = update_rate
        self.balance_factor = balance_factor
        self.rule = rule
        self.decay_from = decay_from
        self.register_buffer("counts_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def add(self, counts_E: Tensor) -> None:
        """Count a micro-batch of this rank: int64 assignments of each expert, padding left out."""
        self.counts_E += counts_E

    def update(self, progress: float = 0.0) -> None:
        """Move this bias alone, see `update_biases` (collective)."""
        update_biases([self], progress)

    def rate(self, progress: float) -> float:
        """u at this share of the run."""
        if self.decay_from >= 1 or progress <= self.decay_from:
            return self.update_rate
        return self.update_rate * max(1 - progress, 0.0) / (1 - self.decay_from)

    @torch.no_grad()
    def move(self, counts_E: Tensor, rate: float) -> None:
        """Move the bias one step. `counts_E` are sums over all ranks; if they are all zero, the bias stays.

        Integers decide which experts are above the mean, and the rest is float64, so that no rounding depends on E or
        on the number of tokens.
        """
        total = counts_E.sum()
        excess_E = total - counts_E * counts_E.numel()  # E * (mean - c)
        if self.rule == "sign":
            step_E = excess_E.sign().double()
        else:
            step_E = excess_E.double() / total.clamp_min(1)
        bias_E = self.bias_E.double() + rate * step_E
        self.bias_E.copy_(bias_E - bias_E.mean())


def loss_free(model: nn.Module) -> list[LossFreeBalancing]:
    """All loss-free balancings of a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, LossFreeBalancing)]


@torch.no_grad()
def update_biases(balancings: Sequence[LossFreeBalancing], progress: float = 0.0) -> None:
    """Move the biases of all layers by the counts of all ranks; call it once an optimizer step (collective).

    One all-reduce over all ranks serves all layers. Routers are replicated on every rank, whatever the EP size.

    Args:
        progress: share of the run that is done, 0 ... 1, for the decay of u.
    """
    if not balancings:
        return
    counts_LE = torch.stack([balancing.counts_E for balancing in balancings])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts_LE)
    for balancing, counts_E in zip(balancings, counts_LE, strict=True):
        balancing.move(counts_E, balancing.rate(progress))
        balancing.counts_E.zero_()


def check_biases_agree(balancings: Sequence[LossFreeBalancing], step: int) -> None:
    """Raise `RuntimeError` on every rank, naming those whose biases differ from rank 0's (collective)."""
    if not balancings:
        return
    biases_LE = torch.stack([balancing.bias_E for balancing in balancings])
    digests = over_ranks(hashlib.sha256(biases_LE.cpu().numpy().tobytes()).digest())
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise RuntimeError(
            f"step {step}: the expert biases of rank {', '.join(map(str, differing))} differ from rank 0's; "
            "all ranks must hold the same"
        )
