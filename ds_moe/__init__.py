"""ds_moe: train Mixture-of-Experts vision-language models with expert parallelism on DeepSpeed.

The layer alone, in a loop of your own and without DeepSpeed: `from ds_moe.moe import MoELayer`, `help(MoELayer.build)`.
Routers and losses alone: `ExpertRouter`, `ExpertChoiceRouter` and `LoadBalancingLoss` of `ds_moe.moe`.

A room imports from the rooms above it only:

errors.py       the one exception for what the person who runs a job must fix
distributed.py  where this process stands in its job, and collective helpers
faults/         signals, and ranks that hang
config/         every key of a run file, and what is wrong with one
moe/            the expert layer: route -> dispatch -> experts -> combine
weights/        safetensors files
data/           chat records with images -> micro-batches
models/         model families, loaded and given our expert layers
monitor/        curves, progress, pictures
replay/         the experts that an inference engine used
engine/         everything that relies on DeepSpeed's internals
memory/         the memory of a rank, predicted
assembly/       one MoE model out of dense ones
checkpoint/     saving and resuming on any number of ranks
export/         checkpoints -> folders that plain libraries load
rollout/        completions from an inference engine
tasks/          what a run minimises: answers, rewards, a gate over adapters
training/       one run from its set-up to its closing table
doctor/         what would fail or be slow, said beforehand
train.py        the loop, started once a rank
evaluate.py     an evaluation of its own, started once a rank
launcher/       the ranks of a run under DeepSpeed's launcher
cli.py, __main__.py   the `ds-moe` command
ds_configs/     a DeepSpeed JSON for each ZeRO stage
"""

__version__ = "0.1.0"
