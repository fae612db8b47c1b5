"""Processes that stream are killed (SIGKILL, with their loading processes) at 20 random moments and started again, on
other numbers of ranks and loading processes: together they have had the samples of a run that was never stopped."""

import json
import random
import time
from itertools import islice
from pathlib import Path

import pytest

from ds_moe.data import blocks, pools
from ds_moe.data.streaming import StreamedTrain
from tests.data.streamed_data import FORMS, data_of
from tests.data.streams import answers
from tests.launcher import HANGS_S, start_ranks

BATCH, KILLS = 6, 20
BLOCK, MIB = 512, 1024
PATIENCE_S = 0.05


def lines(folder: Path, ranks: int) -> list[list[dict]]:
    """What each rank has written, as far as all of them have."""
    files = [folder / f"rank{rank}.jsonl" for rank in range(ranks)]
    texts = [file.read_text() if file.exists() else "" for file in files]
    whole = [text[: text.rfind("\n") + 1].splitlines() for text in texts]
    steps = min(map(len, whole))
    return [[json.loads(line) for line in of_rank[:steps]] for of_rank in whole]


def until_killed(plan: dict, folder: Path, ranks: int, steps: int) -> tuple[list[list[str]], dict | None]:
    """The samples of each step that all ranks have ended, and the state behind the last; at least `steps`."""
    folder.mkdir()
    run = start_ranks("tests/data/streamed_ranks.py", ranks, [json.dumps({**plan, "folder": str(folder)})],
                      launcher="forked")  # fmt: skip
    deadline = time.monotonic() + HANGS_S
    while len(lines(folder, ranks)[0]) < steps:
        assert run.returncode is None and time.monotonic() < deadline, run.tails()
        time.sleep(PATIENCE_S)
    run.kill()
    run.wait()
    found = lines(folder, ranks)
    assert len({json.dumps(of_rank[-1]["state"]) for of_rank in found}) == 1
    together = [sorted(sum((rank["samples"] for rank in step), [])) for step in zip(*found, strict=True)]
    return together, found[0][-1]["state"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_killed_and_started_again_twenty_times(form, folder, run_config, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    monkeypatch.setattr(pools, "MIB", MIB)
    given = {"train": data_of(form, folder), "root": str(folder), "streaming": True, "max_length": 128}
    config = run_config("", {**given, "shuffle_window_mb": 4}, global_batch_size=BATCH, micro_batch_size=1)
    data, train = (one.model_dump(exclude_defaults=True) for one in (config.data, config.train))
    chance, found, state = random.Random(0), [], None
    for kill in range(KILLS + 1):
        ranks, data["num_workers"] = [1, 2, 3][kill % 3], [0, 2, 4][chance.randrange(3)]
        plan = {"data": data, "train": train, "state": state, "block": BLOCK, "mib": MIB}
        steps, state = until_killed(plan, tmp_path / f"start{kill}", ranks, chance.randint(1, 12))
        found += steps
    stream = StreamedTrain(config, processor, rank=0, world_size=1)
    expected = [sorted(str(one) for batch in step for one in answers(batch, processor))
                for step in islice(stream, len(found))]  # fmt: skip
    assert found == expected and len(found) > KILLS
