"""The cost model of `estimate_step.py`: shapes -> costs -> seconds and bytes of a step on a topology."""
