"""The model that a run began with, for the KL term where rollouts come without its log-probs."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from ds_moe.checkpoint.fit import persistent_buffers
from ds_moe.config.rules.lora import base_changes
from ds_moe.config.run import RunConfig
from ds_moe.engine.exchange import FrozenCopy
from ds_moe.models.lora import without_updates


class StartingPolicy(Protocol):
    """Makes an engine compute as it did when the run began."""

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, forwards are those of that model; nothing may be trained (collective)."""
        ...


class BasePolicy:
    """Under LoRA: the model without its low-rank updates."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def in_place(self) -> AbstractContextManager[None]:
        return without_updates(self._model)


def starting_policy(config: RunConfig, model: nn.Module) -> StartingPolicy:
    """The base where low-rank updates are all that a run trains, else a copy; make it before a checkpoint is loaded."""
    if base_changes(config) is None:
        return BasePolicy(model)
    return FrozenCopy(model, (buffer for _, buffer in persistent_buffers(model)))
