"""A GPU's host side without a GPU: tensors on the meta device, launches that compile for one and stop there.

What a meta tensor cannot give (its values, its address) a step must not ask for while a CUDA graph is captured, so a
step that runs here under :func:`no_host` neither synchronises nor copies from the host.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graddrop_fused import dispatch, triton_backend

DEVICE = torch.device("meta")
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, *_INDEXED}


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.pinned_copies = []  # that nothing waits for: a graph repeats them, as long as their memory stays

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device for t in tensors} | ({kwargs["device"]} if tensors and kwargs.get("device") else set())
        if func is torch.ops.aten.copy_.default and args[2:] == (True,) and hasattr(args[1], "pinned"):
            self.pinned_copies.append(args[0])
        elif DEVICE in devices:
            assert func not in _READS, f"{func} waits for the device"
            # a 0-dimensional host tensor is a number to most operations, but not to copies
            assert len(devices) == 1 or (func not in _COPIES and all(t.dim() == 0 or t.is_meta for t in tensors)), (
                f"{func} copies between host and device"
            )
            bool_index = func in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])
            assert not bool_index, "the number of elements that a bool tensor selects is only known to the device"
        return func(*args, **kwargs)


class _Calls(TorchFunctionMode):
    """For what reaches no operation on meta tensors: lists copied to the device by indexing, or by torch.tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not (args[0].is_meta and any(isinstance(i, list) for i in index)), f"{index} is copied to the device"
        if func in (torch.tensor, torch.as_tensor):
            assert torch.device(kwargs.get("device") or "cpu") != DEVICE, "a device tensor made from host values"
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_host():
    """Fails on what a CUDA graph capture forbids or what replays cannot repeat. Yields the list of tensors that were
    copied from pinned memory without waiting."""
    with _Operations() as operations, _Calls():
        yield operations.pinned_copies


def _pin_memory(tensor):
    tensor.pinned = True
    return tensor


@contextlib.contextmanager
def gpu(monkeypatch, compiles: bool):
    """Triton's backend serves DEVICE. Yields a namespace: ``capturing`` (to be set) and ``launches``, a list of
    (kernel's name, grid, what Triton compiled for sm_90 or None)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from graddrop_fused.kernels.triton import kernels

    state = SimpleNamespace(capturing=False, launches=[])

    def launcher(name, kernel):
        class Launcher:
            def __getitem__(self, grid):
                def launch(**arguments):
                    compiled = kernel.warmup(grid=grid, **arguments) if compiles else None
                    state.launches.append((name, grid, compiled))

                return launch

        return Launcher()

    for name in ("update_kernel", "pack_kernel"):
        monkeypatch.setattr(kernels, name, launcher(name, getattr(kernels, name)))
    monkeypatch.setattr(triton_backend, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=32))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", _pin_memory)
    stub = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    before = driver._active
    driver.set_active(stub)
    try:
        yield state
    finally:
        driver._active = before
        dispatch.choose.cache_clear()
