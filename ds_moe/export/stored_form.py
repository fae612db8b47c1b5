"""Weights of a model as files of a layout hold them: which of them make up a tensor, its name, its shape."""

from collections.abc import Iterable

from torch import Tensor
from transformers import PretrainedConfig

from ds_moe.models.families import TRANSPOSED_ON_HUB, expert_state, family_of
from ds_moe.models.load import build_outline
from ds_moe.models.stored_names import HubNames
from ds_moe.weights.layouts import ExpertLayout, choose_layout, in_layout

TRAINING_ONLY = ".gate.noise_weight"  # ends the names of weights that evaluation does not use and exports leave out


class StoredForm:
    """How files of `layout` hold the weights of a model, see `LAYOUTS`."""

    def __init__(self, config: PretrainedConfig, layout: ExpertLayout) -> None:
        moe = family_of(config).moe
        self._layout, self._transposes = layout, moe is not None and moe.transposed_on_hub
        as_in_memory = layout == "memory" or moe is None or moe.transposed_on_hub or moe.stacked_on_hub
        self._names = None if as_in_memory else HubNames(build_outline(config))

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """The weights, those together of which files hold one tensor."""
        return [[name] for name in names] if self._names is None else self._names.groups(names)

    def tensors(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of files that hold a group of weights; some are views."""
        if self._names is not None:
            return self._names.tensors(weights)
        transposed = {name: self._transposes and expert_state(name) for name in weights}
        return {name: in_layout(one, self._layout) if transposed[name] else one for name, one in weights.items()}


def layout_of(config: PretrainedConfig, asked: ExpertLayout | None) -> ExpertLayout:
    """See `choose_layout`. Where the hub does not store experts transposed, any model can be stored as there."""
    if family_of(config).moe is None or config.model_type in TRANSPOSED_ON_HUB:
        return choose_layout(config, asked, TRANSPOSED_ON_HUB)
    return asked or "hub"
