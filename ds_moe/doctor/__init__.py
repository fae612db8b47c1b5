"""What would fail or be slow in a run, said before an accelerator is booked.

report.py   the findings, one line each         case.py    the run under examination
run.py      device, kernels, intervals          model.py   the model's config and file headers
data.py     the records                         memory.py  whether it fits
packing.py  the rows that they fill             engine.py  rl.engine and its rounds
resume.py   the checkpoint it would go on from
plan_command.py, plans.py                       memory of other topologies
new_run.py, look.py, fit.py, run_text.py        a run file for a model and its data
prepare_command.py                              records encoded once, and what they are like
cli.py     the options of the commands
"""
