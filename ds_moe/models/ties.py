"""Ties of the output layer to the input embedding, decided as `from_pretrained` decides them: by the values.

A config asks for the tie. Where files hold both weights nevertheless (Qwen3-0.6B's do), transformers ties them only if
they are equal (`modeling_utils.py`, `tie_weights`); on the meta device it cannot compare and leaves them apart.
"""

import logging
import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_moe.models.families import family_of
from ds_moe.weights.files import SafetensorsFiles

BLOCK = 2**24  # bytes compared at a time


def ties_of(config: PretrainedConfig) -> dict[str, str]:
    """Weights that the config ties, which files may leave out or repeat -> the weight that each is tied to."""
    return family_of(config).model_class._tied_weights_keys if getattr(config, "tie_word_embeddings", False) else {}


def tie_as_stored(model: PreTrainedModel, files: SafetensorsFiles) -> None:
    """Tie the weights of a model on the meta device that its config ties and its files hold twice, equal."""
    for target, source in list(model.all_tied_weights_keys.items()):
        weight, tied = model.get_parameter(target), model.get_parameter(source)
        if weight is tied or not {target, source} <= files.shapes.keys():
            continue
        if equal_values(files, target, source, weight.dtype):
            owner, _, name = target.rpartition(".")
            setattr(model.get_submodule(owner), name, tied)
        else:
            model.all_tied_weights_keys.pop(target)


def untie(model: PreTrainedModel, stored: set[str]) -> None:
    """Give weights of a model on the meta device that its config ties one of their own, if they are among `stored`."""
    for target in ties_of(model.config).keys() & stored:
        owner, _, name = target.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.Parameter(model.get_parameter(target).detach()))


def equal_values(files: SafetensorsFiles, one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two stored weights are the same in the dtype that they are loaded in."""
    shape = files.shapes[one]
    if files.shapes[other] != shape:
        return False
    rows = max(1, BLOCK // (4 * max(1, math.prod(shape[1:]))))
    return all(
        torch.equal(*(files.read(name, start, start + rows).to(dtype) for name in (one, other)))
        for start in range(0, shape[0], rows)
    )


def untie_config(model: PreTrainedModel) -> None:
    """Let the config of a loaded model say that its output layer is a weight of its own, if it is.

    Checkpoints and exports hold this config: with one that still asks for the tie, a loader other than transformers
    would drop the trained output layer.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not ties_of(model.config) or head is None or head.weight is embedding.weight:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    logging.getLogger(__name__).warning(
        "tie_word_embeddings is true, but the files hold an output layer that differs from the input embedding: "
        "both are loaded, and the model is saved with tie_word_embeddings: false"
    )
