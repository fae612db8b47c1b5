"""One run from its set-up to its closing table; `ds_moe/train.py` has the loop.

set_up.py    everything a run needs      run.py           what the loop works with
step.py      one optimizer step          expert_load.py   expert loads over all ranks
summary.py   opening and closing table   checkpoints.py   saving and resuming
evaluation.py    an evaluation of its own, without training
eval_files.py    its files, of which it replaces no others
"""
