"""Numbers that must divide others: the EP size divides ranks and experts, ranks that share rows all ranks, a
micro-batch of all ranks the batch."""

import math
from typing import Literal

from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError


def fitting_ep_sizes(*counts: int | None) -> list[int]:
    """The EP sizes that divide all of these numbers, of ranks and of experts; None: a number is not known."""
    common = math.gcd(*(count for count in counts if count is not None))
    return [size for size in range(1, common + 1) if common % size == 0]


def ep_size_problem(
    ep_size: int, ranks: int | None, experts: int | None, of: Literal["ranks", "experts"]
) -> str | None:
    """The complaint about an EP size that does not divide the ranks, or the experts. Those it advises divide both."""
    names = {"ranks": f"the {ranks} ranks", "experts": f"the model's {experts} experts"}
    count, other = (ranks, experts) if of == "ranks" else (experts, ranks)
    if count is None or count % ep_size == 0:
        return None
    fits = fitting_ep_sizes(count, other)
    too = f", and {names['experts' if of == 'ranks' else 'ranks']}" if other is not None else ""
    advised = f"{', '.join(map(str, fits))} {'do' if len(fits) > 1 else 'does'}"
    return f"moe.ep_size {ep_size} does not divide {names[of]} ({advised}{too})"


def row_sharing_problem(sequence_parallel: int, ranks: int) -> str | None:
    """The complaint about ranks that cannot share rows by so many."""
    if ranks % sequence_parallel == 0:
        return None
    return f"train.sequence_parallel {sequence_parallel} does not divide the {ranks} ranks ({divisors(ranks)})"


def divisors(count: int) -> str:
    """The numbers that divide `count`, as advice."""
    found = [size for size in range(1, count + 1) if count % size == 0]
    return f"{', '.join(map(str, found))} {'do' if len(found) > 1 else 'does'}"


def accumulation_steps(config: RunConfig, world_size: int) -> int | None:
    """Micro-batches of a rank in an optimizer step: global / (micro x ranks), or a `UserError` if that is not whole.

    None where samples are packed: each step has as many rows as its samples need.
    """
    if config.data.packing:
        return None
    micro, total = config.train.micro_batch_size, config.train.global_batch_size
    step = micro * world_size
    if total % step == 0:
        return total // step
    fits = [size for size in (total // step * step, (total // step + 1) * step) if size]
    micros = [size for size in range(1, total // world_size + 1) if total % (size * world_size) == 0]
    advice = f"global_batch_size {' or '.join(map(str, fits))} would work"
    if micros:
        advice += f", or micro_batch_size {min(micros, key=lambda size: abs(size - micro))}"
    raise UserError(
        f"{config.at('train.global_batch_size')}: train.global_batch_size {total} is not a multiple of "
        f"micro_batch_size {micro} x {world_size} ranks = {step}; {advice}"
    )
