"""The options of `ds-moe rollouts`."""

import argparse
from pathlib import Path

from ds_moe.config.arguments import Commands, positive

DESCRIBED = """Write rollouts for runs of task rl: plain transformers samples completions of prompts, with log-probs,
rewards and the routing of every token. It shares nothing with the trainer: unconverted model, transformers' expert
kernels, a KV cache. Samples are those of the full softmax at --temperature, without top-k or top-p: their log-probs are
those of the policy that is trained."""


def add_rollouts(commands: Commands) -> None:
    brief = "sample completions and rewards for a run of task rl"
    parser = commands.add_parser("rollouts", help=brief, description=DESCRIBED)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder, checkpoint, or output folder of a run")
    add("out", type=Path, metavar="OUT.jsonl", help="replaced if it is there; images are copied into OUT_images")
    add("--data", default="digits", metavar="FILE", help='JSONL or Parquet of messages, or "digits" (default)')
    add("--root", metavar="FOLDER", help="that its image paths start from (default: the folder of --data)")
    add("--skip-bad", action="store_true", help="leave out bad records and count them (default: stop at the first)")
    add("--prompts", type=positive, metavar="N", help="a random choice of so many (default: all)")
    add("--per-prompt", type=positive, default=8, metavar="N", help="completions (default %(default)s)")
    add("--temperature", type=_temperature, default=1.0, metavar="T", help="0: greedy (default %(default)s)")
    add("--max-new-tokens", type=positive, default=16, metavar="N", help="(default %(default)s)")
    add("--batch-size", type=positive, default=64, metavar="N", help="sequences (default %(default)s)")
    add("--max-length", type=positive, default=4096, metavar="N", help="of a prompt and its right answer")
    add("--content-tokens", nargs="+", default=(), metavar="TOKEN", help="as data.content_tokens of the run file")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="of the engine (default %(default)s)")
    add("--experts-implementation", metavar="NAME", help="transformers' (default: the model's own)")
    add("--reward", choices=("exact", "contains"), default="exact", help="of the right answer (default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts and samples (default %(default)s)")
    parser.set_defaults(command=_rollouts)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def _rollouts(options: argparse.Namespace) -> int:
    from ds_moe.tasks.rl.sample import rollouts

    rollouts(options)
    return 0
