"""Watching a run: TensorBoard curves and pictures, a progress bar or log lines, a closing table.

monitor.py       the object the loop talks to; rank 0 only, silent elsewhere
reports.py       what the loop reports        meters.py     what is computed from it
board.py         TensorBoard                  progress.py   terminal and log file
heatmap.py       layer x expert load          gallery.py    evaluated samples
coactivation.py  experts that share tokens    flops.py      FLOPs of a token, peak of a device
plot.py          the curves of a finished run as one picture
"""

from ds_moe.monitor.monitor import Monitor, make_monitor
from ds_moe.monitor.progress import print_table
from ds_moe.monitor.reports import EvalReport, RoutingReport, ShownSample, StepReport

__all__ = [
    "EvalReport",
    "Monitor",
    "RoutingReport",
    "ShownSample",
    "StepReport",
    "make_monitor",
    "print_table",
]
