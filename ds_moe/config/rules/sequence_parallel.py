"""Rules about `train.sequence_parallel`: what ranks that share a row compute exactly, and nothing else."""

from collections.abc import Iterator

from ds_moe.config.rules.rule import Complaint
from ds_moe.config.run import RunConfig, other_task

KEY = "train.sequence_parallel"


def contradictions(config: RunConfig) -> Iterator[Complaint]:
    ranks = config.train.sequence_parallel
    if ranks == 1:
        return
    named = f"{KEY} {ranks}"
    if other := other_task(config, "sft"):
        yield KEY, f"{named} is for task sft, and task is {other}; remove it"
    if not config.data.packing:
        yield KEY, f"{named} shares packed rows, and data.packing is false; set it to true"
    if config.model.attention == "flash_attention_2":
        text = f"{named} runs sdpa sample by sample, which takes torch's own flash kernels on a GPU"
        yield "model.attention", f"{text}; set model.attention to sdpa"
    if config.moe is None:
        return
    router = config.moe.router
    if not router.causal or not router.learns:
        why = "chooses among all tokens of a row" if not router.causal else "places tokens by their index in a row"
        yield "moe.router.kind", f"moe.router.kind {router.kind} {why}, of which {named} gives a rank a part; use topk"
    elif getattr(router, "capacity_factor", None) is not None:
        text = f"moe.router.capacity_factor counts the tokens of a row, of which {named} gives a rank a part"
        yield "moe.router.capacity_factor", f"{text}; remove it"
