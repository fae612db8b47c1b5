"""Ranks of a benchmark on this machine, under DeepSpeed's launcher: they get a plan and leave what they found."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_moe.config.run import RunConfig
from ds_moe.distributed import Topology
from ds_moe.launcher.command import Launch, free_port
from ds_moe.launcher.processes import start

ROOT = Path(__file__).resolve().parents[2]


def run_plan(
    module: str, plan: dict[str, Any], processes: int, settings: dict[str, str], folder: Path, keep: Path | None = None
) -> dict[str, Any]:
    """What `python -m <module> PLAN.json RESULT.json` has written in one of its `processes` ranks.

    The files lie in `folder`, but the result in `keep`, if given; `settings` are environment variables. If a rank
    fails, this process ends with its exit code: what it said is on the terminal.
    """
    plan_file, result_file = folder / "plan.json", keep or folder / "result.json"
    plan_file.write_text(json.dumps(plan))
    result_file.parent.mkdir(parents=True, exist_ok=True)
    result_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes)]
    command += ["--master_port", str(free_port()), "--quiet", "--no_local_rank"]
    command += ["--module", module, str(plan_file), str(result_file)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = start(Launch(command, {"PYTHONPATH": paths, **settings}), stop_within_s=0)
    if code:
        sys.exit(code)
    return json.loads(result_file.read_text())


# --- in the ranks


def run_config(
    topology: Topology, zero: int | str, samples: int = 1, moe: Any = None, model: Any = None, **train: Any
) -> RunConfig:
    """A run of EP over the ranks, of `samples` a micro-batch; `zero` is how the shipped DeepSpeed JSON's name ends. It
    must name a model, whatever the engine is given."""
    batch = {"micro_batch_size": samples, "global_batch_size": samples * topology.world_size}
    return RunConfig(
        model=model or {"preset": "tiny-moe"},
        data={"train": "random tokens"},
        moe={"ep_size": topology.ep_size, **(moe or {})},
        train=batch | train,
        deepspeed=str(ROOT / f"ds_configs/zero{zero}.json"),
    )


def read_plan() -> dict[str, Any]:
    return json.loads(Path(sys.argv[1]).read_text())


def write_result(found: dict[str, Any]) -> None:
    """Rank 0 does it for all."""
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))


def leave() -> None:
    """The last call of every rank: all end together, or gloo's threads may abort one that exits."""
    dist.barrier()
    dist.destroy_process_group()
