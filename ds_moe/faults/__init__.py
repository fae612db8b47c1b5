"""How a run ends before it is complete.

signals.py    SIGTERM, SIGINT and SIGUSR1 end it after a checkpoint at the end of the step
watchdog.py   a rank that dies or makes no progress ends the job, and is named
"""
