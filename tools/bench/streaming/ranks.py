"""One rank of tools/bench/streaming/bench.py: how long to its first step, how much memory, how fast after that.

It has no model and talks to no other rank: a stream of data does not. Memory is counted from the imports, the tokenizer
and the filler on, which a run has in any case; `workers` is that of the loading processes alone, the largest of them.
"""

import json
import sys
import time
from itertools import islice

import psutil
import torch

from ds_moe.config.run import RunConfig
from ds_moe.data.encode import filler
from ds_moe.data.pools import Pools
from ds_moe.data.streaming import StreamedTrain, train_stream
from ds_moe.models.processor import tiny_processor
from tools.bench.resident import new_peak, resident


def main(given: str) -> None:
    """`given` is JSON: data, train (sections of a run file), rank, world_size, steps, and `skip` (steps)."""
    plan = json.loads(given)
    torch.set_num_threads(1)
    processor = tiny_processor("text")
    filler(processor)
    config = RunConfig(
        model={"preset": "tiny-moe"}, data=plan["data"], train=plan["train"], deepspeed="ds_configs/zero2.json"
    )
    new_peak()
    before = resident("RssAnon")
    began, cpu = time.perf_counter(), time.process_time()
    stream = train_stream(config, processor, rank=plan["rank"], world_size=plan["world_size"])
    opened_s = time.perf_counter() - began
    steps = iter(stream)
    next(steps)
    first_s, first_cpu_s = time.perf_counter() - began, time.process_time() - cpu
    began, cpu, samples = time.perf_counter(), time.process_time(), 0
    for step in islice(steps, plan["steps"]):
        samples += sum(int(batch.real_B.sum()) for batch in step)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    workers = psutil.Process().children(recursive=True)
    found = {
        "opened_s": opened_s,
        "first_step_s": first_s,
        "first_step_cpu_s": first_cpu_s,
        "peak_bytes": resident("VmHWM") - resident_of_libraries(before),
        "now_bytes": resident("RssAnon") - before,
        "worker_bytes": max((psutil.Process(one.pid).memory_full_info().uss for one in workers), default=0),
        "samples": samples,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "outlook": stream.outlook() if isinstance(stream, StreamedTrain) else None,
    }
    stream.close()
    if isinstance(stream, StreamedTrain):
        found["scanned_mb_per_cpu_s"] = scanned(config)
    print(json.dumps(found))


def scanned(config: RunConfig, windows: int = 8) -> float:
    """Megabytes of windows that this process reads, counts and shuffles in a second of a core."""
    pools, size = Pools.of(config), 0
    began = time.process_time()
    for number in range(min(windows, pools.pools[0].windows(0))):
        window = pools.pools[0].read(0, number)
        size += sum(window[row].length for row in range(0, len(window), 1000)) * 1000
    return size / 1e6 / (time.process_time() - began)


def resident_of_libraries(anonymous: int) -> int:
    """What of the peak was there before the data: anonymous pages of then, and file pages of libraries."""
    return anonymous + resident("RssFile")


if __name__ == "__main__":
    main(sys.argv[1])
