"""`task: dpo`: learn which of two answers is preferred (Rafailov et al. 2023), and its relatives.

pair_record.py   one record, checked, in the forms of other trainers
pairs.py         its tensors: a pair is one sample of the plan and two sequences of a micro-batch
objective.py     the losses, pure functions
reference.py     log-probs of the reference: the base under LoRA, or stored ones
stored.py        log-probs computed once and kept in a file
task.py          the loss of a micro-batch, figures, evaluation
"""
