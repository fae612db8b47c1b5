"""Checkpoints that any number of ranks can resume.

files.py      the folder of a checkpoint, its manifest and checksums, and how to read tensors from it
save.py       writes one
restore.py    chooses one, and loads it into an engine
progress.py   what one holds beside tensors: step, losses, what is due
base.py       identifies the frozen model that checkpoints leave out
"""
