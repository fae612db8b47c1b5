"""How a model generates: where it stops, and what a folder's generation config may not decide."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from transformers import Cache, GenerationConfig, PreTrainedModel

Arguments = tuple[object, ...]  # of a forward of transformers, as torch hands them to hooks
Keywords = dict[str, object]


def cache_of(arguments: Keywords) -> Cache | None:
    """The cache of earlier tokens among a forward's keyword arguments, as transformers 5.24 or 5.23 calls it."""
    found = arguments.get("cache")
    return cast("Cache | None", found if found is not None else arguments.get("past_key_values"))


def stop_tokens(config: GenerationConfig) -> list[int]:
    """The ids at which generation stops; a config holds none, one or several."""
    eos = config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else [int(token) for token in eos]


def stop_at(model: PreTrainedModel, token_id: int) -> None:
    """Let generation stop at a token too: in evaluations, and by whoever loads the model's checkpoints and exports."""
    known = stop_tokens(model.generation_config)
    if token_id not in known:
        model.generation_config.eos_token_id = [token_id, *known] if known else token_id


@contextmanager
def own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Set the folder's generation config aside: `generate` takes from there what a call leaves open, such as a
    repetition penalty or min_p, and would not give what the model itself says is likely."""
    folders, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = folders
