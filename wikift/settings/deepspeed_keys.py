"""What a DeepSpeed config file may hold (DeepSpeed 0.19), and what wikift does with each key.

A key is written with dots, "zero_optimization.stage". It stands in one of four tables: handed on to DeepSpeed, read as
a setting of wikift's, not used because wikift does that by itself, or refused with the way out.
"""

from __future__ import annotations

from typing import Any

# Handed on to DeepSpeed as they are, with the kind of their value.
PASSED: dict[str, type] = {
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "disable_python_gc": bool,
    "zero_allow_untested_optimizer": bool,
    "data_types.grad_accum_dtype": str,
    "fp16.loss_scale": float,
    "fp16.initial_scale_power": int,
    "fp16.loss_scale_window": int,
    "fp16.hysteresis": int,
    "fp16.consecutive_hysteresis": bool,
    "fp16.min_loss_scale": int,
    "bf16.immediate_grad_update": bool,
    "aio.block_size": int,
    "aio.queue_depth": int,
    "aio.intra_op_parallelism": int,
    "aio.single_submit": bool,
    "aio.overlap_events": bool,
    "aio.use_gds": bool,
    **{
        "zero_optimization." + key: kind
        for kind, keys in {
            bool: (
                "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions",
                "overlap_comm", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
                "ignore_unused_parameters", "round_robin_gradients", "parameter_alignment", "memory_efficient_linear",
                "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
                "offload_optimizer.pin_memory", "offload_optimizer.pipeline_read", "offload_optimizer.pipeline_write",
                "offload_optimizer.fast_init", "offload_param.pin_memory",
            ),
            int: (
                "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
                "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
                "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_module_granularity_threshold",
                "offload_optimizer.buffer_count", "offload_param.buffer_count", "offload_param.buffer_size",
                "offload_param.max_in_cpu",
            ),
            str: (
                "offload_optimizer.device", "offload_optimizer.nvme_path",
                "offload_param.device", "offload_param.nvme_path",
            ),
        }.items()
        for key in keys
    },
}  # fmt: skip

_FORMATS = ("fp32", "fp16", "bf16")
CHOICES: dict[str, tuple[str, ...]] = {
    "communication_data_type": _FORMATS,
    "data_types.grad_accum_dtype": _FORMATS,
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
}
ABOVE_ZERO = ("zero_optimization.reduce_bucket_size", "fp16.loss_scale_window", "fp16.min_loss_scale")

# Read as wikift's own settings, with the kind of their value.
SETTINGS: dict[str, tuple[str, type]] = {
    "train_batch_size": ("global_batch_size", int),
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", int),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", int),
    "gradient_clipping": ("max_grad_norm", float),
    "optimizer.params.lr": ("learning_rate", float),
    "optimizer.params.eps": ("adam_epsilon", float),
    "optimizer.params.weight_decay": ("weight_decay", float),
    "scheduler.params.warmup_max_lr": ("learning_rate", float),
    "scheduler.params.warmup_num_steps": ("warmup_steps", float),  # float: below 1 is a part of the run
    "scheduler.params.total_num_steps": ("max_steps", int),
    "communication_data_type": ("reduce_dtype", str),
}

# DeepSpeed's schedulers that are wikift's, by name, with their --lr-scheduler-type.
SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear"}

# Looked at by dsconfig itself.
OWN = (
    "zero_optimization.stage",
    "fp16.enabled",
    "bf16.enabled",
    "optimizer.type",
    "optimizer.params.betas",
    "scheduler.type",
)

# What wikift does by itself, whatever the file says.
UNUSED = (
    "steps_per_print",
    "log_level",
    "timers",
    "dataloader_drop_last",
    "vocabulary_size",
    "optimizer.legacy_fusion",
    "optimizer.params.torch_adam",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save",
)

# Refused keys with the one value that asks for nothing; for all others that is false, 0, "none" or {"enabled": false}.
HARMLESS: dict[str, Any] = {
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "bf16.check_grad_overflow": True,
    "optimizer.params.adam_w_mode": True,
    "optimizer.params.bias_correction": True,
    "scheduler.params.warmup_type": "linear",
    "scheduler.params.last_batch_iteration": -1,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.load_from_fp32_weights": True,
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.offload_optimizer.ratio": 1,
}

_REMOVED = "DeepSpeed 0.19 has it no more; leave it out"
_OTHER_MODELS = "wikift shards by ZeRO alone; leave it out"
_FP32_MASTERS = "wikift keeps weights and moments in fp32 beside bf16 and fp16; leave it out"
_OWN_CHECKPOINTS = "wikift writes its own checkpoints, to --output-dir; leave it out"
_METRICS = "wikift writes OUTPUT_DIR/metrics.jsonl; leave it out"
_ROUNDED = "it rounds what the ranks exchange, and losses would depend on the engine; leave it out"

# Refused where it asks for something, with the way out.
REFUSED: dict[str, str] = {
    "activation_checkpointing": "use --gradient-checkpointing",
    "amp": "use --precision fp16 or bf16",
    "torch_autocast": "use --precision fp16 or bf16",
    "compile": "use --compile",
    "checkpoint": _OWN_CHECKPOINTS,
    "datastates_ckpt": _OWN_CHECKPOINTS,
    "nebula": _OWN_CHECKPOINTS,
    "tensorboard": _METRICS,
    "csv_monitor": _METRICS,
    "comet": _METRICS,
    "wandb": "use --wandb",
    "flops_profiler": "metrics.jsonl has mfu and tokens_per_second; leave it out",
    "wall_clock_breakdown": "metrics.jsonl has tokens_per_second; leave it out",
    "memory_breakdown": "metrics.jsonl has memory_gb; leave it out",
    "comms_logger": "it would write into wikift's output; leave it out",
    "dump_state": "it would write into wikift's output; leave it out",
    "autotuning": "choose the batch by --per-device-train-batch-size; leave it out",
    "elasticity": "the global batch is fixed, the number of processes is not; leave it out",
    "data_efficiency": "the seed and --data-fraction decide what is learned; leave it out",
    "curriculum_learning": "the seed and --data-fraction decide what is learned; leave it out",
    "progressive_layer_drop": _REMOVED,
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "graph_harvesting": _REMOVED,
    "weight_quantization": "wikift trains all weights; leave it out",
    "hybrid_engine": "it is for reinforcement learning; leave it out",
    "pipeline": _OTHER_MODELS,
    "tensor_parallel": _OTHER_MODELS,
    "sequence_parallel_size": _OTHER_MODELS,
    "seq_parallel_communication_data_type": _OTHER_MODELS,
    "expert_parallel": _OTHER_MODELS,
    "use_data_before_expert_parallelism": _OTHER_MODELS,
    "disable_allgather": "ZeRO gathers the weights; leave it out",
    "gradient_allreduce_op": "the loss is a mean over the global batch; leave it out",
    "managed_gradient_accumulation": "the global batch decides when a step ends; leave it out",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's AdamW under every engine; leave it out",
    "data_types.param_dtype": "use --precision",
    "data_types.buffer_dtype": "use --precision",
    "data_types.keep_in_fp32_modules": "use --precision",
    "fp16.auto_cast": "tokens are whole numbers; leave it out",
    "fp16.fp16_master_weights_and_grads": _FP32_MASTERS,
    "bf16.bf16_master_weights_and_grads": _FP32_MASTERS,
    "bf16.bf16_optimizer_states": _FP32_MASTERS,
    "bf16.check_grad_overflow": "a step whose gradient is not finite is skipped under every engine; leave it out",
    "optimizer.params.max_grad_norm": 'write "gradient_clipping" or use --max-grad-norm',
    "optimizer.params.amsgrad": "wikift's optimizer is AdamW; leave it out",
    "optimizer.params.adam_w_mode": "wikift's optimizer is AdamW; leave it out",
    "optimizer.params.bias_correction": "wikift's optimizer is AdamW; leave it out",
    "scheduler.params.warmup_min_lr": 'the rate rises from 0; write 0 or "auto"',
    "scheduler.params.warmup_type": 'the rate rises by a straight line; write "linear" or leave it out',
    "scheduler.params.last_batch_iteration": "--resume goes on from a checkpoint; leave it out",
    "zero_optimization.zenflow": "it updates weights a step late; leave it out",
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.elastic_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.load_from_fp32_weights": _OWN_CHECKPOINTS,
    "zero_optimization.pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "zero_optimization.compute_grad_norm": "wikift logs the norm of every step; leave it out",
    "zero_optimization.leaf_module": "it is for mixtures of experts; leave it out",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "wikift's optimizer is AdamW; leave it out",
    "zero_optimization.cpu_offload_use_pin_memory": 'write "pin_memory" into "offload_optimizer"',
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "zero_optimization.zero_hpz_partition_size": "ZeRO++ is not supported; leave it out",
    "zero_optimization.zero_quantized_weights": _ROUNDED,
    "zero_optimization.zero_quantized_nontrainable_weights": _ROUNDED,
    "zero_optimization.zero_quantized_gradients": _ROUNDED,
    "zero_optimization.offload_optimizer.ratio": "all of the optimizer is offloaded or none; leave it out",
    "zero_optimization.offload_optimizer.super_offload": "the optimizer is torch's AdamW; leave it out",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "the optimizer is torch's AdamW; leave it out",
}

# Older spellings: key as written -> key of today. `cpu_offload...: true` become {"device": "cpu"}.
RENAMED = {
    "bfloat16": "bf16",
    "zero_optimization.aio": "aio",
    "aio.thread_count": "aio.intra_op_parallelism",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_params": "zero_optimization.offload_param",
}

KNOWN = (*PASSED, *SETTINGS, *OWN, *UNUSED, *REFUSED)
SECTIONS = frozenset(key.rsplit(".", depth)[0] for key in KNOWN for depth in range(1, key.count(".") + 1))
