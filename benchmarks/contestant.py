"""What a contestant declares."""

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from benchmarks.gate import Claim, MaskClaim, NoClaim
from benchmarks.tensors import Tensors

LR, P = 1e-2, 0.1  # a large step, so that the gate sees a missing one; time does not depend on it


def one_pass(tensors: Tensors) -> float:
    return tensors.bytes_per_element


@dataclass(frozen=True)
class Contestant:
    """Something that is timed beside others.

    build: makes the step (a callable without arguments) from the shared tensors.
    claim: what one step computes; the gate checks it.
    spoils_gradients: masks gradients in place; they are put back after each call, untimed.
    own_moments: keeps moments in the parameters' dtype where the others keep float32.
    devices: where it runs. module, install: what must be imported, and how one gets it.
    traffic: bytes per element that a step must move at least, where that is known.
    """

    name: str
    build: Callable[[Tensors], Callable[[], object]]
    claim: Claim | MaskClaim | NoClaim = field(default_factory=Claim)
    spoils_gradients: bool = False
    own_moments: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    module: str | None = None
    install: str = ""
    traffic: Callable[[Tensors], float] | None = None

    def missing(self) -> str | None:
        """Why it cannot take part and how to get it, or None."""
        reason = self.module and _not_importable(self.module)
        return f"{reason}: {self.install}" if reason else None


@cache
def _not_importable(module: str) -> str | None:
    # some peers compile on import and look for ninja, which pip puts beside python
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == module.partition(".")[0] else f"needs {error.name}"
    except Exception as error:  # whatever a broken installation raises is its reason, and others are timed still
        return f"does not import ({describe(error)})"
    return None


def describe(error: Exception) -> str:
    """Type and first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
