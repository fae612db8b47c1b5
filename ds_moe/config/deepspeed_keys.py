"""Which keys of a DeepSpeed JSON (0.19) ds_moe fills, passes on or refuses, and why."""

# Sections and keys of the root: those that DeepSpeed gets as they are written, those that ds_moe fills from the run
# file, and those that it refuses (key -> what to do in their place, or why).
PASSED_ON = """aio checkpoint communication_data_type comms_logger csv_monitor data_types disable_python_gc
    dump_state flops_profiler log_level memory_breakdown steps_per_print timers wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer""".split()
FILLED = """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping optimizer bf16
    fp16 zero_optimization""".split()
REFUSED = {
    "expert_parallel": "ds_moe installs its own expert layers; set moe.ep_size in the run file",
    "scheduler": "the learning rate follows train.schedule and train.warmup_steps of the run file",
    "activation_checkpointing": "set train.gradient_checkpointing in the run file",
    "tensorboard": "set monitor.tensorboard in the run file",
    "amp": "set train.precision in the run file",
    "torch_autocast": "set train.precision in the run file",
    "data_efficiency": "ds_moe orders its data itself (data.shuffle, data.length_grouping)",
    "dataloader_drop_last": "ds_moe reads its data itself and drops nothing",
    "gradient_allreduce_op": "ds_moe needs the mean of the gradients",
    "prescale_gradients": "expert gradients are already averaged over all ranks",
    "gradient_predivide_factor": "expert gradients are already averaged over all ranks",
    "tensor_parallel": "ds_moe has expert and data parallelism only",
    "sequence_parallel_size": "ds_moe has expert and data parallelism only",
    "pipeline": "ds_moe has expert and data parallelism only",
    "hybrid_engine": "ds_moe trains with the plain engine",
    "compile": "it was not verified with expert parallelism",
}
ZERO_KEYS = """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm load_from_fp32_weights offload_param offload_optimizer
    sub_group_size ignore_unused_parameters memory_efficient_linear override_module_apply
    pipeline_loading_checkpoint log_trace_cache_warnings enable_sanity_checks parameter_alignment
    stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
    stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save
    stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential""".split()
ZERO_REFUSED = {
    "round_robin_gradients": "DeepSpeed then finds the fp32 weights of other parameters, for checkpoints too",
    "stage3_module_granularity_threshold": "it regroups the modules that ds_moe has ZeRO-3 gather together",
    "zenflow": "DeepSpeed's ZenFlow takes neither experts of three dimensions nor CPUs",
    "zero_quantized_gradients": "DeepSpeed does not support it with expert parallelism",
    "zero_quantized_weights": "it was not verified with expert parallelism",
    "zero_hpz_partition_size": "DeepSpeed does not support it with expert parallelism",
    "leaf_module": "ds_moe marks its layers itself",
    "elastic_checkpoint": "ds_moe converts checkpoints between topologies itself",
    "compute_grad_norm": "the run needs the gradient norm",
}
OFFLOAD_REFUSED = {"super_offload": "DeepSpeed's SuperOffload takes neither experts of three dimensions nor CPUs"}
# Refused keys pass at the values that switch them off: these, null, and a section that is empty or not enabled.
OFF = {
    "gradient_allreduce_op": ("mean", "avg"),
    "gradient_predivide_factor": (1,),
    "sequence_parallel_size": (0, 1),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.stage3_module_granularity_threshold": (0,),
    "zero_optimization.compute_grad_norm": (True,),
}
OFF_OTHERWISE = (False,)
STAGE_3_ONLY = ("sub_group_size", "offload_param")  # beside all keys that begin with stage3_
NO_NVME = "offload to NVMe was not tested; use cpu"
# Dotted key -> (the value that is refused, why); every other value of these keys is passed on.
REFUSED_VALUES = {
    "optimizer.params.fp32_optimizer_states": (False, "checkpoints hold Adam's moments in fp32; remove it"),
    "bf16.bf16_master_weights_and_grads": (True, "checkpoints hold fp32 master weights; remove it"),
    "bf16.bf16_optimizer_states": (True, "checkpoints hold Adam's moments in fp32; remove it"),
    "zero_optimization.offload_optimizer.device": ("nvme", NO_NVME),
    "zero_optimization.offload_param.device": ("nvme", NO_NVME),
}
OFFLOAD_KEYS = """device nvme_path buffer_count buffer_size max_in_cpu pin_memory pipeline_read pipeline_write fast_init
    ratio""".split()
DEVICES = ("none", None, "cpu", "nvme")
OFFLOADS = ("offload_optimizer", "offload_param")
# It says how DeepSpeed's own `save_16bit_model` writes weights, which `ds-moe export` does in its place at every stage.
ANY_STAGE = ("stage3_gather_16bit_weights_on_model_save",)
# Kind of value, as messages call it -> the keys that need one; DeepSpeed would end in a traceback over another.
KINDS = {
    "an object": """optimizer optimizer.params zero_optimization zero_optimization.offload_param
        zero_optimization.offload_optimizer bf16 fp16 aio checkpoint comms_logger csv_monitor data_types flops_profiler
        timers wandb""",
    "a number above 0": """steps_per_print optimizer.params.eps zero_optimization.reduce_bucket_size
        zero_optimization.allgather_bucket_size zero_optimization.stage3_prefetch_bucket_size
        zero_optimization.stage3_max_live_parameters zero_optimization.stage3_max_reuse_distance
        zero_optimization.sub_group_size""",
    "true or false": """disable_python_gc dump_state memory_breakdown wall_clock_breakdown
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer optimizer.params.torch_adam
        zero_optimization.contiguous_gradients zero_optimization.reduce_scatter zero_optimization.overlap_comm
        zero_optimization.allgather_partitions""",
}
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")  # names of fp32 in data_types
BESIDE_MUON = ("lr", "betas", "eps", "weight_decay")  # keys of Adam that a run with train.optimizer muon reads
ADAM_KEYS = ["lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam", "fp32_optimizer_states"]
