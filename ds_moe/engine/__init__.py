"""Everything that relies on DeepSpeed's internals.

start.py     join the job                   prepare.py       a model that DeepSpeed can wrap
build.py     the engine, its invariants     moe_binding.py   DeepSpeed's view of an expert layer
masters.py   fp32 weights and moments       cpu.py           the compiled op and the settings of CPU ranks
"""
