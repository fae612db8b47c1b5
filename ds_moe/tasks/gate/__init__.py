"""`task: gate`: a gate learns which of several LoRA adapters serve a request.

task.py      the losses of its three stages            evaluate.py  asks the gate about held-out records
model.py     a model with adapters and a gate          scores.py    accuracy, calibration and baselines
network.py   the gate's network                        figures.py   pictures of the scores
features.py  what the gate sees of request and screen  files.py     reads and writes saved gates
bank.py      linear layers with several adapters       serving.py   the manifest for an inference engine
adapters.py  reads the adapters' folders               commands.py  what the commands of `ds-moe gate` do
placement.py where their updates belong in a model     cli.py       their options
records.py   conversations that name an adapter
"""
