"""Small checks of single values. Every error names the argument, its value and what would be right."""

import math
import numbers
import reprlib
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from torch import Tensor

from . import mask_stream


def is_int(value: Any) -> bool:
    """Python's own or numpy's."""
    return isinstance(value, int | numbers.Integral) and not isinstance(value, bool)  # int first, which is quick


def is_number(value: Any) -> bool:
    """Python's own or numpy's."""
    return isinstance(value, float | int | numbers.Real) and not isinstance(value, bool)


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raises TypeError or ValueError if ``value`` is no integer in [low, high]."""
    right = is_int(value)
    if right and low <= value and (high is None or value <= high):
        return
    wanted = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    raise (ValueError if right else TypeError)(f"{name} must be {wanted}, got {shown(value)}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {shown(value)}")


def check_p(name: str, p: Any) -> None:
    """A drop probability in [0, 1) that does not round to 1."""
    if not is_number(p):
        raise TypeError(f"{name} must be a number in [0, 1), got {shown(p)}")
    if is_int(p) and p:
        raise ValueError(f"{name} must be a number in [0, 1), got {shown(p)}")
    try:
        mask_stream.bernoulli_window(float(p))
    except ValueError as error:
        raise ValueError(str(error).replace("p must", f"{name} must", 1)) from None


def check_nonnegative(name: str, value: Any) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {shown(value)}")


def shown(value: Any) -> str:
    """``repr`` that stays short: an integer of a million digits takes seconds to print, and what strangers put into a
    checkpoint may be of any size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        return shown(value) if value.bit_length() > 200 else repr(value)

    def repr_Tensor(self, value: Tensor, level: int) -> str:
        return shown(value)


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 20


def make_plain(policy: Any, *names: str) -> None:
    """Turn numpy's numbers among the named fields of a frozen dataclass into Python's: they are computed with as such,
    and a checkpoint must give the same ones."""
    for name in names:
        object.__setattr__(policy, name, plain(name, getattr(policy, name)))


def saved_fields(thing: Any) -> list[Field]:
    """The fields that make a policy or a schedule.

    Raises TypeError if it is no frozen dataclass: a checkpoint could not hold it, or not what steps had gone by.
    """
    parameters = getattr(type(thing), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise TypeError(f"{type(thing).__name__} must be a frozen dataclass, so that a checkpoint can hold it")
    return [f for f in fields(thing) if f.init]


def plain(name: str, value: Any) -> Any:
    """``value`` as what torch.load(weights_only=True) reads: numpy's numbers and strings, and enums of these, become
    Python's.

    Raises TypeError on anything that would have to be pickled.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple):
        items = [plain(name, item) for item in value]
        return tuple(items) if type(value) is tuple else items
    if isinstance(value, Mapping):
        return {plain(name, key): plain(name, item) for key, item in value.items()}
    raise TypeError(
        f"{name} must be made of numbers, strings and None, so that a checkpoint can hold it, got {value!r}"
    )
