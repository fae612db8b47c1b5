"""What a run minimises: a task gives the weight and the loss of a micro-batch, the loop is the same for all.

registry.py   one row for each task      task.py   the base class, supervised fine-tuning
answers.py    held-out loss and generated answers
rl/           reinforcement with routing replay
gate/         a learned gate over LoRA adapters
dpo/          preferred answers
"""
