"""What would fail or be slow in a run, said before an accelerator is booked.

report.py   the findings, one line each       case.py     the run under examination
run.py      device, resume, intervals         model.py    the model's config and file headers
data.py     the records                       kernels.py  cores and expert kernels
memory.py   whether it fits                   plan_command.py, plans.py, sweep.py   memory of other topologies
"""
