"""The life of a masked optimizer: what GradDropAdamW, GradDropSGD and GradDropLion have in common.

A step reads straight down: gather the gradients, ask whether the last plan fits, ask the policies for their numbers,
one backend call per bucket of tensors, count.
"""

import _signal
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import checkpoint, compact, dispatch, preview, state, step_hooks, validate
from .buckets import Plan, UpdateBucket, make_buckets
from .checks import check_bool
from .clock import Clock
from .contract import Mask
from .cuda_graph import check_not_capturing
from .fakes import check_no_fake_mode, is_fake
from .groups import Layers, Member, members, policy_of, rounds_stochastically
from .numbers import DeviceNumbers, HostNumbers, StepNumbers
from .policies import Policy, Row
from .rules import Rule
from .tables import group_step


class MaskedOptimizer(Optimizer):
    """An optimizer whose kernel draws the gradient's mask, rescales by 1/q and updates in one pass over memory.

    A subclass names its update rule and gives its signature; its hyperparameters stand in ``defaults``.
    """

    rule_class: ClassVar[type[Rule]]
    profile_hook_step = staticmethod(step_hooks.profile_hook_step)  # what torch decorates `step` with

    def __init__(
        self,
        params: ParamsT,
        hyperparameters: dict[str, Any],
        *,
        capturable: bool,
        drop: Policy | None,
        seed: int,
        steps_per_epoch: int | None,
        effect: str | None,
        state_dtype: torch.dtype | None,
        rounding: str,
        backend: str,
        active_state: bool = False,
    ):
        dispatch.check_name(backend)
        check_bool("active_state", active_state)
        validate.state_dtype(state_dtype)
        self.backend = backend
        self.state_dtype = state_dtype
        self.active_state = active_state
        self._asked: tuple[tuple, HostNumbers] | None = None  # groups' numbers for the key of active states
        self._checked: tuple | None = None  # what the groups were when they were last looked at as a whole
        self._clock = Clock(seed, steps_per_epoch)
        self._plan: Plan | None = None
        self._device_numbers: dict[torch.device, DeviceNumbers] = {}
        self._inside_backward: InsideBackward | None = None
        self._switched_off: set[int] = set()  # id(param): its missing gradient is zero (skip_dropped_layers)
        defaults = {**hyperparameters, "capturable": capturable, "drop": drop, "effect": effect}
        defaults["rounding"] = rounding
        validate.group_options(defaults, self.rule_class)
        super().__init__(params, defaults)
        validate.all_groups(self.param_groups)
        validate.policy_is_used(drop, self.param_groups)
        validate.warn_of_groups_as_layers(self.param_groups)
        # as torch's fused optimizers: GradScaler hands over grad_scale and found_inf in place of unscaling
        self._step_supports_amp_scaling = bool(defaults.get("fused"))

    # What a mask depends on

    @property
    def seed(self) -> int:
        return self._clock.seed

    @property
    def draw(self) -> int:
        """Steps taken; those that GradScaler skipped do not count. Synchronises under capturable."""
        for numbers in self._device_numbers.values():
            self._clock.draw = self.param_groups[0]["draw"] = int(numbers.draw)
        return self._clock.draw

    @property
    def epoch(self) -> int | None:
        """The epoch that the coming step belongs to; None if nobody told."""
        return self._clock.epoch_at(self.draw + 1)

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch the coming steps belong to, counted from 0. Telling it again changes nothing.

        Raises:
            RuntimeError: if steps_per_epoch was given, or in the middle of a step with release_gradients. TypeError,
                ValueError: on what is no epoch.
        """
        if self._inside_backward is not None and epoch != self._clock.epoch:
            self._inside_backward.before_epoch()
        self._clock.set_epoch(epoch)
        self._show_clock()
        for numbers in self._device_numbers.values():
            numbers.set_epoch(epoch)

    def keep_mask(self, param: Tensor) -> Tensor:
        """The mask that the coming step applies to ``param``: bool, of its shape (a DTensor for a DTensor).

        Drawn by the reference, whatever the backend.

        Raises:
            ValueError: if ``param`` is not in this optimizer. RuntimeError: if the epoch is not known.
        """
        self._clock.draw = self.draw
        return preview.keep_mask(self.param_groups, self._clock, param)

    def dropped_layers(self) -> list[Tensor]:
        """The parameters that the coming step drops as a whole, under LayerGradDrop and GradFreeze."""
        self._clock.draw = self.draw
        return preview.dropped_layers(self.param_groups, self._clock)

    # A step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One masked step over all parameters that have a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: if a policy follows epochs that nobody told. TypeError, ValueError: on a gradient that cannot
                serve, or on a parameter or its state that was changed into what cannot. Parameters and state are then
                as they were.
        """
        if torch.compiler.is_compiling():
            return self._step_between_graphs(closure)
        # not by torch.no_grad(), whose calls of Python functions take a tenth of a small step
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return self._step(closure)
        finally:
            torch._C._set_grad_enabled(enabled)

    @torch.compiler.disable  # one graph break; a step's tables and launches are nothing to trace
    def _step_between_graphs(self, closure: Callable[[], Any] | None) -> Any:
        with torch.no_grad():
            return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if self._inside_backward is not None:
            return self._inside_backward.end_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        capturable = self._capturable()
        if not capturable:
            check_not_capturing()
            if found_inf is not None:
                if found_inf.item():
                    return loss
                found_inf = None
        if self._plan is None and self._all_fake():
            self._step_on_fakes()
            return loss
        plan = self._fitting_plan()
        try:
            prepare = self._prepare_on_devices if capturable else self._prepare_on_host
            commit = prepare(plan, found_inf)
            with UninterruptedByKeyboard():
                self._launch(plan, commit, grad_scale, found_inf)
        finally:
            plan.release_gradients()
        return loss

    def _launch(
        self,
        plan: Plan,
        commit: Callable[[], None],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update what is in ``plan``, and ``commit`` the step.

        All that may fail comes before the first launch, but for what the reference allocates between two tensors. A
        step that is broken off there is one in which the rest had no gradients: it counts, unless it reached nothing.
        """
        for bucket in plan.buckets:
            bucket.batch.done = 0
        launches, seed = [], self._clock.seed
        for bucket in plan.buckets:
            scale, inf = _to(grad_scale, bucket.device), _to(found_inf, bucket.device)
            launches.append(
                bucket.backend.prepare(bucket.batch, bucket.rule, seed=seed, grad_scale=scale, found_inf=inf)
            )
        try:
            for bucket, launch in zip(plan.buckets, launches, strict=True):
                bucket.run(launch)
        except BaseException:
            if any(bucket.batch.done for bucket in plan.buckets):
                commit()
            raise
        commit()

    def _capturable(self) -> bool:
        return bool(self.param_groups and self.param_groups[0]["capturable"])

    def _all_fake(self) -> bool:
        params = [p for group in self.param_groups for p in group["params"]]
        return bool(params) and all(map(is_fake, params))

    def _step_on_fakes(self) -> None:
        """Under FakeTensorMode a step makes its state, for those who count memory: kernels allocate nothing else."""
        for member in members(self.param_groups):
            if member.param.grad is not None:
                validate.gradient(member, member.param.grad)
                rule, entry = self.rule_class.of(self.param_groups[member.group]), self.state[member.param]
                entry.update(state.complete(entry, member.param, rule, state.dtype_of(member.param, self.state_dtype)))
                entry["step"] += 1
        self._clock.draw = self.param_groups[0]["draw"] = self._clock.next_draw()

    def _prepare_on_host(self, plan: Plan, found_inf: None) -> Callable[[], None]:
        """Make every bucket ready for the coming step; returns what counts it."""
        coming = plan.numbers.of_step(self._clock, self._clock.next_draw())
        self._fill_on_host(plan, coming)
        return partial(self._count, coming)

    def _fill_on_host(self, plan: Plan, coming: StepNumbers) -> None:
        groups, effects, seed = self.param_groups, plan.numbers.effects, self._clock.seed
        for bucket in plan.buckets:
            if coming.packed:
                bucket.pack(coming.packed, seed)
            steps = {g: group_step(groups[g], bucket.rule, *coming.rows[g], effects[g]) for g in bucket.by_group}
            bucket.prepare_on_host(steps, coming.draw, seed)

    def _count(self, coming: StepNumbers) -> None:
        self._clock.draw = self.param_groups[0]["draw"] = coming.draw

    def _prepare_on_devices(self, plan: Plan, found_inf: Tensor | None) -> Callable[[], None]:
        groups = self.param_groups
        for device in {bucket.device for bucket in plan.buckets} - self._device_numbers.keys():
            self._clock.draw = self.draw  # synchronises, which a capture forbids: only for a device not met before
            self._device_numbers[device] = DeviceNumbers(groups, plan.layers, self._clock, device)
        now = {d: numbers.advance(_to(found_inf, d)) for d, numbers in self._device_numbers.items()}
        for bucket in plan.buckets:
            numbers = self._device_numbers[bucket.device]
            bucket.batch.pairs = frozenset().union(*(numbers.pairs[group] for group in bucket.by_group))
            inf = _to(found_inf, bucket.device)
            bucket.prepare_on_device(groups, now[bucket.device], numbers.next_draw, inf, self.seed)

        def commit() -> None:
            for numbers in self._device_numbers.values():
                numbers.commit()
            if not self._device_numbers:
                self._clock.draw = groups[0]["draw"] = self._clock.next_draw()

        return commit

    # Plans

    def _fitting_plan(self) -> Plan:
        """A plan whose buckets have taken the gradients of now: the last one, unless it no longer fits."""
        check_no_fake_mode()
        self._check_shown_clock()
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        plan, key, off = self._plan, self._plan_key(), self._switched_off
        if plan is None or not plan.fits(key, params, grads, self.state, off):
            plan = self._plan = self._replan(plan, key, params, grads, lambda: self.state, off)
        return plan

    def _replan(
        self,
        plan: Plan | None,
        key: tuple,
        params: list[Tensor],
        grads: list[Tensor | None],
        state_of_params: Callable[[], Mapping[Tensor, dict[str, Any]]],
        switched_off: set[int],
    ) -> Plan:
        """A new plan over ``params``, in the groups' order, for one that does not fit; it has taken ``grads``."""
        check_not_capturing()
        if plan is not None and plan.key != key:
            plan.let_go()
            self._clear()  # device tables hold the groups' schedules
        plan = self._make_plan(key, params, grads, state_of_params, switched_off)
        if not plan.fits(key, params, grads, state_of_params(), switched_off):
            raise AssertionError("a new plan must fit the gradients that it was made for")
        return plan

    def _plan_key(self) -> tuple:
        rule_of = self.rule_class.of
        key: tuple = tuple(
            [
                (g["drop"], g["effect"], g.get("rounding"), g.get("layer"), g["capturable"], rule_of(g))
                for g in self.param_groups
            ]
        )
        if torch.is_inference_mode_enabled():  # what is made in it must not be updated outside
            key = key, "inference"
        if not self.active_state:
            return key
        rows = self._coming_rows(key)
        return key, self.seed, tuple((r, word if r.mask in (Mask.BLOCK, Mask.ELEMENT) else 0) for r, word in rows)

    def _coming_rows(self, key: tuple) -> list[tuple[Row, int]]:
        """The groups' rows in the coming step, which say what state there must be. ``key``: what they are made from."""
        if self._asked is None or self._asked[0] != key:
            for group in self.param_groups:
                self._check_group(group)
            self._asked = key, HostNumbers(self.param_groups, Layers.of(self.param_groups))
        return self._asked[1].at(self._clock, self._clock.next_draw())

    def _check_group(self, group: Mapping[str, Any]) -> None:
        validate.group_options(group, self.rule_class)
        if self.active_state:
            compact.check_group(group)

    def _check_groups(self, key: tuple) -> None:
        """Each group, and what only all together show; once for all plans of a step, of this ``key``."""
        held = [([*group.get("param_names", [])], *map(id, group["params"])) for group in self.param_groups]
        seen = key, self._clock.draw, self._clock.epoch, held
        if seen != self._checked:
            for group in self.param_groups:
                self._check_group(group)
                self._clock.check_epoch_known(policy_of(group))
            validate.all_groups(self.param_groups)
            self._checked = seen

    def _make_plan(
        self,
        key: tuple,
        params: list[Tensor],
        grads: list[Tensor | None],
        state_of_params: Callable[[], Mapping[Tensor, dict[str, Any]]],
        switched_off: set[int],
    ) -> Plan:
        groups = self.param_groups
        planned = set(map(id, params))
        every = members(groups, planned)
        self._check_groups(key)
        rules = [self.rule_class.of(group) for group in groups]
        check_state = compact.check_state if self.active_state else state.check
        wanted = []
        for i, (member, grad) in enumerate(zip(every, grads, strict=True)):
            entry = self.state.get(member.param, {})
            if grad is not None or entry or id(member.param) in switched_off:
                validate.param(member.called, member.param)
                validate.gradient(member, grad)
                check_state(member.called, entry, member.param, rules[member.group])
                wanted.append(i)
        validate.no_shared_memory([every[i] for i in wanted])
        dtypes = [param.dtype if grad is None else grad.dtype for param, grad in zip(params, grads, strict=True)]

        def key_of(i: int) -> tuple[Rule, torch.dtype, tuple]:
            kinds = state.dtype_of(params[i], self.state_dtype), rounds_stochastically(groups[every[i].group])
            return rules[every[i].group], dtypes[i], kinds

        ordinary, packed = self._turn_over(key, every, wanted, rules)
        make = partial(make_buckets, groups, every)
        choose = partial(dispatch.choose_for, self.backend)
        buckets = make(ordinary, key_of, choose, UpdateBucket, on_device=self._capturable())
        missing = [
            state.missing(
                b.members,
                self.state,
                b.rule,
                state.dtype_of(b.params[0], self.state_dtype),
                [kind.blocks for kind in b.kinds],
            )
            for b in buckets
        ]
        for bucket, entries in zip(buckets, missing, strict=True):
            bucket.give_state(state.adopt(bucket.members, self.state, entries, [kind.blocks for kind in bucket.kinds]))
        for bucket in make(packed, key_of, partial(compact.choose, self.backend), compact.CompactBucket):
            bucket.give_state([self.state[p] for p in bucket.params])
            buckets.append(bucket)
        for bucket in buckets:
            if rounds_stochastically(groups[bucket.members[0].group]):
                bucket.round_stochastically()
        stateless = sorted(set(range(len(params))).difference(wanted))
        layers = Layers.of(groups)
        numbers = HostNumbers(groups, layers)
        held = state_of_params()
        return Plan(key, params, [*held, *held.values()], layers, numbers, buckets, stateless)

    def _turn_over(
        self, key: tuple, every: list[Member], positions: list[int], rules: list[Rule]
    ) -> tuple[list[int], list[int]]:
        """Bring the state of the parameters at ``positions`` to the coming step's masks, with active_state.

        Returns the positions of those with ordinary state and of those with compact state; others are frozen.
        """
        if not self.active_state:
            return positions, []
        groups, rows = self.param_groups, self._coming_rows(key[0])
        for i in positions:
            if compact.has_blocks(groups[every[i].group]):
                compact.choose(self.backend, every[i].param)  # raises before anything changes
        dtype_of = partial(state.dtype_of, state_dtype=self.state_dtype)
        compact.turn_over([every[i] for i in positions], groups, self.state, rows, rules, dtype_of, self.seed)
        ordinary, packed = [], []
        for i in positions:
            member = every[i]
            entry = self.state.get(member.param, {})
            if compact.is_compact(entry):
                packed += [i] if len(entry[compact.ACTIVE]) else []
            elif rows[member.group][0].mask != Mask.DROP and not compact.has_blocks(groups[member.group]):
                ordinary.append(i)
        return ordinary, packed

    def _turn_over_idle(self, key: tuple, params: list[Tensor]) -> None:
        """The same for parameters that the step does not update: frozen ones lose what state they have."""
        rules = [self.rule_class.of(group) for group in self.param_groups]
        every = members(self.param_groups, {id(p) for p in params if p in self.state})
        self._turn_over(key, every, list(range(len(every))), rules)

    def _clear(self) -> None:
        """Drop what is derived from groups and tensors; the next step plans anew."""
        if self._device_numbers:
            self._clock.draw = self.draw
        self._device_numbers = {}
        self._plan = None
        if self._inside_backward is not None:
            self._inside_backward.clear()

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with ``drop``, ``effect`` and ``layer`` in the group. Raises before anything changes."""
        checked = validate.new_group(param_group, self.defaults, self.param_groups, self.rule_class)
        if self.active_state:
            compact.check_group({**self.defaults, **checked})
        super().add_param_group(checked)
        self._clear()
        self._show_clock()

    def _show_clock(self) -> None:
        """The first group shows seed, draw and epoch: from a flattened state dict torch loads the entries that groups
        have by then, and no others. They are read nowhere else."""
        if self.param_groups:
            self.param_groups[0].update(checkpoint.of_clock(self._clock))

    def _check_shown_clock(self) -> None:
        if not self.param_groups:
            return
        # under capturable both have the draw that was last read from the device
        shown, clock = self.param_groups[0], self._clock.state()
        if clock.items() <= shown.items():
            return
        for name, value in clock.items():
            if shown.get(name, value) != value:
                changed = shown[name]
                self._show_clock()
                raise ValueError(
                    f"{name} in a param group must stay {value!r}, got {changed!r} (set back now): the optimizer keeps "
                    "it elsewhere; construct with seed= or steps_per_epoch=, call set_epoch(), or load a checkpoint"
                )

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Groups carry policies as plain numbers and strings, and seed, draw, epoch, steps_per_epoch."""
        if self._inside_backward is not None:
            self._inside_backward.check_whole("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._clock.draw = self.draw
        entries = compact.saved(self.state, self._clock.draw) if self.active_state else self.state
        packed = checkpoint.pack(self.param_groups, entries, self._clock)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, packed)
            packed = packed if replaced is None else replaced
        return packed

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a checkpoint of ours or of the torch optimizer of the same name.

        The checkpoint's seed, draw, epoch and policies win over the constructor's, as its learning rate does; what it
        lacks stays. A UserWarning says so where policies differ.

        Raises:
            TypeError, ValueError: naming the entry that is missing, extra, mis-shaped or of a value that cannot be;
                nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict as state_dict() makes it, got {type(state_dict)}")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else dict(replaced)
        loaded = checkpoint.check(state_dict, self.param_groups, self._clock, self.rule_class, self.active_state)
        entries = {
            param: compact.restored(param, entry, rule, state.dtype_of(param, self.state_dtype))
            for param, (entry, rule) in loaded.entries.items()
        }
        checkpoint.warn_of_other_policies(self.param_groups, loaded.groups)
        self._clear()
        for group, values in zip(self.param_groups, loaded.groups, strict=True):
            params = group["params"]
            group.clear()
            group.update({**values, "params": params})
        self.state.clear()
        self.state.update(entries)
        self._clock = loaded.clock
        self._show_clock()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._clock.draw = self.draw
        mine = ("backend", "state_dtype", "active_state", "_clock")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_switched_off", set())
        self.__dict__.setdefault("active_state", False)
        self._asked = self._checked = None
        self._device_numbers = {}
        self._plan = None
        self._inside_backward = None


class InsideBackward(Protocol):
    """What runs a step's updates before its step() is called (release_gradients)."""

    updated: set[int]  # ids of the parameters that the last step has updated

    def end_step(self, closure: Callable[[], Any] | None) -> None:
        """Update what is left, and count the step."""

    def clear(self) -> None:
        """Groups or tensors have changed: drop what is derived from them."""

    def check_whole(self, what: str) -> None:
        """Raises RuntimeError, naming ``what``, if a step has begun and not ended."""

    def before_epoch(self) -> None:
        """The epoch is about to change. Raises RuntimeError in the middle of a step."""


class UninterruptedByKeyboard:
    """Holds Ctrl-C back until a step is whole: half of one would leave counts, parameters and state apart."""

    # signal's own functions turn each result into an enum, which takes longer than a small step

    def __enter__(self) -> None:
        self._pending: list[tuple] = []
        self._handler = _signal.getsignal(_signal.SIGINT)
        if callable(self._handler):
            try:
                _signal.signal(_signal.SIGINT, lambda *arguments: self._pending.append(arguments))
            except ValueError:  # not the main thread, which alone is interrupted
                self._handler = None

    def __exit__(self, *_: object) -> None:
        if callable(self._handler):
            _signal.signal(_signal.SIGINT, self._handler)
            if self._pending:
                self._handler(*self._pending[0])


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
