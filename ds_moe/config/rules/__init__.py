"""What the types of the keys cannot say; each file has UNUSED, keys without effect, and `contradictions`.

rule.py    what a rule is
train.py   train, data, monitor, checkpoint    moe.py    moe
data.py    data.train, data.eval, data.mixture
lora.py    lora                                rl.py     rl and moe.replay
gate.py    gate                                dpo.py    dpo
engine.py  rl.engine                           reward.py rl.reward
streaming.py   data.streaming
model.py   rules that need the model's config  sequence_parallel.py   train.sequence_parallel
"""
