"""All settings, by command: a new one is a decision, see CONTRIBUTING.md. pytest tests/settings/test_pinned.py"""

from __future__ import annotations

import dataclasses

import pytest

from wikift.settings.run_fields import SETTINGS

PINNED = {
    "prepare": """
        append_eos config dataset dataset_config dataset_revision encoding out quiet seed text_column tokenizer
        validation_fraction verify workers
    """,
    "train": """
        adam_beta1 adam_beta2 adam_epsilon append_eos async_save block_size compile config config_overrides data
        data_fraction dataset dataset_config dataset_revision deepspeed deterministic device dropout
        dry_run early_stopping_patience encoding engine eval_steps from_scratch fsdp_reshard global_batch_size
        gradient_accumulation_steps gradient_checkpointing hang_timeout learning_rate logging_steps lr_scheduler_type
        max_eval_samples max_grad_norm max_steps model num_train_epochs on_nonfinite output_dir
        per_device_eval_batch_size per_device_train_batch_size precision profile quiet reduce_dtype report_to
        residual_dtype resume revision sample_prompts sample_steps save_only_model save_steps save_total_limit seed
        text_column tokenizer validation_fraction wandb warmup_steps weight_decay workers
    """,
    "plan": "find_lr gpu gpu_memory gpus mfu trial",
    "consolidate": """
        best dtype max_shard_size out private push_to_hub quiet run step
    """,
    "evaluate": """
        context data dataset dataset_config device encoding json models per_device_eval_batch_size precision protocol
        quiet split stride text_column
    """,
    "generate": """
        batch_size device examples json max_new_tokens model num_return_sequences
        precision prompt prompts_file quiet repetition_penalty seed stop temperature top_k top_p train
    """,
    "report": """
        out png runs text
    """,
    "compare": """
        runs within
    """,
    "runs": """
        folder prune yes
    """,
    "log": """
        model run to
    """,
}


@pytest.mark.parametrize("command", PINNED)
def test_the_set_of_settings(command: str) -> None:
    names = {field.name for field in dataclasses.fields(SETTINGS[command])}
    inherited = PINNED["train"].split() if command == "plan" else []
    assert sorted(names.difference(inherited)) == PINNED[command].split()
