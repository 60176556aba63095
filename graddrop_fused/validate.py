"""What users may pass. Every error names the argument, its value and what would be right, before anything changes."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .checks import check_bool, check_choice, check_nonnegative, shown
from .fakes import is_fake
from .groups import (
    Layers,
    Member,
    effect_of,
    is_layerwise,
    members,
    policy_of,
    rounds_stochastically,
    shown_policies,
    static_mask,
)
from .names import canonical_name, numbered_block
from .policies import Policy, StaticMask, check_policy
from .rules import Rule
from .shards import local, place_problem

ROUNDINGS = ("nearest", "stochastic")
PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be None, torch.float32 or torch.bfloat16, got {dtype!r}")


def group_options(options: Mapping[str, Any], rule_class: type[Rule]) -> None:
    """Hyperparameters of one group (or the defaults of all)."""
    group_numbers(options, rule_class)
    for name in ("maximize", "capturable", "differentiable"):
        check_bool(name, options.get(name, False))
    if options.get("differentiable"):
        raise ValueError("differentiable must be False: the fused step updates in place, outside autograd; got True")
    if options.get("foreach") is True and options.get("fused") is True:
        raise ValueError("foreach and fused must not both be True (the step is always fused), got True and True")
    policy(options["drop"], options["effect"])
    check_choice("rounding", options.get("rounding", ROUNDINGS[0]), ROUNDINGS)
    layer(options.get("layer"))


def group_numbers(options: Mapping[str, Any], rule: type[Rule] | Rule) -> None:
    """The learning rate and the rule's own numbers."""
    _check_lr(options.get("lr", 0.0))
    rule.check(options)


def layer(name: Any) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"layer must be a layer's name (str) or None, got {shown(name)}")


def _check_lr(lr: Any) -> None:
    if not isinstance(lr, Tensor):
        return check_nonnegative("lr", lr)
    if lr.layout is not torch.strided or lr.dtype.is_complex or lr.dtype == torch.bool:
        raise ValueError(f"lr must be a float or a dense tensor of one real number, got {shown(lr)}")
    if lr.numel() != 1:
        raise ValueError(f"lr must be a float or a tensor of one element, got one of shape {tuple(lr.shape)}")
    if not lr.is_cuda and not lr.is_meta and not bool(((lr >= 0) & (lr < math.inf)).all()):
        raise ValueError(f"lr must be finite and at least 0, got {lr!r:.200}")


def policy(drop: Any, effect: Any) -> None:
    of_group = {"drop": drop, "effect": effect}
    if policy_of(of_group) is None:
        effect_of(of_group)
        return
    check_policy(drop)
    drop.check_effect(effect_of(of_group).name.lower())
    drop.to_state()  # what cannot be saved would fail at the first checkpoint, after the training


def new_group(
    group: Any, defaults: Mapping[str, Any], others: Sequence[Mapping[str, Any]], rule_class: type[Rule]
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
    named = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
    for entry in named:
        if len(entry) != 2 or not isinstance(entry[0], str | None):
            raise TypeError(f"params must hold tensors or (name, tensor) pairs, got {shown(entry)}")
    for index, (name, value) in enumerate(named):
        param("a parameter" if name is None else f"parameter {name!r}", value, index)
    listed_once(named, others)
    whole = {**defaults, **group, "params": [value for _, value in named]}
    group_options(whole, rule_class)
    if all(name is not None for name, _ in named) and named:
        whole["param_names"] = [name for name, _ in named]
    consistent = [g for g in others if ("param_names" in g) == ("param_names" in whole)]
    if len(consistent) == len(others):  # torch refuses a mixture of named and unnamed in its own words
        groups([*others, whole])
    unnamed = [value if name is None else (name, value) for name, value in named]  # whose name is None, too
    return {**group, "params": unnamed}


def listed_once(named: Sequence[tuple[Any, Tensor]], others: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if a group of (name, parameter) has one of them twice, or one of another group."""
    seen: set[int] = set()
    for index, (_, value) in enumerate(named):
        if id(value) in seen:
            raise ValueError(
                f"params must not list a parameter twice (a fused pass would update it twice at once): number {index} "
                f"of the group, of shape {tuple(value.shape)}, stood before"
            )
        seen.add(id(value))
    held = {id(p) for other in others for p in other["params"]}
    for index, (name, value) in enumerate(named):
        if id(value) in held:
            called = index if name is None else name
            raise ValueError(f"params must not list a parameter of another group again, got {called!r} a second time")


def groups(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """What only groups show: colliding ids, shards of unknown place, masks of other shapes, mixed capturable, and
    stochastic rounding of what is not bfloat16."""
    every = members(param_groups)
    Layers.of(param_groups)
    for member in every:
        if rounds_stochastically(param_groups[member.group]) and member.param.dtype != torch.bfloat16:
            raise ValueError(
                f"rounding must be 'nearest' for parameter {member.called}, got 'stochastic': that rounds bfloat16 "
                f"parameters and their bfloat16 state, and this one is {member.param.dtype}; give such parameters a "
                "group with rounding='nearest'"
            )
        if is_lazy(member.param):  # its first forward pass gives it a shape
            continue
        member.shard()
        static_mask(param_groups[member.group], member)
    if len({group.get("capturable", False) for group in param_groups}) > 1:
        raise ValueError("capturable must be the same in all groups, got both True and False")


def all_groups(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """What only all groups together show: the above, names that StaticMask has for nothing, and a layer policy over a
    single layer, which would drop everything at once or never anything."""
    groups(param_groups)
    names = {member.name for member in members(param_groups)}
    layers = Layers.of(param_groups).count
    for group in param_groups:
        drop = policy_of(group)
        if isinstance(drop, StaticMask) and isinstance(drop.masks, Mapping):
            unknown = [key for key in drop.masks if canonical_name(key) not in names]
            if unknown:
                raise ValueError(f"StaticMask names {unknown[0]!r}, which is no parameter of this optimizer")
        if drop is not None and drop.layerwise and layers < 2:
            raise ValueError(
                f"{drop!r} needs a model of at least two layers, and these groups have {layers}: give the optimizer "
                "graddrop_fused.param_groups(model, drop=...), or groups with group['layer'] of your own"
            )


def policy_is_used(drop: Policy | None, param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError if the constructor got a policy that every group's own entry overrules."""
    if drop is not None and all(policy_of(group) != drop for group in param_groups):
        raise ValueError(
            f"drop must be of use, and drop={drop!r} would be used by no group: their own entries say "
            f"drop={shown_policies(param_groups)}. Give it to the groups, as in param_groups(model, drop={drop!r}), or "
            "leave their own out"
        )


def warn_of_groups_as_layers(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """A policy of layers takes a group without a layer's name for one layer, which groups made for weight decay are
    not."""
    for number, group in enumerate(param_groups):
        if is_layerwise(group) and group.get("layer") is None:
            blocks = {block for name in group.get("param_names", ()) if (block := numbered_block(name)) is not None}
            if len(blocks) > 1:
                warnings.warn(
                    f"{policy_of(group)!r} drops group {number} as one layer, and it holds parameters of {len(blocks)} "
                    f"blocks ({', '.join(sorted(blocks)[:3])}, ...). If that is not what you want, give the optimizer "
                    "graddrop_fused.param_groups(model, drop=...), or groups with group['layer'] of your own",
                    UserWarning,
                    stacklevel=4,  # where the optimizer is made
                )


def param(called: str, value: Any, index: int | None = None) -> None:
    """A parameter that kernels, or at least the reference, can update in place."""
    if not isinstance(value, Tensor):
        raise TypeError(f"params must hold tensors or (name, tensor) pairs, got {type(value)} for {called}")
    called = called if called.startswith(("a ", "param")) else f"parameter {called}"
    if value.layout is not torch.strided:
        raise ValueError(f"{called} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in PARAM_DTYPES:
        raise ValueError(f"{called} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if is_lazy(value):
        return
    if value.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{called} must not be an inference tensor, which only torch.inference_mode() may update: clone it"
        )
    part = local(value)
    if expanded(part) or overlaps_itself(part):
        raise ValueError(
            f"{called} must not be expanded or overlap itself (elements would share memory), got shape "
            f"{tuple(part.shape)} with strides {part.stride()}"
        )
    whole_memory(called, value)


def whole_memory(called: str, value: Tensor) -> None:
    """Raises ValueError if the storage of an ordinary tensor, or of a DTensor's local one, ends before its elements."""
    part = local(value)
    if type(part) in ORDINARY and part.device.type in ("cpu", "cuda") and part.numel():
        needed = _extent(part)
        held = part.untyped_storage().nbytes() // part.element_size() - part.storage_offset()
        if needed > held:
            raise ValueError(
                f"{called} must have memory for its shape {tuple(part.shape)}, which takes {needed} elements, but its "
                f"storage has {held}"
            )


ORDINARY = (Tensor, torch.nn.Parameter)  # classes whose elements lie at their address


def gradient(member: Member, grad: Tensor | None) -> None:
    """A gradient that the coming step would read."""
    if grad is None:
        return
    param = member.param
    if grad.layout is not torch.strided:
        _refuse(
            member,
            f"must be dense, got layout {grad.layout}: masks are not for sparse gradients. Use torch.optim.SparseAdam "
            "without them, or give the parameter a group with drop=None to attach()",
        )
    if grad.dtype is not param.dtype and grad.dtype not in PARAM_DTYPES:
        _refuse(member, f"must be a floating-point tensor, got {grad.dtype}")
    if grad.dtype is not param.dtype and torch.float64 in (grad.dtype, param.dtype):
        _refuse(member, f"must be {param.dtype} like its parameter (float64 mixes with nothing), got {grad.dtype}")
    if grad.shape != param.shape:
        _refuse(member, f"must have its parameter's shape {tuple(param.shape)}, got {tuple(grad.shape)}")
    if grad.device != param.device:
        _refuse(member, f"must be on its parameter's device {param.device}, got {grad.device}")
    problem = place_problem(param, grad)
    if problem is not None:
        _refuse(member, problem)
    if type(grad) not in ORDINARY and type(param) in ORDINARY and not has_memory(grad):
        _refuse(member, f"must be an ordinary tensor like its parameter, got a {type(grad).__name__} without memory")


def _refuse(member: Member, problem: str) -> None:
    raise ValueError(f"the gradient of parameter {member.called} {problem}")


def has_memory(tensor: Tensor) -> bool:
    """Do its elements lie at its address? Not those of wrapper subclasses, and of zeros that autograd never made."""
    if is_fake(tensor):
        return False
    try:
        return tensor.numel() == 0 or tensor.is_meta or tensor.data_ptr() != 0
    except RuntimeError:
        return False


def no_shared_memory(every: Sequence[Member]) -> None:
    """Raises ValueError if two parameters have elements in common: a fused pass would update them twice at once."""
    spans = []
    for member in every:
        part = local(member.param)
        if type(member.param) in ORDINARY and part.numel() and part.device.type in ("cpu", "cuda"):
            start = part.data_ptr()
            spans.append((start, start + _extent(part) * part.element_size(), member))
    spans.sort(key=lambda span: span[:2])
    interleaved: list[list[Member]] = []  # those between whose first and last elements others' lie
    reached = 0
    for start, stop, member in spans:
        if start < reached:
            interleaved[-1].append(member)
        else:
            interleaved.append([member])
        reached = max(reached, stop)
    for cluster in interleaved:
        if len(cluster) > 1:
            _no_common_elements(cluster)


def _no_common_elements(cluster: Sequence[Member]) -> None:
    parts = [local(member.param) for member in cluster]
    base, size, dtype = parts[0].data_ptr(), parts[0].element_size(), parts[0].dtype
    places = [divmod(part.data_ptr() - base, size) for part in parts]
    extent = max(offset + _extent(part) for part, (offset, _) in zip(parts, places, strict=True))
    owner = torch.zeros(extent, dtype=torch.int32, device="cpu")  # of each element: 1 + its place in the cluster
    for i, (part, (offset, rest)) in enumerate(zip(parts, places, strict=True)):
        elements = owner.as_strided(part.shape, part.stride(), offset)
        taken = i if part.dtype != dtype or rest else int(elements.max())
        if taken:
            raise ValueError(
                f"parameters {cluster[taken - 1].called} and {cluster[i].called} must not share memory (a fused pass "
                "would update their common elements twice at once)"
            )
        elements.fill_(i + 1)


def _extent(tensor: Tensor) -> int:
    """Elements from the first one to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, as torch.Tensor.expand makes them."""
    return tensor.numel() > 1 and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements may share memory, as torch.as_strided can make them: a stride that the smaller ones reach."""
    reached = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if tensor.numel() > 1 and size > 1:
            if stride <= reached:
                return True
            reached += stride * (size - 1)
    return False
