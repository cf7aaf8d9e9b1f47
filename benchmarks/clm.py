"""What run_clm.py of transformers' examples does, with its imports but `evaluate`: the peer of data.py and startup.py.

    python benchmarks/clm.py --model_name_or_path M --train_file T.parquet --output_dir O [--do_train True ...]

takes TrainingArguments' options too. Without --do_train only datasets' `map`s are made, whose results are kept. After
the first step the file O/first_step appears. DeepSpeed, which accelerate imports, is hidden: run_clm does not need it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

del sys.path[0]  # this folder, whose kernels.py transformers would take for the package of that name
sys.modules["deepspeed"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments  # noqa: E402


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    block_size: int = 1024
    preprocessing_num_workers: int | None = None


class FirstStep(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (Path(args.output_dir) / "first_step").write_text(f"{state.global_step}\n")


def main() -> None:
    parser = transformers.HfArgumentParser((Arguments, TrainingArguments))
    given, training = parser.parse_args_into_dataclasses()
    transformers.set_seed(training.seed)
    raw = load_dataset("parquet", data_files={"train": given.train_file})
    tokenizer = AutoTokenizer.from_pretrained(given.model_name_or_path)

    def tokenize(examples: dict[str, list[str]]) -> Any:
        return tokenizer(examples["text"])

    def group(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {key: list(chain(*lists)) for key, lists in examples.items()}
        total = len(joined["input_ids"]) // given.block_size * given.block_size
        cut = range(0, total, given.block_size)
        result = {key: [ids[i : i + given.block_size] for i in cut] for key, ids in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    workers = given.preprocessing_num_workers
    tokenized = raw.map(tokenize, batched=True, num_proc=workers, remove_columns=["text"])
    blocks = tokenized.map(group, batched=True, num_proc=workers)
    if training.do_train:
        model = AutoModelForCausalLM.from_pretrained(given.model_name_or_path, dtype=torch.float32)
        collator = transformers.default_data_collator
        made = {"train_dataset": blocks["train"], "processing_class": tokenizer, "data_collator": collator}
        Trainer(model, training, **made, callbacks=[FirstStep()]).train()


if __name__ == "__main__":
    main()
