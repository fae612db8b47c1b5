"""Watching a run: TensorBoard curves and pictures, a progress bar or log lines, a closing table.

monitor.py       the object that the training loop talks to; on rank 0 only, silent elsewhere
reports.py       what the loop reports
meters.py        the numbers that are computed from the reports
flops.py         FLOPs of a token, and the peak of a device
progress.py      the terminal and log files
board.py         TensorBoard
heatmap.py       pictures: load of each layer's experts, and experts that serve the same tokens
gallery.py       picture: evaluated samples
plot.py          picture: the curves of one run, or of several
cli.py           the options of `ds-moe plot`
"""
