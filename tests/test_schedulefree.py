"""Schedule-free AdamW: the library's update, the same run under every engine, and x wherever a model is judged.

pytest tests/test_schedulefree.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.matrix import SINGLE, TOLERANCE, Place, read, train_all, write
from tests.ranks import run_ranks
from tests.real import ROOT
from tests.tiny import VOCABULARY, arguments, curve, metrics, tiny_store
from tests.tiny_engines import ADAM, BLOCK, ENGINES, make_engine, random_start, tiny_config
from tests.trained import text_store, trained_run
from wikift.base.errors import UserError
from wikift.base.folders import step_folder
from wikift.checkpoint.reader import Checkpoint, open_checkpoint
from wikift.commands import train
from wikift.engines.base import SCHEDULE_FREE_SCALARS, SCHEDULE_FREE_STATES
from wikift.engines.optim import LossScale, ScaleRule, build_optimizer, clip_and_step, total_norm
from wikift.export import export
from wikift.schedulefree import at_average

SCHEDULE_FREE = replace(ADAM, schedule_free=True)
RATES = [0.0, 2e-3, 4e-3, *[6e-3] * 21]
CPU = torch.device("cpu")


# --- the update --------------------------------------------------------------------------------------------------


def parameters() -> list[nn.Parameter]:
    """A matrix, which decays, of more elements than are updated at a time, and a vector, which does not."""
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random)) for shape in ((600, 500), (7,))]


def update(optimizer: Any, weights: Sequence[nn.Parameter], step: int, *, bad: float = 0.0, scale: Any = None) -> None:
    random = torch.Generator().manual_seed(step)
    scale = scale or LossScale(None, CPU)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=random) * scale.scale
    weights[1].grad[3] += bad
    norm = total_norm([weight.grad for weight in weights]) / scale.scale
    clip_and_step(optimizer, norm, RATES[step], SCHEDULE_FREE.max_grad_norm, scale)


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).detach().abs().max()) <= 2e-6 * float(theirs.detach().abs().max())


@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_the_update_is_the_librarys(loss_scale: float) -> None:
    """24 steps, the rate rising from 0, clipped, one group decaying; then the weights of its eval mode, and back."""
    ours, theirs, begun = parameters(), parameters(), parameters()
    optimizer = build_optimizer(ours, SCHEDULE_FREE)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}]
    library = AdamWScheduleFree(groups, lr=0.0, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.epsilon)
    library.train()
    for step, rate in enumerate(RATES):
        update(optimizer, ours, step, scale=LossScale(ScaleRule(initial=loss_scale), CPU))
        random = torch.Generator().manual_seed(step)
        for weight in theirs:
            weight.grad = torch.randn(weight.shape, generator=random)
        norm = torch.stack([weight.grad.double().norm() for weight in theirs]).norm()  # torch clips by a rougher one
        assert norm > ADAM.max_grad_norm
        for weight in theirs:
            weight.grad *= (ADAM.max_grad_norm / norm).float()
        for group in library.param_groups:
            group["lr"] = rate
        library.step()
        for a, b in zip(ours, theirs, strict=True):
            assert_near(a, b)
            assert_near(optimizer.state[a]["z"], library.state[b]["z"])
            assert_near(optimizer.state[a]["exp_avg_sq"], library.state[b]["exp_avg_sq"])
    assert all((a - b).abs().max() > 0.02 for a, b in zip(ours, begun, strict=True))
    trained = [weight.detach().clone() for weight in ours]
    library.eval()
    with at_average(optimizer):
        for a, b, y in zip(ours, theirs, trained, strict=True):
            assert_near(a, b)
            assert (a - y).abs().max() > 1e-4
    assert all(torch.equal(a, y) for a, y in zip(ours, trained, strict=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("skipped", [0, 1, 9])
def test_a_step_that_is_skipped_is_as_if_it_had_not_been(bad: float, skipped: int) -> None:
    """At the very first, at the first with a rate, and later: everything goes on as in a run without it."""
    once, twice = parameters(), parameters()
    optimizer, other = build_optimizer(once, SCHEDULE_FREE), build_optimizer(twice, SCHEDULE_FREE)
    for step in range(12):
        update(optimizer, once, step)
        if step == skipped:
            update(other, twice, step, bad=bad)
        update(other, twice, step)
        for a, b in zip(once, twice, strict=True):
            assert torch.equal(a, b)
            assert all(torch.equal(value, other.state[b][name]) for name, value in optimizer.state[a].items())
    assert float(other.state[twice[0]]["step"]) == 12


# --- every engine ------------------------------------------------------------------------------------------------


def kept(engine: Any) -> dict[tuple[str, str, int], Tensor]:
    return {(f.name, f.state, f.start): f.data.clone() for f in engine.fragments()}


def computed_with(engine: Any) -> list[Tensor]:
    """What lies in the model's parameters, whole or a share."""
    model = engine.local.model if hasattr(engine, "ddp") else engine.model
    tensors = [getattr(p, "ds_tensor", p).detach() for p in model.parameters()]
    return [getattr(t, "to_local", lambda t=t: t)().clone() for t in tensors]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def measure(kind: str) -> dict[str, Any]:
    """On one rank: six steps of four blocks, after each a validation at x; what came, and what that left behind."""
    from wikift.base.world import start_world

    world = start_world("cpu")
    config = tiny_config()
    engine: Any = make_engine(kind, world, config, micro=1, accumulation=4 // world.size, adam=SCHEDULE_FREE)
    engine.restore(random_start(config))
    data = torch.Generator().manual_seed(1)
    blocks = torch.randint(VOCABULARY, (6, 4, BLOCK + 1), generator=data)
    held = torch.randint(VOCABULARY, (3, BLOCK + 1), generator=data)
    found: dict[str, Any] = {"losses": [], "norms": [], "at x": [], "at y": [], "traces": 0}
    begun = kept(engine)
    assert all(torch.equal(begun[name, "z", start], y) for (name, kind, start), y in begun.items() if kind == "weight")
    for step, batch in enumerate(blocks):
        mine = batch[world.rank :: world.size].split(1)
        losses = [engine.forward_backward(block, last=i == len(mine) - 1) for i, block in enumerate(mine)]
        found["norms"].append(float(engine.step(RATES[step])))
        found["losses"].append(float(world.total(torch.stack(losses).mean())) / world.size)
        before, memory = kept(engine), computed_with(engine)
        found["at y"].append(float(engine.nll(held[:, :-1], held[:, 1:])))
        with engine.averaged():
            found["at x"].append(float(engine.nll(held[:, :-1], held[:, 1:])))
            inside = kept(engine)
        after = kept(engine)
        found["traces"] += not same(list(before.values()), list(after.values()))
        found["traces"] += not same(memory, computed_with(engine))
        found["traces"] += float(engine.nll(held[:, :-1], held[:, 1:])) != found["at y"][-1]
    found["x"] = {key: tensor.numpy() for key, tensor in inside.items() if key[1] == "weight"}
    found["y, z"] = {key: tensor.numpy() for key, tensor in after.items()}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    (found,) = run_ranks(measure, 1, "single")
    assert max(map(abs, (a - b for a, b in zip(found["at x"], found["at y"], strict=True)))) > 1e-3
    assert all(norm > ADAM.max_grad_norm for norm in found["norms"])
    return found


@pytest.mark.parametrize("kind", ENGINES)
def test_any_engine_is_the_same_run_and_validation_leaves_no_trace(alone: dict[str, Any], kind: str) -> None:
    """Losses, norms, validation at x and the states of every range; and all that a validation touches is put back."""
    whole = {(name, state): values for (name, state, _), values in alone["y, z"].items()}
    averages = {name: values for (name, _, _), values in alone["x"].items()}
    for found in [alone] if kind == "single" else run_ranks(measure, 2, kind):
        assert found["losses"] == pytest.approx(alone["losses"], abs=TOLERANCE)
        assert found["norms"] == pytest.approx(alone["norms"], rel=TOLERANCE)
        assert found["at x"] == pytest.approx(alone["at x"], rel=1e-6)
        assert found["at y"] == pytest.approx(alone["at y"], rel=1e-6)
        assert found["traces"] == 0
        for (name, state, start), values in found["y, z"].items():
            expected = whole[name, state][start : start + len(values)]
            assert values == pytest.approx(expected, abs=TOLERANCE), (name, state)
        for (name, _, start), values in found["x"].items():
            assert values == pytest.approx(averages[name][start : start + len(values)], abs=TOLERANCE), name


def overflown(kind: str) -> bool:
    """Whether a step whose gradient overflowed in fp16 left every state as it was, after a good one."""
    from wikift.base.world import start_world

    world = start_world("cpu")
    config = tiny_config()
    engine: Any = make_engine(kind, world, config, precision="fp16", adam=SCHEDULE_FREE)
    engine.restore(random_start(config))
    blocks = torch.randint(VOCABULARY, (1, BLOCK + 1), generator=torch.Generator().manual_seed(1))
    states, norms = [], []
    for scale in (2.0**8, 2.0**30):
        engine.loss_scale = LossScale(ScaleRule(initial=scale, dynamic=False), CPU, world.size)
        engine.forward_backward(blocks, last=True)
        norms.append(float(engine.step(1e-2)))
        states.append({key: value for key, value in kept(engine).items() if key[1] != "loss_scale"})
    assert [math.isfinite(norm) for norm in norms] == [True, False]
    return same(list(states[0].values()), list(states[1].values()))


@pytest.mark.parametrize(("kind", "ranks"), [("single", 1), ("fsdp", 2), ("zero3", 2)])
def test_an_overflow_in_fp16_is_skipped(kind: str, ranks: int) -> None:
    assert all(run_ranks(overflown, ranks, kind))


# --- checkpoints -------------------------------------------------------------------------------------------------

WORDS = {"optimizer": "schedulefree", "warmup_steps": 2}
PROMPT = "The Renaissance"
ZERO3, FSDP = Place("zero3", 2), Place("fsdp", 2)


def test_a_checkpoint_of_any_engine_goes_on_under_any_other(tmp_path: Path) -> None:
    """Dropout off; where the engine stays the same, not a bit differs."""
    tiny_store(tmp_path / "store")
    write(tmp_path, [SINGLE, ZERO3, FSDP], **WORDS)
    for reader, writers in {SINGLE: [ZERO3], FSDP: [SINGLE, FSDP], ZERO3: [ZERO3]}.items():
        for writer, gap in read(tmp_path, writers, reader, **WORDS):
            assert gap <= (0 if writer == reader else TOLERANCE), (writer, reader)


def test_validations_and_samples_do_not_move_a_run(tmp_path: Path) -> None:
    """Dropout on; and from a checkpoint in the middle it goes on bit for bit."""
    store = text_store(tmp_path / "store").path
    (tmp_path / "prompts.txt").write_text("The Renaissance\n")
    words = {**WORDS, "config_overrides": "n_layer=2,n_head=2,n_embd=32,n_positions=32", "block_size": 16}
    asked = {"sample_prompts": tmp_path / "prompts.txt", "sample_steps": 2, "eval_steps": 1}
    lines = [
        arguments(store, tmp_path / "often", **words, **asked, save_total_limit=9),
        arguments(store, tmp_path / "seldom", **words, save_steps=12, eval_steps=12),
    ]
    resumed = [*lines[0], "--resume", str(step_folder(tmp_path / "often", 4))]
    assert run_ranks(train_all, 1, lines) == [[0, 0]]
    often, seldom = curve(tmp_path / "often"), curve(tmp_path / "seldom")
    assert [row[:5] for row in often] == [row[:5] for row in seldom]
    assert often[-1] == seldom[-1]
    assert run_ranks(train_all, 1, [resumed]) == [[0]]
    assert curve(tmp_path / "often") == often


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A schedule-free run with checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.txt").write_text(PROMPT + "\n")
    words = {**WORDS, "sample_prompts": folder / "prompts.txt", "sample_steps": 12}
    return trained_run(folder / "runs" / "small", text_store(folder / "store").path, **words)


def saved(checkpoint: Checkpoint, name: str, state: str) -> Tensor:
    shape = checkpoint.shapes[name]
    return checkpoint.read(name, state, 0, math.prod(shape)).reshape(shape)


def library_average(checkpoint: Checkpoint, name: str) -> Tensor:
    """What the library's eval mode makes of a checkpoint's y and z."""
    weight = nn.Parameter(saved(checkpoint, name, "weight"))
    library = AdamWScheduleFree([weight], betas=(checkpoint.manifest["settings"]["adam_beta1"], 0.999))
    library.train()
    library.state[weight]["z"] = saved(checkpoint, name, "z")
    library.eval()
    return weight.detach()


def test_a_consolidated_model_has_the_librarys_weights_and_the_loss_that_was_logged(run: Path) -> None:
    assert export.main([str(run), "--quiet"]) == 0
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    newest = open_checkpoint(step_folder(run, 12))
    for name, weight in model.named_parameters():
        y, z = saved(newest, name, "weight"), saved(newest, name, "z")
        assert_near(weight, library_average(newest, name))
        assert torch.equal(weight, (z - y) * (1 - 1 / 0.9) + y), "not to the bit what was validated"
        assert not torch.equal(weight, y)
    assert "| optimizer | schedulefree |" in (run / "hf" / "README.md").read_text()
    loss = own_loss(run, model)
    assert loss == pytest.approx(newest.manifest["eval_loss"], abs=1e-6)
    assert loss == pytest.approx(metrics(run)[-1]["eval_loss"], abs=1e-6)


def test_samples_are_those_of_the_consolidated_model(run: Path, tmp_path: Path) -> None:
    """One step of AdamW at a rate of 0 from the consolidated weights writes what step 12 wrote."""
    assert export.main([str(run), "--out", str(tmp_path / "hf"), "--quiet"]) == 0
    (written,) = (json.loads(text) for text in (run / "samples.jsonl").read_text().splitlines())
    words = {"from_scratch": None, "config_overrides": None, "model": tmp_path / "hf", "block_size": 16, "max_steps": 2}
    words |= {"sample_prompts": run.parent.parent / "prompts.txt", "sample_steps": 1, "learning_rate": 1e-30}
    assert train.main(arguments(run.parent.parent / "store", tmp_path / "again", **words)) == 0
    again = [json.loads(text)["text"] for text in (tmp_path / "again" / "samples.jsonl").read_text().splitlines()]
    assert again[0] == written["text"]


@torch.no_grad()
def own_loss(run: Path, model: Any) -> float:
    """The loss on the validation split in blocks of 16, by transformers' model and torch alone."""
    from wikift.data.store import open_store

    ids = torch.tensor(open_store(json.loads((run / "config.json").read_text())["store_path"]).tokens("validation"))
    ids, total = ids.long(), 0.0
    for start in range(0, len(ids) - 1, 16):
        block = ids[start : start + 17]
        logits = model(block[None, :-1]).logits[0]
        total += float(nn.functional.cross_entropy(logits, block[1:], reduction="sum"))
    return total / (len(ids) - 1)


def test_an_average_of_checkpoints_is_one_of_their_averages(run: Path, tmp_path: Path) -> None:
    assert export.main([str(run), "--average-last", "2", "--out", str(tmp_path / "mean"), "--quiet"]) == 0
    parts = [open_checkpoint(step_folder(run, step)) for step in (8, 12)]
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "mean").named_parameters():
        both = torch.stack([library_average(part, name) for part in parts])
        assert_near(weight, both.double().mean(0).float())


def test_a_checkpoint_keeps_what_the_optimizer_keeps(run: Path) -> None:
    manifest = open_checkpoint(step_folder(run, 12), verify=True).manifest
    states = {(name, state) for name, state, *_ in manifest["fragments"]}
    assert {state for name, state in states if name != "optimizer"} == set(SCHEDULE_FREE_STATES)
    assert {state for name, state in states if name == "optimizer"} > set(SCHEDULE_FREE_SCALARS)


# --- settings ----------------------------------------------------------------------------------------------------


def problems(*words: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        train.main([str(word) for word in words])
    return list(error.value.problems)


def test_what_does_not_go_with_it_is_an_error(tmp_path: Path) -> None:
    line = ["--optimizer", "schedulefree", "--dry-run"]
    for kind in ("linear", "cosine", "warmup_stable_decay"):
        (problem,) = problems(*line, "--lr-scheduler-type", kind)
        assert problem.startswith(f"--lr-scheduler-type {kind}: cannot act with --optimizer schedulefree")
    assert problems(*line, "--adam-beta1", 0) == [
        "--adam-beta1 0: must be above 0 with --optimizer schedulefree; try 0.9"
    ]
    file = tmp_path / "ds.json"
    config = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    file.write_text(json.dumps({**config, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}))
    (problem,) = problems(*line, "--deepspeed", file)
    assert problem.startswith(f'--optimizer schedulefree: clashes with optimizer.type "AdamW" in {file}')


def test_a_dry_run_shows_it_with_a_constant_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--optimizer", "schedulefree", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert 'optimizer = "schedulefree"\n' in said
    assert 'lr_scheduler_type = "constant"\n' in said
    assert train.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert 'optimizer = "adamw"\n' in said
    assert 'lr_scheduler_type = "linear"\n' in said


def refused(line: list[str]) -> list[str]:
    try:
        train.main(line)
    except UserError as error:
        return list(error.problems)
    return []


def test_a_run_keeps_its_optimizer(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store")
    for first, second in (("adamw", "schedulefree"), ("schedulefree", "adamw")):
        line = arguments(store, tmp_path / first, optimizer=first, max_steps=4)
        assert run_ranks(train_all, 1, [line]) == [[0]]
        ((problem,),) = run_ranks(refused, 1, [*line, "--max-steps", "8", "--optimizer", second])
        assert problem.startswith(f"--optimizer {second}: this run was started with {first}; take the old value")
    ((problem,),) = run_ranks(refused, 1, [*line, "--max-steps", "8", "--adam-beta1", "0.95"])
    assert problem.startswith("--adam-beta1 0.95: this run was started with 0.9; take the old value")


def test_a_checkpoint_from_before_there_was_a_choice_is_adamws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(tiny_store(tmp_path / "store"), tmp_path / "run", max_steps=4, quiet=False)
    assert run_ranks(train_all, 1, [line]) == [[0]]
    path = step_folder(tmp_path / "run", 4) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["optimizer"], manifest["experiment"]["--optimizer"]
    path.write_text(json.dumps(manifest))
    capsys.readouterr()
    assert run_ranks(train_all, 1, [[*line, "--max-steps", "8"]]) == [[0]]
    assert "changed since the checkpoint: max_steps 4 -> 8\n" in capsys.readouterr().out
