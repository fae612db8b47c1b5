"""Each expert chooses its tokens."""

from torch import Tensor, nn

from ds_moe.moe.decision import Assignments
from ds_moe.moe.routers.base import Router, routed
from ds_moe.moe.routers.limits import capacity


class ExpertChoice(Router, kind="expert_choice"):
    """Each expert takes its best tokens, the same number for all experts (Zhou 2022, eq. 1-2).

    That number is ceil(capacity_factor * V * K / E), at most V, of the V routed tokens of this rank's micro-batch;
    capacity_factor 1 costs as much as top-K. The scores are a softmax over the experts, and are themselves the weights.
    A token may get any number of experts, even none. Since a token competes with later ones, a causal language model
    trained this way leaks the future and cannot generate.
    """

    def __init__(self, weight_ED: nn.Parameter, top_k: int, *, capacity_factor: float, **noise: float) -> None:
        Router.__init__(self, weight_ED, top_k, **noise)
        self.share = capacity_factor

    def select(self, ranked_TE: Tensor, token_V: Tensor | None) -> Assignments:
        token_V, ranked_VE = routed(ranked_TE, token_V)
        tokens, experts = ranked_VE.shape
        count = min(tokens, capacity(self.share, tokens, self.top_k, experts))
        best_EC = ranked_VE.t().topk(count, dim=-1).indices
        expert_E = best_EC.new_tensor(range(experts))
        return Assignments(token_V[best_EC.flatten()], expert_E.repeat_interleave(count))

    def weigh(self, scores_TE: Tensor, chosen: Assignments, tokens: int) -> Tensor:
        return scores_TE[chosen.token_N, chosen.expert_N]
