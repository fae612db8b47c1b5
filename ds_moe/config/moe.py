"""The keys of `moe`: routers, balancers, dispatch, experts, replay."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from ds_moe.config.sections import Section

# What keys of a router that are not set stand for where no model says otherwise: Mixtral's router.
PLAIN: Mapping[str, object] = {
    "scores": "softmax",
    "order": "softmax_then_topk",
    "normalize": True,
    "route_scale": 1.0,
    "groups": None,
    "top_groups": None,
}


class AnyRouter(Section):
    """What every kind of router has; their formulas stand on the routers of `ds_moe.moe.routers`.

    The class variables say what a kind can do: whoever must know asks them, so that no other file lists kinds.
    """

    learns: ClassVar[bool] = True  # its weight takes part and gets a gradient
    causal: ClassVar[bool] = True  # a token's experts do not depend on later tokens, while nothing is dropped
    exact_k: ClassVar[bool] = True  # a token gets top_k experts, before dropout and capacity take some away
    noisy: ClassVar[bool] = False  # it draws random numbers in training, whatever its keys
    replays: ClassVar[bool] = False  # the experts of a rollout can take the place of those it selects
    plain: ClassVar[bool] = False  # with its defaults, transformers' own router does the same in evaluation
    useless_balances: ClassVar[tuple[str, ...]] = ()  # kinds of moe.balance that cannot change what it does

    kind: str
    top_k: int | None = Field(default=None, gt=0)  # experts of a token; default: the model's own
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)  # of assignments, in training; a token keeps at least one

    def settings(self, native: Mapping[str, object]) -> dict[str, object]:
        """Keyword arguments of this kind's router class: every key, where it is not set with its default.

        `native` are the arguments of `TopKRouter` that repeat the model's own router, with `top_k`.
        """
        return {**self.model_dump(exclude={"kind", "allow_noncausal"}), "top_k": self.top_k or native["top_k"]}


class Jittered(Section):
    jitter_noise: float = Field(default=0.0, ge=0, lt=1)  # in training the router sees x * uniform(1 - j, 1 + j)


class Limited(Section):
    capacity_factor: float | None = Field(default=None, gt=0)  # training: rows that an expert accepts / its fair share


class TopKRouting(Limited, Jittered, AnyRouter):
    replays: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    kind: Literal["topk"] = "topk"
    # These are the model's own where they are not set.
    scores: Literal["softmax", "sigmoid"] | None = None
    order: Literal["softmax_then_topk", "topk_then_softmax"] | None = None
    normalize: bool | None = None  # a token's weights sum to 1
    route_scale: float | None = Field(default=None, gt=0)  # factor of all weights
    groups: int | None = Field(default=None, gt=0)  # a token chooses from its best top_groups groups of experts
    top_groups: int | None = Field(default=None, gt=0)
    temperature: float = Field(default=1.0, gt=0)  # logits are divided by it
    drop: Literal["position", "score"] | None = None  # which rows a full expert refuses; default position

    def settings(self, native: Mapping[str, object]) -> dict[str, object]:
        own = super().settings(native)
        unset = {key: value for key, value in native.items() if own.get(key) is None}
        return {**own, **unset, "drop": self.drop or "position"}


class NoisyTopKRouting(TopKRouting):
    noisy: ClassVar[bool] = True
    replays: ClassVar[bool] = False

    kind: Literal["noisy_topk"] = "noisy_topk"
    noise_std: float = Field(default=1.0, gt=0)  # factor of the learned noise


class ExpertChoiceRouting(Jittered, AnyRouter):
    causal: ClassVar[bool] = False
    exact_k: ClassVar[bool] = False
    useless_balances: ClassVar[tuple[str, ...]] = ("aux", "loss_free")

    kind: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float = Field(default=1.0, gt=0)  # rows that an expert takes / its fair share
    allow_noncausal: bool = False  # train a causal model although its tokens then depend on later ones


class FixedRouting(Limited, AnyRouter):
    """Routes without a look at the hidden states."""

    learns: ClassVar[bool] = False
    useless_balances: ClassVar[tuple[str, ...]] = ("aux", "z_loss", "loss_free")


class HashRouting(FixedRouting):
    kind: Literal["hash"] = "hash"


class BalancedRouting(FixedRouting):
    kind: Literal["balanced"] = "balanced"


RouterConfig = Annotated[
    TopKRouting | NoisyTopKRouting | ExpertChoiceRouting | HashRouting | BalancedRouting, Field(discriminator="kind")
]
ROUTINGS: dict[str, type[AnyRouter]] = {
    kind.model_fields["kind"].default: kind for kind in get_args(get_args(RouterConfig)[0])
}


class NoBalance(Section):
    kind: Literal["none"] = "none"


class AuxBalance(Section):
    kind: Literal["aux"] = "aux"
    weight: float = Field(default=1e-3, gt=0)
    scope: Literal["micro_batch", "global_batch", "sequence"] = "micro_batch"
    normalize_by_k: bool = False  # a perfectly balanced load then costs weight in place of weight * top_k


class ZLossBalance(Section):
    kind: Literal["z_loss"] = "z_loss"
    weight: float = Field(default=1e-3, gt=0)


class LossFreeBalance(Section):
    kind: Literal["loss_free"] = "loss_free"
    update_rate: float = Field(default=1e-3, gt=0)  # step of the bias, in units of the router's scores
    rule: Literal["sign", "proportional"] = "sign"
    decay_from: float = Field(default=0.8, ge=0, le=1)  # share of the run after which the step falls to 0; 1: never


Balance = Annotated[NoBalance | AuxBalance | ZLossBalance | LossFreeBalance, Field(discriminator="kind")]


class DispatchConfig(Section):
    kind: Literal["auto", "local", "all_to_all"] = "auto"  # auto: local at ep_size 1, else all_to_all
    chunks: int = Field(default=1, gt=0)  # parts of a rank's experts: rows of one part travel while another computes


class ExpertsConfig(Section):
    backend: Literal["auto", "grouped_mm", "megablocks", "liger", "reference"] = "auto"  # kernels; auto: by device
    recompute: Literal["none", "act", "all"] = "act"  # what backward computes again: nothing, the activation, all
    apply_weight: Literal["before", "after"] = "after"  # combine weights multiply the experts' inputs, or their outputs


class ReplayConfig(Section):
    enabled: bool = False  # task rl: a forward uses the experts recorded in its rollouts, not those its routers select
    moves_bias: bool = False  # whether replayed tokens count for the loss-free bias


class MoEConfig(Section):
    ep_size: int = Field(default=1, gt=0)  # ranks that share one copy of the experts
    router: RouterConfig = TopKRouting()
    balance: list[Balance] = []
    dispatch: DispatchConfig = DispatchConfig()
    experts: ExpertsConfig = ExpertsConfig()
    replay: ReplayConfig = ReplayConfig()

    @field_validator("router", mode="before")
    @classmethod
    def _default_kind(cls, router: object) -> object:
        return {"kind": "topk", **router} if isinstance(router, dict) else router
