"""ds_moe: train Mixture-of-Experts vision-language models with expert parallelism on DeepSpeed."""

__version__ = "0.1.0"
