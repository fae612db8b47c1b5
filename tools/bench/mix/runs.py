"""The ranks of a contender that is a build of ds_moe, this one or an earlier one: a run, set up and stepped as it does.

`ds_moe` is whichever the job finds first; `tools.bench.builds` says where builds have what is needed. Encoded samples
are kept, so that from the second turn on a step waits for its collation but not for PNG files.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tools.bench.builds import check_build, module_with
from tools.bench.mix.turns import Step, take_turns


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    check_build(plan["checkout"])
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
