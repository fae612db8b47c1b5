"""Memory and speed of a long row that ranks share: train.sequence_parallel 1, 2 and 4 on CPU processes.

    python -m tools.bench.sequence.bench --json sequence_parallel.json
    python -m tools.bench.sequence.bench --tokens 4096 --samples 2 --ranks 1 2

A row of 32,768 tokens, a quarter of them of images, goes through a small Qwen3-VL-MoE: an optimizer step of ZeRO-2 with
experts over all ranks, fp32, one thread a rank. The peak is that of the largest rank's resident memory (VmHWM) above
its libraries; glibc returns what is freed, so that it is what was in use at once. Seconds are of the second step,
CPU seconds those of all ranks together, which other jobs on the machine disturb less.
Exit status 1 if a loss differs by more than 1e-6, or memory is above the shares of one rank's that are promised.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from ds_moe.engine.cpu import cpu_settings
from ds_moe.errors import UserError
from tools.bench.launched import run_plan
from tools.bench.memory.bench import RETURNED
from tools.results import command_line, new_table, refusing, show, write_json

MIB = 2**20
LIMITS = {2: 0.6, 4: 0.35}  # of one rank's memory
LOSS = 1e-6
TEXT = {
    **{"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16},
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
}
VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 160, "num_heads": 4, "patch_size": 8}
VISION |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 256}
STEPS = 2  # in the second Adam's moments are there


def plan_of(ranks: int, tokens: int, samples: int, checkpointing: bool) -> dict[str, Any]:
    train = {"steps": STEPS, "schedule": "constant", "precision": "fp32", "gradient_checkpointing": checkpointing}
    run = {
        "model": {"preset": "tiny-vl-moe"},
        "data": {"train": "random tokens", "packing": True, "max_length": tokens},
        "moe": {"ep_size": ranks, "balance": [{"kind": "aux", "scope": "sequence"}]},
        "train": train | {"global_batch_size": samples, "sequence_parallel": ranks},
        "deepspeed": "zero2",
    }
    return {"run": run, "model": TEXT | {"vision": VISION}, "samples": samples, "steps": STEPS}


def measure(ranks: int, tokens: int, samples: int, checkpointing: bool) -> dict[str, Any]:
    """Sizes are bytes of the largest rank."""
    print(f"{ranks} ranks", file=sys.stderr, flush=True)
    settings = {**cpu_settings(ranks), "OMP_NUM_THREADS": "1", **RETURNED}
    plan = plan_of(ranks, tokens, samples, checkpointing)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = run_plan("tools.bench.sequence.ranks", plan, ranks, settings, Path(folder))
        except SystemExit as stopped:
            raise UserError(f"{ranks} ranks failed with exit code {stopped.code}") from stopped
    above = found["peak_bytes"] - found["libraries_bytes"]
    return {"ranks": ranks, "checkpointing": checkpointing, "above_libraries_bytes": above, **found}


def with_shares(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each result beside that of one rank, which comes first."""
    alone = results[0]
    return [
        result
        | {
            "memory_share": result["above_libraries_bytes"] / alone["above_libraries_bytes"],
            "loss_difference": max(abs(a - b) for a, b in zip(result["losses"], alone["losses"], strict=True)),
            "tokens_per_s": result["tokens"] / result["seconds"][-1],
        }
        for result in results
    ]


def failed(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        one for one in results if one["memory_share"] > LIMITS.get(one["ranks"], 1.0) or one["loss_difference"] > LOSS
    ]


@refusing
def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "--json")
    parser.add_argument("--tokens", type=int, default=32_768, metavar="N", help="of the row (default 32,768)")
    parser.add_argument("--samples", type=int, default=4, metavar="K", help="in it, of equal length (default 4)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="that share it, the first is 1")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    options = parser.parse_args(arguments)
    if options.ranks[0] != 1 or options.tokens % (8 * options.samples):
        raise UserError("--ranks begins with 1, and --tokens is a multiple of 8 x --samples")
    results = []
    for ranks in options.ranks:
        found = measure(ranks, options.tokens, options.samples, options.checkpointing)
        results.append(found | {"tokens": options.tokens, "samples": options.samples})
    results = with_shares(results)
    columns = ("MiB a rank\nabove libraries", "to one\nrank's", "tokens/s", "CPU s\na step", "loss\ndifference")
    title = f"a row of {options.tokens:,} tokens in {options.samples} samples, one thread a rank"
    table = new_table(["ranks"], columns, title)
    for one in results:
        sizes = [f"{one['above_libraries_bytes'] / MIB:,.0f}", f"{one['memory_share']:.2f}"]
        times = [f"{one['tokens_per_s']:,.0f}", f"{one['cpu_seconds'][-1]:,.1f}"]
        table.add_row(str(one["ranks"]), *sizes, *times, f"{one['loss_difference']:.1e}")
    show(table)
    write_json({"rows": results}, options.json, indent=1)
    return 1 if failed(results) else 0


if __name__ == "__main__":
    sys.exit(main())
