"""What run_clm.py of transformers' examples does until it trains, in its order and with its imports but `evaluate`.

    python benchmarks/peer_clm.py --model_name_or_path M --train_file T.parquet --block_size 64 --output_dir O

takes TrainingArguments' options too. What datasets' `map` made is kept from the second start on. After the first step
the file O/first_step appears. DeepSpeed, which accelerate imports where it is there, is hidden: run_clm needs it not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.modules["deepspeed"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class ModelArguments:
    model_name_or_path: str


@dataclass
class DataArguments:
    train_file: str
    block_size: int = 1024


class FirstStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / "first_step").write_text(f"{state.global_step}\n")


def main() -> None:
    """Train."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    named, given, training = parser.parse_args_into_dataclasses()
    transformers.set_seed(training.seed)
    raw = load_dataset("parquet", data_files={"train": given.train_file})
    config = AutoConfig.from_pretrained(named.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(named.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(named.model_name_or_path, config=config, dtype=torch.float32)

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"])

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain(*lists)) for key, lists in examples.items()}
        total = len(joined["input_ids"]) // given.block_size * given.block_size
        cut = range(0, total, given.block_size)
        result = {key: [ids[i : i + given.block_size] for i in cut] for key, ids in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    tokenized = raw.map(tokenize, batched=True, remove_columns=["text"])
    blocks = tokenized.map(group, batched=True)
    Trainer(
        model=model, args=training, train_dataset=blocks["train"], processing_class=tokenizer,
        data_collator=default_data_collator, callbacks=[FirstStep()],
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()
