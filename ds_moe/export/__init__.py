"""Checkpoints and running models into folders that plain libraries load.

model.py   the whole model for transformers    lora.py   updates merged into their base, or a PEFT adapter
live.py    a running model for an engine       stored_form.py   how files of a layout hold a model's weights
cli.py     the options of `ds-moe export`
"""
