"""Hypothesis profiles, the reasons for which `gpu` and `nightly` tests skip, parts of a run, and a fixture."""

import os
import signal

import hypothesis
import pytest
import torch

from graddrop_fused import triton_backend

hypothesis.settings.register_profile("ordinary", derandomize=True, max_examples=25, deadline=None, database=None)
hypothesis.settings.load_profile("ordinary")
if "GRADDROP_FUZZ" in os.environ:  # GRADDROP_FUZZ=10000 pytest ...: that many random examples of every fuzzed test
    hypothesis.settings.register_profile(
        "fuzz", max_examples=int(os.environ["GRADDROP_FUZZ"]), deadline=None, print_blob=True
    )
    hypothesis.settings.load_profile("fuzz")


@pytest.fixture
def ctrl_c_is_heard():
    """Here and in new processes: a shell starts what it puts into the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items):
    if part := os.environ.get("GRADDROP_PART"):  # "2/6": of all tests, each sixth from the third on
        first, parts = map(int, part.split("/"))
        items[:] = items[first::parts]
    items.sort(key=lambda item: "slow" not in item.keywords)  # first, lest one process ends long after the other
    if "GRADDROP_ALL" not in os.environ:
        skip = pytest.mark.skip(reason="runs by make test-all")
        for item in items:
            if "nightly" in item.keywords:
                item.add_marker(skip)
    reason = "needs a CUDA or ROCm device, and torch sees none"
    if torch.cuda.is_available():
        reason = triton_backend.unavailable(torch.device("cuda"))
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
