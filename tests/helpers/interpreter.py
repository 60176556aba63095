"""Whether Triton's interpreter works with the installed numpy."""

import warnings

import numpy as np


def broken() -> str | None:
    """Why the interpreter cannot run here, or None.

    Up to 3.6 it takes a loop's bounds from arrays of one element by int(), which numpy 2.5 refuses.
    """
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the numpy before it
            int(np.ones(1))
    except TypeError:
        return f"the interpreter of triton {triton.__version__} does not run with numpy {np.__version__}"
    return None
