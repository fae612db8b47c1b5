"""Completions from an inference engine, for reinforcement.

engine.py      what a run asks of any engine: prompts, completions, weights handed over
servers.py     the servers of a run as one engine: `Servers`
requests.py    which server is asked for which prompt; retries, lost servers
server.py      one server: its state, and how weights are handed to it
server_api.py  what is asked of a server of any kind, and how answers are read
vllm.py, sglang.py    requests and answers of these servers
http.py        JSON over HTTP: deadlines, limits, which failures may pass
images.py      images in requests
reward.py           what completions are worth: a pool of processes that call the functions of a run
reward_process.py   one of them, as the trainer sees it
reward_program/     one of them, as a program
"""
