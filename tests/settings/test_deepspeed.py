"""A DeepSpeed config file as settings, and completed for DeepSpeed: the Trainer's own files, clashes, errors."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines.test_build import WORK
from wikift.base.errors import UserError
from wikift.base.shape import Shape
from wikift.commands.train import main
from wikift.settings.deepspeed import Merged, engine_config, merge, read
from wikift.settings.deepspeed_checks import PASSED
from wikift.settings.fields import TrainSettings
from wikift.settings.options import parse_all

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))}

# The configs of transformers' DeepSpeed documentation and tests.
FP16 = {
    "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
    "min_loss_scale": 1,
}  # fmt: skip
COMMON = json.loads("""{
  "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
  "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": false,
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto",
    "torch_adam": true, "adam_w_mode": true}}
}""") | {"fp16": FP16}
TRAINER: dict[str, dict[str, Any]] = {
    "zero2": COMMON
    | json.loads("""{"bf16": {"enabled": "auto"},
  "scheduler": {"type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
  "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": true}, "overlap_comm": true,
    "allgather_partitions": true, "allgather_bucket_size": 5e8, "reduce_scatter": true, "reduce_bucket_size": 5e8,
    "contiguous_gradients": true, "round_robin_gradients": true}}"""),
    "zero3": COMMON
    | json.loads("""{"amp": {"enabled": "auto", "opt_level": "auto"},
  "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_min_lr": "auto"}},
  "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme",
    "buffer_count": 4}, "offload_param": {"device": "cpu", "pin_memory": true}, "overlap_comm": true,
    "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": true},
  "aio": {"block_size": 262144, "queue_depth": 32, "single_submit": false, "overlap_events": true}}"""),
}
EVERY = {**SHIPPED, **TRAINER}


def written(config: Any, folder: Path) -> str:
    """The config as a file; the documentation's NVMe folder is one that is there."""
    path = folder / "ds.json"
    text = config if isinstance(config, str) else json.dumps(config)
    path.write_text(text.replace("/local_nvme", str(folder)))
    return str(path)


def merged(config: Any, folder: Path, line: str = "") -> Merged:
    words = [*line.split(), "--deepspeed", written(config, folder)]
    parsed = parse_all(TrainSettings, words)
    parsed.refuse(())
    return merge(parsed.settings, parsed.typed)


def with_key(key: str, value: Any, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config of stage 2 with one more key, "zero_optimization.stage" for instance."""
    config = copy.deepcopy(base or {"zero_optimization": {"stage": 2}})
    *sections, name = key.split(".")
    table = config
    for section in sections:
        table = table.setdefault(section, {})
    table[name] = value
    if key.startswith("optimizer.params"):
        config["optimizer"].setdefault("type", "AdamW")
    if key.startswith("scheduler.params"):
        config["scheduler"].setdefault("type", "WarmupLR")
    return config


def completed(path: str, ranks: int = 1, **numbers: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"micro_batch": 2, "accumulation": 3, "shape": Shape(n_embd=64)}
    given["adam"] = replace(WORK.adam, max_grad_norm=0.5)
    return engine_config(read(path)[0], replace(WORK, **given | numbers), ranks)


# --- files that are right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", EVERY)
def test_every_file_leaves_auto_to_the_command_line_and_deepspeed_takes_it(
    tmp_path: Path, name: str, precision: str
) -> None:
    line = f"--precision {precision} --learning-rate 0.001 --weight-decay 0.1 --warmup-steps 7 --global-batch-size 6"
    line += f" --lr-scheduler-type {'constant' if name == 'zero2' else 'linear'}"
    result = merged(EVERY[name], tmp_path, line)
    assert not result.problems
    assert not result.taken
    config = completed(str(tmp_path / "ds.json"), precision=precision)
    assert '"auto"' not in json.dumps(config)
    assert "optimizer" not in config
    assert "scheduler" not in config

    from deepspeed.runtime.config import DeepSpeedConfig

    seen = DeepSpeedConfig(config)
    assert seen.zero_optimization_stage == EVERY[name]["zero_optimization"]["stage"]
    batch = (seen.train_micro_batch_size_per_gpu, seen.gradient_accumulation_steps, seen.train_batch_size)
    assert batch == (2, 3, 6)
    assert seen.gradient_clipping == 0.5
    assert (seen.bfloat16_config.enabled, seen.float16_config.enabled) == (precision == "bf16", precision == "fp16")
    offloads = seen.zero_config.offload_optimizer, seen.zero_config.offload_param
    asked = [EVERY[name]["zero_optimization"].get(key) for key in ("offload_optimizer", "offload_param")]
    assert [o and str(o.device) for o in offloads] == [a and a["device"] for a in asked]


def test_sizes_left_to_us_are_those_of_the_trainer(tmp_path: Path) -> None:
    config = completed(written(TRAINER["zero3"], tmp_path), 4, shape=Shape())
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 768 * 768
    assert zero["stage3_prefetch_bucket_size"] == 530841
    assert zero["stage3_param_persistence_threshold"] == 7680
    assert config["train_batch_size"] == 24
    assert type(zero["sub_group_size"]) is int
    # a size of stage 3 that is left open on stage 2 is DeepSpeed's own
    two = completed(written(with_key("zero_optimization.stage3_prefetch_bucket_size", "auto"), tmp_path))
    assert "stage3_prefetch_bucket_size" not in two["zero_optimization"]


def test_the_loss_scale_is_grad_scalers_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    ours = completed(written(SHIPPED["zero2.json"], tmp_path), precision="fp16")["fp16"]
    assert ours == {
        "enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1,
        "min_loss_scale": 1,
    }  # fmt: skip
    theirs = completed(written(TRAINER["zero2"], tmp_path), precision="fp16")["fp16"]
    assert theirs == {**FP16, "enabled": True}
    told = " ".join(merged(TRAINER["zero2"], tmp_path, "--precision fp16").notes)
    assert "fp16.loss_scale_window 1000" in told
    assert "AdamW is wikift's AdamW" in told
    assert "WarmupLR is wikift's --lr-scheduler-type constant with a linear warm-up" in told
    assert not merged(SHIPPED["zero3.json"], tmp_path).notes


# --- numbers in the file -----------------------------------------------------------------------------------------

# key of the file, value there, setting, the same on the command line, another one
NUMBERS: list[tuple[str, Any, str, str, str]] = [
    ("train_batch_size", 64, "global_batch_size", "64", "32"),
    ("optimizer.params.lr", 3e-5, "learning_rate", "3e-5", "5e-5"),
    ("optimizer.params.betas", ["auto", 0.95], "adam_beta2", "0.95", "0.999"),
    ("scheduler.params.warmup_num_steps", 500, "warmup_steps", "500", "0"),
    ("scheduler.params.total_num_steps", 900, "max_steps", "900", "800"),
    ("fp16.enabled", True, "precision", "fp16", "fp32"),
    ("bf16.enabled", False, "precision", "fp32", "bf16"),
    ("scheduler.type", "WarmupLR", "lr_scheduler_type", "constant", "cosine"),
    ("communication_data_type", "bf16", "reduce_dtype", "bf16", "fp32"),
]
IDS = [f"{key}-{setting}" for key, _, setting, _, _ in NUMBERS]


@pytest.mark.parametrize(("key", "value", "setting", "same", "other"), NUMBERS, ids=IDS)
def test_a_number_acts_where_the_command_line_is_silent_agrees_or_clashes(
    tmp_path: Path, key: str, value: Any, setting: str, same: str, other: str
) -> None:
    config, option = with_key(key, value), "--" + setting.replace("_", "-")
    silent = merged(config, tmp_path)
    assert not silent.problems
    kind = type(getattr(silent.settings, setting))
    assert getattr(silent.settings, setting) == kind(same)
    assert silent.taken[setting].startswith(key)
    assert any(f"{option} " in note and key in note for note in silent.notes)

    agreed = merged(config, tmp_path, f"{option} {same}")
    assert not agreed.problems
    assert getattr(agreed.settings, setting) == kind(same)

    (problem,) = merged(config, tmp_path, f"{option} {other}").problems
    assert problem.startswith(f"{option} {other}: contradicts {key}")
    assert problem.endswith(f' in {tmp_path}/ds.json; remove one of the two, or write "auto" there')

    way_out = merged(with_key(key, "auto"), tmp_path, f"{option} {other}")
    assert not way_out.problems
    assert setting not in way_out.taken


def test_a_number_of_the_config_file_clashes_too_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text("learning_rate = 1e-4\nprecision = 'auto'\n")
    config = with_key("optimizer.params.lr", 3e-5, with_key("fp16.enabled", True))
    result = merged(config, tmp_path, f"--config {tmp_path}/my.toml")
    (problem,) = result.problems
    assert problem.startswith(f"learning_rate 0.0001 in {tmp_path}/my.toml: contradicts optimizer.params.lr 3e-05 in ")
    assert result.settings.precision == "fp16"  # auto is no opinion
    length = merged(with_key("scheduler.params.total_num_steps", 900), tmp_path, "--num-train-epochs 2")
    twice = "--num-train-epochs 2: the length of training is set twice, scheduler.params.total_num_steps 900 "
    assert length.problems[0].startswith(twice)


def test_all_clashes_come_at_once_within_the_file_too(tmp_path: Path) -> None:
    config = with_key("optimizer.params.lr", 3e-5, with_key("scheduler.params.warmup_max_lr", 1e-3))
    (problem,) = merged(config, tmp_path).problems
    assert problem.startswith("scheduler.params.warmup_max_lr 0.001")
    assert "optimizer.params.lr 3e-05" in problem
    config |= {"gradient_clipping": 1, "train_batch_size": 16}
    line = "--max-grad-norm 0.5 --global-batch-size 8 --learning-rate 1e-3"
    problems = merged(config, tmp_path, line).problems
    assert [problem.split(":")[0] for problem in problems] == [
        "--global-batch-size 8", "--max-grad-norm 0.5", "--learning-rate 1e-3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fp16", "bf16", "asked", "settled"),
    [
        ("auto", None, "bf16", "bf16"),
        (False, None, "auto", "fp32"),  # the documentation's way to fp32
        (False, None, "bf16", "bf16"),
        (False, "auto", "auto", "auto"),  # bf16 or fp32, by the device
        ("auto", False, "fp16", "fp16"),
        (False, False, "auto", "fp32"),
        (True, False, "auto", "fp16"),
        (False, "auto", "fp16", None),
        (False, False, "bf16", None),
        (True, True, "auto", None),
    ],
)
def test_two_switches_make_one_precision(tmp_path: Path, fp16: Any, bf16: Any, asked: str, settled: str | None) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    config |= {name: {"enabled": value} for name, value in (("fp16", fp16), ("bf16", bf16)) if value is not None}
    result = merged(config, tmp_path, f"--precision {asked}")
    assert len(result.problems) == (settled is None)
    assert settled is None or result.settings.precision == settled


def test_a_file_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    """Comments, trailing commas, numbers and switches as text, older names, names without the prefix."""
    text = """{
      // as people write them
      "train_batch_size": "32",  # text
      "bfloat16": {"enabled": 1},
      "zero_optimization": {
        "stage": "3",
        "cpu_offload": true,
        "prefetch_bucket_size": 5e7 /* without stage3_ */
        "overlap_comm": "True",
        "reduce_bucket_size": "500",
      },
    }"""
    result = merged(text, tmp_path)
    assert not result.problems
    assert (result.settings.global_batch_size, result.settings.precision) == (32, "bf16")
    config, problems = read(tmp_path / "ds.json")
    assert not problems
    zero = {key.partition(".")[2]: value for key, value in config.items() if key.startswith("zero")}
    assert zero == {
        "stage": "3", "offload_optimizer.device": "cpu", "stage3_prefetch_bucket_size": 50000000, "overlap_comm": True,
        "reduce_bucket_size": 500,
    }  # fmt: skip
    assert completed(str(tmp_path / "ds.json"))["zero_optimization"]["stage"] == 3


# --- files that are wrong ----------------------------------------------------------------------------------------

WRONG: list[tuple[str, Any, str]] = [
    ("zero_optimization.stage", 0, "remove --deepspeed"),
    ("zero_optimization.stage", "all", "must be 1, 2 or 3"),
    ("optimizer.type", "Lamb", 'must be one of Adam, AdamW, or "auto"'),
    ("optimizer.params.momentum", 0.9, "changes what is learned, and wikift has no such setting; remove it"),
    ("optimizer.params.betas", [0.9], 'write two numbers in brackets, or "auto"'),
    ("optimizer.params.lr", "fast", 'must be a number, or "auto"'),
    ("optimizer.params.max_grad_norm", 1.0, '"gradient_clipping" or --max-grad-norm clips'),
    ("scheduler.type", "OneCycle", 'must be one of WarmupLR, WarmupDecayLR, or "auto" with --lr-scheduler-type'),
    ("scheduler.params.warmup_min_lr", 1e-6, 'rises from 0; write 0 or "auto"'),
    ("gradient_allreduce_op", "sum", "remove it"),
    ("amp", {"enabled": True}, "--precision"),
    ("train_batch_size", "many", 'must be a whole number, or "auto"'),
    ("fp16.enabled", "maybe", 'must be true or false, or "auto"'),
    ("zero_optimization.reduce_bucket_size", 0, "must be 1 or more"),
    ("zero_optimization.sub_group_size", -1, "must be 0 or more"),
    ("communication_data_type", "fp23", "must be one of fp32, bf16, fp16 (did you mean"),
    ("zero_optimization.offload_optimizer.device", "nvme", "needs stage 3"),
    ("zero_optimization.offload_optimizer.device", "disk", "must be one of none, cpu, nvme"),
    ("zero_optimization.offload_optimizer", "cpu", "must be a section in braces"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG, ids=[f"{key} {value}" for key, value, _ in WRONG])
def test_what_cannot_be_is_one_error_with_the_way_out(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    (problem,) = merged(with_key(key, value), tmp_path).problems
    assert expected in problem
    assert key.split(".")[0] in problem
    assert f" in {tmp_path}/ds.json: " in problem
    if '"auto"' in problem:
        assert not merged(with_key(key, "auto"), tmp_path).problems


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_checkpointing", {"partition_activations": False, "number_checkpoints": None}),
        ("elasticity", {"enabled": False, "max_train_batch_size": 2000}),
        ("zero_optimization.offload_param", None),
        ("scheduler", None),
        ("optimizer.params.adam_w_mode", True),
        ("optimizer.params.fused", True),
        ("scheduler.params.warmup_type", "linear"),
        ("scheduler.params.warmup_min_lr", 0.0),
    ],
)
def test_what_asks_for_nothing_passes_and_is_omitted(tmp_path: Path, key: str, value: Any) -> None:
    result = merged(with_key(key, value), tmp_path)
    assert not result.problems
    assert "not used" not in " ".join(result.notes)
    assert key.split(".")[-1] not in json.dumps(completed(str(tmp_path / "ds.json")))


UNUSED: dict[str, Any] = {
    "wall_clock_breakdown": True,
    "tensorboard": {"enabled": True, "output_path": "logs/"},
    "activation_checkpointing": {"partition_activations": True},
    "zero_force_ds_cpu_optimizer": True,
    "zero_optimization.zero_hpz_partition_size": 8,
    "zero_optimization.overlap_com": True,  # a typing error
    "zero_optimisation": {"stage": 3},
}


def test_what_only_tunes_or_logs_and_what_nobody_knows_is_one_note(tmp_path: Path) -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    for key, value in UNUSED.items():
        config = with_key(key, value, config)
    result = merged(config, tmp_path)
    assert not result.problems
    (note,) = result.notes
    start, _, names = note.partition(": not used by wikift: ")
    assert start == "ds.json"
    assert sorted(names.split(", ")) == sorted(UNUSED)
    plain = completed(written({"zero_optimization": {"stage": 2}}, tmp_path))
    assert completed(written(config, tmp_path)) == plain, "nothing of it reaches DeepSpeed"


def test_a_folder_for_the_nvme_disk_exists(tmp_path: Path) -> None:
    section = {"device": "nvme", "nvme_path": str(tmp_path / "none")}
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": section, "offload_param": {"device": "nvme"}}}
    absent, missing = merged(config, tmp_path).problems
    assert "offload_optimizer.nvme_path" in absent
    assert "existing folder" in absent
    assert "offload_param.nvme_path null" in missing


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2]", "cannot be read (not valid JSON: is a list, not an object of settings); name a DeepSpeed config"),
        ('{"zero_optimization": {"stage": 2}', "or one of zero1, zero2, zero2_offload, zero3, zero3_offload"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "stage is there twice"),
        ('{"zero_optimization": {"stage": 3, "max_reuse_distance": 1, "stage3_max_reuse_distance": 2}}', "there twice"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str, expected: str) -> None:
    (problem,) = merged(content, tmp_path).problems
    assert expected in problem
    assert str(tmp_path / "ds.json") in problem
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read(tmp_path / "none.json")


def test_a_file_of_wikift_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}
    assert {name: read(name)[0]["zero_optimization.stage"] for name in names} == names
    assert [f"{name}.json" for name in names] == list(SHIPPED)
    Path("zero2").write_text('{"zero_optimization": {"stage": 1}}')  # the user's own comes first
    assert read("zero2") == ({"zero_optimization.stage": 1}, [])


# --- the command -------------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_setting_names_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = with_key("train_batch_size", 32, with_key("train_micro_batch_size_per_gpu", 4))
    config = with_key("gradient_accumulation_steps", 2, with_key("optimizer.params.lr", 0, config))
    path = written(config, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as caught:
        main(["--deepspeed", path, "--dry-run", "--dataset", "demo"])
    batch, rate = sorted(caught.value.problems)
    assert batch.startswith("--global-batch-size 32: must be 2 processes x 4 (--per-device-train-batch-size) x 2 ")
    assert batch.endswith(f"(train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps in {path})")
    assert rate == f'optimizer.params.lr 0 in {path}: must be above 0, or "auto"'


def test_the_launchers_local_rank_is_dropped(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["--local_rank=1", "--dataset", "demo", "--max-steps", "7", "--dry-run"]) == 0
    assert "max_steps = 7" in capsys.readouterr().out


# --- what is said of DeepSpeed -----------------------------------------------------------------------------------


def test_what_is_passed_on_is_known_to_deepspeed() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    models = {
        "bf16.": DeepSpeedBF16Config,
        "fp16.": DeepSpeedFP16Config,
        "zero_optimization.": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer.": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param.": offload.DeepSpeedZeroOffloadParamConfig,
    }
    known = {f"{prefix}{f.alias or n}" for prefix, model in models.items() for n, f in model.model_fields.items()}
    passed = {key for key in PASSED if key.rpartition(".")[0] + "." in models}
    assert passed
    assert passed <= known, passed - known
