"""Long work says where it is: by bars on a terminal, by whole lines in a log."""

import contextlib
import os
import struct
import subprocess
import sys

import pytest

CODE = """
from benchmarks import progress
for method in progress.each(["a", "b"], "methods", "method"):
    bar = progress.bar(1000, f"{method}: train", "step")
    for _ in range(1000):
        bar.update()
    bar.close()
    progress.note(f"{method}: epoch 1 of 1")
    progress.say(f"{method}: done")
"""


def test_a_log_has_a_line_for_each_step_of_work():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "methods: method 1 of 2",
        "a: epoch 1 of 1",
        "a: done",
        "methods: method 2 of 2",
        "b: epoch 1 of 1",
        "b: done",
    ]


def test_a_terminal_has_bars():
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # a bar fills the width it has
    done = subprocess.run([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal that nobody writes to any more
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert done.stdout.splitlines() == ["a: done", "b: done"]
    assert b"methods: " in shown and b"a: train: " in shown
