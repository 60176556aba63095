"""What happens around the calls of a model's modules: something before and after the outermost, and who ran within."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.utils.checkpoint import CheckpointFunction


class ModuleCalls:
    """Calls ``before`` and ``after`` around every outermost call of any module of ``model``, and notes who ran.

    A call is outermost if no other module of the model is running: of the model itself, of the parts that a
    LightningModule calls one by one, of the blocks that activation checkpointing calls again during backward.
    ``after`` is called however the call ends, KeyboardInterrupt included.

    Attributes:
        ran: the modules that were called within the outermost calls for which ``before`` returned True. A compiled
            module that ran counts with all modules in it, whose calls nobody sees. Whoever reads it clears it.

    Args:
        model: any module. Pickles and deep copies of it know nothing of this.
        before: is given the outermost module; whether the call is of interest.
        before_compiled: is called before a module that is compiled runs in a call of interest.
        in_reentrant_checkpoint: is called before a module that torch.utils.checkpoint runs in a call of interest with
            use_reentrant=True.
    """

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[nn.Module], bool],
        after: Callable[[], None],
        before_compiled: Callable[[], None],
        in_reentrant_checkpoint: Callable[[], None],
    ):
        self.ran: set[nn.Module] = set()
        # A compiler that traced what we do would fix today's decision in its graph. It is to pass over us, not over the
        # modules that we call.
        torch.compiler.disable(_Call.__call__, recursive=False)
        self.before_compiled, self._before_compiled = torch.compiler.disable(self._compiled), before_compiled
        self.before, self.after = map(torch.compiler.disable, (before, after))
        self.without_grad = torch.compiler.disable(self._without_grad)
        self._in_reentrant_checkpoint = in_reentrant_checkpoint
        self.running = self.noting = self.removed = False
        # A compiled model's wrapper calls the model
        self._calls = [_Call(self, module) for module in model.modules() if "_orig_mod" not in module._modules]

    def remove(self) -> None:
        """Leave the model as it was. Calling it again does nothing."""
        self.removed = True
        for call in self._calls:
            call.remove()

    def renew(self) -> None:
        """Stand again before what `module.compile()` has put in our place meanwhile."""
        for call in self._calls:
            if not call.stands():
                call.install()

    def _without_grad(self) -> None:
        if in_reentrant_checkpoint():
            self._in_reentrant_checkpoint()

    def _compiled(self, module: nn.Module) -> None:
        self.ran.update(module.modules())
        self._before_compiled()


_IMPL = "_compiled_call_impl"
_REENTRANT = CheckpointFunction.forward.__code__


def in_reentrant_checkpoint() -> bool:
    """Does torch.utils.checkpoint run what runs now, with use_reentrant=True and for the first time?"""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _REENTRANT:
        frame = frame.f_back
    return frame is not None


class StandIn:
    """Stands in for the call of one module. A subclass gives ``__call__``, which goes on to ``inner``.

    torch looks for ``_compiled_call_impl`` before it runs a module, hooks included; it was made for `module.compile()`
    and never leaves with a pickle or a copy. Hooks would be left out when KeyboardInterrupt ends a call.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.install()

    def install(self) -> None:
        self.compiled = self.module._compiled_call_impl
        self.inner = self.compiled or self.module._call_impl
        # not by setattr, which Fabric's wrapper hands on to the module that it wraps
        self.module.__dict__[_IMPL] = self

    @property
    def is_compiled(self) -> bool:
        """Does a compiler stand behind us, and not only others like us?"""
        inner = self.compiled
        while isinstance(inner, StandIn):
            inner = inner.compiled
        return inner is not None

    def stands(self) -> bool:
        outer = self.module._compiled_call_impl
        while isinstance(outer, StandIn) and outer is not self:
            outer = outer.compiled
        return outer is self

    def remove(self) -> None:
        if self.module._compiled_call_impl is not self:
            return  # another stands before us, and we let everything through
        del self.module.__dict__[_IMPL]
        if self.compiled is not None:
            self.module.__dict__[_IMPL] = self.compiled


class _Call(StandIn):
    def __init__(self, calls: ModuleCalls, module: nn.Module):
        self.calls = calls
        super().__init__(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls = self.calls
        if calls.removed:
            return self.inner(*args, **kwargs)
        outermost = not calls.running
        try:
            if outermost:
                calls.running = True
                calls.noting = calls.before(self.module)
            if calls.noting and not torch.is_grad_enabled():
                calls.without_grad()
            if calls.noting and (self.is_compiled or get_eval_frame_callback()):
                calls.before_compiled(self.module)
            elif calls.noting:
                calls.ran.add(self.module)
            return self.inner(*args, **kwargs)
        finally:
            if outermost:
                calls.running = calls.noting = False
                calls.after()
