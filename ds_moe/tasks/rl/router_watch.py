"""What the routers of a forward made of the experts that were replayed."""

from typing import Literal

import torch
from torch import Tensor

from ds_moe.errors import UserError
from ds_moe.moe.decision import RoutingDecision
from ds_moe.moe.in_block import RouterOutput, decision_in
from ds_moe.moe.layer import MoELayer
from ds_moe.moe.routers import Router
from ds_moe.moe.tape import current_tape
from ds_moe.replay.metrics import routing_difference
from ds_moe.replay.ratios import expert_logprobs
from ds_moe.replay.record import ids_by_token


class RouterWatch:
    """What the routers of a forward made of its replayed experts: their log-probs, and where they would differ.

    Args:
        router: `rl.router`. Without one, log-probs are left out; `joint` alone gives them a gradient.
    """

    def __init__(self, layers: list[MoELayer], router: Literal["none", "router_shift", "joint"]) -> None:
        self.with_logprobs, self.with_grad = router != "none", router == "joint"
        self._logprob_TLK: list[Tensor] = []
        self._live_TLK: list[Tensor] = []
        self._replayed_RSLK = torch.empty(0)
        self._watching = False
        for layer in layers:
            if router != "none" and layer.gate.scores != "softmax":
                text = f"needs routers that take a softmax; those of this model take {layer.gate.scores}"
                raise UserError(f"rl.router {router} {text}; set it to none")
            layer.gate.register_forward_hook(self._look)

    def begin(self, replayed_RSLK: Tensor) -> None:
        """Before a forward with this routing."""
        self._logprob_TLK, self._live_TLK, self._replayed_RSLK, self._watching = [], [], replayed_RSLK, True

    def end(self) -> None:
        """After it: the forwards of an evaluation are not looked at."""
        self._watching = False

    def logprobs(self) -> Tensor:
        """(T, L, K) fp32 of the experts that each token used."""
        return torch.stack(self._logprob_TLK, dim=1)

    def differences(self, within_T: Tensor) -> dict[str, Tensor]:
        """How many routers and tokens would have chosen other experts, of the tokens that the mask names."""
        return routing_difference(torch.stack(self._live_TLK, dim=1), self._replayed_RSLK.flatten(0, 1), within_T)

    def _look(self, gate: Router, args: tuple[object, ...], output: RoutingDecision | RouterOutput) -> None:
        decision = decision_in(output)
        tape = current_tape()
        again = tape is not None and tape.replaying
        if not (self.with_grad if again else self._watching):  # a recompute must save what the forward saved
            return
        if self.with_logprobs:
            with torch.set_grad_enabled(self.with_grad and torch.is_grad_enabled()):
                logits_TE = decision.logits_TE / gate.temperature
                logprob_TK, _ = expert_logprobs(logits_TE, ids_by_token(decision, gate.top_k))
            if not again:
                self._logprob_TLK.append(logprob_TK)
        if again:
            return
        with torch.no_grad():
            ranked_TE = gate.rank(decision.logits_TE, decision.scores_TE)
            self._live_TLK.append(gate.select(ranked_TE, None).expert_N.view(-1, gate.top_k))
