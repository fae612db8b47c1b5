"""What all routers share: a forward of three steps, score -> select -> weigh."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe.moe.decision import Assignments, RoutingDecision
from ds_moe.moe.loss_free import SelectionBias
from ds_moe.moe.routers.limits import Drop, capacity, survives_dropout, within_capacity

ROUTERS: dict[str, type[Router]] = {}  # moe.router.kind of a run file -> the class that declares this kind
TINY = 1e-20  # added to sums of scores that may be zero; too small to change any other (DeepSeek-V3 adds it too)


class Router(nn.Module):
    """Base of all kinds: `class NewRouter(Router, kind="new")` is what `moe.router.kind: new` of a run file makes.

    The defaults of a run file stand in `ds_moe.config.moe`; those here are for kinds that have no such key.

    The selection has no gradient; the combine weights are computed from the live scores of the selected experts. A
    forward that is given its selection (a recompute, a replay) therefore runs the same operations and saves the same
    tensors for backward. All random numbers of a forward come from one seed, which the decision keeps, so that a
    recompute draws the same jitter and noise.

    Args:
        weight_ED: the router matrix, kept as this module's `weight` (the key transformers uses).
        top_k: experts a token, K (on average, where experts choose).
        expert_dropout: in training, probability of losing an assignment; a token always keeps one.
        jitter_noise: in training, the router sees x * uniform(1 - jitter_noise, 1 + jitter_noise) (Fedus 2021).
        capacity_factor: in training, an expert takes at most ceil(capacity_factor * V * K / E) of the V routed tokens
            of this rank's micro-batch, and refuses further assignments; None: dropless.
        drop: which assignments a full expert refuses: those of later tokens, or those of lower scores.

    Raises:
        ValueError: a `top_k` that these experts cannot give.
    """

    def __init_subclass__(cls, kind: str | None = None) -> None:
        super().__init_subclass__()
        if kind is not None:
            ROUTERS[kind] = cls

    def __init__(
        self,
        weight_ED: nn.Parameter,
        top_k: int,
        *,
        expert_dropout: float,
        jitter_noise: float = 0.0,
        capacity_factor: float | None = None,
        drop: Drop = "position",
    ) -> None:
        nn.Module.__init__(self)  # not super(): a family's router class may follow in the MRO
        if not 1 <= top_k <= weight_ED.shape[0]:
            raise ValueError(f"top_k={top_k} must lie between 1 and the number of experts, {weight_ED.shape[0]}")
        self.weight = weight_ED
        self.top_k = top_k
        self.expert_dropout = expert_dropout
        self.jitter_noise = jitter_noise
        self.capacity_factor = capacity_factor
        self.drop: Drop = drop
        self.balancing: SelectionBias | None = None  # shifts what is selected, never a weight

    def forward(
        self,
        x_TD: Tensor,
        token_V: Tensor | None = None,
        chosen: Assignments | None = None,
        replayed_TK: Tensor | None = None,
    ) -> RoutingDecision:
        """Route hidden states.

        Args:
            token_V: indices of the tokens to route; the others get no assignment. None: all.
            chosen: use these assignments, a token's beside each other, instead of selecting any.
            replayed_TK: use these experts instead of the selected ones (those of an inference engine, say), any integer
                dtype; a row of -1 keeps the selected ones. Only for routers that give each token K experts.
        """
        tokens = x_TD.shape[0] if token_V is None else token_V.numel()
        seed, generator = self._randomness(x_TD.device, chosen)
        if generator is not None and self.jitter_noise:
            low, high = 1 - self.jitter_noise, 1 + self.jitter_noise
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(low, high, generator=generator)
        logits_TE = self.logits(x_TD)
        scores_TE = self.score(logits_TE if generator is None else self.perturb(logits_TE, x_TD, generator))
        dropped = 0
        if chosen is None:
            with torch.no_grad():
                selected = self.select(self.rank(logits_TE, scores_TE), token_V)
                if replayed_TK is not None:
                    selected = selected.replaced(replayed_TK)
                chosen, dropped = self._limit(selected, scores_TE, tokens, generator)
        weight_N = self.weigh(scores_TE, chosen, tokens)
        token_N, expert_N, _, top_k = chosen
        return RoutingDecision(logits_TE, scores_TE, token_N, expert_N, weight_N, seed, dropped, top_k)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) raw logits in the model's dtype, with grad."""
        return F.linear(x_TD, self.weight)

    def perturb(self, logits_TE: Tensor, x_TD: Tensor, generator: torch.Generator) -> Tensor:
        """The logits that are scored in training if the router is random; here unchanged."""
        return logits_TE

    def score(self, logits_TE: Tensor) -> Tensor:
        """(T, E) fp32 scores, with grad."""
        return torch.softmax(logits_TE, dim=-1, dtype=score_dtype(logits_TE))

    def rank(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """(T, E) what experts are ranked by: the scores, plus the bias if there is one."""
        return scores_TE if self.balancing is None else self.balancing(scores_TE)

    def select(self, ranked_TE: Tensor, token_V: Tensor | None) -> Assignments:
        """Select assignments, without a gradient, by what `rank` gives."""
        raise NotImplementedError

    def weigh(self, scores_TE: Tensor, chosen: Assignments, tokens: int) -> Tensor:
        """(N,) fp32 combine weights from the live scores, with grad. `tokens` is V, the number of routed tokens."""
        raise NotImplementedError

    @property
    def random(self) -> bool:
        """Whether a forward in training draws random numbers."""
        return bool(self.jitter_noise or self.expert_dropout)

    def _randomness(
        self, device: torch.device, chosen: Assignments | None
    ) -> tuple[int | None, torch.Generator | None]:
        if not (self.training and self.random):
            return None, None
        # The CPU draws the seed, so nothing waits for the device. A recompute draws one as well and discards it, which
        # leaves the random state as the forward left it.
        seed = int(torch.randint(2**62, ()))
        if chosen is not None and chosen.seed is not None:
            seed = chosen.seed
        return seed, torch.Generator(device).manual_seed(seed)

    def _limit(
        self, chosen: Assignments, scores_TE: Tensor, tokens: int, generator: torch.Generator | None
    ) -> tuple[Assignments, int]:
        """Apply dropout, then capacity. Returns the assignments left, and how many the capacity refused."""
        if generator is not None and self.expert_dropout:
            chosen = chosen.where(survives_dropout(chosen.token_N, scores_TE.shape[0], self.expert_dropout, generator))
        if self.capacity_factor is None or not self.training:
            return chosen, 0
        limit = capacity(self.capacity_factor, tokens, self.top_k, scores_TE.shape[1])
        kept = chosen.where(within_capacity(chosen, scores_TE, limit, self.drop))
        return kept, chosen.token_N.numel() - kept.token_N.numel()


def score_dtype(logits_TE: Tensor) -> torch.dtype:
    """fp32 for any dtype of the model, except that float64 stays."""
    return torch.promote_types(logits_TE.dtype, torch.float32)


def routed(values_TE: Tensor, token_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """The indices of the routed tokens, and their rows."""
    if token_V is None:
        return torch.arange(values_TE.shape[0], device=values_TE.device), values_TE
    return token_V, values_TE.index_select(0, token_V)


def share_of_token(
    values_N: Tensor, token_N: Tensor, tokens_total: int, uniform_k: int | None, eps: float = TINY
) -> Tensor:
    """Divide each of T tokens' values by their sum. With `uniform_k` each has so many, beside each other."""
    if uniform_k is not None:
        values_VK = values_N.view(-1, uniform_k)
        return (values_VK / (values_VK.sum(-1, keepdim=True) + eps)).flatten()
    sums_T = values_N.new_zeros(tokens_total).index_add(0, token_N, values_N)
    return values_N / (sums_T.index_select(0, token_N) + eps)
