"""The engine that a run file asks for."""

from collections.abc import Callable

from ds_moe.config.deepspeed import precision
from ds_moe.config.rules.engine import engine_of
from ds_moe.config.run import RunConfig
from ds_moe.engine.start import on_cpu
from ds_moe.rollout.engine import RolloutEngine
from ds_moe.rollout.servers import Servers
from ds_moe.tasks.rl.online.local import LocalEngine


def engine_dtype(config: RunConfig) -> str:
    """Of the weights that the engine is given: "fp32" or "bf16"."""
    engine = engine_of(config)
    return (engine and engine.weights_dtype) or precision(config, on_cpu())


def compared_dtype(config: RunConfig) -> str:
    """The coarser dtype of engine and trainer, whose rounding their log-probs differ by."""
    return "bf16" if "bf16" in (engine_dtype(config), precision(config, on_cpu())) else "fp32"


def make_engine(config: RunConfig, note: Callable[[str], None] = print) -> RolloutEngine:
    """What `rl.engine` asks for; nothing is started or asked yet. `note` is told of servers that are lost and found.

    Raises `UserError` as `Servers`.
    """
    engine = engine_of(config)
    assert engine is not None
    if engine.kind == "local":
        return LocalEngine(engine_dtype(config), engine.timeout_s)
    routing = config.moe is not None and config.moe.replay.enabled
    longest, dtype = config.data.max_length, engine_dtype(config)
    return Servers(engine, routing=routing, longest=longest, dtype=dtype, note=note)
