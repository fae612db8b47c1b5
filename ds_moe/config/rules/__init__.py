"""What the types of the keys cannot say, a file for each section of a run file.

rule.py    what all of them use
train.py   train, data, monitor, checkpoint    moe.py    moe
lora.py    lora                                rl.py     rl
gate.py    gate                                model.py  rules that need the model's config
"""
