"""skip_dropped_rows: the same trajectory up to rounding, from weight gradients of kept rows alone."""

import copy
from functools import partial

import pytest
import ranks
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradDropLion,
    GradDropSGD,
    LayerGradDrop,
    LinearAnneal,
    release_gradients,
    skip_dropped_layers,
    skip_dropped_rows,
)
from graddrop_fused.rows import _product_of_rows

ADAMW = partial(GradDropAdamW, lr=1e-2, weight_decay=0.1)
OPTIMIZERS = {
    "AdamW": ADAMW,
    "SGD": partial(GradDropSGD, lr=1e-2, momentum=0.9),
    "Lion": partial(GradDropLion, lr=1e-3, weight_decay=0.1),
}
POLICIES = {
    "drawn": GradDrop(p=0.7, block="row"),
    "annealed": GradDrop(anneal=LinearAnneal(start=0.9, total_steps=5), block="row"),
    "held": GradDrop(p=0.7, block="row", hold=2),
    "accumulate": GradDropEpoch(p=0.7, block="row"),
    "toggle": GradDropEpoch(p=0.7, block="row", toggle=True),
    "replacement": GradDropEpoch(p=0.7, block="row", replacement=True),
}
STEPS = 7


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(17, 130), nn.Linear(130, 17, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Some of its weights must be left alone: a tied one, and that of a subclass of nn.Linear."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(23, 17)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.other = nn.modules.linear.NonDynamicallyQuantizableLinear(17, 17)
        self.head = nn.Linear(17, 23)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(block(x))  # each weight twice in a pass
        return nn.functional.cross_entropy(self.head(self.other(x)).flatten(0, 1), ids.roll(1, 0).flatten())


def build(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def ids(step):
    return torch.randint(0, 23, (4, 6), generator=torch.Generator().manual_seed(step))


def make(model, drop, optimizer=ADAMW, **options):
    return optimizer(model.named_parameters(), drop=drop, seed=2**40 + 3, steps_per_epoch=2, **options)


def train(model, opt, steps=STEPS, accumulate=1, compute=lambda model, step: model(ids(step))):
    for step in range(steps):
        for micro in range(accumulate):
            compute(model, accumulate * step + micro).backward()
        opt.step()
        opt.zero_grad()


def assert_close(a, b, opt_a, opt_b, tolerance=1e-9):
    assert opt_a.draw == opt_b.draw
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=name)
        for key in opt_a.state[p]:
            torch.testing.assert_close(opt_a.state[p][key], opt_b.state[q][key], rtol=0, atol=tolerance)


def compare(drop, dtype=torch.float64, tolerance=1e-9, train=train, **options):
    plain, model = build(dtype), build(dtype)
    opts = [make(m, drop, **options) for m in (plain, model)]
    train(plain, opts[0])
    with skip_dropped_rows(model, opts[1]) as handle:
        assert len(handle.modules) == 4
        train(model, opts[1])
    assert_close(plain, model, *opts, tolerance)


@pytest.mark.parametrize("effect", ["gradient", "freeze"])
@pytest.mark.parametrize("drop", POLICIES.values(), ids=POLICIES)
def test_same_trajectory(drop, effect):
    compare(drop, effect=effect)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_same_trajectory_of_every_optimizer(optimizer, backend):
    compare(POLICIES["drawn"], optimizer=optimizer, backend=backend)


def test_same_trajectory_with_accumulation():
    compare(POLICIES["drawn"], train=partial(train, accumulate=3))


def test_single_precision():
    """SGD, whose steps are as near as gradients are; AdamW divides a gradient's rounding by its own size."""
    compare(POLICIES["drawn"], torch.float32, tolerance=1e-5, optimizer=OPTIMIZERS["SGD"])


def test_autocast():
    """Forward, and the gradients of kept rows, are autocast's own."""
    plain, model = build(torch.float32), build(torch.float32)
    opt = make(model, POLICIES["drawn"])
    with skip_dropped_rows(model, opt):
        losses = []
        for m in (plain, model):
            with torch.autocast("cpu", torch.bfloat16):
                losses.append(m(ids(0)))
            losses[-1].backward()
    assert torch.equal(*losses)
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert q.grad.dtype == p.grad.dtype, name
        mask = opt.keep_mask(q) if name.startswith("blocks") and q.dim() == 2 else torch.ones_like(q, dtype=torch.bool)
        torch.testing.assert_close(q.grad, p.grad * mask, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("effect", ["gradient", "freeze"])
def test_gradients_of_dropped_rows_are_zero(effect):
    """Kept rows have the gradient that plain autograd gives them."""
    plain, model = build(), build()
    opt = make(model, POLICIES["drawn"], effect=effect)
    with skip_dropped_rows(model, opt):
        for step in range(3):
            for m in (plain, model):
                m.zero_grad()
                m(ids(step)).backward()
            partly = set()
            for (name, p), q in zip(plain.named_parameters(), model.named_parameters(), strict=True):
                linear_weight = name.startswith("blocks") and p.dim() == 2
                mask = opt.keep_mask(q[1]) if linear_weight else torch.ones_like(p, dtype=torch.bool)
                assert torch.equal(q[1].grad != 0, mask & (p.grad != 0)), name
                torch.testing.assert_close(q[1].grad, p.grad * mask, rtol=0, atol=1e-14)
                partly.add(0 < mask.double().mean().item() < 1)
            assert partly == {True, False}
            opt._clock.draw += 1


class Embedded(nn.Module):
    """An nn.Embedding of its own, with a padding index or without."""

    def __init__(self, padding=None, rows=23):
        super().__init__()
        self.embedding = nn.Embedding(rows, 5, padding_idx=padding)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        return nn.functional.cross_entropy(self.head(self.embedding(ids)).flatten(0, 1), ids.flatten().long() % 3)


def embedded(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Embedded(**options).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [None, 0, 22])
def test_embeddings_have_plain_gradients_of_kept_rows(padding, dtype):
    """Bit for bit, with ids that occur many times, once and never; also where all rows are dropped, or none."""
    plain, model = embedded(dtype, padding=padding), embedded(dtype, padding=padding)
    opt = make(model, POLICIES["drawn"])
    shares = set()
    with skip_dropped_rows(model, opt) as handle:
        assert model.embedding in handle.modules
        for step in range(4):
            for m in (plain, model):
                m.zero_grad()
                for as_type in (torch.int64, torch.int32):  # twice: the second is added
                    m(ids(step).to(as_type)).backward()
            mask = opt.keep_mask(model.embedding.weight)
            shares.add(mask.double().mean().item())
            assert torch.equal(model.embedding.weight.grad, plain.embedding.weight.grad * mask)
            opt._clock.draw += 1
    assert len(shares) > 1


@pytest.mark.parametrize("p", [0.0, 0.99])
def test_embeddings_of_few_rows(p):
    plain, model = embedded(rows=24), embedded(rows=24)
    opts = [make(m, GradDrop(p=p, block="row")) for m in (plain, model)]
    train(plain, opts[0])
    with skip_dropped_rows(model, opts[1]):
        train(model, opts[1])
    assert_close(plain, model, *opts)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_embeddings_that_do_more_are_left_alone(option):
    model = nn.Sequential(nn.Embedding(9, 5, **option), nn.Linear(5, 3))
    with skip_dropped_rows(model, make(model, POLICIES["drawn"])) as handle:
        assert handle.modules == [model[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_products_of_any_number_of_rows(rows, dtype):
    """Of 16 bits they are made for a rounded number of rows, of which the surplus is not used."""
    grad, x = torch.randint(-4, 5, (6, 40)).to(dtype), torch.randint(-4, 5, (6, 7)).to(dtype)
    chosen = torch.randperm(40)[:rows].sort().values
    assert torch.equal(_product_of_rows(grad, chosen, x), (grad.t() @ x)[chosen])


def test_the_product_is_of_kept_rows_alone():
    """Floating-point operations of a pass, counted by torch: those of dropped rows are missing, and no others."""
    from torch.utils.flop_counter import FlopCounterMode

    def operations(model):
        loss = model(ids(0))
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    model = build()
    opt = make(model, POLICIES["drawn"])
    everything = operations(model)
    with skip_dropped_rows(model, opt) as handle:
        some = operations(model)
    dropped = [(~opt.keep_mask(m.weight)).sum().item() for m in handle.modules]
    # each weight is used twice, on 24 tokens, and a multiplication and an addition are two operations
    assert everything - some == sum(2 * 24 * 2 * count for count in dropped) > 0


@pytest.mark.parametrize("effect", ["gradient", "freeze"])
def test_with_released_gradients(effect):
    def train_releasing(model, opt):
        with release_gradients(model, opt):
            train(model, opt)
            assert not any(p.grad is not None for p in model.parameters())

    plain, model = build(), build()
    opts = [make(m, POLICIES["toggle"], effect=effect) for m in (plain, model)]
    train(plain, opts[0])
    with skip_dropped_rows(model, opts[1]):
        train_releasing(model, opts[1])
    assert_close(plain, model, *opts)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("build", [build, partial(embedded, padding=3)], ids=["linear", "embedding"])
def test_what_nobody_reads_is_not_written(build, backend, monkeypatch):
    """Gradients that are released under "freeze": dropped rows are left as memory came, here with NaN."""
    plain, model = build(), build()
    opts = [make(m, POLICIES["drawn"], effect="freeze", backend=backend) for m in (plain, model)]
    train(plain, opts[0])
    poisoned = []

    def poison(tensor):
        poisoned.append(torch.full_like(tensor, float("nan")))
        return poisoned[-1]

    with skip_dropped_rows(model, opts[1]), release_gradients(model, opts[1]), monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", poison)
        train(model, opts[1])
    assert poisoned
    assert_close(plain, model, *opts)


@pytest.mark.parametrize("rows_first", [True, False])
def test_with_skipped_layers(rows_first):
    """Groups of two policies: one drops rows, the other layers."""

    def run(skip):
        model = build()
        groups = [
            {"params": list(block.named_parameters(f"blocks.{i}")), "layer": str(i), "drop": drop}
            for i, (block, drop) in enumerate(zip(model.blocks, [POLICIES["drawn"], LayerGradDrop(p=0.5)], strict=True))
        ]
        rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("blocks")]
        opt = ADAMW([*groups, {"params": rest, "drop": None}], seed=3)
        functions = [skip_dropped_rows, skip_dropped_layers] if rows_first else [skip_dropped_layers, skip_dropped_rows]
        handles = [function(model, opt) for function in functions] if skip else []
        train(model, opt, steps=6)
        for handle in handles:  # the first made goes first: it no longer stands where it was put
            handle.remove()
        train(model, opt, steps=2)
        return model, opt

    (a, opt_a), (b, opt_b) = run(False), run(True)
    assert_close(a, b, opt_a, opt_b)


@pytest.mark.parametrize("rows_first", [True, False])
def test_with_skipped_layers_whose_linear_modules_a_checkpoint_calls(rows_first):
    """A policy of rows gives way to one of layers; the function that is checkpointed is no module."""

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return self[2](checkpoint(lambda x: self[1](self[0](x)).tanh(), x, use_reentrant=False))

    def run(skip):
        torch.manual_seed(0)
        model = Checkpointed(*(nn.Linear(5, 5) for _ in range(3))).double()
        groups = [{"params": list(linear.named_parameters(f"{i}"))} for i, linear in enumerate(model)]
        groups[2]["drop"] = LayerGradDrop(p=0.5)
        opt = ADAMW(groups, drop=POLICIES["drawn"], seed=3, effect="freeze")
        functions = [skip_dropped_rows, skip_dropped_layers] if rows_first else [skip_dropped_layers, skip_dropped_rows]
        handles = [function(model, opt) for function in functions] if skip else []
        opt.param_groups[1]["drop"] = LayerGradDrop(p=0.5)
        for step in range(6):
            model(torch.full((4, 5), step + 1.0, dtype=torch.float64)).sum().backward()
            opt.step()
            opt.zero_grad()
        for handle in handles:
            handle.remove()
        return model, opt

    (a, opt_a), (b, opt_b) = run(False), run(True)
    assert_close(a, b, opt_a, opt_b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_computes_all_rows(backend):
    torch._dynamo.reset()
    compare(POLICIES["drawn"], train=lambda model, opt: train(torch.compile(model, backend=backend), opt, steps=3))


def test_second_derivatives():
    plain, model = build(), build()
    opt = make(model, POLICIES["drawn"])
    with skip_dropped_rows(model, opt):
        found = []
        for m in (plain, model):
            grads = torch.autograd.grad(m(ids(0)), [m.blocks[0].up.bias], create_graph=True)
            found.append(torch.autograd.grad((grads[0] ** 2).sum(), [m.embedding.weight])[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for jvp
def test_functional_transforms_see_a_plain_linear():
    model = build()
    opt = make(model, POLICIES["drawn"])
    x = torch.randn(3, 17, dtype=torch.float64)
    with skip_dropped_rows(model, opt):
        jacobian = torch.func.jacrev(lambda v: model.blocks[0].up(v))(x[0])
        _, tangent = torch.func.jvp(model.blocks[0].up, (x,), (torch.ones_like(x),))
    weight = model.blocks[0].up.weight
    torch.testing.assert_close(jacobian, weight.detach())
    torch.testing.assert_close(tangent, torch.ones_like(x) @ weight.t())


def test_what_is_left_alone():
    def modules(model, opt):
        with skip_dropped_rows(model, opt) as handle:
            return {name for name, m in model.named_modules() if any(m is n for n in handle.modules)}

    everything = {f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")}
    model = build()
    opt = make(model, POLICIES["drawn"])
    assert modules(model, opt) == everything
    hook = model.blocks[0].up.weight.register_hook(lambda g: None)
    assert modules(model, opt) == everything - {"blocks.0.up"}
    hook.remove()
    hook = model.blocks[0].up.weight.register_post_accumulate_grad_hook(lambda p: None)
    assert modules(model, opt) == everything - {"blocks.0.up"}
    hook.remove()
    model.blocks[1].up.forward = lambda x: linear(x, model.blocks[1].up.weight)
    assert modules(model, opt) == everything - {"blocks.1.up"}
    del model.blocks[1].up.forward
    torch.nn.utils.parametrize.register_parametrization(model.blocks[1].down, "weight", nn.Identity())
    opt = make(model, POLICIES["drawn"])
    assert modules(model, opt) == everything - {"blocks.1.down"}
    opt = ADAMW([{"params": model.blocks[0].up.parameters()}], drop=POLICIES["drawn"])
    assert modules(model, opt) == {"blocks.0.up"}


def test_a_hook_that_comes_later_sees_all_rows():
    model = build()
    opt = make(model, POLICIES["drawn"])
    seen = []
    with skip_dropped_rows(model, opt):
        model.blocks[0].up.weight.register_hook(lambda g: seen.append((g != 0).any(1).double().mean()))
        model(ids(0)).backward()
    assert min(seen) > 0.9


def test_forward_hooks_run_and_the_forward_is_as_before():
    model = build()
    opt = make(model, POLICIES["drawn"])
    seen = []
    model.blocks[0].up.register_forward_hook(lambda module, args, out: seen.append(out.grad_fn.name()))
    with skip_dropped_rows(model, opt):
        model(ids(0))
        assert "forward" not in vars(model.blocks[0].up)
    assert len(seen) == 2 and all("ByRows" in name for name in seen)
    model(ids(0))
    assert not any("ByRows" in name for name in seen[2:]) and len(seen) == 4
    assert not any("_compiled_call_impl" in vars(m) for m in model.modules())


def test_an_error_in_a_pass_leaves_the_module_as_it_was():
    model = build()
    with skip_dropped_rows(model, make(model, POLICIES["drawn"])):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model.blocks[0].up(torch.ones(3, 4, dtype=torch.float64))
        assert "forward" not in vars(model.blocks[0].up)


def test_copies_know_nothing_of_it():
    model = build()
    opt = make(model, POLICIES["drawn"])
    with skip_dropped_rows(model, opt):
        other = copy.deepcopy(model)
        other(ids(0)).backward()
    assert all((block.up.weight.grad != 0).any(1).double().mean() > 0.9 for block in other.blocks)


def test_a_policy_that_changes_between_steps():
    def train_changing(model, opt):
        train(model, opt, steps=2)
        opt.param_groups[0]["effect"] = "update"  # whose moments need every row
        train(model, opt, steps=2)
        opt.param_groups[0]["effect"], opt.param_groups[0]["drop"] = None, POLICIES["held"]
        train(model, opt, steps=3)

    compare(POLICIES["drawn"], train=train_changing)


@pytest.mark.parametrize("other", [GradDrop(p=0.5), None])
def test_policies_that_all_drop_no_rows_any_more(other):
    def train_changing(model, opt):
        for drop in (POLICIES["drawn"], other, POLICIES["held"]):
            for group in opt.param_groups:
                group["drop"] = drop
            train(model, opt, steps=2)

    compare(POLICIES["drawn"], train=train_changing)


@pytest.mark.parametrize("steps", [1, 3])  # the last backward pass may be of the draw that comes after loading
def test_a_checkpoint_with_other_names(steps):
    """Masks go by the checkpoint's names."""
    saved = make(build(), POLICIES["drawn"]).state_dict()
    saved["param_groups"][0]["param_names"] = [f"net.{name}" for name in saved["param_groups"][0]["param_names"]]

    def train_loading(model, opt):
        train(model, opt, steps)
        opt.load_state_dict(saved)
        train(model, opt)

    compare(POLICIES["drawn"], train=train_loading)


def test_a_policy_of_rows_that_only_other_parameters_keep():
    """Biases, say: elements of theirs are decided, no rows that could be skipped."""

    def make_groups(named, **options):
        named = list(named)
        groups = [[n for n in named if (n[1].dim() > 1) == matrices] for matrices in (True, False)]
        return ADAMW([{"params": group} for group in groups], **options)

    def train_changing(model, opt):
        for drop in (POLICIES["drawn"], None, POLICIES["held"]):
            opt.param_groups[0]["drop"] = drop
            train(model, opt, steps=2)

    compare(POLICIES["drawn"], train=train_changing, optimizer=make_groups)


def test_capturable_that_is_set_later():
    """By hand or by a checkpoint. Only the device knows the draw then: all rows are computed until it is off again."""

    def train_changing(model, opt):
        for capturable in (False, True, False):
            for group in opt.param_groups:
                group["capturable"] = capturable
            train(model, opt, steps=3)

    compare(POLICIES["drawn"], train=train_changing)


def test_a_weight_that_grows():
    """As a vocabulary does, in the memory of the same parameter."""
    weight = nn.Parameter(torch.zeros(3, 2))
    module = nn.Linear(2, 3, bias=False)
    module.weight = weight
    opt = GradDropSGD([("weight", weight)], lr=1.0, drop=POLICIES["drawn"])
    with skip_dropped_rows(module, opt):
        for rows in (3, 40, 5):
            weight.data, weight.grad = torch.zeros(rows, 2), None
            kept = opt.keep_mask(weight)
            module(torch.ones(1, 2)).sum().backward()
            opt.step()
            assert torch.equal(weight.detach() != 0, kept)


def test_ddp():
    ranks.run(replicated, 2)


def replicated(rank, world):
    """Gradients of kept rows are averaged over ranks, which all keep the same."""
    plain, model = build(), build()
    opts = [make(m, POLICIES["drawn"]) for m in (plain, model)]
    train(plain, opts[0], accumulate=2, compute=lambda m, step: m(ids(step)) / 2)
    wrapped = DistributedDataParallel(model)
    with skip_dropped_rows(wrapped, opts[1]) as handle:
        assert len(handle.modules) == 4
        train(wrapped, opts[1], compute=lambda m, step: m(ids(2 * step + rank)))
    assert_close(plain, model, *opts)


def test_another_optimizer_must_not_step_meanwhile():
    model = build()
    opt = make(model, POLICIES["drawn"])
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = skip_dropped_rows(model, opt)
    model(ids(0)).backward()
    with pytest.raises(RuntimeError, match=r"SGD.step\(\) has parameters of whose gradients skip_dropped_rows left"):
        other.step()
    opt.step()
    other.step()
    model(ids(1)).backward()
    handle.remove()
    other.step()


# Bad input


def test_what_cannot_work_is_refused_at_once():
    model = build()
    with pytest.raises(TypeError, match="optimizer must be a masked optimizer"):
        skip_dropped_rows(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="optimizer must have a policy with block='row' for skip_dropped_rows"):
        skip_dropped_rows(model, make(model, GradDrop(p=0.5, block=128)))
    with pytest.raises(ValueError, match="capturable must be False with skip_dropped_rows"):
        skip_dropped_rows(model, make(model, POLICIES["drawn"], capturable=True))
    with pytest.raises(ValueError, match="effect must be 'gradient' or 'freeze' with skip_dropped_rows, got 'update'"):
        skip_dropped_rows(model, make(model, POLICIES["drawn"], effect="update"))
    with pytest.raises(ValueError, match="model must have an nn.Linear or nn.Embedding whose weight is"):
        skip_dropped_rows(build(), make(model, POLICIES["drawn"]))
    with pytest.raises(ValueError, match="model must not be a DataParallel"):
        skip_dropped_rows(nn.DataParallel(model), make(model, POLICIES["drawn"]))
    assert not any("_compiled_call_impl" in vars(m) for m in model.modules())


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_what_comes_out_may_be_written_into(shape):
    def gradients(skip):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
        optimizer = ADAMW(model.named_parameters(), drop=GradDrop(0.5, block="row"), seed=1)
        masks = [optimizer.keep_mask(p) for p in model.parameters()]
        if skip:
            skip_dropped_rows(model, optimizer)
        out = model(torch.ones(shape))
        out += 1
        out.square().sum().backward()
        return [p.grad * mask for p, mask in zip(model.parameters(), masks, strict=True)]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_float64_under_autocast():
    model = nn.Linear(8, 4).double()
    optimizer = ADAMW(model.named_parameters(), drop=GradDrop(0.5, block="row"))
    skip_dropped_rows(model, optimizer)
    x = torch.ones(3, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float64  # which autocast leaves alone
        model(x).sum().backward()
    mask = optimizer.keep_mask(model.weight)
    assert torch.equal(model.weight.grad, 3.0 * mask)


@pytest.mark.parametrize("at", ["backward", "step", "step with a closure"])
def test_an_epoch_that_begins_between_the_passes_of_a_step(at):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = ADAMW(model.named_parameters(), drop=GradDropEpoch(0.5, toggle=True, block="row"))
    skip_dropped_rows(model, optimizer)
    optimizer.set_epoch(0)
    for p in model.parameters():
        p.data.fill_(1.0)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.set_epoch(1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="one mask for all passes of a step"):
        if at == "backward":
            model(torch.ones(1, 4)).sum().backward()
        else:
            optimizer.step(None if at == "step" else lambda: None)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and optimizer.draw == 0
    optimizer.zero_grad()
    masks = {p: optimizer.keep_mask(p) for p in model.parameters()}
    model(torch.ones(1, 4)).sum().backward()
    for name, p in model.named_parameters():
        if name.endswith("weight"):
            assert torch.equal(p.grad.any(1), masks[p].any(1))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.set_epoch(2)  # between a step and the next pass, as it should be
    model(torch.ones(1, 4)).sum().backward()
    optimizer.set_epoch(3)

    def closure():
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()

    optimizer.step(closure)
    optimizer.zero_grad()
    assert optimizer.draw == 2
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert optimizer.draw == 3
