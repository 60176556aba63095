"""The layers of a transformers model, and parameter groups that follow them."""

import bisect
import itertools
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from .checks import check_bool, check_nonnegative
from .names import canonical_name
from .policies import Policy
from .stacks import Part, Walk
from .targets import ATTENTION, attention_projections

# Modules of the base model that work on the last block's output, where its forward() does not say when they run.
_OUTPUT_SIDE = re.compile(r"(?:pooler|norm|ln_f|layernorm|post_layernorm|final_\w+)\.")

# PEFT's name of what prompt, prefix and P-tuning train: virtual tokens before the first block.
_PROMPTS = "prompt_encoder"


def find_layers(model: nn.Module, *, stack: str | None = None) -> dict[str, dict[str, nn.Parameter]]:
    """Which layer each parameter of a model belongs to.

    A layer is one block of the model's stacks: of an encoder, a decoder, or of all in turn, in the order in which
    forward() runs them. That order is read from the source of the model's forward methods (stacks.py); the order of
    parameters says nothing. Where stages have blocks (Swin, ResNet), a block is a layer. What runs before the first
    block, and every embedding, is the embeddings; what runs behind the last one, final norm and pooler included, is
    the head. What runs between two blocks belongs to the one whose module it shares, else to the earlier one: an
    encoder's final norm to its last block. A tied parameter belongs to the first block that has it, else to the
    embeddings. Shared blocks (ALBERT) are one layer, since they have one set of parameters.

    Args:
        model: may be wrapped (torch.compile, DDP, FSDP2, PEFT).
        stack: dotted name of a ModuleList whose elements shall be the blocks, and nothing else: one stack of several,
            or the stages in place of their blocks.

    Returns:
        {"embeddings": {...}, "layer.0": {...}, ..., "head": {...}}, in this order, without empty layers. The inner
        keys are names as in ``model.named_parameters()``, less wrapper components.

    Raises:
        ValueError: if there are no blocks, if nothing says in which order several stacks run, or if ``stack`` names no
            ModuleList.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r:.100}")
    layer_at = _layers_by_prefix(model, stack)

    def layer_of(name: str) -> str:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        return next(layer_at[prefix] for prefix in prefixes if prefix in layer_at)

    layers: dict[str, dict[str, nn.Parameter]] = {}
    for names, param in _named_parameters(model):
        layer = min(map(layer_of, names), key=_precedence)
        layers.setdefault(layer, {})[names[0]] = param
    return dict(sorted(layers.items(), key=lambda item: _position(item[0])))


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 1e-2,
    drop: Policy | None = None,
    targets: str = "all",
    exclude: str | None = None,
    include_head: bool | None = None,
    stack: str | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for GradDropAdamW, one set per layer of the model.

    A layer has up to four groups, with and without weight decay, with and without ``drop``; they share
    ``group["layer"]``. Groups come in the order embeddings, blocks, head. Each has the keys params (a list of
    (name, parameter)), weight_decay, drop and layer. lr and the rest are the optimizer's.

    Args:
        model: a transformers model, wrapped or not; see :func:`find_layers`. Parameters that do not require a gradient
            now are left out, as the Trainer does.
        weight_decay: for all parameters but biases and norms (those with fewer than two dimensions), which get 0.
        drop: the policy of the targeted parameters; all others get None.
        targets: "all"; "attention", the key, value and output projections of the blocks' attention (the paper's
            theta = {K, V, U} by its words); "attention+query", these and the query projections (theta by its equation
            1, where K and V map to queries and keys, and U to values); or a regular expression that is searched in
            parameter names.
        exclude: a regular expression; parameters whose names it is found in are not targeted.
        include_head: whether the head is dropped, too. None: by policies of elements and blocks, and not by
            LayerGradDrop and GradFreeze. The head is new and must learn: give False where masks hold for an epoch.
        stack: see :func:`find_layers`.

    Raises:
        TypeError: if ``drop`` is no policy, or ``targets`` or ``exclude`` is not a string.
        ValueError: if either is no regular expression or matches nothing, nothing is left to drop, ``weight_decay``
            is negative, no parameter requires a gradient, or the model has no recognisable stack.
    """
    check_nonnegative("weight_decay", weight_decay)
    if include_head is not None:
        check_bool("include_head", include_head)
    if not isinstance(drop, Policy | None):
        raise TypeError(f"drop must be a policy, such as GradDrop(0.1), or None, got {drop!r}")
    layers = find_layers(model, stack=stack)
    in_layer = {name: layer for layer, params in layers.items() for name, p in params.items() if p.requires_grad}
    if not in_layer:
        raise ValueError("model must have parameters that require a gradient; all of its parameters are frozen")

    dropped = _dropped(model, in_layer, drop, targets, exclude, include_head)
    groups: dict[tuple, dict] = {}
    for name, layer in in_layer.items():
        param = layers[layer][name]
        decay = weight_decay if param.dim() >= 2 else 0.0
        policy = drop if name in dropped else None
        group = groups.setdefault(
            (layer, param.dim() >= 2, name in dropped),
            {"params": [], "weight_decay": decay, "drop": policy, "layer": layer},
        )
        group["params"].append((name, param))
    return list(groups.values())


def _base_model(model: nn.Module) -> tuple[str, nn.Module | None]:
    """(canonical name, module) of the first transformers model's base model, or ("", None)."""
    for name, module in model.named_modules():
        if hasattr(type(module), "base_model_prefix"):  # a PreTrainedModel, without importing transformers
            base = module.base_model
            inner = "" if base is module else module.base_model_prefix
            return canonical_name(".".join(part for part in (name, inner) if part)), base
    return "", None


def _layers_by_prefix(model: nn.Module, stack: str | None) -> dict[str, str]:
    """The layer of each part of the model, by the names of modules (and parameters outside them)."""
    parts = _parts(model, stack)
    inside, base = _base_model(model)
    blocks = [i for i, part in enumerate(parts) if part.is_block]
    number = {i: f"layer.{n}" for n, i in enumerate(blocks)}
    layers = {}
    for i, part in enumerate(parts):
        if part.is_block:
            layer = number[i]
        elif part.names[0].endswith(_PROMPTS):
            layer = "embeddings"
        elif not part.known:
            layer = _layer_by_name(part, inside, base is not None)
        elif i < blocks[0]:
            layer = "embeddings"
        elif i > blocks[-1]:
            layer = "head"
        else:
            nearest, stage = _nearest(parts, blocks, i)
            layer = "embeddings" if _is_embedding(part) and not stage else number[nearest]
        layers.update(dict.fromkeys(part.names, layer))
    return layers


def _parts(model: nn.Module, stack: str | None) -> list[Part]:
    """Parts of the model in order, with a block among them."""
    if stack is not None:
        names = [canonical_name(name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        if canonical_name(stack) not in names:
            raise ValueError(f"stack must name a ModuleList of the model, one of {names}, got {stack!r}")
        stack = canonical_name(stack)
    walk = Walk.through(model, stack)
    if not any(part.is_block for part in walk.parts):
        raise ValueError(
            f"model must have a stack of encoder or decoder blocks (a ModuleList of modules that have submodules), and "
            f"{type(model).__name__} has none among its parts {_some(part.names[0] for part in walk.parts)}. If one of "
            "its ModuleLists is the stack, name it, as in stack='encoder.block'"
        )
    if walk.unordered:
        stacks = [*dict.fromkeys(part.names[0].rpartition(".")[0] for part in walk.parts if part.is_block)]
        raise ValueError(
            f"model must say in which order its stacks run, and neither a readable forward() nor the names encoder and "
            f"decoder say so for {walk.unordered} of {type(model).__name__}. Give param_groups() one of these modules, "
            f"or name one ModuleList, as in stack={stacks[0]!r}; its lists of blocks are {stacks}"
        )
    return walk.parts


def _is_embedding(part: Part) -> bool:
    return isinstance(part.holder, nn.Embedding) or "emb" in part.names[0].rpartition(".")[2].lower()


def _layer_by_name(part: Part, inside: str, has_base: bool) -> str:
    """The layer of what forward() does not mention: by whether it is in the base model, and what it is called."""
    name = f"{part.names[0]}."
    if has_base and name.startswith(inside):
        return "head" if _OUTPUT_SIDE.match(name.removeprefix(inside)) else "embeddings"
    return "embeddings" if _is_embedding(part) and not has_base else "head"


def _nearest(parts: list[Part], blocks: list[int], i: int) -> tuple[int, bool]:
    """The position of the block that part ``i`` belongs to, and whether they share a stage."""
    after = bisect.bisect(blocks, i)
    before, behind = _common(parts[blocks[after - 1]], parts[i]), _common(parts[blocks[after]], parts[i])
    common = max(before, behind, key=len)
    return blocks[after if len(behind) > len(before) else after - 1], any(map(str.isdigit, common))


def _common(block: Part, part: Part) -> list[str]:
    """The components of their places that agree from the beginning."""
    pairs = zip(block.place.split("."), part.place.split("."), strict=False)
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _named_parameters(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Each parameter once, with all the names that it goes by, that of ``model.named_parameters()`` first."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(canonical_name(name))
    return [(aliases, param) for param, aliases in names.items()]


def _position(layer: str) -> float:
    return {"embeddings": -1, "head": float("inf")}.get(layer) or int(layer.removeprefix("layer."))


def _precedence(layer: str) -> tuple[bool, float]:
    """Which of its layers a tied parameter belongs to: the first block, else the embeddings, else the head."""
    return layer == "embeddings" or layer == "head", _position(layer)


def _dropped(
    model: nn.Module,
    in_layer: dict[str, str],
    drop: Policy | None,
    targets: str,
    exclude: str | None,
    include_head: bool | None,
) -> set[str]:
    """The names of the parameters that the policy drops. Raises as :func:`param_groups` says."""
    dropped = _targeted(model, in_layer, targets)
    if exclude is not None:
        dropped -= _matching("exclude", exclude, in_layer)
    if include_head is None:
        include_head = drop is None or not drop.layerwise
    if not include_head:
        dropped -= {name for name, layer in in_layer.items() if layer == "head"}
    if not dropped:
        raise ValueError(
            f"targets={targets!r} with exclude={exclude!r} and include_head={include_head!r} must leave a parameter to "
            f"drop, and leaves none of {_some(in_layer)}"
        )

    if drop is not None and drop.layerwise and {in_layer[name] for name in dropped} == {"embeddings"}:
        raise ValueError(
            f"drop={drop!r} chooses among layers, and all that it could drop is in the embeddings: "
            f"{_some(sorted(dropped))}. Prompt and prefix tuning train one table before the first block; give a policy "
            "that decides per element, such as GradDrop(0.1), or train blocks too"
        )
    return dropped


def _targeted(model: nn.Module, in_layer: dict[str, str], targets: str) -> set[str]:
    if targets == "all":
        return set(in_layer)
    if targets not in ATTENTION:
        return _matching("targets", targets, in_layer)
    in_blocks = [name for name, layer in in_layer.items() if layer.startswith("layer.")]
    found = attention_projections(model, in_blocks, targets)
    if not found:
        raise ValueError(
            f"targets={targets!r} must find attention projections that require a gradient, and knows none of this "
            f"model's names ({_some(in_blocks or in_layer)}); give a regular expression"
        )
    return found


def _matching(argument: str, pattern: str, names: Iterable[str]) -> set[str]:
    choices = (
        "'all', 'attention', 'attention+query' or a regular expression"
        if argument == "targets"
        else "a regular expression or None"
    )
    if not isinstance(pattern, str):
        raise TypeError(f"{argument} must be {choices}, got {pattern!r}")
    try:
        found = {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"{argument} must be {choices}, got {pattern!r}: {error}") from None
    if not found:
        raise ValueError(
            f"{argument} must be {choices} that matches a trainable parameter; {pattern!r} matches none of "
            f"{_some(names)}"
        )
    return found


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3] + ["..."] * (len(names) > 6) + names[3:][-3:])
