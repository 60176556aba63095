"""One optimizer run on several backends at once, compared after every operation: the ground of test_sequences.py.

A :class:`Side` is parameters and their optimizer on one backend. :class:`Sides` does the same to all of them and fails
where one does otherwise than the first, which is the reference: another mask, error, count, parameter or state.
"""

import copy
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graddrop_fused import GradDropAdamW, GradDropLion, GradDropSGD, StaticMask, dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["reference", "cpu", *(["triton"] if INTERPRETED else [])]
CLASSES = {"adamw": GradDropAdamW, "sgd": GradDropSGD, "lion": GradDropLion}
CLOCK = ("seed", "draw", "epoch", "steps_per_epoch", "mask_stream")  # what the first group shows
REACH = 20.0  # no mask of these tests rescales by more


def backends() -> list[str]:
    """Those that can run here, the reference first."""
    return [name for name in BACKENDS if dispatch.load(name).unavailable(torch.device("cpu")) is None]


@dataclass
class Start:
    """How the optimizers are constructed."""

    rule: str = "adamw"
    named: bool = True
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = (((17, 23), (33,)), ((3, 129), (1,)), ((0,), (5, 2, 7)))


@dataclass
class Side:
    backend: str
    params: list[nn.Parameter]
    names: list[str]
    opt: torch.optim.Optimizer

    @classmethod
    def of(cls, start: Start, backend: str) -> "Side":
        side = cls(backend, [], [], None)
        groups = [side.new_group(start, shapes, f"layer{k}", 0) for k, shapes in enumerate(start.shapes)]
        side.opt = CLASSES[start.rule](groups, backend=backend, **start.options)
        return side

    def new_group(self, start: Start, shapes, layer: str, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 * seed + len(self.params))
        params = [nn.Parameter(torch.randn(s, generator=generator).to(start.dtype)) for s in shapes]
        names = [f"{layer}.{len(self.params) + i}" for i in range(len(params))]
        self.params = self.params + params
        self.names = self.names + names
        return {"params": list(zip(names, params, strict=True)) if start.named else params, "layer": layer}

    def fresh_optimizer(self, start: Start) -> torch.optim.Optimizer:
        """A new optimizer of the same parameters, which has taken no step."""
        groups = []
        for group in self.opt.param_groups:
            listed = zip(group["param_names"], group["params"], strict=True) if start.named else group["params"]
            kept = {name: group[name] for name in ("layer", "drop", "effect") if name in group}
            groups.append({**kept, "params": list(listed)})
        return CLASSES[start.rule](groups, backend=self.backend, **start.options)

    def numbers(self) -> dict[str, Tensor]:
        """Parameters and state by name."""
        found = {}
        for name, p in zip(self.names, self.params, strict=True):
            found[name] = p.detach()
            for entry, value in self.opt.state.get(p, {}).items():
                found[f"{name}: {entry}"] = torch.as_tensor(value)
        return found

    def facts(self) -> dict[str, Any]:
        """What must be equal on all sides, masks included."""
        opt = self.opt
        groups = [{k: _plain(v) for k, v in g.items() if k != "params"} for g in opt.param_groups]
        entries = [
            {k: (tuple(v.shape), v.dtype, _strides(v)) if isinstance(v, Tensor) else v for k, v in opt.state[p].items()}
            if p in opt.state
            else None
            for p in self.params
        ]
        return {
            "draw, epoch, seed": (opt.draw, opt.epoch, opt.seed),
            "groups": groups,
            "state": [e and {k: v for k, v in e.items() if k != "step"} for e in entries],
            "steps": [float(opt.state[p]["step"]) if "step" in opt.state.get(p, {}) else None for p in self.params],
            "masks": [outcome(lambda p=p: opt.keep_mask(p)) for p in self.params],
            "dropped layers": outcome(lambda: [self.names[_at(self.params, p)] for p in opt.dropped_layers()]),
            "gradients": [None if p.grad is None else (p.grad.dtype, tuple(p.grad.shape)) for p in self.params],
        }

    def snapshot(self) -> dict[str, Any]:
        """All that an error must leave as it was."""
        return {**self.facts(), "numbers": {name: t.clone() for name, t in self.numbers().items()}}


def _at(params: list[Tensor], wanted: Tensor) -> int:
    return next(i for i, p in enumerate(params) if p is wanted)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Those that say where elements are: of a dimension of size 1, and of an empty tensor, they may be anything."""
    if not tensor.numel():
        return ()
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _plain(value: Any) -> Any:
    if isinstance(value, StaticMask):
        return ["StaticMask", [mask.tolist() for _, mask in value.items()], value.rescale]
    return value.item() if isinstance(value, Tensor) else value


def outcome(call: Callable[[], Any]) -> tuple[str, Any]:
    """("returned", what) or ("raised", the error's class and text)."""
    try:
        return "returned", call()
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"


def same(a: Any, b: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().resolve_neg().view(integers[tensor.element_size()])


def difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The first entry in which two snapshots differ, shortly."""
    for key in a:
        if not same(a[key], b.get(key)):
            if isinstance(a[key], dict):
                inner = next(k for k in {**a[key], **b[key]} if not same(a[key].get(k), b[key].get(k)))
                return f"{key}: {inner}: {str(a[key].get(inner))[:300]} and {str(b[key].get(inner))[:300]}"
            return f"{key}: {str(a[key])[:600]} and {str(b[key])[:600]}"
    return None


class Sides:
    """The same optimizer on every backend."""

    def __init__(self, start: Start):
        self.start = start
        self.all = [Side.of(start, name) for name in backends()]
        self.left_behind: list[tuple[Side, dict]] = []  # what copies were made from, and how it was

    @property
    def first(self) -> Side:
        return self.all[0]

    def each(self, operation: Callable[[Side], Any], but: tuple[str, ...] = ()) -> tuple[str, Any]:
        """Do it to every side; what it returned or raised must be the same, and an error must change nothing, ``but``
        these."""
        before = [side.snapshot() for side in self.all]
        results = []
        for side, then in zip(self.all, before, strict=True):
            kind, value = outcome(lambda side=side: operation(side))
            if kind == "raised":
                value = value.replace(f"backend={side.backend!r}", "backend")
                changed = difference({k: v for k, v in then.items() if k not in but}, side.snapshot())
                assert changed is None, f"{side.backend}: the error {value!r} left a change: {changed}"
            results.append((kind, value))
        for side, result in zip(self.all, results, strict=True):
            assert same(result, results[0]), f"{side.backend}: {result}, but the reference: {results[0]}"
        self.compare(before[0]["numbers"])
        return results[0]

    def step(self, closure_of: Callable[[Side], Any] | None = None, scale: float | None = None, inf: bool = False):
        """A step on every side; returns ("returned", ...) or ("raised", ...)."""
        masks = [side.facts()["masks"] for side in self.all]
        before = [side.snapshot()["numbers"] for side in self.all]

        def operation(side: Side) -> Any:
            if scale is not None:  # as GradScaler hands them over
                side.opt.grad_scale, side.opt.found_inf = torch.tensor(scale), torch.tensor(float(inf))
            try:
                result = side.opt.step(None if closure_of is None else closure_of(side))
                return None if result is None else result.detach().clone()
            finally:
                if scale is not None:
                    del side.opt.grad_scale, side.opt.found_inf

        result = self.each(operation, but=() if closure_of is None else ("gradients",))
        if result[0] == "returned":
            for side, masked, then in zip(self.all, masks, before, strict=True):
                self._dropped_stand_still(side, masked, then)
        return result

    def _dropped_stand_still(self, side: Side, masks: list[tuple[str, Any]], before: dict[str, Tensor]) -> None:
        """What the previewed mask drops, the step has left alone under "freeze" and "update"."""
        for (kind, mask), name, p in zip(masks, side.names, side.params, strict=True):
            group = next(g for g in side.opt.param_groups if any(q is p for q in g["params"]))
            effect = group["effect"] or (group["drop"] and group["drop"].default_effect)
            if kind == "returned" and effect in ("freeze", "update") and mask.shape == p.shape:
                assert same(p.detach()[~mask], before[name][~mask]), f"{side.backend}: {name}: a dropped element moved"

    def compare(self, before: dict[str, Tensor]) -> None:
        """Every side against the first; then every side goes on from the first's numbers."""
        facts, numbers = self.first.facts(), self.first.numbers()
        rate = max((float(g["lr"]) for g in self.first.opt.param_groups), default=0.0)
        noisy = any("gaussian" in repr(g["drop"]) for g in self.first.opt.param_groups)
        for side in self.all[1:]:
            apart = difference(facts, side.facts())
            assert apart is None, f"reference and {side.backend} differ: {apart}"
            mine = side.numbers()
            assert mine.keys() == numbers.keys()
            for name, right in numbers.items():
                self._close(f"{side.backend}: {name}", mine[name], right, before.get(name), rate, noisy)
            with torch.no_grad():
                for name, right in numbers.items():
                    if mine[name].dim() or ":" not in name:
                        mine[name].copy_(right)
        for side, then in self.left_behind:
            changed = difference(then, side.snapshot())
            assert changed is None, f"{side.backend}: what a copy was made from changed: {changed}"

    def _close(self, what: str, actual: Tensor, right: Tensor, before: Tensor | None, rate: float, noisy: bool) -> None:
        """Within what float32 rounding can make of one step (parity.py has the exact bounds), and one unit in the last
        place of the tensor's own dtype. Lion's step is a sign, and so is nearly the first step of AdamW: where noise or
        rounding decides it, one element in a hundred may come out on the other side."""
        assert actual.dtype == right.dtype and actual.shape == right.shape, what
        u = 2.0**-53 if right.dtype == torch.float64 else 2.0**-24
        old = right if before is None or before.shape != right.shape else before
        size = max((_largest(t) for t in (right, old)), default=0.0)
        reach = size if ":" in what.split(": ", 1)[1] else size + 60 * REACH * rate
        atol = (16 * u + (1e-3 if noisy else 0.0)) * reach
        a, b = actual.double(), right.double()
        bound = atol + b.abs() * (torch.finfo(right.dtype).eps * 1.01 + 16 * u) if right.is_floating_point() else 0.0
        wrong = ~(((a - b).abs() <= bound) | (a == b) | (a.isnan() & b.isnan()))
        if (self.start.rule == "lion" or noisy) and ": " not in what.split(": ", 1)[1]:
            allowed = max(1, wrong.numel() // 100)
            near = (a - b).abs() <= bound + 2.2 * REACH * rate
            if int(wrong.sum()) <= allowed and bool(near[wrong].all()):
                return
        at = wrong.nonzero()[:5].tolist()
        assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: " + (
            f"{a[wrong][:5].tolist()} for {b[wrong][:5].tolist()} within {atol:.3g}"
        )

    # Copies and checkpoints

    def copied(self, how: str) -> None:
        """Go on with copies of parameters and optimizers; the originals must stay as they are from now on."""
        left = []
        for side in self.all:
            both = side.params, side.opt
            params, opt = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
            left.append(copy.copy(side))
            side.params, side.opt = params, opt
        self.left_behind = [(side, side.snapshot()) for side in left]
        self.compare({})

    def reloaded(self, into: str) -> tuple[str, Any]:
        """A checkpoint through a file, into the same optimizer, a new one, or one that a foreign backend saved."""
        saved = []
        for side in self.all:
            file = io.BytesIO()
            torch.save(side.opt.state_dict(), file)
            saved.append(file.getvalue())

        def operation(side: Side) -> None:
            source = saved[0] if into == "foreign" else saved[self.all.index(side)]
            state = torch.load(io.BytesIO(source), weights_only=True)
            opt = side.opt if into == "same" else side.fresh_optimizer(self.start)
            opt.load_state_dict(state)
            side.opt = opt

        then = self.first.snapshot()
        result = self.each(operation)
        if result[0] == "returned":
            changed = difference(then, self.first.snapshot())
            assert changed is None, f"a checkpoint changed what it was made from: {changed}"
        return result


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach().double()
    finite = finite[finite.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
