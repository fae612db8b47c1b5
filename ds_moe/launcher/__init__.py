"""The ranks of a run under DeepSpeed's launcher.

hostfile.py   the hosts of a hostfile, read as DeepSpeed reads it
command.py    the command that starts a run, here or on the hosts of a hostfile
ranks.py      signals to the ranks that a launcher has started, on other hosts too
cli.py        the options of `ds-moe train` and `ds-moe eval`, and what they do
processes.py  running that command, and leaving no rank behind
"""
