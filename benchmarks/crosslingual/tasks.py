"""The tasks by name."""

from collections.abc import Callable
from pathlib import Path

from . import intents, multiemo, xglue
from .task import Task

# Read from PyPI packages; the others need XGLUE's folder
EMBEDDED: dict[str, Callable[[], Task]] = {"intents": intents.load, "multiemo": multiemo.load}
TASKS = (*EMBEDDED, *xglue.TASKS)


def load(name: str, xglue_folder: Path | None = None) -> Task:
    """The task ``name``.

    Raises:
        ValueError: on an unknown name, a missing folder, a download that fails, or data that cannot be read (naming
            file and line).
    """
    if name in EMBEDDED:
        try:
            return EMBEDDED[name]()
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    if name not in xglue.TASKS:
        raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    if xglue_folder is None:
        raise ValueError(f"task {name} needs the folder of XGLUE's data (xglue_full_dataset): --xglue FOLDER")
    return xglue.load(name, xglue_folder)
