"""What users may pass. Every error names the argument, its value and what would be right, before anything changes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import Effect
from .names import canonical_name
from .plan import Layers, Member, members, policy_of, static_mask
from .policies import GradDrop, Policy, StaticMask
from .shards import gradient_problem, local

EFFECTS = tuple(effect.name.lower() for effect in Effect)
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be None, torch.float32 or torch.bfloat16, got {dtype!r}")


def group_options(options: Mapping[str, Any]) -> None:
    """Hyperparameters of one group (or the defaults of all)."""
    _check_nonnegative("lr", options["lr"])
    if isinstance(options["lr"], Tensor) and options["lr"].numel() != 1:
        raise ValueError(
            f"lr must be a float or a tensor of one element, got one of shape {tuple(options['lr'].shape)}"
        )
    _check_nonnegative("eps", options["eps"])
    _check_nonnegative("weight_decay", options["weight_decay"])
    betas = options["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    for index, beta in enumerate(betas):
        if not isinstance(beta, int | float) or not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{index}] must be a number in [0, 1), got {beta!r}")
    for name in ("amsgrad", "maximize", "capturable", "differentiable"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be True or False, got {options[name]!r}")
    if options["differentiable"]:
        raise ValueError("differentiable must be False: the fused step updates in place, outside autograd; got True")
    if options["foreach"] and options["fused"]:
        raise ValueError("foreach and fused must not both be True (the step is always fused), got True and True")
    policy(options["drop"], options["effect"])
    layer = options.get("layer")
    if layer is not None and not isinstance(layer, str):
        raise TypeError(f"layer must be a layer's name (str) or None, got {layer!r}")


def policy(drop: Any, effect: str) -> None:
    if effect not in EFFECTS:
        raise ValueError(f"effect must be one of {', '.join(map(repr, EFFECTS))}, got {effect!r}")
    if drop is not None and not isinstance(drop, Policy):
        raise TypeError(f"drop must be None or a policy such as GradDrop(p=0.1), got {drop!r}")
    if isinstance(drop, GradDrop) and drop.distribution == "gaussian" and effect != "gradient":
        raise ValueError(f"effect must be 'gradient' with distribution='gaussian', got {effect!r}")


def new_group(
    group: Mapping[str, Any], defaults: Mapping[str, Any], others: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Check a group that add_param_group is about to take; returns it with its params as a list."""
    if not isinstance(group, Mapping) or "params" not in group:
        raise TypeError(f"param_group must be a dict with 'params', got {group!r}")
    params = group["params"]
    if isinstance(params, Tensor):
        params = [params]
    elif isinstance(params, set):
        raise TypeError("params must be an ordered collection, got a set, whose order changes between runs")
    params = list(params)
    for entry in params:
        name, param = entry if isinstance(entry, tuple) else (None, entry)
        _check_param(name, param)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
    if len({id(p) for p in tensors}) != len(tensors):
        repeated = next(i for i, p in enumerate(tensors) if any(p is q for q in tensors[:i]))
        raise ValueError(
            f"params must not list a parameter twice (a fused pass would update it twice at once): number {repeated} "
            f"of the group, of shape {tuple(tensors[repeated].shape)}, stood before"
        )
    held = {id(p) for other in others for p in other["params"]}
    for index, (entry, param) in enumerate(zip(params, tensors, strict=True)):
        if id(param) in held:
            name = entry[0] if isinstance(entry, tuple) else index
            raise ValueError(f"params must not list a parameter of another group again, got {name!r} a second time")
    group_options({**defaults, **group})
    return {**group, "params": params}


def groups(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """What only groups show: colliding ids, shards of unknown place, StaticMasks that fit nothing, mixed capturable."""
    every = members(param_groups)
    Layers.of(param_groups)
    for member in every:
        member.shard()
        static_mask(param_groups[member.group], member)
    names = {member.name for member in every}
    for group in param_groups:
        drop = policy_of(group)
        if isinstance(drop, StaticMask) and isinstance(drop.masks, Mapping):
            unknown = [key for key in drop.masks if canonical_name(key) not in names]
            if unknown:
                raise ValueError(f"StaticMask names {unknown[0]!r}, which is no parameter of this optimizer")
    if len({group.get("capturable", False) for group in param_groups}) > 1:
        raise ValueError("capturable must be the same in all groups, got both True and False")


def gradient(member: Member, grad: Tensor | None) -> None:
    """A gradient that the coming step would read."""
    if grad is None:
        return
    param = member.param
    if grad.layout is not torch.strided:
        _refuse(member, f"must be dense, got layout {grad.layout}; use torch.optim.SparseAdam for sparse gradients")
    if grad.dtype is not param.dtype and grad.dtype not in PARAM_DTYPES:
        _refuse(member, f"must be a floating-point tensor, got {grad.dtype}")
    if grad.dtype is not param.dtype and torch.float64 in (grad.dtype, param.dtype):
        _refuse(member, f"must be {param.dtype} like its parameter (float64 mixes with nothing), got {grad.dtype}")
    if grad.shape != param.shape:
        _refuse(member, f"must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}")
    if grad.device != param.device:
        _refuse(member, f"must be on its parameter's device {param.device}, got {grad.device}")
    problem = gradient_problem(param, grad)
    if problem is not None:
        _refuse(member, problem)


def _refuse(member: Member, problem: str) -> None:
    raise ValueError(f"the gradient of parameter {member.called} {problem}")


def _check_param(name: str | None, param: Any) -> None:
    called = "a parameter" if name is None else f"parameter {name!r}"
    if not isinstance(param, Tensor):
        raise TypeError(f"params must hold tensors or (name, tensor) pairs, got {type(param)} for {called}")
    if param.layout is not torch.strided:
        raise ValueError(f"{called} must be a dense tensor, got layout {param.layout}")
    if param.dtype not in PARAM_DTYPES:
        raise ValueError(f"{called} must be float32, bfloat16, float16 or float64, got {param.dtype}")
    if expanded(local(param)):
        strides = local(param).stride()
        raise ValueError(f"{called} must not be expanded (elements would share memory), got strides {strides}")


def expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, as torch.Tensor.expand makes them."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _check_nonnegative(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if not value.is_cuda and not bool((value >= 0).all()):
            raise ValueError(f"{name} must be at least 0, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    elif not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
