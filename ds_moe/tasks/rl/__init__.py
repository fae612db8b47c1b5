"""`task: rl`: reinforce completions under the experts that an inference engine used.

task.py             the loss and its sums      router_watch.py   log-probs of the routers
rollout_record.py   one record, checked        rollouts.py       its tensors, and advantages
rewards.py          how much a file's rewards can teach
sample.py           makes records with plain transformers: `ds-moe rollouts`
write.py            their file, and the folder of their images
online/    `rl.engine`: rounds of rollouts that are sampled during the run
cli.py              the options of that command
"""
