"""torch's own descriptions of its optimizers, run against ours with drop=None: `make torch-tests`.

    python -m tests.torch_optim                 # our battery over torch.testing's OptimizerInfo (ships with torch)
    TORCH_SOURCE=/path/to/pytorch python -m tests.torch_optim [-k NAME] [-v]
                                                # also test/test_optim.py of a source tree of the same version, with
                                                # AdamW and SGD replaced by ours in its list of optimizers

What torch tests of its several implementations against each other (foreach, fused, differentiable), of complex and of
sparse tensors does not apply: those are refused, which the battery checks. Error inputs are compared by class; the
texts are ours.
"""

import copy
import os
import sys
import unittest

import torch
from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, optim_db

from graddrop_fused import GradDropAdamW, GradDropSGD

OURS = {"AdamW": GradDropAdamW, "SGD": GradDropSGD}
INFOS = [info for info in optim_db if info.name in OURS]


class Battery(unittest.TestCase):
    """Every test runs over every OptimizerInfo's inputs for the CPU; ours against torch's single-tensor class."""

    def over_inputs(self, dtype=torch.float32):
        for info in INFOS:
            for given in info.optim_inputs_func(device="cpu", dtype=dtype):
                case = f"{info.name}, {given.desc}, {dtype}"
                yield case, info, _maker(OURS[info.name], given), _maker(info.optim_cls, given, foreach=False)

    def test_trajectories(self):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            for case, _, ours, theirs in self.over_inputs(dtype):
                with self.subTest(case):
                    runs = [_train(make, dtype) for make in (ours, theirs)]
                    torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance / 10)

    def test_non_contiguous(self):
        for case, _, ours, theirs in self.over_inputs():
            with self.subTest(case):
                runs = [_train(make, torch.float32, place=lambda t: t.t().contiguous().t()) for make in (ours, theirs)]
                torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)

    def test_schedulers(self):
        for case, info, ours, theirs in self.over_inputs():
            with self.subTest(case):
                for schedulers in info.scheduler_inputs:
                    runs = [_train(make, torch.float32, schedulers=schedulers) for make in (ours, theirs)]
                    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)

    def test_param_groups(self):
        for case, _, ours, theirs in self.over_inputs():
            with self.subTest(case):
                runs = [_train(make, torch.float32, groups=True) for make in (ours, theirs)]
                torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)

    def test_state_dict_is_deterministic_and_resumes(self):
        for case, _, ours, theirs in self.over_inputs():
            with self.subTest(case):
                params, optimizer = _prepared(ours, torch.float32)
                _steps(params, optimizer, 5)
                saved = copy.deepcopy(optimizer.state_dict())
                twins = [p.detach().clone().requires_grad_() for p in params]
                for taker in (ours, theirs):  # ours, and torch's
                    others = [p.detach().clone().requires_grad_() for p in twins]
                    other = taker(others)
                    other.load_state_dict(copy.deepcopy(saved))
                    reference = [p.detach().clone().requires_grad_() for p in twins]
                    resumed = ours(reference)
                    resumed.load_state_dict(saved)
                    _steps(others, other, 5)
                    _steps(reference, resumed, 5)
                    torch.testing.assert_close(others, reference, rtol=1e-5, atol=1e-6)

    def test_missing_gradients_and_empty_groups(self):
        for case, _, ours, _ in self.over_inputs():
            with self.subTest(case):
                params, optimizer = _prepared(ours, torch.float32)
                before = [p.detach().clone() for p in params]
                optimizer.step()
                self.assertTrue(all(map(torch.equal, params, before)))
                self.assertFalse(any(optimizer.state.values()))
                ours([{"params": []}, {"params": params}]).step()

    def test_deepcopy_keeps_public_attributes(self):
        for case, _, ours, _ in self.over_inputs():
            with self.subTest(case):
                params, optimizer = _prepared(ours, torch.float32)
                _steps(params, optimizer, 1)
                names = {name for name in vars(optimizer) if not name.startswith("_")}
                self.assertEqual(names, {name for name in vars(copy.deepcopy(optimizer)) if not name.startswith("_")})

    def test_hooks(self):
        for case, _, ours, _ in self.over_inputs():
            with self.subTest(case):
                params, optimizer = _prepared(ours, torch.float32)
                called = []
                optimizer.register_step_pre_hook(lambda *_, called=called: called.append("before"))
                optimizer.register_step_post_hook(lambda *_, called=called: called.append("after"))
                _steps(params, optimizer, 1)
                self.assertEqual(called, ["before", "after"])

    def test_errors(self):
        """What torch refuses is refused, unless it concerns foreach, which we have no use for."""
        for info in INFOS:
            for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
                given = error.optimizer_error_input
                if given.kwargs.get("foreach") or error.error_on is not OptimizerErrorEnum.CONSTRUCTION_ERROR:
                    continue
                params = [torch.nn.Parameter(torch.zeros(1, 1))] if given.params is None else given.params
                with self.subTest(optimizer=info.name, error=given.desc):
                    with self.assertRaises((TypeError, ValueError, RuntimeError)):
                        OURS[info.name](params, **given.kwargs)

    def test_what_is_refused(self):
        for make in OURS.values():
            with self.assertRaises(ValueError):
                make([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
            p = torch.nn.Parameter(torch.zeros(3))
            p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
            with self.assertRaises(ValueError):
                make([p]).step()


def _maker(cls, given, **more):
    """A constructor that shares nothing with the last call: a scheduler changes a tensor lr in place."""
    return lambda params: cls(params, **copy.deepcopy(given.kwargs), **more)


def _prepared(make, dtype, place=lambda tensor: tensor, groups=False):
    generator = torch.Generator().manual_seed(7)
    weight = place(torch.randn(10, 5, generator=generator, dtype=dtype)).requires_grad_()
    bias = torch.randn(10, generator=generator, dtype=dtype).requires_grad_()
    return [weight, bias], make([{"params": [weight]}, {"params": [bias], "lr": 0.01}] if groups else [weight, bias])


def _steps(params, optimizer, count, schedulers=()):
    weight, bias = params
    data = torch.linspace(-1, 1, 5, dtype=weight.dtype)

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(data) + bias).pow(2).sum()
        loss.backward()
        return loss

    for _ in range(count):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss) if plateau else scheduler.step()


def _train(make, dtype, *, place=lambda tensor: tensor, groups=False, schedulers=()):
    params, optimizer = _prepared(make, dtype, place, groups)
    _steps(params, optimizer, 20, [scheduler(optimizer) for scheduler in schedulers])
    return [p.detach() for p in params]


def torchs_own_tests(source: str) -> unittest.TestSuite:
    """TestOptimRenewed of a source tree's test/test_optim.py, over ours in place of AdamW and SGD."""
    for info in INFOS:
        info.optim_cls = type(info.name, (OURS[info.name],), {})  # its tests are called by the class's name
        info.supported_impls = ()
        info.supports_complex = info.supports_sparse = False
    common_optimizers.optim_db[:] = INFOS
    sys.path.insert(0, os.path.join(source, "test"))
    import test_optim

    return unittest.defaultTestLoader.loadTestsFromModule(test_optim)


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    source = os.environ.get("TORCH_SOURCE")
    if source:
        tests.addTests(torchs_own_tests(source))
    return tests


assert all(isinstance(info, OptimizerInfo) for info in INFOS) and len(INFOS) == len(OURS)

if __name__ == "__main__":
    unittest.main()
