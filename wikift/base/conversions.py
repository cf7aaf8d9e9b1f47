"""What people have instead of a Hugging Face model folder, and the exact command that makes one of it.

wikift reads no pickle and imports no other framework; the commands do, in a process that the user starts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path

from wikift.base.files import read_json

# Python for `python -c` that makes a model folder of something else, in DIR/converted or in DIR itself
_MERGE = """from peft import AutoPeftModelForCausalLM as P; from transformers import AutoTokenizer as T; \
P.from_pretrained({folder}, trust_remote_code=False).merge_and_unload().save_pretrained({out}); \
T.from_pretrained({base}, trust_remote_code=False).save_pretrained({out})"""
_TO_SAFETENSORS = """import glob, torch, safetensors.torch as s; \
s.save_file({{k: v.clone().contiguous() for f in glob.glob({folder} + "/pytorch_model*.bin") \
for k, v in torch.load(f, map_location="cpu", weights_only=True).items()}}, {folder} + "/model.safetensors")"""
_SAVE_AGAIN = """from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; \
M.from_pretrained({folder}, trust_remote_code=False%s).save_pretrained({out}); \
T.from_pretrained({folder}, trust_remote_code=False).save_pretrained({out})"""
# nanoGPT's linear layers are (out, in), biases may be absent, its GELU is the exact one, the vocabulary may be padded
_NANOGPT = """import torch, transformers as t; c = torch.load({file}, map_location="cpu", weights_only=True); \
a = c["model_args"]; w = {{k.removeprefix("_orig_mod."): v for k, v in c["model"].items()}}; \
e, x = w["transformer.wte.weight"], w["transformer.h.0.attn.c_attn.weight"]; \
m = t.GPT2LMHeadModel(t.GPT2Config(n_layer=a["n_layer"], n_head=a["n_head"], n_embd=a["n_embd"], \
n_positions=a["block_size"], vocab_size=len(e), activation_function="gelu")); s = m.state_dict(); \
m.load_state_dict({{k: v * 0 for k, v in s.items() if k.endswith("bias")}} | {{"lm_head.weight": e}} | \
{{k: v.t() if len(x) > x.shape[1] and ".c_" in k else v for k, v in w.items() if k in s}}); \
m.save_pretrained({out}); t.AutoTokenizer.from_pretrained("gpt2").save_pretrained({out})"""
_OLD = "which transformers 5 cannot read; in an environment with pip install 'transformers<5' torch %s run"
# (files, what they are, Python that makes a model folder of them); the first that matches counts
_WAYS_OUT = (
    ("adapter_config.json", "a PEFT adapter, which is no model by itself; merge it", _MERGE),
    ("pytorch_model*.bin", "pickled weights, which wikift never reads; convert them", _TO_SAFETENSORS),
    ("tf_model.h5", "TensorFlow weights, " + _OLD % "tf-keras", _SAVE_AGAIN % ", from_tf=True"),
    ("flax_model.msgpack", "Flax weights, " + _OLD % "flax", _SAVE_AGAIN % ", from_flax=True"),
    ("*.gguf", "llama.cpp's weights; convert them (pip install gguf)", _SAVE_AGAIN % ", gguf_file={name}"),
    ("ckpt*.pt", "a checkpoint of nanoGPT; convert it", _NANOGPT),
)


def way_out(folder: Path, files: Iterable[Path]) -> str | None:
    """What to say of a `folder` without a model, by those of its `files` that were named; None where it is unknown."""
    for pattern, kind, code in _WAYS_OUT:
        if match := next((path for path in files if path.match(pattern)), None):
            then = "" if code is _TO_SAFETENSORS else f"; then name {folder / 'converted'}"
            return f"holds {kind}: {_command(code, folder, match)}{then}"
    return third_party(folder)


def save_again(folder: Path) -> str:
    """The command that writes what transformers reads in `folder`, and nothing else, and what to name then."""
    return f"{_command(_SAVE_AGAIN % '', folder)}; then name {folder / 'converted'}"


def third_party(folder: Path) -> str | None:
    """What to do with a checkpoint that DeepSpeed or torch.distributed.checkpoint wrote; None where it is neither's."""
    sharded = next(
        (path.parent for path in (folder / ".metadata", *folder.glob("*/.metadata")) if path.is_file()), None
    )
    above = folder.parent if any(folder.glob("*_states.pt")) else folder
    if sharded is not None:
        kind = "torch.distributed.checkpoint"
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(sharded))} OUT.pt"
    elif any(above.glob("*/*_states.pt")):
        tag = "" if above == folder else f" -t {shlex.quote(folder.name)}"
        kind = "DeepSpeed"
        command = f"python {shlex.quote(f'{above}/zero_to_fp32.py')} {shlex.quote(str(above))} OUT{tag}"
    else:
        return None
    return (
        f"is a checkpoint of {kind}, not of wikift; convert it: {command}, then load the weights into a "
        "model and call save_pretrained, as docs/how-to/third-party-checkpoints.md shows"
    )


def _command(code: str, folder: Path, file: Path = Path()) -> str:
    """`python -c` with the paths filled in, quoted for the shell."""
    base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path", "gpt2"))
    paths = {"folder": folder, "file": file, "name": file.name, "out": folder / "converted", "base": base}
    return f"python -c {shlex.quote(code.format(**{key: json.dumps(str(path)) for key, path in paths.items()}))}"
