"""A Mixture-of-Experts model out of dense ones: `ds-moe assemble`.

spec.py      the file that says what is wanted     plan.py      which tensors come from where
assemble.py  checks, reads, writes                 weights.py   the tensors themselves
dense.py     dense models to begin with            domains.py   routers initialised from data
cli.py       the options of the command
"""
