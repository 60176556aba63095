"""skip_dropped_layers: the same trajectory, bit for bit, without the work."""

import copy
import warnings
from functools import partial

import numpy
import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from benchmarks import layer_skipping
from graddrop_fused import GradDrop, GradDropAdamW, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal
from graddrop_fused import skip as skip_module
from graddrop_fused.layers import param_groups
from graddrop_fused.skip import skip_dropped_layers

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
MODELS = {  # all with dropout
    "Bert": lambda **options: hf.BertForSequenceClassification(hf.BertConfig(**{**SIZES, **options})),
    "Albert": lambda: hf.AlbertForSequenceClassification(
        hf.AlbertConfig(**SIZES, embedding_size=8, hidden_dropout_prob=0.1)
    ),
    "GPT2, tied": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=1)
    ),
}


def build_model(family="Bert", **options):
    torch.manual_seed(0)
    return MODELS[family](**options).train()


def build_optimizer(model, drop, options=None, **group_options):
    groups = param_groups(model, weight_decay=0.1, drop=drop, **group_options)
    opt = GradDropAdamW(groups, lr=1e-2, seed=5, backend="reference", **(options or {}))
    opt.set_epoch(0)
    return opt


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 40, (count, 3, 7), generator=generator)


def loss_of(model, ids):
    inner = getattr(model, "module", model)
    labels = ids if isinstance(getattr(inner, "_orig_mod", inner), hf.GPT2LMHeadModel) else ids[:, 0] % 2
    return model(input_ids=ids, labels=labels).loss


def dropped_by_mask(opt):
    """An independent account: parameters in layer-wise groups of which the next step keeps no element."""
    layerwise = [g for g in opt.param_groups if isinstance(g["drop"], LayerGradDrop | GradFreeze)]
    return {p for g in layerwise for p in g["params"] if not opt.keep_mask(p).any()}


def train(model, opt, *, skip, steps=6, accumulate=1, per_epoch=2, before_step=lambda model: None, wrap=lambda m: m):
    """Train; returns how many parameters each backward pass left without a gradient."""
    handle = skip_dropped_layers(model, opt) if skip else None
    wrapped = wrap(model)
    torch.manual_seed(2)  # for dropout
    off = []
    never_asked = {p for p in model.parameters() if not p.requires_grad}
    for i, ids in enumerate(batches(steps * accumulate)):
        if i % (accumulate * per_epoch) == 0:
            opt.set_epoch(i // (accumulate * per_epoch))
        loss = loss_of(wrapped, ids)
        assert {p for p in model.parameters() if not p.requires_grad} == never_asked
        loss.backward()
        off.append(sum(p.grad is None for p in model.parameters()) - len(never_asked))
        if (i + 1) % accumulate == 0:
            before_step(model)
            opt.step()
            opt.zero_grad()
    if handle:
        handle.remove()
    return off


def assert_same(a, b, opt_a, opt_b):
    for (name, p), q in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
        assert opt_a.state[p].keys() == opt_b.state[q[1]].keys(), name
        for key in opt_a.state[p]:
            assert torch.equal(opt_a.state[p][key], opt_b.state[q[1]][key]), (name, key)


def compare(build, make_optimizer, **options):
    """Train without and with skipping: equal parameters and state. Returns what was switched off in each pass."""
    runs = []
    for skip in (False, True):
        model = build()
        opt = make_optimizer(model)
        runs.append((model, opt, train(model, opt, skip=skip, **options)))
    (a, opt_a, never), (b, opt_b, off) = runs
    assert_same(a, b, opt_a, opt_b)
    assert not any(never)
    assert all(p.requires_grad for p in b.parameters()) and not opt_b._switched_off
    return off


POLICIES = {
    "per step": LayerGradDrop(p=0.5),
    "per epoch": LayerGradDrop(p=0.5, per="epoch"),
    "rescaled": LayerGradDrop(p=0.5, rescale=True),
    "annealed": LayerGradDrop(anneal=LinearAnneal(start=0.9, total_steps=5)),
    "top-down": GradFreeze("top-down"),
    "bottom-up": GradFreeze("bottom-up"),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_same_trajectory(policy):
    off = compare(build_model, partial(build_optimizer, drop=policy))
    assert any(off) and len(set(off)) > 1


@pytest.mark.parametrize("family", ["Albert", "GPT2, tied"])
def test_same_trajectory_with_shared_parameters(family):
    off = compare(partial(build_model, family), partial(build_optimizer, drop=LayerGradDrop(p=0.5)))
    assert any(off)


@pytest.mark.parametrize(
    "options",
    [{"effect": "freeze"}, {"amsgrad": True}, {"maximize": True, "eps": 1e-6}, {"weight_decay": 0.0}],
    ids=str,
)
def test_same_trajectory_with_other_options(options):
    assert any(compare(build_model, partial(build_optimizer, drop=LayerGradDrop(p=0.5), options=options)))


def test_same_trajectory_on_attention_only():
    make = partial(build_optimizer, drop=LayerGradDrop(p=0.5), targets="attention")
    off = compare(build_model, make)
    assert set(off) <= {0, 6, 12, 18} and any(off)  # three projections with their biases in each of three layers


def test_one_decision_for_all_micro_batches():
    off = compare(build_model, partial(build_optimizer, drop=LayerGradDrop(p=0.5)), accumulate=3)
    by_step = list(zip(off[::3], off[1::3], off[2::3], strict=True))
    assert all(len(set(step)) == 1 for step in by_step) and len(set(by_step)) > 1


def test_everything_dropped():
    """The last layer stays on, or backward would have nothing to do; its gradient is dropped as before."""
    make = partial(build_optimizer, drop=LayerGradDrop(p=0.95), include_head=True)
    off = compare(build_model, make)
    model = build_model()
    head = len(list(model.classifier.parameters())) + len(list(model.bert.pooler.parameters()))
    assert max(off) == len(list(model.parameters())) - head


@pytest.mark.parametrize("effect", ["gradient", "freeze"])
def test_switches_off_exactly_the_dropped_layers(effect):
    model = build_model()
    opt = build_optimizer(model, LayerGradDrop(p=0.5), {"effect": effect})
    with skip_dropped_layers(model, opt):
        for step, ids in enumerate(batches(5)):
            # which parameters get a gradient at all shows in the first step; a frozen layer is untouched either way
            expected = set() if step == 0 and effect == "gradient" else dropped_by_mask(opt)
            inside = []
            hook = model.bert.pooler.register_forward_hook(
                lambda *_, inside=inside: inside.extend(p for p in model.parameters() if not p.requires_grad)
            )
            loss_of(model, ids).backward()
            hook.remove()
            assert set(inside) == expected
            assert {p for p in model.parameters() if p.grad is None} == expected
            assert all(p.requires_grad for p in model.parameters())
            opt.step()
            opt.zero_grad()


def test_autograd_stores_what_it_stores_for_frozen_layers():
    """Activations kept for backward: the same as with requires_grad_(False) on the same layers, less than in full."""

    def stored(model):
        pointers = {}

        def pack(tensor):
            pointers[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(model, batches(1)[0])
        for param in model.parameters():
            pointers.pop(param.data_ptr(), None)
        return sum(pointers.values()), loss

    model = build_model()
    opt = build_optimizer(model, GradFreeze("top-down"))
    full, _ = stored(model)
    with skip_dropped_layers(model, opt):
        skipped, _ = stored(model)
    frozen = build_model()
    frozen.bert.embeddings.requires_grad_(False)
    frozen.bert.encoder.requires_grad_(False)
    by_hand, _ = stored(frozen)
    assert skipped == by_hand < full / 2


def test_what_the_user_froze_stays_frozen():
    model = build_model()
    opt = build_optimizer(model, LayerGradDrop(p=0.5))
    frozen = [*model.bert.embeddings.parameters(), *model.bert.encoder.layer[1].parameters()]
    for p in frozen:
        p.requires_grad_(False)
    before = [p.clone() for p in frozen]
    handle = skip_dropped_layers(model, opt)
    seen = set()
    for ids in batches(5):
        loss_of(model, ids).backward()
        assert not any(p.requires_grad for p in frozen)
        assert opt._switched_off.isdisjoint(map(id, frozen))
        seen.add(len(opt._switched_off))
        opt.step()
        opt.zero_grad()
    assert len(seen) > 1
    handle.remove()
    assert all(p.requires_grad != any(p is q for q in frozen) for p in model.parameters())
    assert all(map(torch.equal, before, frozen))  # a parameter without a gradient is left alone, as torch does


def test_only_training_passes_with_gradients_switch():
    model = build_model()
    opt = build_optimizer(model, GradFreeze("top-down"))
    handle = skip_dropped_layers(model, opt)
    ids = batches(1)[0]
    model.eval()
    loss_of(model, ids).backward()
    assert all(p.grad is not None for p in model.parameters()) and not opt._switched_off
    model.train()
    model.zero_grad()

    loss_of(model, ids).backward()
    off = {p for p in model.parameters() if p.grad is None}
    assert off == dropped_by_mask(opt) != set() and opt._switched_off == set(map(id, off))
    model.eval()  # an evaluation between micro-batches leaves the step's decision alone
    with torch.no_grad():
        loss_of(model, ids)
    assert opt._switched_off == set(map(id, off))

    handle.remove()
    handle.remove()
    assert not opt._switched_off and not any("_compiled_call_impl" in vars(m) for m in model.modules())
    model.train()
    loss_of(model, ids).backward()
    assert all(p.grad is not None for p in model.parameters())


class Interrupted(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interrupted])
def test_an_interrupted_pass_leaves_nothing_off(error):
    model = build_model()
    opt = build_optimizer(model, GradFreeze("top-down"))
    seen = []

    def interrupt(*_):
        seen.append(sum(not p.requires_grad for p in model.parameters()))
        raise error

    with skip_dropped_layers(model, opt) as handle:
        hook = model.bert.pooler.register_forward_hook(interrupt)
        with pytest.raises(error):
            loss_of(model, batches(1)[0])
        assert seen[0] > 0 and all(p.requires_grad for p in model.parameters())
        hook.remove()
        loss_of(model, batches(1)[0]).backward()  # and the next pass goes on as ever
        assert {p for p in model.parameters() if p.grad is None} == dropped_by_mask(opt)
        assert not handle._calls.running


def test_what_the_user_freezes_between_forward_and_step_stays_frozen():
    model = build_model()
    opt = build_optimizer(model, GradFreeze("top-down"))
    with skip_dropped_layers(model, opt):
        loss_of(model, batches(1)[0]).backward()
        for p in model.bert.parameters():
            p.requires_grad_(False)
        opt.step()
        loss_of(model, batches(1)[0])
        assert not any(p.requires_grad for p in model.bert.parameters())


def test_pickles_and_copies_know_nothing_of_it(tmp_path):
    model = build_model()
    opt = build_optimizer(model, GradFreeze("top-down"))
    with skip_dropped_layers(model, opt):
        loss = loss_of(model, batches(1)[0])
        torch.save(model, tmp_path / "model.pt")
        copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
        for other in copies:
            assert all(p.requires_grad for p in other.parameters())
            loss_of(other, batches(1)[0]).backward()
            assert all(p.grad is not None for p in other.parameters())
        loss.backward()
        assert {p for p in model.parameters() if p.grad is None} == dropped_by_mask(opt)


class OftenAbsent(torch.nn.Module):
    """Blocks that get no gradient for many reasons. Each holds a parameter for one of them."""

    def __init__(self):
        super().__init__()
        self.block = torch.nn.ModuleList(OftenAbsentBlock() for _ in range(3))
        self.head = torch.nn.Linear(4, 1)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        for number, block in enumerate(self.block):
            if (self.passes + number) % 3 != 0:  # a block that is left out, as by Wav2Vec2's layerdrop
                x = block(x, self.passes % 2 == 0)
        return self.head(x).mean()


class OftenAbsentBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.reached = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)  # the second not by its own call
        self.unused, self.discarded = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.never = torch.nn.Parameter(torch.ones(4))  # XLNet's mask_emb
        self.sometimes = torch.nn.Parameter(torch.ones(4))  # XLNet's seg_embed

    def forward(self, x, all_of_it):
        self.discarded(x)
        x = torch.nn.functional.linear(self.linear(x), self.reached.weight, self.reached.bias)
        return x * self.sometimes if all_of_it else x


def test_a_parameter_that_gets_no_gradient_anyway():
    """Same parameters, same state: what took no part has neither step nor decay, as without skipping."""

    def train(skip):
        torch.manual_seed(0)
        model = OftenAbsent().train()
        groups = [
            {"params": list(b.named_parameters(f"block.{i}")), "layer": str(i)} for i, b in enumerate(model.block)
        ]
        groups.append({"params": list(model.head.named_parameters("head")), "drop": None})
        opt = GradDropAdamW(groups, lr=0.1, weight_decay=0.5, drop=LayerGradDrop(p=0.5), seed=4, backend="reference")
        handle = skip_dropped_layers(model, opt) if skip else None
        absent = []
        for step in range(24):
            torch.manual_seed(step)
            model(torch.randn(3, 4)).backward()
            absent.append(sum(p.grad is None for p in model.parameters()))
            opt.step()
            opt.zero_grad()
        if handle:
            handle.remove()
        return model, opt, absent

    (a, opt_a, natural), (b, opt_b, absent) = train(False), train(True)
    assert_same(a, b, opt_a, opt_b)
    assert sum(absent) > sum(natural)
    stepless = {name.split(".")[2] for name, p in b.named_parameters() if not opt_b.state[p]}
    assert stepless == {"unused", "discarded", "never"}


@pytest.mark.parametrize("family", ["XLNet", "Wav2Vec2"])
def test_models_with_such_parameters(family):
    def build():
        torch.manual_seed(0)
        if family == "XLNet":
            config = hf.XLNetConfig(vocab_size=40, d_model=16, n_layer=3, n_head=2, d_inner=24)
            return hf.XLNetForSequenceClassification(config).train()
        config = hf.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, layerdrop=0.4,
            conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
            classifier_proj_size=8,
        )  # fmt: skip
        return hf.Wav2Vec2ForSequenceClassification(config).train()

    def train(skip):
        model = build()
        blocks = model.transformer.layer if family == "XLNet" else model.wav2vec2.encoder.layers
        inside = {p for block in blocks for p in block.parameters()}
        name_of = {p: name for name, p in model.named_parameters()}
        groups = [
            {"params": [(name_of[p], p) for p in block.parameters()], "layer": f"layer.{i}"}
            for i, block in enumerate(blocks)
        ]
        groups.append({"params": [(n, p) for n, p in model.named_parameters() if p not in inside], "drop": None})
        opt = GradDropAdamW(groups, lr=1e-2, weight_decay=0.1, drop=LayerGradDrop(p=0.5), seed=5, backend="reference")
        handle = skip_dropped_layers(model, opt) if skip else None
        absent = 0
        for step in range(8):
            torch.manual_seed(step)
            numpy.random.seed(step)  # Wav2Vec2 draws some of its masks there
            inputs = (
                {"input_ids": torch.randint(2, 40, (3, 7))}
                if family == "XLNet"
                else {"input_values": torch.randn(2, 800)}
            )
            model(**inputs, labels=torch.tensor([0, 1, 0])[: len(next(iter(inputs.values())))]).loss.backward()
            absent += sum(p.grad is None for p in model.parameters())
            opt.step()
            opt.zero_grad()
        if handle:
            handle.remove()
        return model, opt, absent

    (a, opt_a, natural), (b, opt_b, absent) = train(False), train(True)
    assert_same(a, b, opt_a, opt_b)
    assert absent > natural > 0


def test_parts_of_a_model_that_are_called_one_by_one():
    """As a LightningModule's training_step does, whose own call nobody makes."""

    def train(skip):
        model = build_model()
        opt = build_optimizer(model, LayerGradDrop(p=0.5))
        handle = skip_dropped_layers(model, opt) if skip else None
        torch.manual_seed(2)
        absent = 0
        for ids in batches(6):
            pooled = model.bert(input_ids=ids).pooler_output
            torch.nn.functional.cross_entropy(model.classifier(pooled), ids[:, 0] % 2).backward()
            absent += sum(p.grad is None for p in model.parameters())
            opt.step()
            opt.zero_grad()
        if handle:
            handle.remove()
        return model, opt, absent

    (a, opt_a, _), (b, opt_b, absent) = train(False), train(True)
    assert_same(a, b, opt_a, opt_b)
    assert absent


def test_another_optimizer_must_not_step_meanwhile():
    model = build_model()
    opt = build_optimizer(model, GradFreeze("top-down"))
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    elsewhere = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    before = [p.clone() for p in model.parameters()]
    handle = skip_dropped_layers(model, opt)
    loss_of(model, batches(1)[0]).backward()
    elsewhere.step()
    with pytest.raises(RuntimeError, match=r"SGD.step\(\) has parameters whose gradients were left out by .*remove"):
        other.step()
    assert all(map(torch.equal, before, model.parameters()))
    opt.step()
    other.step()
    handle.remove()
    loss_of(model, batches(1)[0]).backward()
    other.step()


def test_two_handles_on_one_model(monkeypatch):
    monkeypatch.setattr(skip_module, "GRAPHS_GO_STALE", True)  # one handle is no compiler to the other
    model = build_model()
    opts = [build_optimizer(model, GradFreeze(direction)) for direction in ("top-down", "bottom-up")]
    model.unused = torch.nn.Linear(2, 2)
    first, second = (skip_dropped_layers(model, opt) for opt in opts)
    first.remove()
    loss_of(model, batches(1)[0]).backward()
    used = set(model.parameters()) - set(model.unused.parameters())
    assert {p for p in used if p.grad is None} == dropped_by_mask(opts[1])
    assert model.classifier in second._calls.ran and model.unused not in second._calls.ran
    second.remove()
    model.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    assert all(p.grad is not None for p in used)


def test_gradients_that_are_needed_are_computed():
    options = {"effect": "update"}  # its moments take the unmasked gradients
    make = partial(build_optimizer, drop=LayerGradDrop(p=0.9), options=options)
    assert not any(compare(build_model, make, steps=4))


@pytest.mark.parametrize("policy", [GradDrop(p=0.9), GradDropEpoch(p=0.9), None], ids=["GradDrop", "epochs", "none"])
def test_policies_that_drop_no_layers_are_refused(policy):
    model = build_model()
    with pytest.raises(ValueError, match="group whose policy drops whole layers .* got (Grad|None)"):
        skip_dropped_layers(model, build_optimizer(model, drop=policy))


def test_activation_checkpointing():
    def build():
        model = build_model()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model

    make = partial(build_optimizer, drop=LayerGradDrop(p=0.6))
    assert any(compare(build, make))
    plain, checkpointed = build_model(), build()
    opts = make(plain), make(checkpointed)
    train(plain, opts[0], skip=False)
    train(checkpointed, opts[1], skip=True)
    assert_same(plain, checkpointed, *opts)


def test_reentrant_activation_checkpointing_is_refused():
    model = build_model()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="model must not use reentrant activation checkpointing"):
        skip_dropped_layers(model, build_optimizer(model, LayerGradDrop(p=0.5)))


def test_clipping():
    """Equal below max_norm; above it, skipping is what clipping the masked gradient would be."""
    make = partial(build_optimizer, drop=LayerGradDrop(p=0.5), options={"effect": "freeze"})

    def clip(max_norm):
        return lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    compare(build_model, make, before_step=clip(1e4))

    models = [build_model(), build_model(), build_model()]
    opts = [make(model) for model in models]

    def clip_masked(model):
        for p in opts[1].dropped_layers():
            p.grad.zero_()
        clip(1e-2)(model)

    train(models[0], opts[0], skip=True, before_step=clip(1e-2))
    train(models[1], opts[1], skip=False, before_step=clip_masked)
    train(models[2], opts[2], skip=False, before_step=clip(1e-2))
    masked, unmasked = (
        max((p - q).abs().max() for p, q in zip(models[0].parameters(), other.parameters(), strict=True))
        for other in models[1:]
    )
    assert masked < 1e-5 < unmasked  # the documented difference


def test_grad_scaler_repeats_the_decision_of_a_skipped_step():
    model = build_model()
    opt = build_optimizer(model, LayerGradDrop(p=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    decisions = []
    with skip_dropped_layers(model, opt):
        for i, ids in enumerate(batches(4)):
            scaler.scale(loss_of(model, ids)).backward()
            decisions.append(frozenset(opt._switched_off))
            if i == 1:
                model.classifier.weight.grad.fill_(float("inf"))
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert opt.draw == 3
    assert decisions[1] == decisions[2] and decisions[0] != decisions[1]


def test_resume_repeats_the_decisions():
    model = build_model()
    opt = build_optimizer(model, LayerGradDrop(p=0.5))
    train(model, opt, skip=True, steps=3, per_epoch=99)
    again = build_model()
    again.load_state_dict(model.state_dict())
    other = build_optimizer(again, LayerGradDrop(p=0.1))
    other.load_state_dict(opt.state_dict())
    off = [train(m, o, skip=True, steps=4, per_epoch=99) for m, o in ((model, opt), (again, other))]
    assert off[0] == off[1] and any(off[0])
    assert_same(model, again, opt, other)


compiled = partial(torch.compile, backend="eager")  # compiling is what matters here, not the compiler
one_layer = partial(build_model, num_hidden_layers=1)


@pytest.fixture
def eager_graphs(monkeypatch):
    """Graphs of the backend "eager" leave gradients to autograd and cannot go stale, with any torch."""
    monkeypatch.setattr(skip_module, "GRAPHS_GO_STALE", False)


@pytest.mark.usefixtures("eager_graphs")
def test_compiled_model():
    torch._dynamo.reset()
    make = partial(build_optimizer, drop=GradFreeze("bottom-up"))
    assert any(compare(one_layer, make, steps=3, per_epoch=2, wrap=compiled))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks at inputs
@pytest.mark.parametrize("what", ["model", "blocks"])
@pytest.mark.usefixtures("eager_graphs")
def test_modules_compiled_in_place_meanwhile(what):
    """module.compile() takes the place of what watches the module's calls."""
    torch._dynamo.reset()

    def run(skip):
        model = one_layer()
        opt = build_optimizer(model, LayerGradDrop(p=0.5))
        handle = skip_dropped_layers(model, opt) if skip else None
        off = train(model, opt, skip=False, steps=2)
        for module in [model] if what == "model" else model.bert.encoder.layer:
            module.compile(backend="eager")
        off += train(model, opt, skip=False, steps=4)
        if handle:
            handle.remove()
        return model, opt, off

    (a, opt_a, _), (b, opt_b, off) = run(False), run(True)
    assert_same(a, b, opt_a, opt_b)
    assert any(off)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize("drop", [GradFreeze("top-down"), LayerGradDrop(p=0.5)], ids=["GradFreeze", "LayerGradDrop"])
@pytest.mark.usefixtures("eager_graphs")
def test_compiled_blocks_are_compiled_a_few_times(drop):
    """A whole model is compiled for each set of dropped layers, and beyond dynamo's limit no more."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 9, "num_attention_heads": 2, "intermediate_size": 24}
    config = hf.BertConfig(**sizes, vocab_size=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    runs = []
    for skips in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = hf.BertForSequenceClassification(config)
        count = CompileCounter()
        for block in model.bert.encoder.layer:
            block.compile(backend=count)
        opt = GradDropAdamW(param_groups(model, drop=drop), lr=1e-2)
        skipped = skip_dropped_layers(model, opt)
        if not skips:
            skipped.remove()
        for step in range(12):
            opt.set_epoch(step)
            model(input_ids=torch.arange(16).view(2, 8) + step, labels=torch.tensor([0, 1])).loss.backward()
            opt.step()
            opt.zero_grad()
        runs.append(list(model.parameters()))
    assert 2 <= count.frame_count <= 4
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("stale", [True, False], ids=["graphs go stale", "graphs notice"])
@pytest.mark.parametrize("what", ["model", "block", "child"])
def test_a_layer_that_was_off_when_it_was_compiled_trains_later(what, stale, monkeypatch):
    """With a backend that takes gradients from its graphs. Where these go stale nothing is skipped, with a warning."""
    stale = stale or skip_module.GRAPHS_GO_STALE
    monkeypatch.setattr(skip_module, "GRAPHS_GO_STALE", stale)
    torch._dynamo.reset()
    make = partial(build_optimizer, drop=GradFreeze("top-down"))
    plain, model = (build_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) for _ in range(2))
    opts = [make(m) for m in (plain, model)]
    wrapped = torch.compile(model, backend="aot_eager") if what == "model" else model
    if what == "block":
        model.bert.encoder.layer[0].compile(backend="aot_eager")
    elif what == "child":
        model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="aot_eager")
    train(plain, opts[0], skip=False, steps=4, per_epoch=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        off = train(wrapped, opts[1], skip=True, steps=4, per_epoch=1)
    said = [str(w.message) for w in caught if "skips nothing in a compiled model" in str(w.message)]
    assert len(said) == stale and any(off[1:]) == (not stale)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("eager_graphs")
def test_hook_on_the_compiled_model():
    torch._dynamo.reset()
    plain, model = one_layer(), compiled(one_layer())
    opts = [build_optimizer(m, GradFreeze("bottom-up")) for m in (plain, model)]
    train(plain, opts[0], skip=False, steps=3)
    assert any(train(model, opts[1], skip=True, steps=3))
    assert_same(plain, model._orig_mod, *opts)


@pytest.fixture
def process_group(tmp_path):
    if not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_with_find_unused_parameters(process_group):
    wrap = partial(DistributedDataParallel, find_unused_parameters=True)
    assert any(compare(build_model, partial(build_optimizer, drop=LayerGradDrop(p=0.5)), wrap=wrap))


def test_benchmark(capsys):
    """The timed runs do what they are compared for: the same update with less work, and the same layers off."""
    flags = ["--layers", "2", "--width", "32", "--batch", "2", "8", "--steps", "3", "--p", "0.5", "--only", "time"]
    layer_skipping.main(flags)
    assert "| 0.5 | skipped / frozen | " in capsys.readouterr().out

    options = layer_skipping.parser().parse_args(flags)
    runs = {name: layer_skipping.Run(name, 0.5, options) for name in layer_skipping.RUNS}
    without_gradient = {name: [] for name in runs}
    for name, run in runs.items():
        run.optimizer.register_step_pre_hook(
            lambda opt, *_, off=without_gradient[name]: off.append(
                sum(p.grad is None for group in opt.param_groups for p in group["params"])
            )
        )
        for step in range(1, 4):
            assert all(seconds > 0 for seconds in run.step(layer_skipping.batch(step, options)))
    assert without_gradient["skipped"] == without_gradient["frozen"] and any(without_gradient["frozen"])
    assert without_gradient["masked"] == without_gradient["fine-tuning"] == [0, 0, 0]
    assert all(map(torch.equal, runs["skipped"].model.parameters(), runs["masked"].model.parameters()))


def test_the_benchmark_asks_the_device_that_it_is_told(monkeypatch):
    asked = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.accelerator, name, lambda device, name=name: asked.append((name, str(device))))
    monkeypatch.setattr(layer_skipping, "batch", lambda step, options: None)

    class Run(layer_skipping.Run):
        def __init__(self, name, p, options):
            self.device, self.clock = options.device, lambda: 0

        def step(self, ids):
            self._now()

    options = layer_skipping.parser().parse_args(["--device", "cuda:1"])
    layer_skipping._peak("masked", 0.5, options, Run)
    assert asked[0] == ("reset_peak_memory_stats", "cuda:1") and asked[-1] == ("max_memory_allocated", "cuda:1")
    assert asked[1:-1] == [("synchronize", "cuda:1")] * 4


# Bad input


def test_data_parallel():
    model = build_model()
    opt = build_optimizer(model, LayerGradDrop(p=0.5))
    with pytest.raises(ValueError, match="model must not be a DataParallel"):
        skip_dropped_layers(torch.nn.DataParallel(model), opt)


def test_another_optimizer():
    model = build_model()
    with pytest.raises(TypeError, match="optimizer must be a masked optimizer .*, got AdamW"):
        skip_dropped_layers(model, torch.optim.AdamW(model.parameters()))


def test_optimizer_of_another_model():
    opt = build_optimizer(build_model(), LayerGradDrop(p=0.5))
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model"):
        skip_dropped_layers(build_model(), opt)


def two_layers(drop, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    groups = [{"params": list(model[i].named_parameters(str(i))), "layer": str(i)} for i in (0, 1)]
    return model, GradDropAdamW(groups, lr=1e-2, drop=drop, seed=3, backend="reference", **options)


CLOSURES = pytest.mark.parametrize("closure", [None, lambda: None], ids=["", "a closure"])  # which Lightning gives


@CLOSURES
@pytest.mark.parametrize("again", [True, False], ids=["with passes of both epochs", "with none of the new one"])
def test_an_epoch_that_begins_between_the_passes_of_a_step(again, closure):
    model, opt = two_layers(GradFreeze("top-down"))
    skip_dropped_layers(model, opt)
    opt.set_epoch(0)
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].weight.grad is None
    opt.set_epoch(1)
    before = copy.deepcopy(model.state_dict())
    if again:
        model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="one mask for all passes of a step"):
        opt.step(closure)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and opt.draw == 0
    assert all(p.requires_grad for p in model.parameters())
    opt.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].weight.grad is not None
    opt.step()
    assert opt.draw == 1


def deep(drop, skip, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)], torch.nn.Linear(4, 1))
    groups = [{"params": list(model[i].parameters()), "layer": str(i), "drop": drop, **options} for i in range(4)]
    opt = GradDropAdamW([*groups, {"params": list(model[4].parameters())}], lr=1e-2, seed=3, backend="reference")
    if skip:
        skip_dropped_layers(model, opt)
    return model, opt


def backward_in_closure(model, opt, x):
    for _ in range(8):
        loss = model(x).square().mean()
        opt.step(loss.backward)
        opt.zero_grad()


def last_pass_not_stepped(model, opt, x):
    for epoch in range(8):
        opt.set_epoch(epoch)
        for batch in range(3):
            loss = model(x).sum()
            opt.zero_grad()
            loss.backward()
            if batch < 2:
                opt.step()


def interrupted_closures(model, opt, x):
    def closure(interrupt):
        opt.zero_grad()
        model(x).square().sum().backward()
        if interrupt:
            raise InterruptedError

    for epoch in range(8):
        opt.set_epoch(epoch)
        for batch in range(3):
            try:
                opt.step(partial(closure, batch == 2))
            except InterruptedError:
                pass


@pytest.mark.parametrize("loop", [backward_in_closure, last_pass_not_stepped, interrupted_closures])
def test_untidy_loops(loop):
    models = []
    for skip in (True, False):
        model, opt = deep(LayerGradDrop(0.5, per="epoch"), skip)
        opt.set_epoch(0)
        loop(model, opt, torch.ones(3, 4))
        models.append((model, opt))
    (model, opt), (plain, other) = models
    assert_same(model, plain, opt, other)


def test_a_last_layer_that_the_user_froze_keeps_no_graph():
    ends = []
    for skip in (True, False):
        model, opt = deep(LayerGradDrop(0.6), skip, effect="freeze")
        model[4].requires_grad_(False)
        model[3].requires_grad_(False)
        for _ in range(12):
            model(torch.ones(3, 4)).sum().backward()
            opt.step()
            opt.zero_grad()
        ends.append(model)
    for p, q in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.equal(p, q)


@CLOSURES
def test_a_step_after_a_pass_without_backward_moves_nothing(closure):
    def trained(skip):
        model, opt = two_layers(LayerGradDrop(0.5))
        if skip:
            skip_dropped_layers(model, opt)
        for i in range(12):
            loss = model(torch.ones(2, 4)).sum()
            if i % 3 != 2:
                loss.backward()
            opt.step(closure)
            opt.zero_grad()
        return model, opt

    (model, opt), (plain, other) = trained(True), trained(False)
    assert_same(model, plain, opt, other)


@pytest.mark.parametrize("held", [True, False], ids=["in the optimizer", "outside"])
@pytest.mark.parametrize("effect", [None, "freeze"])
def test_parameters_that_no_loss_depends_on_are_not_enough(effect, held):
    """A loss without a graph has no backward: something must be on that the loss depends on."""

    def trained(skip):
        torch.manual_seed(0)
        model = hf.BertModel(hf.BertConfig(**SIZES)).train()  # its pooler is not in last_hidden_state
        groups = param_groups(model, drop=LayerGradDrop(0.5))
        if not held:
            groups = [g for g in groups if all("pooler" not in name for name, _ in g["params"])]
        opt = GradDropAdamW(groups, lr=1e-3, effect=effect, seed=1, backend="reference")
        if skip:
            skip_dropped_layers(model, opt)
        torch.manual_seed(2)
        for ids in batches(24):
            model(input_ids=ids).last_hidden_state.square().mean().backward()
            opt.step()
            opt.zero_grad()
        return model

    for p, q in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("whole", [True, False], ids=["in the model", "part by part"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_hand(reentrant, whole):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return x

    def trained(skip):
        torch.manual_seed(0)
        model = Model()
        groups = [{"params": list(b.named_parameters(str(i))), "layer": str(i)} for i, b in enumerate(model.blocks)]
        opt = GradDropAdamW(groups, lr=1e-2, drop=LayerGradDrop(0.5), effect="freeze", seed=1, backend="reference")
        if skip:
            skip_dropped_layers(model, opt)
        call = model if whole else model.forward  # as a LightningModule's training_step calls its parts
        for _ in range(6):
            call(torch.ones(2, 4, requires_grad=True)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return model

    if reentrant:
        with pytest.raises(ValueError, match="reentrant activation checkpointing"):
            trained(True)
        return
    for p, q in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert torch.equal(p, q)
