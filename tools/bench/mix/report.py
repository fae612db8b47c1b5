"""What the benchmark prints of its figures, and what they are held against."""

from typing import Any

from rich.table import Table

from tools.results import Claim, judged, new_table, print_claims, show

CONTENDERS = {
    "packed": "ds_moe, packed",
    "padded": "ds_moe, padded",
    "before": "ds_moe, earlier build",
    "zero3": "ZeRO-3 + transformers grouped_mm",
    "autoep": "DeepSpeed AutoEP",
}
AIMS = {"before": 2.5, "zero3": 3.5, "autoep": 2.5}  # speeds of packed rows to theirs
OURS = "packed"
MIB = 2**20


def claims(rounds: list[dict[str, Any]]) -> list[Claim]:
    """What packing is to be worth, and at no more memory."""
    by_name = {one["contender"]: one for one in sorted(rounds, key=lambda one: one["median"])}  # at its quickest
    found = []
    for name, aim in AIMS.items():
        if OURS in by_name and name in by_name:
            speed, peaks = by_name[name]["speed_of_packed"], [by_name[one]["peak_bytes"] for one in (OURS, name)]
            text = f"{speed:.2f} times the speed of {CONTENDERS[name]}, at least {aim}"
            found.append((text, speed >= aim))
            text = f"{peaks[0] / peaks[1]:.2f} of the peak memory of {CONTENDERS[name]}, at most 1"
            found.append((text, peaks[0] <= peaks[1]))
    return judged(found)


def show_results(found: dict[str, Any]) -> None:
    parts = {key: value for key, value in found.items() if key not in ("scan", "rounds", "claims")}
    show(parts, results_table("each setting by itself", found["scan"]))
    if found["rounds"]:
        show(results_table("the quickest settings, in turns", found["rounds"]))
        print_claims(found["claims"])


def results_table(title: str, results: list[dict[str, Any]]) -> Table:
    columns = ["setting", "tokens/s", "min - max", "peak MiB\nof a rank", "micro-steps", "speed of\npacked to it"]
    table = new_table(["contender"], [*columns, "loss off by"], title)
    for one in results:
        unit = "tokens" if one["contender"] == OURS else "samples"
        cells = [CONTENDERS[one["contender"]], f"{one['size']:,} {unit}"]
        if "median" in one:
            cells += [f"{one['median']:,.0f}", f"{one['min']:,.0f} - {one['max']:,.0f}"]
            cells += [f"{one['peak_bytes'] / MIB:,.0f}", ", ".join(map(str, one["micro_steps"]))]
        else:
            cells += ["wrong, not timed", "", "", ""]
        speed = f"{one['speed_of_packed']:.2f}" if "speed_of_packed" in one else ""
        table.add_row(*cells, speed, f"{one['loss_difference']:.0e}")
    return table
