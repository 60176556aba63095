"""The suite's own options, and what the JSON holds beside pytest-benchmark's statistics."""

import importlib.metadata
import os
import traceback

import pytest
import torch

from benchmarks import cases, harness, ours, results, run
from benchmarks.contestant import describe
from graddrop_fused import cpu

PACKAGES = ("graddrop_fused", "torch", "triton", "transformers", "pytest-benchmark")
PEER_PACKAGES = ("dropgrad", "magma-optimizer", "pytorch-optimizer", "deepspeed")
GPU_PACKAGES = ("apex", "flashoptim", "torchao", "bitsandbytes")
RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("graddrop_fused")
    group.addoption("--size", choices=cases.SIZES, default="quick", help="how much time to take; default: %(default)s")
    group.addoption("--device", choices=ours.BACKENDS, default="cpu", help="default: %(default)s")
    group.addoption("--turns", type=int, help="turns of every case; default: as many as its time allows")


def pytest_configure(config):
    config.stash[RESULTS] = {}


def pytest_sessionstart(session):
    if reason := ours.unavailable(session.config.option.device):
        pytest.exit(f"nothing to time: {reason}", 1)


@pytest.fixture(scope="session")
def result_of(request):
    """A function: case -> its Result. All contestants of a case are timed together, when the first is asked for."""
    known, options = request.config.stash[RESULTS], request.config.option

    def result(case: cases.Case) -> run.Result:
        if case.name not in known:
            try:
                found = run.run(case, cases.SIZES[options.size], options.device, options.turns)
            except Exception as error:  # as where a GPU's memory does not suffice: once for all, and in the report
                traceback.print_exc()
                found = run.Result(red={c.name: f"does not run ({describe(error)})" for c in case.contestants})
            known[case.name] = case, found
        return known[case.name][1]

    return result


def pytest_benchmark_update_machine_info(config, machine_info):
    names = PACKAGES + PEER_PACKAGES + (GPU_PACKAGES if config.option.device == "cuda" else ())
    machine_info["summary"] = harness.machine()
    machine_info["op"] = cpu.levels()[-1] if cpu.levels() else cpu.unavailable(torch.device("cpu"))
    machine_info["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine_info["packages"] = {name: _version(name) for name in names}
    if config.option.device == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_benchmark_update_json(config, output_json):
    output_json["suite"] = {
        "size": config.option.size,
        "device": config.option.device,
        "cases": [results.facts(case, result) for case, result in config.stash[RESULTS].values()],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
