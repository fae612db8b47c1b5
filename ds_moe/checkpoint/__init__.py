"""Checkpoints that any number of ranks can resume.

files.py      the folder of a checkpoint, its manifest and checksums, and how to read tensors from it
save.py       writes one
room.py       how large one will be, and whether the disk has room
host_copy.py  values from an accelerator to host memory
restore.py    chooses one, and loads it into an engine
fit.py        which one a run means, and whether it can go on from it
changes.py    what the run file says otherwise by now
progress.py   what one holds beside tensors: step, losses, what is due
base.py       identifies the frozen model that checkpoints leave out
"""
