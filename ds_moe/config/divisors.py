"""Numbers that must divide others: the EP size divides ranks and experts, a micro-batch of all ranks the batch."""

from ds_moe.config.run import RunConfig
from ds_moe.errors import UserError


def ep_size_problem(ep_size: int, count: int, what: str) -> str | None:
    """The complaint about an EP size that does not divide `count`, which messages call `what` ("the 8 ranks")."""
    if count % ep_size == 0:
        return None
    fits = ", ".join(str(size) for size in range(1, count + 1) if count % size == 0)
    return f"moe.ep_size {ep_size} does not divide {what} ({fits} do)"


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches of a rank in an optimizer step: global / (micro x ranks), or a `UserError` if that is not whole."""
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
