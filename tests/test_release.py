"""release_gradients: the same trajectory, bit for bit, with the gradients of one layer alive at a time."""

import copy
import sys
import weakref
from functools import partial

import pytest
import ranks
import sharded_transformer
import torch
import transformers as hf
from test_distributed import local
from test_trainer import arguments, build_model, examples
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradDropLion,
    GradDropSGD,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    StaticMask,
    release_gradients,
    skip_dropped_layers,
)
from graddrop_fused.release import ReleasedGradients
from graddrop_fused.trainer import GradDropCallback, graddrop_optimizer

STEPS = 6
ADAMW = partial(GradDropAdamW, lr=1e-2, weight_decay=0.1)
OPTIMIZERS = {
    "AdamW": ADAMW,
    "AMSGrad": partial(ADAMW, amsgrad=True, maximize=True),
    "SGD": partial(GradDropSGD, lr=1e-2, momentum=0.9, nesterov=True),
    "Lion": partial(GradDropLion, lr=1e-3, weight_decay=0.1),
}
POLICIES = {
    "drawn": GradDrop(p=0.3),
    "rows": GradDrop(p=0.5, block="row"),
    "annealed": GradDrop(anneal=LinearAnneal(start=0.9, total_steps=4)),
    "packed": GradDropEpoch(p=0.6),
    "packed, toggle": GradDropEpoch(p=0.6, toggle=True),
    "replacement": GradDropEpoch(p=0.6, replacement=True, storage="regenerate"),
    "layers": LayerGradDrop(p=0.5),
    "layers, per epoch": LayerGradDrop(p=0.5, per="epoch", rescale=True),
    "GradFreeze": GradFreeze("top-down"),
    "static": StaticMask({"head.weight": torch.rand(37, 12, generator=torch.Generator().manual_seed(3)) < 0.5}),
    "none": None,
}


def make(model, drop, optimizer=ADAMW, layers=True, **options):
    params = sharded_transformer.groups(model) if layers else model.named_parameters()
    return optimizer(params, drop=drop, seed=2**40 + 7, steps_per_epoch=2, **options)


def train(model, opt, release, steps=STEPS, wrap=lambda model: model):
    """Returns how many gradients each backward pass left."""
    handle = release_gradients(model, opt) if release else None
    wrapped, left = wrap(model), []
    for step in range(steps):
        sharded_transformer.loss(wrapped, step).backward()
        left.append(sum(p.grad is not None for p in model.parameters()))
        opt.step()
        opt.zero_grad()
    if handle:
        handle.remove()
    return left


def assert_same(a, b, opt_a, opt_b):
    assert opt_a.draw == opt_b.draw
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(local(p), local(q)), name
        assert opt_a.state[p].keys() == opt_b.state[q].keys(), name
        for key in opt_a.state[p]:
            assert torch.equal(local(opt_a.state[p][key]), local(opt_b.state[q][key])), (name, key)


def compare(drop, dtype=torch.float32, **options):
    """Train without and with releasing: equal bits. Returns what each releasing pass left."""
    runs = []
    for release in (False, True):
        model = sharded_transformer.model(dtype)
        opt = make(model, drop, **options)
        runs.append((model, opt, train(model, opt, release)))
    (a, opt_a, _), (b, opt_b, left) = runs
    assert_same(a, b, opt_a, opt_b)
    return left


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drop", POLICIES.values(), ids=POLICIES)
def test_same_trajectory(drop, dtype):
    assert compare(drop, dtype) == [0] * STEPS


@pytest.mark.parametrize("effect", ["gradient", "freeze", "update"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("drop", ["drawn", "packed", "layers", "GradFreeze"])
def test_same_trajectory_of_every_optimizer_and_effect(drop, optimizer, effect):
    assert compare(POLICIES[drop], optimizer=optimizer, effect=effect) == [0] * STEPS


@pytest.mark.parametrize("drop", ["drawn", "packed", "none"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_same_trajectory_without_layers(drop, backend):
    assert compare(POLICIES[drop], layers=False, backend=backend) == [0] * STEPS


@pytest.mark.parametrize("effect", ["gradient", "freeze"])
@pytest.mark.parametrize("drop", ["layers", "layers, per epoch", "GradFreeze"])
def test_with_skipped_layers(drop, effect):
    plain, model = (sharded_transformer.model() for _ in range(2))
    opts = [make(m, POLICIES[drop], effect=effect) for m in (plain, model)]
    train(plain, opts[0], release=False)
    off = []
    with skip_dropped_layers(model, opts[1]):
        opts[1].register_step_pre_hook(lambda opt, *_: off.append(len(opt._switched_off)))
        assert train(model, opts[1], release=True) == [0] * STEPS
    assert_same(plain, model, *opts)
    assert any(off) and not opts[1]._switched_off


def test_groups_change_between_steps():
    """A policy, a hyperparameter and a whole group: the next step goes by them."""

    def run(release):
        model = sharded_transformer.model()
        groups = sharded_transformer.groups(model)
        opt = ADAMW(groups[:-1], drop=GradDrop(p=0.5), seed=3)
        handle = release_gradients(model, opt) if release else None
        for step in range(6):
            if step == 2:
                opt.param_groups[1]["drop"] = GradDrop(p=0.9)
                opt.param_groups[0]["lr"] = 1e-4
            if step == 4:
                opt.add_param_group({**groups[-1], "drop": None})
            sharded_transformer.loss(model, step).backward()
            opt.step()
            opt.zero_grad()
        assert handle is None or not any(p.grad is not None for p in model.parameters())
        return model, opt

    (a, opt_a), (b, opt_b) = run(False), run(True)
    assert_same(a, b, opt_a, opt_b)


def test_parameters_of_a_group_change_between_steps():
    """In its list, by hand: one takes the place of another, as where a vocabulary grows, and one is added."""

    def run(release):
        model = sharded_transformer.model()
        opt = ADAMW(
            [{"params": list(model.blocks.parameters())}, {"params": [model.head.weight]}], drop=GradDrop(p=0.5)
        )
        handle = release_gradients(model, opt) if release else None
        params = opt.param_groups[1]["params"]
        for step in range(6):
            if step == 2:
                params[0] = model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
            if step == 4:
                params.append(model.head.bias)
            sharded_transformer.loss(model, step).backward()
            opt.step()
            model.zero_grad()
        if handle:
            handle.remove()
        return model, opt

    (a, opt_a), (b, opt_b) = run(False), run(True)
    assert_same(a, b, opt_a, opt_b)


def test_capturable_steps_before_it():
    """Their draw stands on a device."""

    def run(release):
        model = sharded_transformer.model()
        opt = make(model, GradDrop(p=0.5), capturable=True)
        train(model, opt, release=False, steps=3)
        for group in opt.param_groups:
            group["capturable"] = False
        train(model, opt, release)
        return model, opt

    (a, opt_a), (b, opt_b) = run(False), run(True)
    assert_same(a, b, opt_a, opt_b)
    assert opt_b.draw == opt_b.param_groups[0]["draw"] == 3 + STEPS


class Partial(nn.Module):
    """Uses one block or the other, one of its weights twice, and one never; the head is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(4, 4)

    def forward(self, x, which):
        x = self.blocks[2](self.blocks[which](self.blocks[2](self.embedding(x))))
        return self.head(x).logsumexp(-1).mean()


@pytest.mark.parametrize("inference", [False, True])
def test_parameters_that_get_no_gradient_or_are_shared(inference):
    """What the model's pass did not reach is left alone, as torch does; what is outside the model is updated too, in
    step(), some of which may be in inference mode."""

    def run(release):
        torch.manual_seed(0)
        model, outside = Partial(), nn.Parameter(torch.ones(3))
        opt = ADAMW([*model.named_parameters(), ("outside", outside)], drop=GradDrop(p=0.5), seed=1)
        handle = release_gradients(model, opt) if release else None
        for step in range(7):
            loss = model(torch.arange(5) + step, which=step % 2) + (outside**2).sum()
            loss.backward()
            with torch.inference_mode(inference and release and step % 3 == 0):
                opt.step()
            opt.zero_grad()
        if handle:
            handle.remove()
        assert not any(opt.state[p] for p in model.unused.parameters())
        model.outside = outside
        return model, opt

    (a, opt_a), (b, opt_b) = run(False), run(True)
    assert_same(a, b, opt_a, opt_b)


def test_gradients_of_one_layer_are_alive_at_a_time():
    """Bytes of gradients, counted whenever one arrives, by weak references to their memory."""

    def peak(release):
        model = hf.BertForSequenceClassification(
            hf.BertConfig(
                hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32, vocab_size=8,
                max_position_embeddings=8,
            )
        )  # fmt: skip
        opt = ADAMW(model.named_parameters(), drop=GradDrop(p=0.1))
        alive, peaks = weakref.WeakSet(), []

        def watch(param):
            alive.add(param.grad.untyped_storage())
            peaks.append(sum(storage.nbytes() for storage in alive))

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(watch)
        handle = release_gradients(model, opt) if release else None
        for _ in range(3):
            peaks.clear()
            ids = torch.arange(8).reshape(2, 4)
            model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
            left = len(alive)
            opt.step()
            opt.zero_grad(set_to_none=True)
        assert not alive
        del handle
        block = sum(4 * p.numel() for p in model.bert.encoder.layer[0].parameters())
        return max(peaks), left, block, sum(4 * p.numel() for p in model.parameters())

    kept, released = peak(False), peak(True)
    assert kept[0] == kept[3] and kept[1] > 0
    assert released[0] == released[2] < kept[0] / 6 and released[1] == 0


def test_gradients_of_what_is_frozen_as_a_whole_are_freed_too():
    model = sharded_transformer.model()
    drop = GradDropEpoch(p=0.9, block="row", toggle=True)
    opt = make(model, drop, effect="freeze", active_state=True)
    assert any(not opt.keep_mask(p).any() for p in model.parameters())
    with release_gradients(model, opt):
        for number in range(3):
            sharded_transformer.loss(model, number).backward()
            opt.step()
            assert not any(p.grad is not None for p in model.parameters())


def test_gradients_go_back_to_staying():
    model = sharded_transformer.model()
    opt = make(model, GradDrop(p=0.5))
    with release_gradients(model, opt) as handle:
        sharded_transformer.loss(model, 0).backward()
        opt.step()
    handle.remove()
    sharded_transformer.loss(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    opt.step(lambda: sharded_transformer.loss(model, 1))
    assert not any(map(torch.equal, before, model.parameters()))
    assert opt.draw == 2
    release_gradients(model, opt).remove()


def test_an_error_within_ends_it():
    model = sharded_transformer.model()
    opt = make(model, GradDrop(p=0.5))
    with pytest.raises(ZeroDivisionError), release_gradients(model, opt):
        sharded_transformer.loss(model, 0).backward()
        raise ZeroDivisionError
    sharded_transformer.loss(model, 1).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_step_without_backward_counts():
    model = sharded_transformer.model()
    opt = make(model, GradDrop(p=0.5))
    with release_gradients(model, opt):
        opt.step()
        assert opt.draw == 1 and not opt.state


def test_copies_know_nothing_of_it():
    model = sharded_transformer.model()
    opt = make(model, GradDrop(p=0.5))
    with release_gradients(model, opt):
        other, other_opt = copy.deepcopy((model, opt))
        sharded_transformer.loss(other, 0).backward()
        assert all(p.grad is not None for p in other.parameters())
        other_opt.step()
        assert other_opt.draw == 1 and opt.draw == 0


def test_resumes():
    model = sharded_transformer.model()
    opt = make(model, GradDropEpoch(p=0.6, toggle=True))
    again = sharded_transformer.model()
    train(model, opt, release=True, steps=3)
    again.load_state_dict(model.state_dict())
    other = make(again, GradDrop(p=0.1))
    with release_gradients(again, other):
        other.load_state_dict(opt.state_dict())
        for step in range(3):
            sharded_transformer.loss(again, step).backward()
            other.step()
    train(model, opt, release=False, steps=3)
    assert_same(model, again, opt, other)


def test_the_epoch_is_asked_for_before_anything_changes():
    model = sharded_transformer.model()
    opt = ADAMW(sharded_transformer.groups(model), drop=GradDropEpoch(p=0.5))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="the epoch is not known"), release_gradients(model, opt):
        sharded_transformer.loss(model, 0).backward()
    assert all(map(torch.equal, before, model.parameters()))


# Around it


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("drop", ["drawn", "layers"])
def test_compiled_model(backend, drop):
    torch._dynamo.reset()
    runs = []
    for release in (False, True):
        model = sharded_transformer.model()
        opt = make(model, POLICIES[drop])
        runs.append((model, opt, train(model, opt, release, steps=4, wrap=partial(torch.compile, backend=backend))))
    (a, opt_a, _), (b, opt_b, left) = runs
    assert_same(a, b, opt_a, opt_b)
    assert left == [0] * 4


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    def run(release):
        model = build_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        kwargs = {"use_reentrant": use_reentrant}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
        opt = ADAMW(model.named_parameters(), drop=GradDrop(p=0.5))
        handle = release_gradients(model, opt) if release else None
        for _ in range(3):
            ids = torch.arange(2, 18).reshape(2, 8)
            model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
            assert not release or not any(p.grad is not None for p in model.parameters())
            opt.step()
            opt.zero_grad()
        del handle
        return model.train(), opt

    (a, opt_a), (b, opt_b) = run(False), run(True)
    assert_same(a, b, opt_a, opt_b)


@pytest.mark.parametrize("drop", ["drawn", "packed", "layers"])
def test_fsdp2(drop):
    """Gradients arrive as DTensors once they are reduced."""
    ranks.run(sharded, 2, drop)


def sharded(rank, world, drop):
    runs = []
    for release in (False, True):
        model = sharded_transformer.model(torch.float64)
        sharded_transformer.fsdp(model, world)
        opt = make(model, POLICIES[drop])
        handle = release_gradients(model, opt) if release else None
        if release and drop == "layers":
            skip_dropped_layers(model, opt)
        for step in range(STEPS):
            for micro in range(2):  # gradients that are not synchronised wait: one pass for us
                model.set_requires_gradient_sync(micro == 1)
                sharded_transformer.loss(model, step, 2 * rank + micro, 2 * world).backward()
            assert not release or not any(p.grad is not None for p in model.parameters())
            opt.step()
            opt.zero_grad()
        runs.append((model, opt, handle))
    (a, opt_a, _), (b, opt_b, _) = runs
    assert_same(a, b, opt_a, opt_b)


def trainer(args, drop, release, **options):
    return hf.Trainer(
        build_model(),
        args,
        train_dataset=examples(16),
        optimizer_cls_and_kwargs=graddrop_optimizer(args, drop=drop, seed=7),
        callbacks=[GradDropCallback(release_gradients=release, **options)],
    )


class Left(hf.TrainerCallback):
    def __init__(self, until=None):
        self.until, self.left = until, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.left.append(sum(p.grad is not None for p in model.parameters()))
        if state.global_step == self.until:
            raise KeyboardInterrupt


@pytest.mark.parametrize("drop", [GradDropEpoch(p=0.6), LayerGradDrop(p=0.5)], ids=["packed", "layers"])
def test_trainer(drop, tmp_path):
    runs = []
    for release in (False, True):
        args = arguments(tmp_path / str(release), max_grad_norm=0, save_strategy="no")
        run = trainer(args, drop, release, skip_dropped_layers=release and drop.layerwise)
        run.add_callback(left := Left())
        run.train()
        runs.append(run)
    plain, released = runs
    assert left.left == [0] * 12
    for (name, p), q in zip(plain.model.named_parameters(), released.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    released.model(**{k: v[None] for k, v in examples(1)[0].items()}).loss.backward()
    assert all(p.grad is not None for p in released.model.parameters())


def test_an_interrupted_trainer_releases_no_more(tmp_path):
    args = arguments(tmp_path, max_grad_norm=0, save_strategy="no")
    run = trainer(args, GradDrop(p=0.5), release=True)
    run.add_callback(Left(until=2))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    other = torch.optim.SGD(run.model.parameters(), lr=0.1)
    for _ in range(2):
        run.model(**{k: v[None] for k, v in examples(1)[0].items()}).loss.backward()
        assert all(p.grad is not None for p in run.model.parameters())
    other.step()
    release_gradients(run.model, GradDropAdamW(run.model.named_parameters(), lr=1e-3)).remove()  # nor is in the way


def test_a_loop_that_ended_in_the_middle_of_a_step_is_not_in_the_way():
    model = sharded_transformer.model()
    opt = ADAMW(model.named_parameters(), drop=GradDropEpoch(p=0.5))

    def loop():
        opt.set_epoch(0)
        ReleasedGradients(model, opt, within=sys._getframe())
        sharded_transformer.loss(model, 0).backward()

    for go_on in (partial(opt.set_epoch, 1), lambda: release_gradients(model, opt).remove()):
        loop()
        go_on()


# Bad input


def test_two_optimizers_of_one_model():
    """A notebook's cell that is run twice."""
    model = sharded_transformer.model()
    handle = release_gradients(model, make(model, GradDrop(p=0.5)))
    with pytest.raises(ValueError, match="model must not release gradients to another optimizer already"):
        release_gradients(model, make(model, GradDrop(p=0.5)))
    handle.remove()
    release_gradients(model, make(model, GradDrop(p=0.5))).remove()


def test_a_second_backward():
    model = sharded_transformer.model()
    opt = make(model, GradDrop(p=0.5))
    with release_gradients(model, opt):
        sharded_transformer.loss(model, 0).backward()
        before = [p.clone() for p in model.parameters()]
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"one backward pass before optimizer.step\(\).*'[\w.]+' got"):
                sharded_transformer.loss(model, 1).backward()
        assert all(map(torch.equal, before, model.parameters()))
        assert not any(p.grad is not None for p in model.parameters())
        opt.step()  # ends the step
        sharded_transformer.loss(model, 1).backward()
        opt.step()
        assert opt.draw == 2


def test_between_backward_and_step():
    model = sharded_transformer.model()
    opt = ADAMW(model.named_parameters(), drop=GradDropEpoch(p=0.5))
    opt.set_epoch(0)
    handle = release_gradients(model, opt)
    sharded_transformer.loss(model, 0).backward()
    for call in (opt.state_dict, handle.remove, partial(opt.set_epoch, 1)):
        with pytest.raises(RuntimeError, match="must not come between a backward pass and optimizer.step"):
            call()
    with pytest.raises(RuntimeError, match=r"SGD.step\(\) has parameters whose gradients were released by .*remove"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="closure must be None with release_gradients"):
        opt.step(lambda: None)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    with pytest.raises(RuntimeError, match="was given another after it had been updated in backward"):
        opt.step()
    model.head.weight.grad = None
    opt.step()
    handle.remove()


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler(fused):
    model = sharded_transformer.model()
    opt = make(model, GradDrop(p=0.5), fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    release_gradients(model, opt)
    scaler.scale(sharded_transformer.loss(model, 0)).backward()
    problem = (RuntimeError, "grad_scale must not be set with release_gradients")
    problem = problem if fused else (AssertionError, "No inf checks were recorded")
    with pytest.raises(problem[0], match=problem[1]):
        scaler.step(opt)


def test_what_cannot_work_is_refused_at_once():
    model = sharded_transformer.model()
    with pytest.raises(TypeError, match="optimizer must be a masked optimizer"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))
    opt = make(model, GradDrop(p=0.5))
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model"):
        release_gradients(sharded_transformer.model(), opt)
    with pytest.raises(ValueError, match="capturable must be False with release_gradients"):
        release_gradients(model, make(model, GradDrop(p=0.5), capturable=True))
    with release_gradients(model, opt), pytest.raises(ValueError, match="must not release gradients already"):
        release_gradients(model, opt)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    wrapper = torch.optim.SGD(model.parameters())  # as Accelerate's: an optimizer around another
    wrapper.optimizer, wrapper.scaler = opt, torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="optimizer must come without a GradScaler with release_gradients"):
        release_gradients(model, wrapper)


def test_ddp_is_refused():
    ranks.run(replicated, 2)


def replicated(rank, world):
    model = sharded_transformer.model()
    opt = make(model, GradDrop(p=0.5))
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="model must not be in DistributedDataParallel with release_gradients"):
        release_gradients(wrapped, opt)
    release_gradients(model, opt)
    with pytest.raises(ValueError, match="model must not be in DistributedDataParallel with release_gradients"):
        sharded_transformer.loss(wrapped, 0)


@pytest.mark.parametrize(
    "options, problem",
    [
        ({}, "max_grad_norm must be 0 with GradDropCallback(release_gradients=True), got 1.0"),
        ({"max_grad_norm": 0, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1 with"),
    ],
)
def test_trainer_arguments(options, problem, tmp_path):
    run = trainer(arguments(tmp_path, save_strategy="no", **options), GradDrop(p=0.5), release=True)
    with pytest.raises(ValueError) as raised:
        run.train()
    assert problem in str(raised.value)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_parts_of_which_some_steps_use_a_part(backend):
    """Weights that a step has not changed may be needed in the same backward pass yet."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, use_a):
            return self.b(self.a(x) if use_a else x)

    def trained(release):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.embedding, model.blocks = nn.Linear(4, 4), nn.ModuleList([Block()])
        opt = ADAMW(model.named_parameters(), drop=GradDrop(0.3), backend=backend)
        if release:
            release_gradients(model, opt)
        for step, use_a in enumerate((True, False, True, False, True)):
            if step == 3:
                model.blocks[0].b.requires_grad_(False)
            model.blocks[0](model.embedding(torch.ones(2, 4)), use_a).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return model

    for p, q in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert torch.equal(p, q)
