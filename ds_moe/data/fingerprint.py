"""Everything that the tokens of a data file follow from, by names that people know.

What is kept of encoded records (`token_counts.py`, `prepared/`) is kept under a fingerprint, and used only by a run
with an equal one. What images of the same size contain is not part of it, because finding out would read them all.
"""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL import features

from ds_moe.config.run import RunConfig
from ds_moe.config.sections import sources_of
from ds_moe.data.processor import Processor
from ds_moe.data.record_kind import Records
from ds_moe.errors import shown

RULES = 4  # of how records become tokens: raised where they change
PACKAGES = ("transformers", "tokenizers", "jinja2", "pillow", "torch")

Facts = dict[str, Any]  # values are JSON
Fingerprint = Facts


def fingerprint(config: RunConfig, records: Records, processor: Processor) -> Fingerprint:
    """Of the records of data.train or data.eval; what would be long is a digest."""
    data, tokenizer, images = config.data, processor.tokenizer, processor.image_processor
    whole = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    kind = records.record_kind
    return {
        "the records": records.sha256,
        "the sizes of images": _digest(records.lengths.tobytes()),
        "the records that are left out": _digest(json.dumps([one.where for one in records.bad]).encode()),
        "the names of sources": json.dumps([records.kinds, [str(source) for source in records.sources]]),
        "the roots of sources": [one.root for one in (*sources_of(data.train), *sources_of(data.eval))],
        "the kind of records": f"{type(kind).__qualname__} {vars(kind)}",
        "the tokenizer": _digest(whole.encode()),
        "the chat template": _digest(json.dumps([str(tokenizer.chat_template), str(processor.chat_template)]).encode()),
        "special tokens of the tokenizer": str(sorted(tokenizer.special_tokens_map.items(), key=str)),
        "the kind of processor": type(processor).__qualname__,
        "the processor of videos": str(getattr(processor, "video_config", None)),
        "data.video": str(data.video),
        "the image processor": "" if images is None else str(sorted(images.to_dict().items())),
        **{
            f"data.{key}": getattr(data, key)
            for key in ("max_length", "max_pixels", "train_on", "content_tokens", "root")
        },
        **{package: version(package) for package in PACKAGES},
        "av": _version("av"),
        "libjpeg": str(features.version("jpg")),
        "the rules of this version of ds_moe": RULES,
    }


def _version(package: str) -> str | None:
    """None: it is not there, and what it would read is refused."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def key_of(made_of: Fingerprint) -> str:
    """A digest of it all."""
    return _digest(json.dumps(made_of, sort_keys=True, default=str).encode())


def difference(kept: Fingerprint, now: Fingerprint) -> str:
    """What differs, in a line: "data.max_length was 512 and is 1024"; what is long is not shown."""
    found = []
    for name in {**now, **kept}:
        was, is_now = kept.get(name), now.get(name)
        if name not in kept:
            found.append(f"an earlier build did not note {name}")
        elif was != is_now:
            short = all(len(str(value)) < 40 for value in (was, is_now))
            found.append(f"{name} was {shown(was)} and is {shown(is_now)}" if short else f"{name} changed")
    return ", ".join(found)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
