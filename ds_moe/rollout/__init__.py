"""Completions from an inference engine, for reinforcement.

engine.py           what a run asks of any engine: prompts, completions, weights handed over
reward.py           what completions are worth: a pool of processes that call the functions of a run
reward_process.py   one of them, as the trainer sees it
reward_worker.py    one of them, as a program
"""
