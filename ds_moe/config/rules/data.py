"""Rules about the sources of `data.train` and `data.eval`, and how several are mixed."""

from collections import Counter
from collections.abc import Iterator

from ds_moe.config.rules.rule import Complaint, Unused
from ds_moe.config.run import RunConfig
from ds_moe.config.sections import DIGITS, SourceConfig, sources_of
from ds_moe.config.sources import HUB, source_names
from ds_moe.errors import shown

TAKEN_NAMES = ("all", "mean")  # rows of an evaluation: records without a kind, and the mean over all kinds


def shares(config: RunConfig) -> bool:
    """Whether the run file says how much each source is drawn, so that an epoch is not every record once."""
    return config.data.mixture.temperature is not None or any(
        source.weight is not None or source.epochs is not None for source in sources_of(config.data.train)
    )


def _one_source(config: RunConfig) -> str | None:
    return None if len(sources_of(config.data.train)) > 1 else "data.train is one source"


def _length_given(config: RunConfig) -> str | None:
    if reason := _one_source(config):
        return reason
    if any(source.epochs is not None for source in sources_of(config.data.train)):
        return "an epoch has as many records as `epochs` of the sources say"
    return None if shares(config) else "without a weight or a temperature an epoch is every record once"


UNUSED: dict[str, Unused] = {
    "data.mixture": _one_source,
    "data.mixture.epoch": _length_given,
}


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    for split in ("train", "eval"):
        given = getattr(config.data, split)
        for number, source in enumerate(sources_of(given)):
            for key, text in _of_source(source):
                place = f"data.{split}.{number}" if isinstance(given, list) else f"data.{split}"
                yield f"{place}.{key}" if key else place, f"{place}{f'.{key}' if key else ''} {text}"
        names = source_names(given)
        for name, count in Counter(names).items():
            if count > 1:
                text = f"data.{split}: {count} sources have the name {shown(name)}; give each a name of its own"
                yield f"data.{split}.{names.index(name)}", text
            elif name in TAKEN_NAMES and (len(names) > 1 or sources_of(given)[0].name):
                text = (
                    f"data.{split}: a source has the name {name}, that of an evaluation's own row; give it another name"
                )
                yield f"data.{split}.{names.index(name)}", text
    yield from _mixture(config)


def _of_source(source: SourceConfig) -> Iterator[tuple[str, str]]:
    hub = source.path.startswith(HUB)
    for key in ("subset", "revision") if not hub else ():
        if getattr(source, key) is not None:
            yield key, f"would not be used: {shown(source.path)} is no dataset of the hub ({HUB}OWNER/NAME); remove it"
    if source.path == DIGITS:
        for key in ("columns", "root", "split"):
            if getattr(source, key):
                yield key, 'would not be used: the path is "digits", which reads no files; remove it'


def _mixture(config: RunConfig) -> Iterator[Complaint]:
    sources = sources_of(config.data.train)
    weighted = [number for number, source in enumerate(sources) if source.weight is not None]
    counted = [number for number, source in enumerate(sources) if source.epochs is not None]
    if len(sources) == 1 and weighted:
        place = "data.train.0.weight" if isinstance(config.data.train, list) else "data.train.weight"
        yield place, f"{place} would not be used: data.train is one source; remove it"
    elif weighted and counted:
        text = f"data.train: source {weighted[0]} has a weight and source {counted[0]} epochs"
        yield f"data.train.{max(weighted[0], counted[0])}", f"{text}; say all shares in one of the two"
    elif config.data.mixture.temperature is not None and (weighted or counted):
        what = "weights" if weighted else "epochs"
        text = f"data.mixture.temperature shares by the sizes of the sources, which have {what}; remove one of them"
        yield "data.mixture.temperature", text
