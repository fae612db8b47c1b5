"""`rl.engine`: rollouts are sampled during the run, round after round, by an engine that is given the run's weights.

task.py       the loss of tasks/rl, over rounds         stream.py     a round's file as the steps of a rank
sampler.py    the thread of rank 0 that uses the engine  round.py     one round: prompts, completions, rewards, a file
prompts.py    records of data.train as prompts          round_file.py  files of rounds, and what is known of them
handover.py   weights for the engine, and a comparison  probe.py      the trainer's own greedy answers
rounds.py     what all ranks do between two rounds      reference.py  the model that the run began with
local.py      plain transformers as the engine          local_worker.py  the process in which that runs
engines.py    the engine that a run file asks for
"""
