"""`task: rl`: reinforce completions under the experts that an inference engine used.

task.py      the loss and its sums        router_watch.py   log-probs of the routers
rollouts.py  the records                  sample.py         makes them with plain transformers
"""
