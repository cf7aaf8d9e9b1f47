"""Foreign pickles without foreign code: a class they name is replaced by a record that only keeps what it is given.

Needs nothing that wrote them. What such a file can do is make records, numbers, strings, containers and (by torch.load
with weights_only) tensors; a name outside of the expected libraries is refused before anything is made.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from wikift.base.errors import UserError


class Record:
    """Stands for an object of any class: `given`, what it was made with, and the attributes of its state."""

    given: tuple[Any, ...]

    def __new__(cls, *given: Any) -> Record:
        record = super().__new__(cls)
        record.given = given
        return record

    def __init__(self, *given: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.given = tuple(state) if isinstance(state, (tuple, list)) else (state,)


# How Python 3.11.0 to 3.11.3 pickle a member of an enumeration: getattr(class, name). The class is a Record here, and
# so is what comes of the call: nothing is looked up.
_GETATTR = "builtins.getattr"


def damaged(path: Path, error: Exception | str) -> UserError:
    """The one message for a file that cannot be read."""
    words = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: cannot be read ({words[:200]}); it is damaged, copy it anew or take an older checkpoint")


def check_names(path: Path, names: Sequence[str], allowed: tuple[str, ...]) -> None:
    """Raises UserError where a pickle names something outside of the modules that begin with one of `allowed`."""
    strange = sorted(name for name in names if not name.startswith(allowed) and name != _GETATTR)
    if strange:
        raise UserError(
            f"{path}: holds {', '.join(strange[:3])}, which is neither a tensor nor a plain value; wikift runs no code "
            "of a checkpoint: save it without that (DeepSpeed: client_state)"
        )


def load_torch(path: Path, allowed: tuple[str, ...]) -> Any:
    """What torch.save wrote, tensors mapped into memory and on the CPU, classes of the modules `allowed` as Records.

    Raises UserError where it is damaged or names anything else.
    """
    import torch
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        names = get_unsafe_globals_in_checkpoint(path)
        check_names(path, names, allowed)
        with safe_globals([(Record, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; the checkpoint is not whole") from None
    except Exception as error:  # a torn zip or pickle raises anything
        raise damaged(path, error) from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path, allowed: tuple[str, ...]) -> None:
        super().__init__(file)
        self.path, self.allowed = path, allowed

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in ("torch.Size", "collections.OrderedDict"):
            return tuple if name == "Size" else OrderedDict
        check_names(self.path, [full], self.allowed)
        return Record if not full.startswith("torch.") or full.count(".") > 1 else full  # torch.float32 as a word


def load_pickle(path: Path, allowed: tuple[str, ...]) -> Any:
    """A bare pickle, every class of the modules `allowed` as a Record, torch.Size as a tuple, torch.float32 as a str.

    Raises UserError where it is damaged or names anything else.
    """
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, path, allowed).load()
    except UserError:
        raise
    except Exception as error:
        raise damaged(path, error) from None
