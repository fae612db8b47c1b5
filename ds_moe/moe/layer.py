"""The MoE layer: route -> dispatch -> experts -> combine; and the same for loops without the trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import get_args

import torch
from torch import Tensor, nn

from ds_moe.moe import parts
from ds_moe.moe.backends import Recompute
from ds_moe.moe.balance import Balancer, TokenStats, global_counts, shared_counts
from ds_moe.moe.context import ForwardContext
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.dispatch import AllToAllDispatcher, ApplyWeight, DispatchPlan, LocalDispatcher
from ds_moe.moe.expert_load import ExpertLoad
from ds_moe.moe.experts import Experts
from ds_moe.moe.loss_free import update_biases
from ds_moe.moe.parts import BalanceSetting
from ds_moe.moe.tape import TapeEntry, current_tape

MANY_FORWARDS = 256  # more than a step accumulates: who has asked for a loss-free bias has forgotten to move it
_numbers = count()  # an index of its own for each layer that `build` makes, since a tape tells layers apart by it


class MoELayer(nn.Module):
    """Takes the place of a transformers MoE block: (B, S, D) in, (B, S, D) out, same parameter names.

    Args:
        gate: a router; transformers records its logits if the family's router class is among its bases.
        experts: those this rank owns.
        context: shared by the model's layers.
        index: which MoE layer of the model this is, 0 ... L-1.
        shared: an expert that every token uses; its result is added to the output. None if the family has none.
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: Experts,
        dispatcher: LocalDispatcher | AllToAllDispatcher,
        context: ForwardContext,
        index: int,
        balancers: Sequence[Balancer] = (),
        shared: nn.Module | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not super(): DeepSpeed's layer class may follow in the MRO
        self.experts = experts  # before the gate, which is transformers' order of the parameters
        self.gate = gate
        self.shared = shared
        self.dispatcher = dispatcher
        self.context = context
        self.index = index
        self.balancers = balancers
        self.load = ExpertLoad(gate.weight.shape[0])

    @staticmethod
    def build(
        dim: int,
        width: int,
        experts: int,
        top_k: int,
        *,
        router: str = "topk",
        aux: BalanceSetting = None,
        z_loss: BalanceSetting = None,
        loss_free: BalanceSetting = None,
        shared: int | nn.Module | None = None,
        activation: str = "silu",
        backend: str = "auto",
        recompute: Recompute | None = None,
        apply_weight: ApplyWeight = "after",
        **settings: object,
    ) -> StandaloneLayer:
        """A layer with new weights for a training loop of your own, in one process or under DDP, without DeepSpeed.

            layer = MoELayer.build(dim=64, width=96, experts=8, top_k=2, aux=1e-2, loss_free=1e-3)
            for x, target in batches:
                loss = F.mse_loss(layer(x), target) + layer.aux_loss()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                layer.end_step()

        Args:
            dim: D, the width of the model.
            width: F, the width of an expert.
            experts: E.
            top_k: K, experts of a token.
            router: topk, noisy_topk, expert_choice, hash or balanced.
            aux: the load-balancing loss: its weight, True for the default one, or a dict of `weight`, `scope` and
                `normalize_by_k`, see `AuxLoss`.
            z_loss: the weight of the z-loss, True, or {"weight": ...}, see `ZLoss`.
            loss_free: the rate of a bias that balances without a loss, True, or a dict of `update_rate`, `rule` and
                `decay_from`, see `LossFreeBalancing`. `end_step` moves it.
            shared: the width of an expert that every token uses, or a module (T, D) -> (T, D) in its place.
            activation: of the experts' gates: silu, gelu or relu.
            backend: auto, grouped_mm, megablocks, liger or reference.
            recompute: none, act (the default) or all: what backward computes again instead of keeping it.
            apply_weight: after or before: combine weights multiply what experts give, or what they get.
            settings: the keys of `moe.router` of this kind in a run file, such as `scores`, `capacity_factor` or
                `noise_std`. Left out they have the defaults there; `normalize` is false for top_k 1, where a weight of
                1 would hide the router from the loss.

        Raises:
            TypeError: an argument of another type, or a setting that this router does not have.
            ValueError: one out of range, or one that would have no effect beside the others.
        """
        parts.whole(dim=dim, width=width, experts=experts, top_k=top_k)
        # With one expert a token, its weight is its score.
        gate = parts.router_from(router, parts.new_weight(experts, dim), top_k, settings, normalizes=top_k > 1)
        balancers = parts.balancers_from(router, aux=aux, z_loss=z_loss, loss_free=loss_free)
        gate.balancing = parts.bias_from(experts, loss_free)
        kernels = {"activation": activation, "backend": backend, "recompute": recompute}
        return StandaloneLayer(
            gate=gate,
            experts=parts.experts_from(dim, width, experts, **kernels),
            dispatcher=LocalDispatcher(backend, parts.one_of("apply_weight", apply_weight, get_args(ApplyWeight))),
            context=ForwardContext(),
            index=next(_numbers),
            balancers=balancers,
            shared=parts.shared_from(dim, shared, activation),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        decision, plan = self._route(partial(self.gate, x_TD), x_TD.shape[0], hidden_states.shape[0])
        return self._through_experts(x_TD, decision, plan).view_as(hidden_states)

    def _through_experts(self, x_TD: Tensor, decision: RoutingDecision, plan: DispatchPlan) -> Tensor:
        """(T, D): dispatch, experts, combine."""
        chunks = self.dispatcher.dispatch(x_TD, decision, plan)
        shared_TD = None if self.shared is None else self.shared(x_TD)  # while the rows travel
        experts_of_chunk = self.experts.split(self.dispatcher.chunks)
        outputs = [run(experts) for run, experts in zip(chunks, experts_of_chunk, strict=True)]
        y_TD = self.dispatcher.combine(outputs, plan)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def _route(
        self, choose: Callable[..., RoutingDecision], tokens: int, rows: int
    ) -> tuple[RoutingDecision, DispatchPlan]:
        """Decide; or, in a recompute, repeat what the forward decided.

        `choose` takes what `Router.forward` does after the hidden states of the T `tokens`, in so many `rows`.
        """
        tape = current_tape()
        replaying = tape is not None and tape.replaying
        if replaying:
            chosen, plan, stats = tape.entries[self.index]
            decision = choose(stats.token_V, chosen)
        else:
            decision = choose(self.context.token_V, replayed_TK=self._replayed())
            plan = self.dispatcher.plan(decision)
            stats = self._token_stats(tokens, rows, plan, decision)
            if tape is not None:
                tape.entries[self.index] = TapeEntry(decision.chosen, plan, stats)
        if self.training:
            # A recompute runs the balancers too, because autograd needs what they save, but reports nothing again.
            losses = [balancer.loss(decision, stats) for balancer in self.balancers]
            if not replaying:
                self.context.aux_losses += losses
                self.load.add(decision, stats, self.context.image_T, self.context.kind_T)
                if self.gate.balancing is not None:
                    self.gate.balancing.add(self._counted(decision, plan))
        return decision, plan

    def _replayed(self) -> Tensor | None:
        """(T, K) experts that this layer must use, -1 where its router decides; None: it decides everywhere."""
        return None if self.context.replayed_TLK is None else self.context.replayed_TLK[:, self.index]

    def _counted(self, decision: RoutingDecision, plan: DispatchPlan) -> Tensor:
        """(E,) assignments that move a loss-free bias. Replayed ones do not: this router did not choose them."""
        replayed_TK = self._replayed()
        if replayed_TK is None or self.context.replay_moves_bias:
            return plan.counts_E
        live_N = replayed_TK[decision.token_N, 0] < 0
        return torch.zeros_like(plan.counts_E).scatter_add_(0, decision.expert_N, live_N.long())

    def _token_stats(self, tokens: int, rows: int, plan: DispatchPlan, decision: RoutingDecision) -> TokenStats:
        """What the balancers may know. The tape keeps it, because a recompute must not run the all-reduce again."""
        token_V, sequence_T = self.context.token_V, self.context.sequence_T
        sequences = rows if sequence_T is None else self.context.sequences
        counts = None
        if self.training and any(balancer.scope == "global_batch" for balancer in self.balancers):
            counts = global_counts(token_V, tokens, plan.counts_E)
        group = self.context.row_group
        stats = TokenStats(token_V, sequences, plan.counts_E, counts, sequence_T, occupancy=self.context.occupancy)
        if self.training and self.balancers and group is not None:
            stats = stats._replace(shared=shared_counts(decision, stats, group))
        return stats


class StandaloneLayer(MoELayer):
    """A layer that a training loop of one's own calls; `MoELayer.build` makes it.

    Nothing is counted twice or forgotten in silence. A forward in training leaves its balancing losses for `aux_loss`,
    which takes them; the next forward and `end_step` raise where nobody has. In evaluation nothing is collected.
    `load.take()` gives what the experts have got since it was last called: `counts_E` is the number of assignments.
    """

    _forwards = 0  # in training, since the bias was last moved

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, S, D) or (T, D) to the same shape and dtype. It is computed in the dtype of the weights.

        Args:
            mask: (B, S) or (T,), non-zero at real tokens. The others get 0 from the experts, and neither route nor
                count; None: all are real.

        Raises:
            TypeError: hidden states of a wider dtype than the weights, or none of floats.
            ValueError: shapes that do not fit.
            RuntimeError: the losses of the forward before were not taken; or gradient checkpointing that would decide
                and count a second time. A backward with create_graph raises one too.
        """
        parts.check_states(hidden_states, mask, self.gate.weight)
        tape = current_tape()
        if tape is None or not tape.replaying:
            self._begin(mask, again=tape is not None and self.index in tape.entries)
        x_BSD = hidden_states if hidden_states.dim() == 3 else hidden_states.unsqueeze(0)
        y = super().forward(x_BSD.to(self.gate.weight.dtype)).view_as(hidden_states).to(hidden_states.dtype)
        if y.requires_grad:
            y.register_hook(_refuse_second_derivatives)
        return y

    def __setstate__(self, state: dict[str, object]) -> None:
        """Give a copy or an unpickled layer an index of its own."""
        super().__setstate__(state)
        self.index = next(_numbers)

    def aux_loss(self) -> Tensor:
        """The sum of the weighted balancing losses of the last forward, an fp32 scalar with grad, to add to its loss.

        This takes them: asked again it is 0, as after a forward in evaluation and without `aux` and `z_loss`.
        """
        taken, self.context.aux_losses = self.context.aux_losses, []
        if not taken:
            return torch.zeros((), device=self.gate.weight.device)
        return torch.stack(taken).sum()

    def end_step(self, progress: float = 0.0) -> None:
        """Move the loss-free bias, if there is one, by what was counted since the last call (collective under DDP).

        Call it after each `optimizer.step()`, however many forwards the step had.

        Args:
            progress: share of the run that is done, 0 ... 1: after `decay_from` the bias moves less and less.

        Raises:
            RuntimeError: a forward's losses were not taken, so that its gradients lack theirs.
            ValueError: a progress outside of 0 ... 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress} must lie between 0 and 1: the share of the run that is done")
        self._check_taken()
        update_biases([] if self.gate.balancing is None else [self.gate.balancing], progress)
        self._forwards = 0

    def _begin(self, mask: Tensor | None, again: bool) -> None:
        """Begin a forward that is no replay; `again`: the layer has run in this checkpointed region already."""
        if again:
            raise RuntimeError("a layer can run once in a checkpointed region; checkpoint its calls one by one")
        if torch._C._current_graph_task_id() != -1:  # inside of backward; torch's own checkpointing asks so, too
            raise RuntimeError(
                "a recompute would route and count a second time; checkpoint with "
                "use_reentrant=False, context_fn=ds_moe.moe.tape.checkpoint_contexts"
            )
        if self.training:
            self._check_taken()
            self._forwards += 1
            if self._forwards == MANY_FORWARDS and self.gate.balancing is not None:
                text = f"the loss-free bias did not move for {MANY_FORWARDS} forwards: call end_step() once a step"
                warnings.warn(text, stacklevel=3)
        waiting = self.context.aux_losses  # in evaluation there may be some, of a forward before
        self.context.begin(mask, None)
        self.context.aux_losses = waiting

    def _check_taken(self) -> None:
        if self.context.aux_losses:
            raise RuntimeError(
                "the balancing losses of the last forward were not taken: add layer.aux_loss() to the loss of every "
                "forward in training (or call it and drop the result)"
            )


def _refuse_second_derivatives(grad: Tensor) -> None:
    """A hook: under create_graph torch's once_differentiable leaves out terms in silence where `grad` is a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("a layer has no second derivatives: call backward or grad without create_graph=True")
