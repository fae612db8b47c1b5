"""Benchmarks, a folder each: `bench` is the command, `ranks` what its processes run, `plot` draws the result.

- `balance`  does loss-free balancing balance, and what does it cost?
- `data`     what a rank gets from its data a second, against earlier builds and `datasets` with a DataLoader
- `gate`     a bank of LoRA adapters against PEFT's adapters one by one
- `host`     what the host spends on a step, by layers, against transformers and DeepSpeed
- `layer`    one MoE layer against those of other libraries
- `load`     peak memory of the two ways of loading a checkpoint
- `mix`      a real mix of images and texts: packed rows against padded ones, earlier builds and other trainers
- `memory`   predicted against measured peaks of a training step
- `replay`   mismatch of rollout engine and trainer, with routing replay and without
- `rollout`  the same with a real vLLM server as the engine
- `routers`  loads of every router before any training
- `streaming` data without an index: time to the first step, memory, and how well windows shuffle
- `step`     a whole training step against DeepSpeed's own expert layers
- `chaos`    kills, stops and starts a run again, round after round
- `resident` resident memory of a process
- `rivals`   engines without us: transformers' models under DeepSpeed
- `launched` starts the ranks of a benchmark under DeepSpeed's launcher
"""
