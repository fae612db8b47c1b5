"""The memory of a rank, predicted from configs alone.

predict.py            by purpose and moment       activations.py   what autograd keeps
parameter_counts.py   parameters a rank holds and gathers
rows.py               the longest packed rows that fit
"""
