"""Ranks of test_streamed_kills: each streams its samples into a file, with the state behind each step, until killed."""

import json
import os
import sys
import time
from pathlib import Path

from ds_moe.config.run import RunConfig
from ds_moe.data import blocks, pools
from ds_moe.data.streaming import StreamedTrain
from ds_moe.models.processor import tiny_processor
from tests.data.streams import answers

PACE_S = 0.01  # of a step, so that a kill meets the middle of something


def main(given: str) -> None:
    """`given` is JSON: data and train (sections of a run file), folder, state, block and mib (bytes)."""
    plan, rank, world = json.loads(given), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    blocks.BLOCK, pools.MIB = plan["block"], plan["mib"]
    processor = tiny_processor("vl")
    config = RunConfig(
        model={"preset": "tiny-vl-moe"}, data=plan["data"], train=plan["train"], deepspeed="ds_configs/zero3.json"
    )
    stream = StreamedTrain(config, processor, rank=rank, world_size=world)
    if plan["state"] is not None:
        stream.load_state_dict(plan["state"])
    with Path(plan["folder"], f"rank{rank}.jsonl").open("w") as file:
        for step in stream:
            samples = [str(one) for batch in step for one in answers(batch, processor)]
            file.write(json.dumps({"samples": samples, "state": stream.state_dict()}) + "\n")
            file.flush()
            time.sleep(PACE_S)


if __name__ == "__main__":
    main(sys.argv[1])
