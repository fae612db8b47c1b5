"""How a run ends before its time.

signals.py    SIGTERM, SIGINT, SIGUSR1: a checkpoint at the end of the step
watchdog.py   a rank without progress: the job ends, and the rank is named
"""
