"""`task: gate`: a gate learns which of several LoRA adapters serve a request.

task.py      the losses of its three stages
model.py     a model with adapters and a gate
network.py   the gate's network
features.py  what the gate sees of request and screen
bank.py      linear layers with several adapters, mixed by weights
adapters.py  reads the adapters' folders
placement.py where their updates belong in a model
records.py   conversations that name an adapter
evaluate.py  asks the gate about held-out records
scores.py    accuracy, calibration and baselines
figures.py   pictures of the scores
files.py     reads and writes saved gates
serving.py   the manifest for an inference engine
commands.py  what the commands of `ds-moe gate` do
cli.py       their options
"""
