"""What torch puts around an optimizer's ``step``: hooks, and a record for profilers; what a hook does with closures."""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import _record_function_with_args_enter, _record_function_with_args_exit
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

P = ParamSpec("P")
R = TypeVar("R")


def profile_hook_step(func: Callable[P, R]) -> Callable[P, R]:
    """Stands in for torch's decorator of this name, whose record takes a dozen calls of Python functions: a third of a
    small step's time. Profilers see the same record. Where there are hooks, torch's own decorator calls them.
    """
    with_hooks = Optimizer.profile_hook_step(func)

    @wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        self: Any = args[0]
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch.compiler.is_compiling()
        ):
            return with_hooks(*args, **kwargs)
        record = _record_function_with_args_enter(f"Optimizer.step#{type(self).__name__}.step")
        try:
            result = func(*args, **kwargs)
            self._optimizer_step_code()  # by which profilers of Python find an optimizer
            if self._optimizer_step_post_hooks or torch_optimizer._global_optimizer_post_hooks:  # since the step began
                hooks = self._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks
                for hook in chain.from_iterable(of.values() for of in hooks):
                    hook(self, args, kwargs)
        finally:
            _record_function_with_args_exit(record)
        return result

    return wrapper


def once_gradients_are_there(
    args: tuple, kwargs: dict[str, Any], act: Callable[[], None]
) -> tuple[tuple, dict[str, Any]] | None:
    """For a step's pre-hook, of what it is given, which it returns: ``act`` now, or after each call of the closure."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # the optimizer itself comes first
    if not callable(closure):  # none, or an argument of another optimizer's own
        act()
        return None

    def evaluate() -> Any:
        with torch.enable_grad():
            loss = closure()
        act()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluate}
    return (args[0], evaluate, *args[2:]), kwargs
