"""The command in a run's config.json starts the same run. Run: pytest tests/settings/test_reproduce.py"""

from __future__ import annotations

import shlex

from wikift.settings.fields import TrainSettings
from wikift.settings.options import parse
from wikift.settings.reproduce import command_of


def test_the_command_is_parsed_to_the_settings_it_was_made_of() -> None:
    settings = TrainSettings(
        dataset=("my text; rm -rf x.txt", "b.txt"), from_scratch=True, fsdp_reshard=False, learning_rate=3e-4,
        max_steps=5, model="gpt2-medium", adam_epsilon=1e-6,
    )  # fmt: skip
    words = shlex.split(command_of(settings, 1))
    assert words[:2] == ["wikift", "train"]
    assert parse(TrainSettings, words[2:], prog="wikift train") == settings
    assert command_of(TrainSettings(), 4) == "torchrun --nproc_per_node=4 -m wikift train"
