"""Checkpoints that any number of ranks can resume.

save.py      write one                files.py   its folder, manifest and checksums
restore.py   read one                 base.py    the frozen base that checkpoints leave out
progress.py  what one holds beside tensors: step, losses, what is due
"""
