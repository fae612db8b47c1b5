"""What the types of the keys cannot say, a file for each section of a run file.

Each has UNUSED, keys without effect, and `contradictions`; `check.py` puts them together.

rule.py    what a rule is
train.py   train, data, monitor, checkpoint    moe.py    moe
lora.py    lora                                rl.py     rl and moe.replay
gate.py    gate                                model.py  rules that need the model's config
"""
