"""Every key of a run file, and what is wrong with a file.

run.py, sections.py, moe.py, tasks.py, rollout.py   the typed tree of keys with their defaults
run_file.py      from YAML and overrides to that tree; load_run is where runs start
sources.py       the names of the sources of data.train and data.eval
yaml_lines.py    YAML that knows the line of each key
habits.py        keys that users of other trainers write, and ours
complaints.py    pydantic's errors, one line each
check.py         all rules together, and the keys that a run uses
rules/           what types cannot say: a file for each section
divisors.py      EP size against ranks and experts, micro-batches against the global batch
deepspeed.py     from the DeepSpeed JSON to the dictionary that DeepSpeed gets
deepspeed_json.py, deepspeed_keys.py    reading that JSON; which of its keys ds_moe takes
arguments.py     what the commands of `ds-moe` have in common
sizes.py         memory on a command line, such as 80GB
zero_plan.py     what it says about stage, offload and buckets, as typed values
"""
