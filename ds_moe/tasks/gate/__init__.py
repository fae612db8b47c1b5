"""`task: gate`: a learned gate over LoRA adapters, which one serves a request.

task.py      losses of the three stages    model.py     a model with bank and gate
network.py   the gate's network            features.py  what it reads of request and screen
bank.py      mixed adapters                adapters.py  their folders
records.py   labelled conversations        evaluate.py, scores.py, figures.py   how good it is
files.py     saved gates                   serving.py   the manifest for a server
commands.py, cli.py   `ds-moe gate ...`
"""
