"""Training starts from a checkpoint of transformers' Trainer. Run: pytest tests/model/test_trainer_checkpoint.py"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoTokenizer, default_data_collator

from tests.tiny import arguments
from tests.trained import text_store
from wikift.base.folders import list_checkpoints
from wikift.checkpoint.reader import open_checkpoint
from wikift.commands.train import main as train

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate (tests/requirements.in)")


CONFIG = {
    "n_layer": 2, "n_head": 2, "n_embd": 30, "vocab_size": 97, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0
}  # fmt: skip


def tiny_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**CONFIG))


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 16) % CONFIG["vocab_size"]
        return {"input_ids": ids, "labels": ids}


def test_train_goes_on_from_a_trainers_weights(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    store = text_store(tmp_path / "store")
    model = tiny_model()
    model.resize_token_embeddings(store.vocab_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = TrainingArguments(
            output_dir=str(tmp_path / "trainer"), max_steps=2, save_steps=2, report_to=[], use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(store.path / "tokenizer")
        data: dict[str, Any] = {"train_dataset": Rows(), "data_collator": default_data_collator}
        Trainer(model=model, args=settings, processing_class=tokenizer, **data).train()
    saved = tmp_path / "trainer" / "checkpoint-2"
    words = {"from_scratch": None, "config_overrides": None, "model": saved, "block_size": 8, "learning_rate": 1e-30}
    assert train(arguments(store.path, tmp_path / "run", **{**words, "max_steps": 1})) == 0
    opened = open_checkpoint(list_checkpoints(tmp_path / "run")[-1])
    for name, weight in load_file(saved / "model.safetensors").items():
        read = opened.read(name, "weight", 0, weight.numel())
        torch.testing.assert_close(read, weight.reshape(-1), rtol=0, atol=1e-20)
