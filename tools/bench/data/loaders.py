"""A loader of training data in a process of its own, which takes its turns as it is told to.

The parent writes a request a line, `{"turn": "check" or "time", "file", "workers"}`, and reads an answer behind MARK.
`ds_moe` is whichever build this process finds first; `tools.bench.builds` says where builds have what is needed.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from tools.bench.builds import check_build, module_with

MARK = "loader says: "
MAX_LENGTH, MAX_PIXELS = 4096, 2**24
Batches = Iterator[dict[str, Any]]  # as a model's forward takes them


class Build:
    """The stream of one rank of a build of ds_moe. Encoded samples are not kept: each is encoded when it comes."""

    def __init__(self, plan: dict[str, Any]) -> None:
        check_build(plan["checkout"])
        self._plan = plan
        self._processor = module_with("load_processor").load_processor(plan["model"])
        module_with("CACHE_BYTES").CACHE_BYTES = 0

    def batches(self, file: str, workers: int) -> Batches:
        plan = self._plan
        data: dict[str, Any] = {"train": file, "shuffle": False, "length_grouping": False, "num_workers": workers}
        data |= {"max_length": MAX_LENGTH, "max_pixels": MAX_PIXELS}
        if plan["prepared"]:
            data["prepared"] = str(Path(file).parent / "prepared")
        config = module_with("RunConfig").RunConfig(
            model={"path": plan["model"]},
            data=data,
            train={
                **{"output_dir": str(Path(file).parent / "run"), "steps": 1},
                **{"global_batch_size": plan["batch"], "micro_batch_size": plan["batch"]},
            },
            deepspeed="-",
        )
        stream = module_with("TrainStream").TrainStream(config, self._processor, rank=0, world_size=1)
        return self._steps(stream)

    def _steps(self, stream: Any) -> Batches:
        try:
            for step in islice(stream, self._plan["samples"] // self._plan["batch"]):
                for batch in step:
                    yield batch if isinstance(batch, dict) else batch.to(torch.device("cpu")).with_labels
        finally:
            if hasattr(stream, "close"):
                stream.close()


class HuggingFace:
    """`datasets` and torch's DataLoader, whose `collate_fn` calls the processor, as examples of transformers do it.

    The answer's tokens are not told apart: labels are all ids but those of images and padding.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._processor = module_with("load_processor").load_processor(plan["model"])

    def batches(self, file: str, workers: int) -> Batches:
        import datasets
        from torch.utils.data import DataLoader

        datasets.disable_progress_bars()
        table = [self._row(json.loads(line), Path(file).parent) for line in Path(file).read_text().splitlines()]
        rows = datasets.Dataset.from_list(table).cast_column("image", datasets.Image())
        ahead = {"prefetch_factor": 2} if workers else {}
        return iter(
            DataLoader(rows, batch_size=self._plan["batch"], num_workers=workers, collate_fn=self._collate, **ahead)
        )

    def _row(self, record: dict[str, Any], root: Path) -> dict[str, str]:
        """Arrow has no column that holds a list in one row and a string in another."""
        (image, request), answer = record["messages"][0]["content"], record["messages"][1]["content"]
        return {"image": str(root / image["image"]), "request": request["text"], "answer": answer}

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [
            self._processor.apply_chat_template(
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["request"]}]},
                    {"role": "assistant", "content": row["answer"]},
                ],
                tokenize=False,
            )
            for row in rows
        ]
        images = [row["image"].convert("RGB") for row in rows]
        batch = self._processor(text=texts, images=images, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        labels[labels == self._processor.image_token_id] = -100
        return {**batch, "labels": labels}


def digests(batch: dict[str, Any]) -> Iterator[str]:
    """Of each sample, its ids and the pixels of its image."""
    end_I = batch["image_grid_thw"].prod(-1).cumsum(0).tolist()
    for number, (start, end) in enumerate(zip([0, *end_I], end_I, strict=False)):
        ids = batch["input_ids"][number][batch["attention_mask"][number].bool()]
        yield digest(ids, batch["pixel_values"][start:end])


def digest(ids: Tensor, pixel_values: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes() + pixel_values.contiguous().numpy().tobytes()).hexdigest()


def timed(batches: Batches) -> dict[str, float]:
    """Samples, bytes, seconds and CPU-seconds of all batches but the first, for which loading processes are started;
    every tensor is read, as a model would read it."""
    read(next(batches))
    used, began = cpu_seconds(), time.perf_counter()
    samples = size = 0
    for batch in batches:
        samples += len(batch["input_ids"])
        size += read(batch)
    seconds = time.perf_counter() - began
    return {"samples": samples, "bytes": size, "seconds": seconds, "cpu_seconds": cpu_seconds() - used}


def cpu_seconds() -> float:
    """Of this process and its loading processes, those that have ended included."""
    running = [one.cpu_times() for one in psutil.Process().children(recursive=True)]
    return sum(os.times()[:4]) + sum(one.user + one.system for one in running)


def read(batch: dict[str, Any]) -> int:
    """The bytes of its ids, labels and pixels, which every loader makes alike."""
    tensors = [batch[name] for name in ("input_ids", "labels", "pixel_values")]
    sum(float(tensor.sum()) for tensor in tensors)
    return sum(tensor.nbytes for tensor in tensors)


def main() -> None:
    plan = json.loads(sys.argv[1])
    loader = (HuggingFace if plan["rival"] else Build)(plan)
    print(MARK + "ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        batches = loader.batches(request["file"], request["workers"])
        if request["turn"] == "check":
            answer: Any = [one for batch in batches for one in digests(batch)]
        else:
            answer = timed(batches)
        del batches  # ends its loading processes
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
