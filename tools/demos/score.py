"""Exact-match accuracy of a plain Hugging Face folder on a data file, with plain transformers and nothing of ours.

    python -m tools.demos.score runs/demo/export --data digits

ds_moe only reads the questions; the model is what `from_pretrained` of its own class gives, in one process.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers

from ds_moe.config.run import RunConfig
from ds_moe.data.eval_set import EvalSet
from ds_moe.models.processor import load_processor
from ds_moe.monitor.progress import print_table
from tools.results import command_line, refusing, write_json


def score(folder: Path, data: str, max_new_tokens: int) -> dict[str, float]:
    """Share of exact matches per kind of question, and their mean."""
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(folder).eval()
    processor = load_processor(str(folder))
    train = {"steps": 1, "micro_batch_size": 120}
    run = RunConfig(model={"path": str(folder)}, data={"train": data, "eval": data}, train=train, deepspeed="none")
    asked, hits = Counter(), Counter()
    for batch in EvalSet(run, processor, rank=0, world_size=1).batches():
        with torch.inference_mode():
            prompt = next(batch.prompts()).to(model.device)
            tokens = model.generate(**prompt.inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = processor.batch_decode(tokens[:, prompt.labels.shape[1] :], skip_special_tokens=True)
        for sample, expected, answer, weight in zip(batch.samples, batch.answers, answers, batch.weights, strict=True):
            kind = sample.kind or "all"
            asked[kind] += weight
            hits[kind] += weight * (answer.strip() == expected)
    accuracy = {kind: hits[kind] / count for kind, count in sorted(asked.items()) if count}
    return {**accuracy, "mean": sum(accuracy.values()) / len(accuracy)}


@refusing
def main() -> int:
    parser = command_line(__doc__, "--json")
    parser.add_argument("folder", type=Path, help="an exported model")
    parser.add_argument("--data", required=True, help='a JSONL or Parquet file, or "digits" (the held-out split)')
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args()
    accuracy = score(options.folder, options.data, options.max_new_tokens)
    print_table({kind: f"{share:.4f}" for kind, share in accuracy.items()}, f"plain transformers, {options.folder}")
    write_json(accuracy, options.json, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
