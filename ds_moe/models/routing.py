"""Where plain transformers would route otherwise than a run: one answer for the doctor, the run and its export."""

from collections.abc import Mapping

from transformers import PretrainedConfig

from ds_moe.config.moe import MoEConfig, TopKRouting
from ds_moe.models.blocks import moe_blocks
from ds_moe.models.load import build_outline
from ds_moe.models.router_forms import form_of


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
    blocks = moe_blocks(build_outline(model_config))
    if not blocks:
        return {}
    form = form_of(blocks[0].router)
    router, found = moe.router, {}
    if not router.plain:
        found["moe.router.kind"] = router.kind
    elif isinstance(router, TopKRouting) and form is not None:
        found |= _of_topk(router, form.native(blocks[0].router))
    if moe.experts.apply_weight == "before":
        found["moe.experts.apply_weight"] = "before"
    has_place = form is not None and form.bias is not None
    if not has_place and any(balance.kind == "loss_free" for balance in moe.balance):
        found["moe.balance"] = "loss_free"
    return found


def _of_topk(router: TopKRouting, native: Mapping[str, object]) -> dict[str, object]:
    """As `routed_otherwise`, given the settings that repeat the family's own router."""
    found: dict[str, object] = {}
    if router.scores not in (None, native["scores"]):
        found["moe.router.scores"] = router.scores
    if router.groups and _limits(router.groups, router.top_groups) != _limits(native["groups"], native["top_groups"]):
        found |= {"moe.router.groups": router.groups, "moe.router.top_groups": router.top_groups}
    if router.route_scale not in (None, native["route_scale"]):
        found["moe.router.route_scale"] = router.route_scale
    if router.temperature != 1:
        found["moe.router.temperature"] = router.temperature
    if router.order == "topk_then_softmax" and not native["normalize"]:
        found["moe.router.order"] = router.order
    elif router.normalize not in (None, native["normalize"]) and router.order != "topk_then_softmax":
        found["moe.router.normalize"] = str(router.normalize).lower()
    return found


def _limits(groups: object, top_groups: object) -> tuple[object, object] | None:
    """What groups there are; None where a token chooses from all of them."""
    return None if groups == top_groups else (groups, top_groups)
