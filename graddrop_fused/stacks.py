"""The blocks of a model in the order in which it runs them, with all that lies before, between and behind them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .forward_order import uses
from .names import canonical_name

Holder = nn.Module | nn.Parameter

_LISTS = (nn.ModuleList, nn.Sequential)

# Lists of what is no block: tables, patch mergers, codebooks, biases; by the list's name and its elements' class.
_NO_STACK = re.compile(r"emb|merge|quantiz|bias", re.IGNORECASE)
_NO_BLOCK = re.compile(r"(?:Embeddings?|Embed|Merger|Quantization|Quantizer|Bias(?:\dD|\w+al)?|MLP)$")


@dataclass(frozen=True)
class Part:
    """A block, or something that is none, by the canonical names (of modules or parameters) that it goes by."""

    names: tuple[str, ...]
    holder: Holder  # the module, or the parameter itself; of several modules the first
    place: str  # dotted; parts with more of it in common are nearer to each other
    is_block: bool = False
    known: bool = True  # whether the forward pass says when it runs


@dataclass
class Walk:
    """Goes through a model in the order in which it runs.

    Attributes:
        only: name of the one list whose elements are the blocks; None for all lists of blocks.
        any_convolutions: whether a list of blocks without matrices counts. Beside others it is their front end
            (wav2vec's feature extractor); where there are no others it is the network (ResNet).
        flat: within a stage: lists of blocks are not looked into for stages.
        parts: what was found, in order.
        unordered: modules with blocks of which nothing says which runs first.
    """

    only: str | None = None
    any_convolutions: bool = False
    flat: bool = False
    parts: list[Part] = field(default_factory=list)
    unordered: list[str] = field(default_factory=list)

    @classmethod
    def through(cls, model: nn.Module, only: str | None = None) -> "Walk":
        """A finished walk through all of ``model``."""
        walk = cls(only)
        walk.any_convolutions = not any(walk.is_stack(module, name) for name, module in model.named_modules())
        walk.visit(model, "", "")
        return walk

    def visit(self, module: nn.Module, name: str, place: str) -> None:
        """Add what ``module`` holds, in order."""
        members = _members(module)
        with_blocks = [child for child, member in members.items() if self.has_blocks(member, _join(name, child))]
        order, loops = self._order(module, name, members, with_blocks)
        zipped = [self._zipped(members, loop, name) for loop in loops]
        done: set[str] = set()
        for child in [*order, *(n for n in members if n not in order)]:
            if child in done:
                continue
            together = next((names for names in zipped if child in names), [child])
            done.update(together)
            names, here = [_join(name, n) for n in together], _join(place, child)
            if len(together) > 1 or self.is_stack(members[child], names[0]):
                self._add_stack(names, [members[n] for n in together], here)
            elif isinstance(member := members[child], nn.Module) and child in with_blocks:
                self.visit(member, names[0], here)
            else:
                self._add(names, members[child], here, known=child in order)

    def is_stack(self, module: Holder, name: str) -> bool:
        """Whether this is a list of blocks. A block has submodules: a list of plain Linear layers is no stack."""
        if not isinstance(module, _LISTS):
            return False
        if self.only is not None:
            return canonical_name(name) == self.only
        blocks = [unwrapped(block) for block in module if _size(block)]
        kinds = {type(block) for block in blocks}
        if not blocks or (isinstance(module, nn.Sequential) and len(kinds) > 1):
            return False
        if _NO_STACK.search(name.rpartition(".")[2]) or all(_NO_BLOCK.search(kind.__name__) for kind in kinds):
            return False
        matrices = self.any_convolutions or any(p.dim() == 2 for p in module.parameters())
        return matrices and all(any(True for _ in block.children()) for block in blocks)

    def has_blocks(self, module: Holder, name: str) -> bool:
        """Whether there is a stack in ``module``, or it is one."""
        if isinstance(module, nn.Parameter):
            return False
        return self.is_stack(module, name) or any(
            self.has_blocks(child, _join(name, n)) for n, child in module.named_children()
        )

    def _order(
        self, module: nn.Module, name: str, members: dict[str, Holder], with_blocks: list[str]
    ) -> tuple[list[str], list[list[str]]]:
        """Members in the order in which the forward pass uses them, and those that its loops go through.

        Of what it does not mention, encoders go first and decoders last.
        """
        used = uses(module)
        order = [child for child in used.order if child in members]
        missing = [child for child in with_blocks if child not in order]
        if missing and len(with_blocks) > 1 and not all(re.search("encoder|decoder", n) for n in with_blocks):
            self.unordered += [canonical_name(_join(name, child)) for child in with_blocks]
        decoders = [child for child in missing if "decoder" in child]
        order = [*(child for child in missing if child not in decoders), *order, *decoders]
        for loop in used.loops:
            order = _helpers_first(order, loop, [n for n in loop if n in with_blocks])
        return order, used.loops

    def _zipped(self, members: dict[str, Holder], loop: Sequence[str], name: str) -> list[str]:
        """Lists of one length that a loop goes through together: the attentions, ffns and norms of XLM."""
        lists = {n: member for n in loop if isinstance(member := members.get(n), _LISTS)}
        lengths = [len(member) for n, member in lists.items() if self.is_stack(member, _join(name, n))]
        return [n for n, member in lists.items() if lengths and len(member) == lengths[0]]

    def _add_stack(self, names: list[str], lists: list, place: str) -> None:
        """Add the elements of one list, or of several that belong together element by element."""
        staged = not self.flat and self.only is None and any(_are_stages(modules) for modules in lists)
        for i, elements in enumerate(zip(*lists, strict=True)):
            here = [f"{name}.{i}" for name in names]
            if not staged:
                self._add(here, elements[0], f"{place}.{i}", is_block=_size(elements[0]) > 0)
                continue
            for name, element in zip(here, elements, strict=True):
                self._add_stage(element, name, f"{place}.{i}.{name}")

    def _add_stage(self, stage: nn.Module, name: str, place: str) -> None:
        """Add a stage's blocks, or the stage as one block where blocks are the lesser part of it."""
        inner = Walk(any_convolutions=True, flat=True)
        if inner.is_stack(stage, name):
            inner._add_stack([name], [stage], place)
        else:
            inner.visit(stage, name, place)
        blocks = sum(_size(part.holder) for part in inner.parts if part.is_block)
        if 2 * blocks > _size(stage):
            self.parts += inner.parts
        else:
            self._add([name], stage, place, is_block=not _NO_BLOCK.search(type(unwrapped(stage)).__name__))

    def _add(self, names: list[str], holder: Holder, place: str, *, is_block: bool = False, known: bool = True) -> None:
        self.parts.append(Part(tuple(map(canonical_name, names)), holder, place, is_block, known))


def _helpers_first(order: list[str], loop: list[str], stacks: list[str]) -> list[str]:
    """What a loop over blocks uses besides them (DeBERTa's convolution after its first block) goes before them."""
    if not stacks:
        return order
    start = min(map(order.index, stacks))
    helpers = [n for n in order[start:] if n in loop and n not in stacks]
    return [*order[:start], *helpers, *(n for n in order[start:] if n not in helpers)]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that a compile, FSDP or checkpoint wrapper holds."""
    for name, child in module.named_children():
        if name != "module" and canonical_name(f"{name}.weight") == "weight":
            return unwrapped(child)
    return module


def _are_stages(modules: nn.Module) -> bool:
    """Whether the elements of a list are stages: lists themselves, or of different widths.

    The blocks of a transformer are alike: of the parameters that two of them both have, most have one shape.
    """
    elements = [unwrapped(element) for element in modules.children()]
    if all(isinstance(element, _LISTS) for element in elements):
        return True
    first: dict[type, dict] = {}
    for element in elements:
        shapes = {name: p.shape for name, p in element.named_parameters()}
        others = first.setdefault(type(element), shapes)
        both = shapes.keys() & others.keys()
        if 2 * sum(shapes[name] != others[name] for name in both) > len(both):
            return True
    return False


def _members(module: nn.Module) -> dict[str, Holder]:
    """Children that have parameters, and parameters of its own."""
    children = {name: child for name, child in module._modules.items() if child is not None and _size(child)}
    return {**children, **{name: p for name, p in module._parameters.items() if p is not None}}


def _size(holder: Holder) -> int:
    return holder.numel() if isinstance(holder, nn.Parameter) else sum(p.numel() for p in holder.parameters())


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
