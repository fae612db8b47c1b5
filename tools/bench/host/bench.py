"""What the host spends on a training step and on a generated token: ours against transformers and DeepSpeed.

plain     transformers' own model in a loop of torch: forward, backward, clipping, fused AdamW
ds_moe    our converted model under ZeRO 1, 2, 3, built as a run builds it
zero3     ZeRO-3 + transformers grouped_mm: the model as it is, each MoE block a ZeRO-3 leaf module
autoep    DeepSpeed AutoEP under ZeRO 2, 3

Layers are so narrow that a step is what Python and torch do to launch it, which decides whether a GPU idles. Counted is
processor time, of all threads of the busiest rank, so that waiting for other ranks or jobs does not lengthen it; and
operators that would be kernels. A contender's loss and gradients are those of plain transformers.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from ds_moe.engine.cpu import cpu_settings
from tools.bench.launched import run_plan
from tools.bench.step.bench import TINY
from tools.results import Claim, command_line, new_table, print_claims, show, write_json

LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
OURS, PLAIN = "ds_moe", "plain"


class Case(NamedTuple):
    contender: str
    zero: int
    ep_size: int

    @property
    def name(self) -> str:
        return self.contender if self.contender == PLAIN else f"{self.contender}, ZeRO-{self.zero}, EP {self.ep_size}"


CASES = [Case(PLAIN, 0, 1), *(Case(OURS, zero, ep) for ep in (1, 2) for zero in (1, 2, 3)), Case("zero3", 3, 1)]
CASES += [Case("autoep", zero, ep) for ep in (1, 2) for zero in (2, 3)]
SUITES = {"smoke": ([2], 1), "cpu": ([12, 24, 48], 15)}  # layers, timed steps


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    layers, steps = options.layers or SUITES[options.suite][0], SUITES[options.suite][1]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.contender in options.contender:
                results += [case._asdict() | found for found in launch(case, layers, steps, Path(folder))]
    for result in results:
        result["median_s"] = statistics.median(result["cpu_s"])
        result["right"] = result["loss_difference"] <= LOSS_TOLERANCE and result["norm_difference"] <= NORM_TOLERANCE
    found = {"suite": options.suite, "cores": len(os.sched_getaffinity(0)), "steps": steps, "model": TINY}
    found["load_average"] = round(os.getloadavg()[0], 1)  # above the processes of a case: others were running
    claims = claims_of(results, max(layers))
    show(step_table(results))
    print_claims(claims)
    write_json(found | {"results": results, "claims": claims}, options.json, indent=1)
    wrong = [Case(one["contender"], one["zero"], one["ep_size"]).name for one in results if not one["right"]]
    if wrong:
        print(f"error: loss or gradients are not those of plain transformers: {sorted(set(wrong))}", file=sys.stderr)
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--json")
    names = list(dict.fromkeys(case.contender for case in CASES))
    parser.add_argument("--suite", choices=SUITES, default="cpu", help="smoke: two layers, one step")
    parser.add_argument("--layers", type=int, action="append", metavar="N", help="of the model (repeatable)")
    parser.add_argument("--contender", choices=names, action="append", help="only this one (repeatable)")
    options = parser.parse_args(arguments)
    options.contender = options.contender or names
    return options


def launch(case: Case, layers: list[int], steps: int, folder: Path) -> list[dict[str, Any]]:
    plan: dict[str, Any] = {**case._asdict(), "layers": layers, "steps": steps, "checkpointing": [True, False]}
    plan |= {"tokens": 64, "sequence": 16, "dtype": "fp32", "model": TINY}
    settings = cpu_settings(case.ep_size) | {"OMP_NUM_THREADS": "1"}
    return run_plan("tools.bench.host.ranks", plan, case.ep_size, settings, folder)["results"]


def find(results: list[dict[str, Any]], case: Case, layers: int, checkpointing: bool) -> dict[str, Any] | None:
    key = {**case._asdict(), "layers": layers, "checkpointing": checkpointing}
    return next((one for one in results if all(one[name] == value for name, value in key.items())), None)


def claims_of(results: list[dict[str, Any]], layers: int) -> list[Claim]:
    """What the largest model bears out, with checkpointing and without."""
    claims: list[Claim] = []
    plain = Case(PLAIN, 0, 1)
    limits = [(Case(OURS, 2, 1), plain, 1.25), (Case(OURS, 3, 1), plain, 1.6)]
    limits += [(Case(OURS, zero, ep), Case("autoep", zero, ep), 1.0) for ep in (1, 2) for zero in (2, 3)]
    for checkpointing in (True, False):
        for one, other, limit in limits:
            pair = [find(results, case, layers, checkpointing) for case in (one, other)]
            if ratio := _ratio(pair, "median_s"):
                how = "with" if checkpointing else "without"
                text = f"{one.name} takes {ratio:.2f} of the time of {other.name} {how} checkpointing (at most {limit})"
                claims.append({"claim": text, "holds": ratio <= limit})
    for zero in (2, 3):
        pair = [find(results, case, layers, False) for case in (Case(OURS, zero, 1), plain)]
        if ratio := _ratio(pair, "token_s"):
            text = f"a token generated under ZeRO-{zero} takes {ratio:.2f} of plain transformers' time (at most 2)"
            claims.append({"claim": text, "holds": ratio <= 2})
    return claims


def _ratio(pair: list[dict[str, Any] | None], key: str) -> float | None:
    ours, other = pair
    return ours[key] / other[key] if ours and other else None


def step_table(results: list[dict[str, Any]]) -> Table:
    columns = ("layers", "ms a step", "min - max", "operators", "ms a token")
    table = new_table(["contender", "checkpointing"], columns)
    for one in results:
        times = [f"{1e3 * value:,.0f}" for value in (one["median_s"], min(one["cpu_s"]), max(one["cpu_s"]))]
        token = f"{1e3 * one['token_s']:,.1f}" if "token_s" in one else ""
        numbers = [str(one["layers"]), times[0], f"{times[1]} - {times[2]}", f"{one['kernels']:,}", token]
        case = Case(one["contender"], one["zero"], one["ep_size"])
        table.add_row(case.name, "on" if one["checkpointing"] else "off", *numbers)
    return table


if __name__ == "__main__":
    sys.exit(main())
