"""Dropped layers cost nothing: no weight gradients for the layers that the coming step drops."""

import sys
import warnings
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .attach import inside_wrappers
from .contract import Effect
from .groups import effect_of, is_layerwise, shown_policies
from .masked import MaskedOptimizer
from .module_calls import ModuleCalls, in_reentrant_checkpoint
from .shards import local
from .step_hooks import once_gradients_are_there

# Before torch 2.12 a graph that was compiled while a parameter was off goes on to serve when it is on again, and gives
# it no gradient (pytorch/pytorch#139476; seen in 2.11, and not in 2.12).
GRAPHS_GO_STALE = torch.__version__ < "2.12"


def skip_dropped_layers(model: nn.Module, optimizer: Optimizer) -> "SkippedLayers":
    """Compute no weight gradients for the layers that the coming step drops, and store no activations for them.

    ``requires_grad`` of their parameters is off while a training forward pass of the model, or of any module in it,
    runs, and as it was when the pass has ended, however it ends. The optimizer takes the missing gradient for the zero
    that its mask would make of it: the trajectory is the same, bit for bit, as without (but for rounding, where torch
    chooses its kernels by what needs a gradient, as for attention with a learned bias). The layers are those of
    LayerGradDrop and GradFreeze; every other policy needs its gradients, and so does effect="update", whose moments
    take the unmasked gradient.

    The decision holds for all micro-batches of a step. If every trainable parameter would be off, the last layer stays
    on, since a loss without a graph has no backward. Which parameters get a gradient at all is learned: unless
    effect="freeze", where a dropped layer is not touched either way, a parameter is first switched off after a step in
    which it got one, and never again after a step in which its module ran and it got none. Never at all, if it stands
    in a module that has submodules, which may use it in some calls only.

    The trajectory is not the same where something looks at all gradients before the step: the norm of
    clip_grad_norm_ (unless it stays below max_norm both ways) and GradScaler's search for infinities see kept
    gradients only. DDP needs ``find_unused_parameters=True``. torch.compile recompiles for every new set of dropped
    layers; before torch 2.12 it would not, so that there a model of which anything is compiled skips nothing, with one
    UserWarning.

    Args:
        model: the model, or what wraps it, a LightningModule too.
        optimizer: a masked optimizer such as GradDropAdamW, or an Accelerate or Lightning wrapper around one.

    Returns:
        a handle; ``remove()`` ends it. It is a context manager, too.

    Raises:
        TypeError: on another optimizer. ValueError: if it has none of the model's parameters or no policy of whole
            layers, or the model is a DataParallel; there and in a forward pass, if the model uses reentrant activation
            checkpointing, which loses all gradients behind a switched-off layer. RuntimeError: from the step of
            another optimizer, if it has a parameter that was switched off; from a step if gradients were there when
            its masks changed. (Two forward passes under different masks before one backward pass go unnoticed.)
    """
    return SkippedLayers(model, unwrap(optimizer))


def unwrap(optimizer: Optimizer) -> MaskedOptimizer:
    """The masked optimizer inside Accelerate's and Lightning's wrappers. Raises TypeError if there is none."""
    inner = inside_wrappers(optimizer)
    if not isinstance(inner, MaskedOptimizer):
        inside = "" if inner is optimizer else f" around {type(inner).__name__}"
        raise TypeError(
            "optimizer must be a masked optimizer such as GradDropAdamW, or a wrapper around one, got "
            f"{type(optimizer).__name__}{inside}. The Trainer makes a masked one if it is given "
            "optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=...)"
        )
    return inner


class SkippedLayers:
    """What :func:`skip_dropped_layers` returns.

    Args:
        within: a frame of Python's stack that must still be running where the model is called; None skips always.
            Nobody tells a callback that its loop was interrupted, and the model may go on in another.
    """

    def __init__(self, model: nn.Module, optimizer: MaskedOptimizer, within: FrameType | None = None):
        if any(isinstance(module, nn.DataParallel) for module in model.modules()):
            raise ValueError("model must not be a DataParallel, whose replicas hide its modules; use DDP")
        self._checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._check_checkpointing()
        self._within = within
        self._optimizer = optimizer
        self._params: set[Tensor] = set(model.parameters())
        if not any(p in self._params for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer must hold parameters of the model, got one with none of {type(model).__name__}'s"
            )
        if not any(map(is_layerwise, optimizer.param_groups)):
            raise ValueError(
                "optimizer must have a group whose policy drops whole layers with skip_dropped_layers, such as "
                f"LayerGradDrop(p=0.5), got {shown_policies(optimizer.param_groups)}"
            )
        self._participation = _Participation(model)
        self._decided: set[Tensor] = set()  # what the coming step's passes switch off
        self._of_step: tuple = ()
        self._dropped: set[Tensor] = set()  # what the masks of `_of_step` drop
        self._stale: list[weakref.ref] = []  # gradients of passes that left out what is not dropped any more
        self._off: list[Tensor] = []  # what is switched off at this moment
        self._unreached: set[Tensor] = set()  # those that were on in a step and got no gradient
        self._all_stays_on = False  # a compiled graph would not notice
        self._calls = ModuleCalls(
            model, self._before_call, self._after_call, self._before_compiled, self._in_reentrant_checkpoint
        )
        self._hooks = [
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            register_optimizer_step_pre_hook(self._before_any_step),
        ]

    def remove(self) -> None:
        """Stop skipping. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._calls.remove()
        self._restore()
        self._decide(set())

    def __enter__(self) -> "SkippedLayers":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_call(self, module: nn.Module) -> bool:
        if not module.training or not self._is_in_its_loop():
            return False
        if not torch.is_grad_enabled():
            if in_reentrant_checkpoint():
                raise ValueError(_REENTRANT)
            return False
        if torch._C._current_graph_task_id() == -1:  # else a block is computed again during backward: as it was
            self._check_checkpointing()
            self._calls.renew()
            if not self._all_stays_on:
                off = self._skippable()
                self._stale += self._gradients_without_what_is_kept()
                self._decide(off)
        for param in () if self._all_stays_on else self._decided:
            if param.requires_grad:
                self._off.append(param)
                param.requires_grad_(False)
        return True

    def _before_compiled(self) -> None:
        if not GRAPHS_GO_STALE:
            return
        for param in self._off:  # and stays in the list: what ran already gives it no gradient
            param.requires_grad_(True)
        if not self._all_stays_on:
            self._all_stays_on = True
            warnings.warn(
                f"skip_dropped_layers skips nothing in a compiled model with torch {torch.__version__}, whose graphs "
                "do not notice that a parameter's requires_grad has changed; torch 2.12 or newer skips",
                UserWarning,
                stacklevel=2,
            )

    def _after_call(self) -> None:
        if self._off:
            ran = self._calls.ran
            known = self._optimizer._switched_off
            known.update(id(p) for p in self._off if p in self._frozen or self._participation.expected(p, ran))
            self._restore()

    def _restore(self) -> None:
        for param in self._off:
            param.requires_grad_(True)
        self._off = []

    def _decide(self, off: set[Tensor]) -> None:
        if off != self._decided:  # a new step, or passes whose step never came
            self._optimizer._switched_off -= {id(p) for p in self._decided}
            self._decided = off

    def _dropped_now(self, draw: int) -> set[Tensor]:
        optimizer = self._optimizer
        groups = [(g["drop"], g["effect"], g.get("layer"), len(g["params"])) for g in optimizer.param_groups]
        of_step = optimizer.seed, draw, optimizer._clock.epoch, groups
        if of_step != self._of_step:
            self._of_step, self._dropped = of_step, self._params.intersection(optimizer.dropped_layers())
        return self._dropped

    def _gradients_without_what_is_kept(self) -> list[weakref.ref]:
        """Those that are there already, if their passes left out what the masks of now do not drop."""
        known = self._optimizer._switched_off
        if not any(id(p) in known for p in self._decided - self._dropped):
            return []
        return [weakref.ref(p.grad) for p in self._params if p.grad is not None and local(p.grad).any()]

    def _check_same_masks(self) -> None:
        """Raises RuntimeError if gradients are there whose passes left out what is not dropped any more."""
        self._dropped_now(self._optimizer._clock.draw)  # not read from a device: no step was taken since the passes
        self._stale += self._gradients_without_what_is_kept()
        grads = {id(p.grad) for p in self._params if p.grad is not None}
        stale, self._stale = self._stale, []
        if any(id(grad) in grads for ref in stale if (grad := ref()) is not None):
            self._decide(set())
            raise RuntimeError(
                "skip_dropped_layers needs one mask for all passes of a step, and the masks changed between them: "
                "gradients are there that lack the layers of the masks before. Call set_epoch(), or change policies, "
                "between optimizer.step() and the next forward pass; zero_grad() leaves these gradients behind"
            )

    def _skippable(self) -> set[Tensor]:
        groups = self._optimizer.param_groups
        dropped = self._dropped_now(self._optimizer.draw)
        self._frozen = {p for g in groups if effect_of(g) == Effect.FREEZE for p in g["params"]}
        needed = {p for g in groups if effect_of(g) == Effect.UPDATE for p in g["params"]}
        off = {p for p in dropped - needed if p in self._frozen or self._participation.known(p)}
        # what is left must be reached, as far as steps have shown: models have parameters that no loss depends on
        if not any(p.requires_grad for p in self._params - off - self._unreached):
            off -= _last_layer(groups, {p for p in off - self._unreached if p.requires_grad})
        return off

    def _after_step(self) -> None:
        candidates = {p for g in self._optimizer.param_groups if g["drop"] and g["drop"].layerwise for p in g["params"]}
        seen, released = self._params - self._decided, self._optimizer._inside_backward
        had = {p for p in seen if p.grad is not None or (released is not None and id(p) in released.updated)}
        if self._calls.ran and had:
            self._unreached = (self._unreached | {p for p in seen if p.requires_grad}) - had
        self._participation.learn(seen & candidates, had & candidates, self._calls.ran)
        self._calls.ran.clear()
        self._calls.renew()
        self._decide(set())
        self._stale = []

    def _before_any_step(
        self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if optimizer is self._optimizer:
            return once_gradients_are_there(args, kwargs, self._before_update)
        known = self._optimizer._switched_off
        if not self._decided or not self._is_in_its_loop():
            return None
        if any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() has parameters whose gradients were left out by "
                f"skip_dropped_layers for a {type(self._optimizer).__name__}, which has not stepped since. End the "
                "skipping by its handle's remove() before another optimizer trains the model"
            )
        return None

    def _before_update(self) -> None:
        if not (self._decided or self._stale) or not self._is_in_its_loop():
            return
        if self._optimizer._inside_backward is None and all(p.grad is None for p in self._params):
            self._decide(set())  # no backward pass was, and nothing is missing
        self._check_same_masks()

    def _is_in_its_loop(self) -> bool:
        frame = sys._getframe() if self._within is not None else None
        while frame is not self._within:
            if frame is None:
                return False
            frame = frame.f_back
        return True

    def _check_checkpointing(self) -> None:
        for module in self._checkpointing:
            function = getattr(module, "_gradient_checkpointing_func", None)  # transformers'
            if module.gradient_checkpointing and getattr(function, "keywords", {}).get("use_reentrant"):
                raise ValueError(_REENTRANT)

    def _in_reentrant_checkpoint(self) -> None:
        if self._is_in_its_loop():
            raise ValueError(_REENTRANT)


_REENTRANT = (
    "model must not use reentrant activation checkpointing with skip_dropped_layers: behind a switched-off layer it "
    "loses all gradients. Set use_reentrant=False, for transformers in its checkpointing kwargs"
)


class _Participation:
    """Which parameters get a gradient when which modules run, learned from steps in which they were on.

    Nothing is said of a parameter that stands in a module with submodules, unless it is one of torch's: such a module
    may use it in some of its calls (XLNet's seg_embed, Wav2Vec2's masked_spec_embed). One without uses all it has.
    """

    def __init__(self, model: nn.Module):
        self._chains: dict[Tensor, list[tuple[nn.Module, ...]]] = {}  # modules around it, innermost first
        self._witnesses: dict[Tensor, tuple[nn.Module, ...]] = {}  # if one of them ran, there is a gradient; () never
        self._collect(model, ())

    def _collect(self, module: nn.Module, around: tuple[nn.Module, ...]) -> None:
        chain = (module, *around)
        plain = not module._modules or type(module).__module__.startswith("torch.nn.")
        for param in module._parameters.values():
            if param is not None:
                self._chains.setdefault(param, []).append(chain)
                if not plain:
                    self._witnesses[param] = ()
        for child in module.children():
            self._collect(child, chain)

    def known(self, param: Tensor) -> bool:
        return bool(self._witnesses.get(param))

    def expected(self, param: Tensor, ran: set[nn.Module]) -> bool:
        """Whether ``param`` would have had a gradient, had it been on."""
        return not ran.isdisjoint(self._witnesses.get(param, ()))

    def learn(self, params: set[Tensor], had_gradient: set[Tensor], ran: set[nn.Module]) -> None:
        """From a step in which ``params`` were on and the modules ``ran`` ran."""
        for param in params if ran else ():
            if not param.requires_grad or self._witnesses.get(param) == ():
                continue
            present = param in had_gradient
            if param in self._witnesses:
                if present != self.expected(param, ran):
                    self._witnesses[param] = ()
            elif present:
                innermost = [next((m for m in chain if m in ran), None) for chain in self._chains[param]]
                self._witnesses[param] = tuple(m for m in innermost if m is not None)
            elif any(chain[0] in ran for chain in self._chains[param]):
                self._witnesses[param] = ()


def _last_layer(groups: list[dict], params: set[Tensor]) -> set[Tensor]:
    """Those parameters of the last layer, in the order of groups, that has any of ``params``."""
    having = [g for g in groups if not params.isdisjoint(g["params"])]
    if not having:
        return set()
    layer = having[-1].get("layer")
    return {
        p for g in having if g is having[-1] or (layer is not None and g.get("layer") == layer) for p in g["params"]
    }
