"""Streamed data: seconds to the first step, memory and samples/s of a rank, and how well windows shuffle.

The data are chats of about 100 bytes of text, made from a seed. With --records beyond those of --shard the other shards
are hard links to the first one: a rank reads, counts and shuffles as many records, and the disk holds one shard, which
is then in the page cache.

Each rank is a process of its own, without a model. Contenders: `streamed` (this build, data.streaming), `indexed` (the
same records in one file with an index, of at most --indexed records: its time and memory grow with them).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.results import command_line, new_table, show, write_json

WORDS = "river stone light cloud seven paper green window table bread night horse".split()
MIB = 2**20
BATCH = 64
WINDOWS = (8, 32, 128)  # MiB
BUFFERS = (1_000, 10_000, 100_000)  # samples, of datasets' shuffle


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    facts = {
        "records": options.records,
        "records_of_a_shard": min(options.records, options.shard),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "global_batch_size": BATCH,
    }
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_streaming_") as folder:
        data = write_data(Path(folder, "data"), options.records, options.shard)
        facts |= {"bytes": data["bytes"], "files": data["files"]}
        runs = [streamed(data, folder, ranks, workers, options) for ranks in (1, 2) for workers in options.workers]
        runs.append(streamed(data, folder, 1, 0, options, packing=True))
        runs.append(indexed(data, folder, options))
    quality = shuffle_quality(facts["bytes"], facts["records"])
    show(facts, table(runs), *quality_tables(quality))
    write_json({**facts, "runs": runs, "quality": quality}, options.json, indent=1)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "--suite", "--json")
    parser.add_argument("--records", type=int, default=100_000_000)
    parser.add_argument("--shard", type=int, default=1_000_000, help="records of a file")
    parser.add_argument("--indexed", type=int, default=200_000, help="records that the index is measured with")
    parser.add_argument("--steps", type=int, default=200, help="after the first one")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--folder", type=Path, help="where data are written, and removed (default: temporary)")
    return parser.parse_args(arguments)


def record(number: int, chance: np.random.Generator) -> str:
    """A line of JSON with about 100 bytes of text."""
    words = " ".join(WORDS[index] for index in chance.integers(len(WORDS), size=14))
    turns = [{"role": "user", "content": f"{number}: {words}"[:92]}, {"role": "assistant", "content": f"no {number}"}]
    return json.dumps({"messages": turns})


def write_data(folder: Path, records: int, shard: int) -> dict[str, Any]:
    """`records` in files of `shard` each, of which all but the first are hard links to it."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    first = folder / "shard-00000.jsonl"
    with first.open("w") as file:
        file.writelines(record(number, chance) + "\n" for number in range(min(records, shard)))
    files = -(-records // shard)
    for number in range(1, files):
        os.link(first, folder / f"shard-{number:05}.jsonl")
    return {"train": str(folder), "first": first, "files": files, "bytes": files * first.stat().st_size}


def streamed(
    data: dict[str, Any], folder: str, ranks: int, workers: int, options: argparse.Namespace, packing: bool = False
) -> dict[str, Any]:
    section = {"train": data["train"], "streaming": True, "num_workers": workers, "max_length": 128}
    found = launch({**section, "packing": packing}, folder, ranks, options.steps)
    name = "streamed, packed" if packing else "streamed"
    return {"contender": name, "records": options.records, "ranks": ranks, "workers": workers, **found}


def indexed(data: dict[str, Any], folder: str, options: argparse.Namespace) -> dict:
    some = min(options.indexed, options.records, options.shard)
    file = Path(folder, "some.jsonl")
    with data["first"].open() as lines, file.open("w") as copy:
        copy.writelines(line for _, line in zip(range(some), lines, strict=False))
    found = launch({"train": str(file), "max_length": 128}, folder, 1, options.steps)
    return {"contender": "indexed", "records": some, "ranks": 1, "workers": 0, **found}


def launch(data: dict[str, Any], folder: str, ranks: int, steps: int) -> dict[str, Any]:
    """Of ranks that run at the same time: the largest figure of each, but for the least samples/s."""
    train = {"output_dir": f"{folder}/run", "global_batch_size": BATCH, "micro_batch_size": 8, "steps": 10**6}
    processes = []
    for rank in range(ranks):
        plan = {"data": data, "train": train, "rank": rank, "world_size": ranks, "steps": steps}
        command = [sys.executable, "-m", "tools.bench.streaming.ranks", json.dumps(plan)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("error: a rank has failed, see above")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    whole = {key: max(one[key] for one in found) for key in found[0] if key != "outlook"}
    whole["outlook"] = found[0]["outlook"]
    return {**whole, "samples_per_s": sum(one["samples"] for one in found) / whole["seconds"]}


def table(runs: list[dict[str, Any]]) -> Any:
    """A row a run."""
    numbers = ["records", "ranks", "workers", "to step 1", "of it CPU", "peak a rank", "a worker", "samples/s"]
    rows = new_table(["contender"], numbers)
    for run in runs:
        memory = [f"{run[key] / 1e6:,.0f} MB" for key in ("peak_bytes", "worker_bytes")]
        times = [f"{run[key]:.2f} s" for key in ("first_step_s", "first_step_cpu_s")]
        counts = [f"{run[key]:,}" for key in ("records", "ranks", "workers")]
        rows.add_row(run["contender"], *counts, *times, *memory, f"{run['samples_per_s']:,.0f}")
    return rows


# --- how well windows shuffle


def shuffle_quality(size: int, records: int) -> list[dict[str, Any]]:
    """Figures of orders of `records` records in blocks, by simulation at a hundredth of the scale."""
    from ds_moe.data.blocks import BLOCK

    per_block = max(1, round(BLOCK / (size / records)))
    blocks = max(64, size // BLOCK // 100)
    chance = np.random.default_rng(0)
    rows = np.arange(blocks * per_block).reshape(blocks, per_block)
    found = [{"order": "full permutation", **mixing(chance.permutation(rows.reshape(-1)), per_block)}]
    for window in WINDOWS:
        chosen = rows[chance.permutation(blocks)]
        in_window = window * MIB // BLOCK
        parts = [chance.permutation(chosen[start : start + in_window].reshape(-1))
                 for start in range(0, blocks, in_window)]  # fmt: skip
        found.append({"order": f"window of {window} MiB", **mixing(np.concatenate(parts), per_block)})
    for buffer in BUFFERS:
        order = np.fromiter(buffered(rows.size, buffer, chance), dtype=np.int64, count=rows.size)
        found.append({"order": f"datasets' buffer of {buffer:,}", **mixing(order, per_block)})
    return found


def buffered(count: int, buffer: int, chance: np.random.Generator) -> Any:
    """The order that datasets' `shuffle(buffer_size)` gives: a random one of the buffer leaves for each that enters."""
    held = list(range(min(buffer, count)))
    for entering, leaves in zip(range(len(held), count), chance.integers(len(held), size=count), strict=False):
        yield held[leaves]
        held[leaves] = entering
    yield from chance.permutation(held)


def mixing(order: np.ndarray, per_block: int) -> dict[str, float]:
    """How far records are from their place, as a share of all; how often neighbours come from one block; and how much
    the mean over a batch varies, of data that are constant in a block, in that of a full permutation."""
    block = order // per_block
    blocks = int(block.max()) + 1
    away = np.abs(np.argsort(order) - np.arange(len(order))).mean() / len(order)
    values = np.random.default_rng(1).standard_normal((16, blocks))
    batches = values[:, block[: len(block) // BATCH * BATCH]].reshape(16, -1, BATCH).mean(-1)
    return {
        "displacement": float(away),
        "neighbours_of_a_block": float((block[1:] == block[:-1]).mean()),
        "variance": float(batches.var(1).mean() / (values.var(1).mean() / BATCH)),
    }


def quality_tables(quality: list[dict[str, Any]]) -> list[Any]:
    rows = new_table(["order"], ["mean displacement", "neighbours of a block", f"variance of a batch of {BATCH}"])
    for one in quality:
        figures = f"{one['displacement']:.3f}", f"{one['neighbours_of_a_block']:.2%}", f"{one['variance']:.2f}"
        rows.add_row(one["order"], *figures)
    return [rows]


if __name__ == "__main__":
    sys.exit(main())
