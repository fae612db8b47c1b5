"""Checks of `rl.engine` and `rl.reward`: the prompts, the servers as a run would find them, the functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_moe.config.deepspeed import precision
from ds_moe.config.rules.engine import engine_of, steps_of_round
from ds_moe.doctor.case import Case, Finding
from ds_moe.doctor.run import GIVEN
from ds_moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_engine(case: Case) -> Iterator[Finding]:
    """The rounds of a run, whether its engine can be given this model, and what the engine says of itself."""
    from ds_moe.export.live import tied_update, unlike_hub

    config, engine = case.config, engine_of(case.config)
    if engine is None:
        return
    where = config.at("rl.engine")
    steps = steps_of_round(config, engine)
    total = f", {-(-case.steps // steps)} rounds" if case.steps is not None else ""
    text = f"rounds: {engine.prompts} prompts x {engine.completions} completions, {steps} steps each{total}"
    yield Finding("ok", text)
    if case.records is not None and engine.prompts > case.records:
        text = f"{where}: a round asks {engine.prompts} prompts of {case.records} records, some of them twice"
        yield Finding("warning", text)
    if case.outline is not None:
        yield _room(case, case.outline)
    problem = None if case.model is None else unlike_hub(config, case.model)
    if case.outline is not None and not _may_be_apart(case):
        problem = problem or tied_update(case.outline)
    if problem is not None:
        yield Finding("error", f"{where}: {problem}")
    elif case.processor is not None:
        yield from _answers(case, where)
    yield from _rewards(case)


def _may_be_apart(case: Case) -> bool:
    """Whether the files hold a weight that the config ties; then values, which nobody reads here, decide."""
    from ds_moe.models.ties import ties_of

    return case.model is not None and case.files is not None and bool(ties_of(case.model).keys() & case.files.shapes)


def _room(case: Case, outline: PreTrainedModel) -> Finding:
    """Whether the versions of weights that a run hands over have room on their disk."""
    from ds_moe.checkpoint.room import written
    from ds_moe.export.live import folder_bytes
    from ds_moe.export.model import DTYPES
    from ds_moe.models.stored_names import Carried
    from ds_moe.tasks.rl.online.engines import engine_dtype
    from ds_moe.tasks.rl.online.handover import no_room_for_weights, weights_folder

    config, engine = case.config, engine_of(case.config)
    assert engine is not None
    dtype, carried = DTYPES[engine_dtype(config)], Carried(outline, case.files)
    size, folder = folder_bytes(outline, 1, dtype, carried), weights_folder(config)
    if problem := no_room_for_weights(folder, size, engine.lag):
        elsewhere = case.device.source == GIVEN  # the job runs on another machine, whose disk this one does not see
        return Finding("warning" if elsewhere else "error", f"{config.at('rl.engine.weights_dir')}: {problem}")
    return Finding("ok", f"weights for the engine: {written(size)} each, in {folder}")


def _rewards(case: Case) -> Iterator[Finding]:
    """Whether every reward can be imported; none is called."""
    from ds_moe.rollout.reward import RewardPool

    engine, one = engine_of(case.config), {"processes": 1}
    assert engine is not None
    try:
        with RewardPool(case.config.rl.reward.model_copy(update=one), engine.max_new_tokens, at=case.config.at) as pool:
            yield from (Finding("ok", line) for line in pool.lines())
    except UserError as error:
        yield Finding("error", str(error))


def _answers(case: Case, where: str) -> Iterator[Finding]:
    from ds_moe.rollout.engine import EnginesGone
    from ds_moe.tasks.rl.online.engines import make_engine

    config = case.config
    at_once = config.rl.model_copy(update={"engine": config.rl.engine.model_copy(update={"wait_s": 0.0})})
    there = config.train.model_copy(update={"precision": precision(config, case.device.on_cpu)})  # where the job runs
    try:
        for line in make_engine(config.model_copy(update={"rl": at_once, "train": there})).check():
            yield Finding("ok", f"engine: {line}")
    except EnginesGone as gone:
        elsewhere = case.device.source == GIVEN  # the job runs on another machine, which may reach the servers
        yield Finding("warning" if elsewhere else "error", f"{where}: {gone}")
    except UserError as error:
        yield from (Finding("error", f"{where}: {line}") for line in str(error).splitlines())
