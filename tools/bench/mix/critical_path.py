"""What packing leaves of waiting: of the tokens that ranks compute at the pace of the slowest one, how many are real.

    python -m tools.bench.mix.critical_path --json docs/results/critical_path.json

Records of the sizes of `screens.csv`, drawn as often as needed, in steps whose samples fill two packed rows a rank.
All ranks take a micro-step together, so it lasts as long as its longest row; the share is real tokens / (tokens of that
row x ranks), both summed over micro-steps. Padded micro-batches are grouped by length, and their padding is computed.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)

from ds_moe.data.order import EpochOrder, PaddedRows, Rows
from ds_moe.data.packing import PackedRows
from tools.bench.mix.records import PATCHES, PIXELS, TOKENS_A_WORD, read_screens
from tools.results import command_line, new_table, refusing, show, write_json

OF_THE_TEMPLATE = 12  # tokens that ChatML writes around an image, a request and an answer
PATCH_COST = 0.13  # tokens: 411 million parameters in the layers of Qwen3-VL-30B-A3B's tower, 3.3 billion active ones
CAPACITY, MICRO_STEPS = 4096, 2
FILL = 0.95  # of the rows' tokens by an average step: few draws then need a third micro-step


def sizes() -> tuple[np.ndarray, np.ndarray]:
    """(tokens, patches) of every screen with its texts."""
    screens, count = (
        read_screens(),
        Qwen2VLImageProcessorPil(size=dict(PIXELS), **PATCHES).get_number_of_image_patches,
    )
    patches = np.array([count(screen.height, screen.width) for screen in screens])
    words = np.array([screen.request_words + screen.answer_words for screen in screens])
    of_texts = OF_THE_TEMPLATE + np.round(TOKENS_A_WORD * words).astype(np.int64)
    return of_texts + patches // PATCHES["merge_size"] ** 2, patches


def simulated(tokens: np.ndarray, patches: np.ndarray, ranks: int, steps: int) -> dict[str, Any]:
    """Figures of one number of ranks."""
    # Padded micro-batches of 4 samples want a multiple of 4 x ranks.
    batch = round(MICRO_STEPS * CAPACITY * FILL / tokens.mean() / 4) * 4 * ranks
    drawn = np.random.default_rng(ranks).integers(0, len(tokens), batch * steps)
    tokens, patches = tokens[drawn], patches[drawn]
    order = EpochOrder(tokens, batch, seed=0, shuffle=True, length_grouping=True)
    packed = PackedRows(order, tokens, patches, PATCH_COST, CAPACITY, ranks)
    began = time.perf_counter()
    rows = [packed.of_step(step) for step in range(steps)]
    seconds = (time.perf_counter() - began) / steps
    fills = [packed.fill(one) for one in rows]
    return {
        "ranks": ranks,
        "global_batch_size": batch,
        "steps": steps,
        "packed": sum(one.tokens for one in fills) / sum(one.critical for one in fills),
        "packed_worst_step": min(one.critical_share for one in fills),
        "packed_fill": sum(one.tokens for one in fills) / sum(one.room for one in fills),
        "packed_micro_steps": sum(one.micro_steps for one in fills) / steps,
        "plan_seconds": seconds,
        **{f"padded_{size}": padded_share(order, size, ranks, steps) for size in (1, 4)},
    }


def padded_share(order: EpochOrder, size: int, ranks: int, steps: int) -> float:
    """The share of real tokens with padded micro-batches of `size` samples."""
    padded = PaddedRows(order, size, ranks)
    real = critical = 0
    for step in range(steps):
        rows: Rows = padded.of_step(step)
        real += sum(int(order.lengths[row].sum()) for micro_step in rows for row in micro_step)
        critical += sum(max(int(order.lengths[row].max()) for row in one) * size * ranks for one in rows)
    return real / critical


@refusing
def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, "--json")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--steps", type=int, default=20)
    options: argparse.Namespace = parser.parse_args(argv)
    tokens, patches = sizes()
    found = [simulated(tokens, patches, ranks, options.steps) for ranks in options.ranks]
    columns = [
        "samples a step",
        "packed",
        "worst step",
        "rows full",
        "padded, 1",
        "padded, 4",
        "ms a plan",
    ]
    table = new_table(
        [],
        ["ranks", *columns],
        title=f"Real tokens on the critical path, rows of {CAPACITY:,} tokens",
    )
    for one in found:
        keys = ("packed", "packed_worst_step", "packed_fill", "padded_1", "padded_4")
        shares = [f"{one[key]:.3f}" for key in keys]
        numbers = [
            str(one["ranks"]),
            f"{one['global_batch_size']:,}",
            *shares,
            f"{1000 * one['plan_seconds']:.0f}",
        ]
        table.add_row(*numbers)
    show(table)
    if options.json is not None:
        about = {
            "records": len(tokens),
            "median_tokens": float(np.median(tokens)),
            "longest": int(tokens.max()),
        }
        settings = {
            "capacity": CAPACITY,
            "patch_cost": PATCH_COST,
            "tokens_a_word": TOKENS_A_WORD,
            **about,
        }
        write_json({"settings": settings, "results": found}, options.json, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
