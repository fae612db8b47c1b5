"""Ranks of test_refusals: a run of two steps, then what each of several runs says that would go on from it.

Argument: JSON of {"run": run file, "first": overrides, "cases": {name: overrides}}.
"""

import json
import sys

from ds_moe.config.run_file import load_run
from ds_moe.errors import UserError
from ds_moe.train import train
from ds_moe.training.checkpoints import resume
from ds_moe.training.set_up import set_up
from tests.launcher import leave, report


def main():
    told = json.loads(sys.argv[1])
    if "first" in told:
        train(load_run(told["run"], told["first"]))
    for name, overrides in told["cases"].items():
        print(f"case {name}", flush=True)
        try:
            run = set_up(load_run(told["run"], overrides))
            resume(run)
        except UserError as error:
            report(**{name: str(error)})
        else:
            report(**{name: run.progress.step})
            run.engine.destroy()
    leave()


if __name__ == "__main__":
    main()
