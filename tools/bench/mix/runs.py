"""The ranks of a contender that is a build of ds_moe, this one or an earlier one: a run, set up and stepped as it does.

`ds_moe` is whichever the job finds first, and `NAMES` says where builds have what is needed here. Encoded samples are
kept, so that from the second turn on a step waits for its collation but not for PNG files.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tools.bench.mix.turns import Step, take_turns

NAMES = (  # what: its modules, the newest build's first
    ("load_run", ("ds_moe.config.run_file", "ds_moe.runfile")),
    ("set_up", ("ds_moe.training.set_up", "ds_moe.run")),
    ("train_step", ("ds_moe.training.step", "ds_moe.step")),
    ("CACHE_BYTES", ("ds_moe.data.encoder", "ds_moe.data.loading")),
)


def module_with(name: str) -> Any:
    for module in dict(NAMES)[name]:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        if hasattr(found, name):
            return found
    raise LookupError(f"this build of ds_moe has no {name} in any of {dict(NAMES)[name]}")


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    package = importlib.import_module("ds_moe")
    if not Path(str(package.__file__)).is_relative_to(plan["checkout"]):
        raise ImportError(f"{package.__file__} was imported, not the build in {plan['checkout']}")
    module_with("CACHE_BYTES").CACHE_BYTES = plan["cache_bytes"]
    run = module_with("set_up").set_up(module_with("load_run").load_run(plan["run_file"]))
    train_step = module_with("train_step").train_step
    stream = run.parts.stream if hasattr(run, "parts") else run.stream
    batches, micro_steps = iter(stream), [0]

    def counted():
        for micro_batches in batches:
            micro_steps[0] = len(micro_batches)
            yield micro_batches

    steps = counted()

    def step() -> Step:
        report = train_step(run, steps)
        return Step(report.loss, report.grad_norm, report.tokens, micro_steps[0])

    take_turns(step, plan["batches"], Path(plan["folder"]))
    run.stop.close()
    run.watch.close(True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
