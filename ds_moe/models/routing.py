"""Where plain transformers would route otherwise than a run: one answer for the doctor, the run and its export."""

from transformers import PretrainedConfig

from ds_moe.config.moe import MoEConfig, TopKRouting
from ds_moe.models.families import family_of


def routing_note(moe: MoEConfig | None, model_config: PretrainedConfig) -> str | None:
    """What to know of the exports of a run with this `moe` section; None: plain transformers routes as the run does."""
    differing = routed_otherwise(moe, model_config) if moe is not None else {}
    if not differing:
        return None
    settings = ", ".join(f"{key} {value}" for key, value in differing.items())
    return (
        f"plain transformers cannot repeat {settings}: it sends some tokens to other experts, or weighs them "
        "otherwise, than this run; evaluate an export with it before you rely on it"
    )


def routed_otherwise(moe: MoEConfig, model_config: PretrainedConfig) -> dict[str, object]:
    """The settings of a run (dotted key: value) with which its evaluations route otherwise than plain transformers.

    What routers do in training only, such as capacity and dropout, is no such setting; a `top_k` stands in the config
    that checkpoints and exports have.
    """
    block = family_of(model_config).moe
    if block is None:
        return {}
    router, found = moe.router, {}
    if not router.plain:
        found["moe.router.kind"] = router.kind
    elif isinstance(router, TopKRouting):
        found |= _of_topk(router, block.normalizes(model_config.get_text_config()))
    if moe.experts.apply_weight == "before":
        found["moe.experts.apply_weight"] = "before"
    if block.selection_bias is None and any(balance.kind == "loss_free" for balance in moe.balance):
        found["moe.balance"] = "loss_free"
    return found


def _of_topk(router: TopKRouting, normalizes: bool) -> dict[str, object]:
    """As `routed_otherwise`, given whether the family's own router makes a token's weights sum to 1."""
    found: dict[str, object] = {}
    if router.scores != "softmax":
        found["moe.router.scores"] = router.scores
    if router.groups != router.top_groups:  # else a token chooses from all groups
        found |= {"moe.router.groups": router.groups, "moe.router.top_groups": router.top_groups}
    for key in ("route_scale", "temperature"):
        if (value := getattr(router, key)) != 1:
            found[f"moe.router.{key}"] = value
    if router.order == "topk_then_softmax" and not normalizes:
        found["moe.router.order"] = router.order
    elif router.normalize not in (None, normalizes) and router.order != "topk_then_softmax":
        found["moe.router.normalize"] = str(router.normalize).lower()
    return found
