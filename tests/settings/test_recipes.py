"""recipes/: each is a config of wikift train that plans, with its source and score."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from wikift.commands.main import main
from wikift.settings.fields import TrainSettings
from wikift.settings.options import parse
from wikift.settings.run_fields import EvaluateSettings

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").iterdir())
PAGE = (ROOT / "docs" / "how-to" / "published-results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_plans_and_tells_its_score(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = dict(re.findall(r"^# (\w+): (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    settings = parse(TrainSettings, ["--config", str(path)])
    assert settings.output_dir == f"runs/{path.stem}", "no recipe resumes another's run"
    program, command, *words = shlex.split(facts["score"])
    assert (program, command) == ("wikift", "evaluate")
    assert parse(EvaluateSettings, words).models == (settings.output_dir,)
    assert facts["source"]
    assert f"`recipes/{path.name}`" in PAGE
    assert re.split(r" \(|;", facts["expected"])[0] in PAGE
    _, machine = facts["forecast"].strip("()").split(", --")
    assert main(["plan", "--config", str(path), *f"--{machine}".split()]) == 0
    plan = capsys.readouterr().out
    assert f"\nglobal_batch_size = {settings.global_batch_size}\n" in plan
    (memory,) = re.findall(r"^# recommended: .* about ([\d.]+) GB of ", plan, re.MULTILINE)
    assert float(memory) == pytest.approx(float(facts["forecast"].split()[0]), rel=0.1), "its forecast is out of date"
