"""Special tokens: the template's, which texts must never write, and those that a run file lets texts write."""

import re
from collections.abc import Sequence
from functools import lru_cache

from ds_moe.config.run import RunConfig
from ds_moe.data.processor import Processor
from ds_moe.errors import UserError

THINK_TAGS = ("<think>", "</think>")  # templates look for them in texts, also where they are special tokens


@lru_cache(maxsize=64)
def special_ids(processor: Processor) -> dict[str, int]:
    """Special tokens and their ids. The longest comes first, because a regex takes the first alternative that fits."""
    decoder = processor.tokenizer.added_tokens_decoder
    special = {str(token): index for index, token in decoder.items() if token.special}
    return dict(sorted(special.items(), key=lambda item: -len(item[0])))


@lru_cache(maxsize=64)
def pattern_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def special_tokens(processor: Processor) -> re.Pattern[str]:
    """Matches the special tokens of the tokenizer in a text."""
    return pattern_of(tuple(special_ids(processor)))


def text_of(ids: list[int], processor: Processor, content_tokens: Sequence[str] = ()) -> str:
    """What tokens say to a reader: special tokens are left out, but for those of texts and the tags of thoughts."""
    kept = (*content_tokens, *THINK_TAGS)
    hidden = {index for token, index in special_ids(processor).items() if token not in kept}
    return str(processor.tokenizer.decode([token for token in ids if token not in hidden], skip_special_tokens=False))


def content_tokens_of(config: RunConfig, processor: Processor) -> tuple[str, ...]:
    """What `data.content_tokens` names. Raises `UserError` as `check_content_tokens`, with the place of the key."""
    tokens = tuple(config.data.content_tokens)
    try:
        check_content_tokens(processor, tokens)
    except UserError as error:
        raise UserError(f"{config.at('data.content_tokens')}: {error}") from error
    return tokens


def check_content_tokens(processor: Processor, tokens: Sequence[str]) -> None:
    """Raise `UserError` for a token that the tokenizer does not have, or that texts must never write."""
    known = {str(token) for token in processor.tokenizer.added_tokens_decoder.values()}
    for token in tokens:
        if token not in known:
            reason = "no added token of the model's tokenizer (add it to the tokenizer and the model, or remove it)"
            raise UserError(f"data.content_tokens: {token!r} is {reason}")
        if use := control_use(processor, token):
            raise UserError(f"data.content_tokens: {token!r} is {use}, which texts must not write (remove it)")


def control_use(processor: Processor, token: str) -> str | None:
    """What the model or its chat template uses a token for; None: nothing, so that texts may write it."""
    tokenizer = processor.tokenizer
    own = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    for name in ("image", "video", "audio", "vision_start", "vision_end"):
        if getattr(processor, f"{name}_token_id", None) == tokenizer.convert_tokens_to_ids(token):
            return "a placeholder of images or videos"
    templates = tokenizer.chat_template, getattr(processor, "chat_template", None)
    if token not in THINK_TAGS and any(token in str(template) for template in templates):
        return "a control token of the chat template"
    ends = [name for name, value in own.items() if value == token and name.endswith("_token")]
    return f"the tokenizer's {ends[0]}" if ends else None
