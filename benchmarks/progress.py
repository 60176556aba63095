"""Progress of long work: a bar on a terminal; in a log, one line for each step of work."""

import sys
from collections.abc import Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def each(items: list[T], label: str, unit: str) -> Iterator[T]:
    """The items, in a bar. A log gets a line as each begins."""
    if on_terminal():
        yield from tqdm(items, desc=label, unit=unit)
        return
    for i, item in enumerate(items, 1):
        note(f"{label}: {unit} {i} of {len(items)}")
        yield item


def bar(total: int, label: str, unit: str, initial: int = 0, leave: bool = False) -> tqdm:
    """A bar inside a step of work, which goes when it is closed unless it is to ``leave``. A log gets nothing of it."""
    off = not on_terminal()
    return tqdm(total=total, initial=initial, desc=label, unit=unit, leave=leave, disable=off, dynamic_ncols=True)


def note(line: str) -> None:
    """For a log alone: what a bar shows on a terminal."""
    if not on_terminal():
        say(line)


def say(*lines: str) -> None:
    """Prints above any bar."""
    for line in lines:
        tqdm.write(line)
    sys.stdout.flush()


def on_terminal() -> bool:
    return sys.stderr.isatty()
