"""Pairs about the scans of digits: the right answer is preferred to a wrong one of the same kind.

python -m tools.demos.dpo.pairs runs/dpo_demo/data
"""

import json
import random
import sys
from pathlib import Path

from ds_moe.data.digits import Split, digits_samples

WRONG = {"even": "odd", "odd": "even", "yes": "no", "no": "yes"}


def write_pairs(folder: Path, split: Split, limit: int | None = None, swapped: float = 0.0) -> Path:
    """Write the first `limit` samples of a split as pairs, with their images below `folder`, and return the file.

    `swapped` is the share of pairs that prefer the wrong answer, drawn by a fixed seed.
    """
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    drawn, file = random.Random(f"wrong answers {split}"), folder / f"{split.replace('-', '_')}.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for sample in digits_samples(split)[:limit]:
            [image] = sample.images
            (folder / image.name).write_bytes(image.data or b"")
            wrong = WRONG.get(sample.answer) or drawn.choice([d for d in "0123456789" if d != sample.answer])
            answers = [sample.answer, wrong]
            if drawn.random() < swapped:
                answers.reverse()
            question = {"role": "user", "content": f"<image>{sample.last_question()}"}
            record = {"messages": [question], "images": [image.name], "kind": sample.kind}
            lines.write(json.dumps({**record, "chosen": answers[0], "rejected": answers[1]}) + "\n")
    return file


if __name__ == "__main__":
    for name in ("train", "held-out"):
        print(write_pairs(Path(sys.argv[1]), name))
