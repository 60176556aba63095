"""Whether a training loop still runs. Nobody tells a callback that its loop was interrupted; Python's stack does."""

import sys
from types import FrameType

import torch


class TrainingLoop:
    """A frame of Python's stack that must be running, in any thread, where a backward pass begins; None always is.

    Backward has a thread for each GPU.
    """

    def __init__(self, frame: FrameType | None):
        self._frame = frame
        self._task: int | None = None  # the backward pass that last asked
        self._running = True

    def is_running(self) -> bool:
        """Looked up once in a backward pass."""
        task = torch._C._current_graph_task_id()
        if self._frame is not None and (task != self._task or task == -1):  # -1: in no backward pass
            self._running = _is_running(self._frame)
        self._task = task
        return self._running


def _is_running(frame: FrameType) -> bool:
    for top in sys._current_frames().values():
        at: FrameType | None = top
        while at is not None:
            if at is frame:
                return True
            at = at.f_back
    return False
