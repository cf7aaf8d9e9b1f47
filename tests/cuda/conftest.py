import shutil

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def guard() -> None:
    """tests/cuda/guard.cpp compiled, before the first process wants it."""
    if torch.version.cuda:
        pytest.skip("pretends CUDA in a CPU build of torch, and this one is for CUDA")
    if shutil.which("g++") is None:
        pytest.skip("needs g++ once, to compile tests/cuda/guard.cpp")
    from tests.cuda.stand_ins import built_guard

    built_guard()
