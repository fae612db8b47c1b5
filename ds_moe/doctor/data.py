"""Checks that read the data: the structure of every record, and the first ones decoded and tokenized."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_moe.config.sections import sources_named, sources_of
from ds_moe.config.sources import HUB, source_names
from ds_moe.doctor.case import Case, Finding
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from ds_moe.data.processor import Processor
    from ds_moe.data.record_kind import Records
    from ds_moe.tasks.registry import TaskKind

STREAMED = 4096  # records of streamed data that are looked at, of which `case.samples` are decoded
SHOWN = 5  # bad records of a file given a line of their own
COMMIT = re.compile(r"[0-9a-f]{40}")  # of the hub


def check_data(case: Case) -> Iterator[Finding]:
    """Findings of data.train and data.eval; sets `case.records` and `case.tokens_a_sample`."""
    from ds_moe.tasks.registry import task_kind

    config, kind = case.config, task_kind(case.config)
    try:
        kind.eval_records(config)
    except UserError as error:  # the records of a gate name its adapters, which must be found
        yield Finding("error", f"{config.at(kind.trainable_key(config))}: {error}")
        return
    try:
        processor = _processor(case)
    except UserError as error:
        yield Finding("error", f"{config.at('model')}: {error}")
        processor = None
    if processor is not None and case.folder is not None:
        yield from _end_token(case, processor)
    if processor is not None and (problem := _content_tokens(case, processor)):
        yield Finding("error", problem)
        processor = None
    for split in ("train", "eval"):
        if getattr(config.data, split) is not None:
            yield from _check_split(case, kind, split, processor)


def _end_token(case: Case, processor: Processor) -> Iterator[Finding]:
    """Whether generation of this folder stops at the token that answers are taught to end with."""
    from transformers import GenerationConfig

    from ds_moe.data.chat_template import end_token
    from ds_moe.models.generation import stop_tokens

    taught = end_token(processor)
    try:
        stops = stop_tokens(GenerationConfig.from_pretrained(case.folder))
    except OSError:  # transformers then derives one from the model's config
        stops = stop_tokens(GenerationConfig.from_model_config(case.model))
    if taught is not None and taught not in stops:
        name = processor.tokenizer.convert_ids_to_tokens
        own = ", ".join(map(str, name(stops))) or "no token"
        text = f"generation of {case.folder} stops at {own}, while its chat template ends answers with {name(taught)}"
        where = case.config.at("model.path")
        yield Finding("warning", f"{where}: {text}: evaluations, checkpoints and exports of this run stop at both")


def _content_tokens(case: Case, processor: Processor) -> str | None:
    """What is wrong with data.content_tokens."""
    from ds_moe.data.special_tokens import check_content_tokens

    try:
        check_content_tokens(processor, case.config.data.content_tokens)
    except UserError as error:
        return f"{case.config.at('data.content_tokens')}: {error}"
    return None


def _in_order(case: Case, split: str, records: Records) -> list[int]:
    """The samples that are decoded: the first ones of a source; of several sources each has its share."""
    from ds_moe.data.pools import FirstRecords
    from ds_moe.data.position import epoch_order_of

    count = min(case.samples, len(records))
    if isinstance(records, FirstRecords):
        return records.in_order(count)
    if len(records.sources) < 2:
        return list(range(count))
    if split == "train":
        return sorted(epoch_order_of(case.config, records).epoch(0)[:count].tolist())
    return [number * len(records) // count for number in range(count)]  # of data.eval all are used


def _special_in_texts(
    case: Case, split: str, records: Records, processor: Processor, chosen: list[int]
) -> Iterator[Finding]:
    """Special tokens that texts write and that become several tokens: wanted ones, and imitated control tokens."""
    from ds_moe.data.images import RecordError
    from ds_moe.data.record_kind import conversation_of
    from ds_moe.data.special_tokens import control_use, special_tokens

    config, where = case.config, case.config.at(f"data.{split}")
    found: dict[str, list[str]] = {}
    for index in chosen:
        try:
            conversation = conversation_of(records.sample(index))
        except RecordError:
            continue  # check_samples has named it
        turns = [turn.written for turn in conversation.turns] if conversation is not None else []
        for match in special_tokens(processor).finditer("\n".join(turns)):
            if match[0] not in config.data.content_tokens:
                found.setdefault(match[0], []).append(records.where(index))
    wanted = [token for token in found if control_use(processor, token) is None]
    for tokens, fix in (
        (wanted, f"data.content_tokens: {json.dumps(wanted)} keeps them whole"),
        ([token for token in found if token not in wanted], "the chat template uses them, so they stay text"),
    ):
        if tokens:
            named = ", ".join(f"{token} {len(found[token])} times" for token in tokens[:SHOWN])
            more = f" and {len(tokens) - SHOWN} more" if len(tokens) > SHOWN else ""
            text = f"special tokens in texts are split into pieces: {named}{more} (first at {found[tokens[0]][0]})"
            yield Finding("warning", f"{where}: data.{split}: {text}; {fix}")


def _processor(case: Case) -> Processor | None:
    from ds_moe.models.processor import load_processor, tiny_processor

    if case.model is None:
        return None
    if case.folder is not None:
        return load_processor(case.folder)
    return tiny_processor("vl" if hasattr(case.model, "vision_config") else "text")


def _check_split(case: Case, kind: TaskKind, split: str, processor: Processor | None) -> Iterator[Finding]:
    from ds_moe.data.encoder import check_samples
    from ds_moe.data.pools import FirstRecords
    from ds_moe.data.position import order_of
    from ds_moe.data.records import SKIPPING
    from ds_moe.data.sources.mixture import mixture_of

    config, where = case.config, case.config.at(f"data.{split}")
    path = sources_named(getattr(config.data, split))
    if split == "train" and case.model is None and kind.files_follow:
        return  # rollouts are read with the model's routing in mind
    try:
        records = _records(case, kind, split)
        mixture = mixture_of(config.data, records) if split == "train" and not config.data.streaming else None
    except UserError as error:
        yield Finding("error", f"{where}: {error}")
        return
    if mixture is not None:
        names = source_names(config.data.train)
        yield Finding("ok", f"data.train: an epoch has {mixture.records:,} records: {mixture.described(names)}")
    for source in sources_of(getattr(config.data, split)):
        if source.path.startswith(HUB) and not COMMIT.fullmatch(source.revision or ""):
            text = f"{source.path} may change on the hub, and a changed source is not resumed"
            yield Finding("warning", f"{where}: data.{split}: {text}; set its revision to a commit")
    streamed = records if isinstance(records, FirstRecords) else None
    if split == "train":
        case.order = streamed.order if streamed else order_of(config, records)
    bad = [str(one) for one in records.bad]
    lengths: list[int] = []
    if processor is not None:
        chosen = _in_order(case, split, records)
        try:
            found, lengths = check_samples(config, records, processor, chosen)
        except UserError as error:  # videos need a library that is not there
            yield Finding("error", f"{where}: {error}")
            return
        bad += map(str, found)
        yield from _special_in_texts(case, split, records, processor, chosen)
    level, fix = ("warning", "") if config.data.on_bad_record == "skip" else ("error", f"; {SKIPPING}")
    yield from (Finding(level, f"{line}{fix}") for line in bad[:SHOWN])
    if len(bad) > SHOWN:
        yield Finding(level, f"{path}: and {len(bad) - SHOWN} more bad records{fix}")
    mean = sum(lengths) / len(lengths) if lengths else None
    if split == "train":
        case.records, case.tokens_a_sample = None if streamed else len(records), mean
        case.train, case.processor = records, processor
        if not streamed and len(records) < config.train.global_batch_size:
            text = f"{len(records)} records do not fill one global batch of {config.train.global_batch_size}"
            yield Finding("warning", f"{where}: data.train {path}: {text}")
    size = f", {min(lengths)} to {max(lengths)} tokens in {len(lengths)} of them" if lengths else ""
    if not bad:
        known = f"streamed: {streamed.outlook}" if streamed else f"{len(records)} records"
        yield Finding("ok", f"data.{split}: {known}{size}")
    for line in kind.records_summary(records.remembered) if split == "train" else ():
        warned = line.removeprefix("warning: ")
        yield Finding("ok", line) if warned == line else Finding("warning", f"{where}: data.train: {warned}")


def _records(case: Case, kind: TaskKind, split: str) -> Records:
    from ds_moe.data.pools import FirstRecords
    from ds_moe.data.records import open_records

    if split == "train" and case.config.data.streaming:
        return FirstRecords(case.config, kind.train_records(case.config, case.model), STREAMED)
    data = case.config.data.model_copy(update={"on_bad_record": "skip"})
    if split == "train":
        return open_records(data.train, "train", data, record_kind=kind.train_records(case.config, case.model))
    assert data.eval is not None  # the caller has looked
    return open_records(data.eval, "held-out", data, record_kind=kind.eval_records(case.config))
