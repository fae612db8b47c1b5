"""What one GPU shows of ds_moe in eight minutes: a line of JSON a fact.

check.py    the command: each section in a process of its own, within the time
facts.py    how a fact is written; times, memory and host waits of a piece of code
layers.py   the machine, kernels, the exchange of rows, pieces of a layer, the layer
engines.py  engines of DeepSpeed: two ranks against transformers, training steps of a cut-down model, a run
"""
