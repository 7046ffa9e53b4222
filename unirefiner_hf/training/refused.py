"""What of `transformers.TrainingArguments` a run does not read; imports no torch."""

_NOTHING = "a run measures nothing beside its loss: use evaluate on what it leaves"
_NO_LABELS = "the images have no labels"
_NO_TEXT = "it is for language models"
_COMPILING = (
    "it would compile the filters too, which depend on values: use compile_layers, which "
    "compiles the backbone's layers"
)
_BFLOAT16 = "use bf16, which needs no loss scaling"
REFUSED = {
    "auto_find_batch_size": "the learning rate follows the batch: set "
    "per_device_train_batch_size to what unirefiner estimate finds to fit",
    "average_tokens_across_devices": _NO_TEXT,
    "batch_eval_metrics": _NOTHING,
    "bf16_full_eval": _NOTHING,
    "do_eval": _NOTHING,
    "do_predict": _NOTHING,
    "do_train": "a run trains anyway",
    "enable_jit_checkpoint": "SIGTERM leaves a checkpoint anyway",
    "eval_accumulation_steps": _NOTHING,
    "eval_delay": _NOTHING,
    "eval_do_concat_batches": _NOTHING,
    "eval_on_start": _NOTHING,
    "eval_steps": _NOTHING,
    "eval_strategy": _NOTHING,
    "eval_use_gather_object": _NOTHING,
    "fp16": _BFLOAT16,
    "fp16_full_eval": _BFLOAT16,
    "greater_is_better": _NOTHING,
    "hub_revision": "checkpoints go to the branch training, the finished model to main",
    "include_for_metrics": _NOTHING,
    "include_num_input_tokens_seen": _NO_TEXT,
    "label_names": _NO_LABELS,
    "label_smoothing_factor": _NO_LABELS,
    "length_column_name": "all images are of one size",
    "liger_kernel_config": _NO_TEXT,
    "load_best_model_at_end": _NOTHING,
    "local_rank": "the launcher says it",
    "metric_for_best_model": _NOTHING,
    "neftune_noise_alpha": _NO_TEXT,
    "parallelism_config": "a layer is not parted: launch with ddp.yaml, zero2.yaml, "
    "zero3.yaml or fsdp.yaml of recipes/accelerate",
    "per_device_eval_batch_size": _NOTHING,
    "prediction_loss_only": _NOTHING,
    "remove_unused_columns": "the images are the only input",
    "resume_from_checkpoint": "use resume, or train(resume_from_checkpoint=...)",
    "torch_compile": _COMPILING,
    "torch_compile_backend": _COMPILING,
    "torch_compile_mode": _COMPILING,
    "use_cache": _NO_TEXT,
    "use_liger_kernel": _NO_TEXT,
}
"""Fields of `TrainingArguments` that a run does not read -> why, or what to use instead."""
BOUNDS = {
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "(0, inf)",
    "data_seed": "[0, 4294967295]",
    "dataloader_prefetch_factor": "[1, inf)",
    "ddp_bucket_cap_mb": "[1, inf)",
    "gradient_accumulation_steps": "[1, inf)",
    "max_grad_norm": "[0, inf)",
    "max_steps": "[-1, inf)",
    "seed": "[0, 4294967295]",
    "torch_empty_cache_steps": "[1, inf)",
    "warmup_steps": "[0, inf)",
}
"""Fields of `TrainingArguments` that are numbers and read -> what they take."""
