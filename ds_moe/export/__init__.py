"""Checkpoints into folders that plain libraries load.

model.py   the whole model for transformers    lora.py   updates merged into their base, or a PEFT adapter
cli.py     the options of `ds-moe export`
"""
