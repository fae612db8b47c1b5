"""The program in which reward functions of a user are called, apart from the trainer. Standard library only.

Two processes: a keeper, which runs none of the user's code, and its worker, which does. The trainer starts the keeper
and writes it a line of JSON for each completion; the keeper hands it on, waits no longer than the limit, and answers
with one line. Whatever a function does (hang, crash, fork, print without end, close what is open), the keeper kills
the worker with all that came of it, and starts another. When the trainer is gone, the keeper ends in the same way.

    trainer -> keeper   {"functions": [...], "timeout_s": ..., "import_s": ..., "memory": bytes, "code": ...}  once
                        {"completion": text, "answer": text, "record": object}                    for each call
    keeper -> trainer   {"values": {name: number}} or {"kind": ..., "error": ..., "name": ...}    for both
                        with "code", see `code_of`, once

keeper.py      the keeper's loop: a case from the trainer, its answer from a worker
worker.py      a worker as the keeper sees it: forked, asked, ended
serve.py       what a worker does: its limits, and a call of each function for each case
functions.py   functions imported and called: what they return, what they raise
code.py        digests of the modules that functions are made of
processes.py   all processes below one, found and killed
protocol.py    lines of pipes, settings, failures
"""
