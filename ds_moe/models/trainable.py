"""What a run trains of a model: all but what is frozen, or low-rank updates of a frozen model."""

from transformers import PreTrainedModel

from ds_moe.config.run import RunConfig
from ds_moe.models.families import family_of
from ds_moe.models.freeze import freeze, frozen
from ds_moe.models.lora import add_lora


def set_trainable(model: PreTrainedModel, config: RunConfig) -> None:
    """Freeze what a run does not train of an unconverted model, and add the low-rank updates it trains instead.

    Raises:
        UserError: nothing is left to train, or a pattern or target matches nothing.
    """
    if config.lora is not None:
        add_lora(model, config.lora, config.train.seed)
    else:
        freeze(model, frozen(config, family_of(model)))
