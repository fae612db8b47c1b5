"""What people write who come from another trainer, and which key of ours they mean by it.

The names are those of transformers' TrainingArguments, PEFT's LoraConfig, LLaMA-Factory, ms-swift, TRL and Megatron.
"""

import re

from ds_moe.config.tasks import TASK_SECTIONS

# Names -> our key, where it means the same in the same unit; else a clause that says what to write, or what there is
# not. Names that are keys of ours in one other section have no row: the section is found without one.
_ROWS = {
    # model
    "model_name_or_path model_id model_id_or_path model_name pretrained_model_name_or_path hf_checkpoint": "model.path",
    "attn_implementation attn_impl attention_backend": "model.attention",
    "flash_attn use_flash_attn use_flash_attention_2": "write model.attention: flash_attention_2",
    "freeze_vit freeze_vision_tower freeze_vision_model freeze_vision": "write model.freeze: [vision]",
    "freeze_aligner freeze_multi_modal_projector": "the aligner is part of the vision tower: write model.freeze: "
    "[vision], or the pattern of its parameters, [merger]",
    "freeze_llm freeze_language_model": "write model.freeze: [language_model, embeddings]",
    "freeze_parameters freeze_parameters_regex trainable_parameters": "model.freeze lists patterns of the parameters "
    "that are not trained",
    "trust_remote_code": "leave it out: ds_moe runs no code of a model's folder",
    "load_in_4bit load_in_8bit quantization_bit quant_bits quant_method": "ds_moe trains no quantized models",
    "use_cache": "leave it out: training keeps no cache of keys and values",
    # data
    "dataset train_dataset train_file train_data data_path dataset_name dataset_path train_data_path": "data.train",
    "val_dataset eval_dataset validation_file valid_data_path val_data_path eval_file": "data.eval",
    "val_size split_dataset_ratio eval_split": "write data.eval: a file of its own, which ds_moe does not split off",
    "dataset_dir media_dir image_folder image_dir": "data.root",
    "cutoff_len model_max_length max_seq_length max_seq_len seq_length": "data.max_length, which refuses longer "
    "samples and cuts none",
    "truncation_strategy truncation_side": "ds_moe cuts no sample: choose data.max_length and data.on_bad_record",
    "image_max_pixels": "images are resized as the processor's files of the model say; data.max_pixels refuses larger "
    "ones",
    "mask_history": "write data.train_on: last",
    "train_on_inputs train_on_prompt": "leave it out: only answers are learned, see data.train_on",
    "packing neat_packing padding_free": "data.packing",
    "group_by_length train_sampling_strategy": "data.length_grouping, on by default; data.packing pads nothing",
    "lazy_tokenize": "leave it out: records are read and tokenized while the run trains",
    "buffer_size shuffle_buffer_size shuffle_buffer": "data.shuffle_window_mb, in MiB, with data.streaming",
    "max_samples max_train_samples": "ds_moe takes all records of data.train: write a smaller file",
    "max_eval_samples": "train.eval_samples",
    "datasets test_datasets": "data.train and data.eval take a list of sources",
    "interleave_probs interleave_prob probabilities dataset_weights": "write a weight for each source of data.train",
    "mix_strategy stopping_strategy": "write data.mixture.epoch: shortest (interleave_under, first_exhausted) or "
    "longest (interleave_over, all_exhausted)",
    "columns_mapping field_messages message_property_mappings": "write columns in the source of data.train",
    "dataset_split train_on_split dataset_revision": "write split and revision in the source of data.train",
    "template chat_template": "leave it out: the model's own chat template is used",
    "system default_system": "write it as the system turn of each record",
    "dataloader_num_workers num_proc preprocessing_num_workers dataset_num_proc": "data.num_workers",
    "dataloader_prefetch_factor": "data.prefetch_factor",
    "dataset_shuffle train_dataloader_shuffle": "data.shuffle",
    "remove_unused_columns overwrite_cache ignore_data_skip dataloader_pin_memory": "leave it out: ds_moe does what is "
    "needed by itself",
    "dataloader_drop_last drop_last": "leave it out: no record is dropped, the last batch is filled up",
    # batches and steps
    "per_device_train_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "per_device_eval_batch_size per_gpu_eval_batch_size": "train.eval_batch_size",
    "gradient_accumulation_steps grad_accum_steps accumulate_grad_batches": "write train.global_batch_size: "
    "micro_batch_size x ranks x accumulation",
    "train_batch_size total_batch_size": "train.global_batch_size",
    "batch_size": "train.micro_batch_size is that of a rank and forward, train.global_batch_size that of a step",
    "auto_find_batch_size": "choose train.micro_batch_size: ds-moe doctor predicts the memory",
    "num_train_epochs num_epochs max_epochs": "train.epochs",
    "max_steps train_iters num_train_steps": "train.steps",
    # optimizer and schedule
    "learning_rate": "train.lr",
    "vit_lr aligner_lr embedding_learning_rate loraplus_lr_ratio": "ds_moe has one learning rate, train.lr",
    "muon_learning_rate muon_matched_adamw_rms": "write train.muon_lr, for updates of AdamW's size (RMS 0.2)",
    "use_muon": "write train.optimizer: muon",
    "lr_scheduler_type lr_scheduler lr_decay_style scheduler": "write train.schedule: cosine, linear or constant",
    "lr_scheduler_kwargs": "write train.min_lr_ratio, the end of the cosine as a share of train.lr",
    "min_lr": "write train.min_lr_ratio: min_lr / lr",
    "warmup_ratio lr_warmup_fraction": "write train.warmup_steps: ratio x steps of the run",
    "lr_warmup_iters num_warmup_steps": "train.warmup_steps",
    "adam_beta1 adam_beta2 beta1 beta2": "write train.betas: [beta1, beta2]",
    "adam_epsilon adam_eps": "write it into the DeepSpeed JSON, optimizer.params.eps",
    "optim": "write train.optimizer: adamw or muon",
    "gradient_clipping clip_grad gradient_clip_val": "train.max_grad_norm",
    "label_smoothing_factor neftune_noise_alpha": "ds_moe has no label smoothing and no noise on embeddings",
    "bf16 pure_bf16 mixed_precision": "write train.precision: bf16 for true, fp32 for false",
    "fp16": "ds_moe trains in bf16 or fp32: write train.precision",
    "torch_dtype dtype": "write train.precision: bf16 or fp32",
    "tf32 torch_compile": "ds_moe sets neither tf32 nor torch.compile",
    "data_seed": "train.seed",
    # LoRA
    "peft_config lora_config lora_args": "lora",
    "r lora_r lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "target_modules lora_target lora_target_modules": "lora.targets",
    "target_parameters": "write lora.experts: true",
    "modules_to_save additional_target": "beside updates only the routers are trained in full: lora.train_router",
    "finetuning_type train_type tuner_type sft_type use_peft use_lora": "a section lora trains LoRA; without it all "
    "that model.freeze leaves is trained",
    "use_dora lora_bias init_lora_weights rank_pattern alpha_pattern layers_to_transform": "ds_moe has LoRA and "
    "rsLoRA only, of one rank",
    "task_type bias inference_mode fan_in_fan_out": "leave it out: an update has no bias and fits the layer it is for",
    # mixture of experts
    "router_aux_loss_coef": "write moe.balance: [{kind: aux, weight: coefficient / number of MoE layers}], whose terms "
    "are summed over the layers",
    "moe_aux_loss_coeff": "write moe.balance: [{kind: aux, weight: coefficient, normalize_by_k: true}]",
    "moe_z_loss_coeff router_z_loss_coef": "write moe.balance: [{kind: z_loss, weight: coefficient}]",
    "output_router_logits moe_router_load_balancing_type": "choose what balances the experts by moe.balance",
    "moe_router_enable_expert_bias moe_router_bias_update_rate": "write moe.balance: [{kind: loss_free, update_rate: "
    "1e-3}]",
    "moe_grouped_gemm experts_impl experts_implementation": "write moe.experts.backend: auto, which takes grouped "
    "products",
    "expert_model_parallel_size expert_parallel_size ep moe_expert_parallel_size": "moe.ep_size",
    "moe_router_topk num_experts_per_tok": "moe.router.top_k",
    "moe_router_score_function": "moe.router.scores",
    "moe_router_dtype": "leave it out: routers score in fp32",
    "moe_expert_capacity_factor": "moe.router.capacity_factor",
    "moe_token_dispatcher_type": "write moe.dispatch.kind: auto",
    "context_parallel_size sequence_parallel_size ulysses_sequence_parallel_size cp_size": "train.sequence_parallel",
    "tensor_model_parallel_size pipeline_model_parallel_size fsdp fsdp_config": "ds_moe spreads experts by "
    "moe.ep_size, and all else by the ZeRO stage of deepspeed",
    # evaluation, log, checkpoints
    "eval_steps eval_interval": "train.eval_every",
    "eval_strategy evaluation_strategy do_eval": "write train.eval_every: steps; with data.eval the end is evaluated",
    "predict_with_generate": "train.eval_generate",
    "generation_max_length": "train.max_new_tokens",
    "load_best_model_at_end metric_for_best_model early_stopping_patience": "write train.patience, which keeps the "
    "checkpoint with the best held-out loss",
    "logging_steps log_interval": "monitor.log_every",
    "logging_strategy logging_first_step": "write monitor.log_every: steps",
    "logging_dir tensorboard_dir": "leave it out: event files lie in train.output_dir",
    "report_to": "write monitor.tensorboard: true or false",
    "wandb_project run_name project_name experiment_name": "ds_moe logs to TensorBoard, runs are told apart by "
    "train.output_dir",
    "save_steps save_interval": "checkpoint.every",
    "save_strategy": "write checkpoint.every: steps",
    "save_total_limit": "checkpoint.keep",
    "save_only_model push_to_hub hub_model_id": "ds-moe export writes a folder without the optimizer's state",
    "async_save": "checkpoint.background",
    "resume_from_checkpoint": "train.resume",
    "overwrite_output_dir": "leave it out: no run is overwritten; choose another train.output_dir",
    "activation_checkpointing vit_gradient_checkpointing recompute_granularity": "train.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "leave it out: train.gradient_checkpointing recomputes each decoder layer",
    "activation_offloading enable_activation_offloading activations_cpu_offload": "train.offload_activations",
    "use_liger_kernel enable_liger_kernel": "write moe.experts.backend: liger, which computes the experts only",
    "ddp_timeout": "train.watchdog_s",
    "local_rank ddp_backend ddp_find_unused_parameters": "leave it out: the launcher and DeepSpeed set it",
    # what is trained, and by which command
    "do_train": "leave it out: ds-moe train trains",
    "stage": f"task is sft, {', '.join(TASK_SECTIONS)}; train.stage and gate.stage are something else",
}
ROWS = [row for rows in (_ROWS, *(section.habits for section in TASK_SECTIONS.values())) for row in rows.items()]
HABITS = {name: hint for names, hint in ROWS for name in names.split()}


def habit(name: str) -> str | None:
    """What to write in place of another trainer's key, as the hint of a complaint; None: no trainer's key is known."""
    hint = HABITS.get(name.replace("-", "_"))
    return f"did you mean {hint}?" if hint and re.fullmatch(r"[\w.]+", hint) else hint
