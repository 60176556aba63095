"""What long runs say: bars on a terminal, elsewhere one line for each step of work that is done."""

import sys

from tqdm import tqdm


def bar(**options) -> tqdm:
    """A tqdm bar on standard error, which is silent where that is no terminal."""
    return tqdm(**options, disable=None, dynamic_ncols=True)


def on_terminal() -> bool:
    return sys.stderr.isatty()


def say(line: str) -> None:
    """A line above the bars, if there are any, and at once, if a file or a pipe reads it."""
    tqdm.write(line)
    sys.stdout.flush()
