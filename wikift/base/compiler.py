"""What torch.compile needs of this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from wikift.base.errors import UserError


def missing_for_compiling(device_type: str) -> str | None:
    """What torch.compile lacks here: it calls g++ for a CPU, and triton a C compiler with Python's headers."""
    on_cpu = device_type == "cpu"
    names = [os.environ.get("CXX", "g++")] if on_cpu else [os.environ.get("CC", "gcc"), "clang"]
    if not any(map(shutil.which, names)):
        return f"a compiler, {' or '.join(names)} is not found (Debian: apt install g++)"
    if not on_cpu and importlib.util.find_spec("triton") is None:
        return "triton, which comes with torch's builds for CUDA on Linux"
    if not on_cpu and not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers (Debian: apt install python3-dev)"
    return None


def check_compiler(device_type: str) -> None:
    """Raises UserError where torch.compile would end in a traceback."""
    if missing := missing_for_compiling(device_type):
        raise UserError(f"--compile: needs {missing}; install it or omit --compile")
