"""Dropped rows cost nothing: with block="row", weight gradients of nn.Linear and nn.Embedding for kept rows only."""

from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import embedding, linear
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import dispatch, mask_stream, validate
from .contract import Batch, Effect, Integer, Mask, Real, Shard
from .groups import Layers, Member, block_of, effect_of, members, policy_of
from .masked import MaskedOptimizer
from .module_calls import StandIn
from .numbers import rows_at
from .release import ReleasedGradients
from .skip import unwrap
from .step_hooks import once_gradients_are_there
from .training_loop import TrainingLoop

HOST = torch.device("cpu")


def skip_dropped_rows(model: nn.Module, optimizer: Optimizer) -> "SkippedRows":
    """Compute weight gradients of kept rows only, where a policy with ``block="row"`` drops whole rows.

    A row is an output feature of an nn.Linear, or an entry of an nn.Embedding. Its gradient reads as zero if the coming
    step drops it; the trajectory is the same up to the rounding of a smaller matrix product. All else of backward stays
    as it is: activations must be kept and their gradients computed.

    Left alone are weights that several modules share, that have hooks or a parametrisation, that are DTensors (FSDP2,
    tensor parallelism), and modules of any other class than nn.Linear and nn.Embedding, with a forward of their own, or
    with an nn.Embedding's max_norm, scale_grad_by_freq or sparse. Under torch.compile all rows are computed.

    The trajectory is not the same where something looks at all gradients before the step: clip_grad_norm_ and
    GradScaler see kept rows only.

    Args:
        model: the model, or what wraps it.
        optimizer: a masked optimizer such as GradDropAdamW, or an Accelerate or Lightning wrapper around one.

    Returns:
        a handle; ``remove()`` ends it. It is a context manager, too.

    Raises:
        TypeError: on another optimizer. ValueError: if no group has a policy with ``block="row"``; if one that has is
            capturable or of effect="update", whose moments take the unmasked gradient; if none of the model's
            modules can do with fewer rows; if the model is a DataParallel. RuntimeError: from the step of another
            optimizer, if rows of its parameters' gradients were left out; from backward or a step, if gradients are
            there that were made under other masks.
    """
    return SkippedRows(model, unwrap(optimizer))


class SkippedRows:
    """What :func:`skip_dropped_rows` returns.

    Args:
        within: a frame of Python's stack that must be running, in any thread, where a backward pass begins; else all
            rows are computed. None always skips. Nobody tells a callback that its loop was interrupted.

    Attributes:
        modules: the nn.Linear and nn.Embedding modules whose gradients are computed by rows.
    """

    def __init__(self, model: nn.Module, optimizer: MaskedOptimizer, within: FrameType | None = None):
        _check(model, optimizer)
        self.removed = False
        self.modules = _suitable(model, optimizer)
        if not self.modules:
            raise ValueError(
                "model must have an nn.Linear or nn.Embedding whose weight is a plain tensor of its own, under a "
                f"policy with block='row', got {type(model).__name__}, where no weight gradient can do with fewer rows"
            )
        self._optimizer = optimizer
        self._loop = TrainingLoop(within)
        self._draws = _Draws(optimizer, {module.weight for module in self.modules})
        self._calls = [_Call(self, module) for module in self.modules]
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: self._draws.left_out.clear()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._draws.forget()),
            register_optimizer_step_pre_hook(self._before_any_step),
        ]

    def remove(self) -> None:
        """Compute all rows again. Calling it again does nothing."""
        self.removed = True
        for hook in self._hooks:
            hook.remove()
        for call in self._calls:
            call.remove()

    def rows(self, weight: Tensor) -> tuple[Tensor | None, bool]:
        """Of the running backward pass: (indices of kept rows or None for all, whether the others will be read)."""
        if self.removed or not self._loop.is_running():
            self._draws.left_out.clear()
            return None, True
        return self._draws.rows(weight)

    def __enter__(self) -> "SkippedRows":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_any_step(
        self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if optimizer is self._optimizer:
            return once_gradients_are_there(args, kwargs, self._before_update)
        left_out = self._draws.left_out
        if not left_out or not self._loop.is_running():
            return None
        if any(id(p) in left_out for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() has parameters of whose gradients skip_dropped_rows left rows out "
                f"for a {type(self._optimizer).__name__}, which has not stepped since. End the skipping by its "
                "handle's remove() before another optimizer trains the model"
            )
        return None

    def _before_update(self) -> None:
        if self._draws.left_out and self._loop.is_running():
            self._draws.bring_up_to_date()


class _Call(StandIn):
    """Stands in for the call of one module; its forward is another while it runs, so that hooks run as ever."""

    def __init__(self, handle: SkippedRows, module: nn.Linear | nn.Embedding):
        self.handle = handle
        self.weight = weight = module.weight
        rows_of = partial(handle.rows, weight)
        self.by_rows: Callable[[Tensor], Any]
        if isinstance(module, nn.Linear):
            self.by_rows = lambda x: _ByRows.apply(x, weight, module.bias, rows_of)
        else:
            self.by_rows = lambda ids: _EmbeddingByRows.apply(ids, weight, module.padding_idx, rows_of)
        super().__init__(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not self._applies(args, kwargs):
            return self.inner(*args, **kwargs)
        own = self.module.__dict__
        own["forward"] = self.forward
        try:
            return self.inner(*args, **kwargs)
        finally:
            del own["forward"]

    def forward(self, x: Tensor) -> Any:
        # skip_dropped_layers, within us, may have switched the weight off: autograd then saves less, and a checkpoint
        # that calls the module again must save what its first call did
        return self.by_rows(x) if self.weight.requires_grad else type(self.module).forward(self.module, x)

    def _applies(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        weight = self.weight
        return (
            not self.handle.removed
            and torch.is_grad_enabled()
            and weight.requires_grad
            and self.module._parameters.get("weight") is weight
            and "forward" not in self.module.__dict__
            and len(args) == 1
            and not kwargs
            and not _hooked(weight)
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )


class _ByRows(torch.autograd.Function):
    """nn.Linear with a weight gradient of some rows. ``rows_of`` gives their indices, or None for all, and whether the
    others will be read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows_of: Callable) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # which autocast leaves alone
            x = x.to(torch.get_autocast_dtype(x.device.type))  # what autograd would save
        ctx.rows_of = rows_of
        ctx.save_for_backward(x, weight)
        out = linear(x, weight, bias)
        # not as the view that it may be: autograd would let nothing write into it
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = (flat @ weight.to(flat.dtype)).reshape(x.shape) if ctx.needs_input_grad[0] else None
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, grad_bias, None
        rows, all_read = ctx.rows_of()
        x = x.reshape(-1, x.shape[-1])
        if rows is None:
            return grad_x, (flat.t() @ x).to(weight.dtype), grad_bias, None
        kept = _product_of_rows(flat, rows, x)
        make = torch.zeros_like if all_read else torch.empty_like
        return grad_x, make(weight).index_copy_(0, rows, kept.to(weight.dtype)), grad_bias, None


class _EmbeddingByRows(torch.autograd.Function):
    """nn.Embedding likewise."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, rows_of: Callable) -> Tensor:
        ctx.padding_idx, ctx.rows_of = padding_idx, rows_of
        ctx.save_for_backward(ids, weight)
        return embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, weight = ctx.saved_tensors
        padding = -1 if ctx.padding_idx is None else ctx.padding_idx
        rows, all_read = ctx.rows_of()
        if rows is None:
            return None, torch.ops.aten.embedding_dense_backward(grad, ids, len(weight), padding, False), None, None
        flat, ids = grad.reshape(-1, grad.shape[-1]), ids.reshape(-1).long()
        kept = _are_in(ids, rows) & (ids != padding)
        used, place = ids[kept].unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(flat[kept], place, len(used), -1, False)
        found = torch.zeros_like(weight) if all_read else torch.empty_like(weight).index_fill_(0, rows, 0)
        return None, found.index_copy_(0, used, sums), None, None


def _are_in(ids: Tensor, rows: Tensor) -> Tensor:
    """``torch.isin``, which would sort all ``rows``; they ascend."""
    if not len(rows):
        return torch.zeros_like(ids, dtype=torch.bool)
    return rows[torch.searchsorted(rows, ids).clamp_(max=len(rows) - 1)] == ids


def _product_of_rows(grad: Tensor, rows: Tensor, x: Tensor) -> Tensor:
    """``grad.t()[rows] @ x``."""
    surplus = -len(rows) % 16 if grad.element_size() == 2 else 0
    if not surplus:
        return grad.index_select(1, rows).t() @ x
    padded = torch.cat([rows, rows.new_zeros(surplus)])
    return (grad.index_select(1, padded).t() @ x)[: len(rows)]


class _Draws:
    """Which rows the coming step keeps, drawn on the host when the first gradient of a step asks."""

    def __init__(self, optimizer: MaskedOptimizer, weights: set[Tensor]):
        self._optimizer, self._weights = optimizer, weights
        self._of_step: tuple = ()
        self._drawn_with: tuple = ()
        self._groups: list[tuple] = []  # what the masks were made for
        self._masks = _RowMasks([], [])
        self._rows: dict[int, Tensor | None] = {}  # id(weight) -> int64 indices on its device; None: all
        self._freezes: set[int] = set()
        self.left_out: set[int] = set()  # ids of weights whose gradients of this step lack rows

    def rows(self, weight: Tensor) -> tuple[Tensor | None, bool]:
        """(indices of kept rows or None for all, whether the others must read as zero)."""
        optimizer = self._optimizer
        self.bring_up_to_date()
        released = isinstance(optimizer._inside_backward, ReleasedGradients)
        unread = released and id(weight) in self._freezes and not torch.is_anomaly_enabled()
        rows = self._rows.get(id(weight))
        if rows is not None:
            self.left_out.add(id(weight))
        return rows, not unread

    def forget(self) -> None:
        """A checkpoint was loaded, which may bring other names."""
        self._of_step, self._groups = (), []

    def bring_up_to_date(self) -> None:
        """Draw the coming step's rows, if that is not done yet.

        Raises RuntimeError if gradients are there already that lack the rows of other masks.
        """
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        draw = None if optimizer._capturable() else optimizer.draw  # which then only the device knows
        of_groups = ((g["drop"], g["effect"], len(g["params"])) for g in groups)
        of_step = optimizer.seed, draw, optimizer._clock.epoch, *of_groups
        if of_step != self._of_step:
            before = self._rows
            self._draw()
            self._of_step = of_step
            if any(self._lacks(weight, before) for weight in self._weights):
                self.left_out.clear()
                raise RuntimeError(
                    "skip_dropped_rows needs one mask for all passes of a step, and the masks changed between them: "
                    "gradients are there that lack rows of the masks before. Call set_epoch(), or change policies, "
                    "between optimizer.step() and the next backward pass; zero_grad() leaves these gradients behind"
                )

    def _lacks(self, weight: Tensor, before: dict[int, Tensor | None]) -> bool:
        """Has ``weight`` a gradient without rows that are kept now?"""
        if id(weight) not in self.left_out or weight.grad is None or not weight.grad.any():
            return False
        then, now = before.get(id(weight)), self._rows.get(id(weight))
        return then is not None and (now is None or not bool(_are_in(now, then).all()))

    def _draw(self) -> None:
        clock, groups = self._optimizer._clock, self._optimizer.param_groups
        of_groups = [(_drops_rows(group), [(id(p), p.shape) for p in group["params"]]) for group in groups]
        if of_groups != self._groups:
            asked = [m for m in members(groups) if m.param in self._weights and _drops_rows(groups[m.group])]
            self._masks, self._groups = _RowMasks(asked, [block_of(groups[m.group], m.param) for m in asked]), of_groups
            self._drawn_with = ()
        self._freezes = {id(m.param) for m in self._masks.members if effect_of(groups[m.group]) == Effect.FREEZE}
        by_rows = {m.group for m in self._masks.members}
        dropping = {
            g: (word, row.lo, row.span)
            for g, (row, word) in enumerate(rows_at(groups, Layers.of(groups), clock, clock.next_draw()))
            if row.mask == Mask.BLOCK
            and g in by_rows
            and _masks_gradients(groups[g])
            and not self._optimizer._capturable()
        }
        drawn_with = clock.seed, tuple(dropping.items())
        if drawn_with != self._drawn_with:
            self._rows = self._masks.kept(dropping, clock.seed) if dropping else {}
            self._drawn_with = drawn_with


class _RowMasks:
    """Masks of rows: one column of each parameter, so that an element's decision is its row's.

    ``blocks``: elements of a row.
    """

    def __init__(self, members: Sequence[Member], blocks: Sequence[int]):
        self.members, self._blocks = members, blocks
        self._shards = [Shard((m.param.shape[0],), (block,)) for m, block in zip(members, blocks, strict=True)]
        self._batch = Batch(
            params=[],
            shards=self._shards,
            integers=torch.zeros(len(members), len(Integer), dtype=torch.int64, device=HOST),
            reals=torch.zeros(len(members), Real.columns(), dtype=torch.float64, device=HOST),
            packed=[torch.empty((s.numel + 31) // 32, dtype=torch.int32, device=HOST) for s in self._shards],
        )

    def kept(self, drawn_with: dict[int, tuple[int, int, int]], seed: int) -> dict[int, Tensor | None]:
        """id(parameter) -> indices of its kept rows, or None for all in groups that ``drawn_with`` lacks.

        ``drawn_with`` maps a group to (Philox counter word 2, lo, span).
        """
        batch = self._batch
        integers = []
        for member, block in zip(self.members, self._blocks, strict=True):
            word, lo, span = drawn_with.get(member.group, (0, 0, mask_stream.HALF))
            integers.append([Mask.BLOCK, Effect.GRADIENT, word, member.stream_id, lo, span, block])
        batch.integers.copy_(torch.tensor(integers, dtype=torch.int64, device=HOST).reshape(-1, len(Integer)))
        dispatch.choose("auto", HOST, torch.float32).pack(batch, seed=seed)
        packed = [words for words in batch.packed if words is not None]
        lengths = [32 * words.numel() for words in packed]
        kept = mask_stream.unpack_mask(torch.cat(packed), (sum(lengths),)).split(lengths)
        return {
            id(m.param): mask[: shard.numel].nonzero().reshape(-1).to(m.param.device, non_blocking=True)
            for m, shard, mask in zip(self.members, self._shards, kept, strict=True)
            if m.group in drawn_with
        }


def _suitable(model: nn.Module, optimizer: MaskedOptimizer) -> list[nn.Linear | nn.Embedding]:
    by_rows = {p for group in optimizer.param_groups if _drops_rows(group) for p in group["params"]}
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for param in module._parameters.values():
            if param is not None:
                owners[param] = owners.get(param, 0) + 1
    return [
        module
        for module in model.modules()
        if (type(module) is nn.Linear or (type(module) is nn.Embedding and _is_plain(module)))
        and type(module.weight) is nn.Parameter
        and module.weight in by_rows
        and owners[module.weight] == 1
        and _has_rows(module.weight)
        and not _hooked(module.weight)
        and "forward" not in module.__dict__
    ]


def _is_plain(module: nn.Embedding) -> bool:
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _has_rows(param: Tensor) -> bool:
    return type(param) in validate.ORDINARY and param.dim() == 2 and param.numel() > 0


def _hooked(param: Tensor) -> bool:
    """Whether somebody else is shown the gradient."""
    after = (param._post_accumulate_grad_hooks or {}).values()
    return bool(param._backward_hooks) or any(
        not isinstance(getattr(hook, "__self__", None), ReleasedGradients) for hook in after
    )


def _drops_rows(group: dict[str, Any]) -> bool:
    policy = policy_of(group)
    return policy is not None and policy.block == "row"


def _masks_gradients(group: dict[str, Any]) -> bool:
    return effect_of(group) != Effect.UPDATE


def _check(model: nn.Module, optimizer: MaskedOptimizer) -> None:
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError("model must not be a DataParallel, whose replicas hide its modules; use DDP")
    by_rows = [group for group in optimizer.param_groups if _drops_rows(group)]
    if not by_rows:
        raise ValueError(
            "optimizer must have a policy with block='row' for skip_dropped_rows, such as GradDrop(p=0.9, "
            f"block='row'), got {[group['drop'] for group in optimizer.param_groups]!r:.200}"
        )
    for group in by_rows:
        if group["capturable"]:
            raise ValueError(
                "capturable must be False with skip_dropped_rows, got True: which rows are kept is decided on the host"
            )
        if not _masks_gradients(group):
            raise ValueError(
                "effect must be 'gradient' or 'freeze' with skip_dropped_rows, got 'update', whose moments take the "
                "gradients of dropped rows too"
            )
