"""describe(): the table against keep_mask, which draws the masks themselves."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from graddrop_fused import (
    GradDrop,
    GradDropAdamW,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    LinearAnneal,
    Policy,
    Schedule,
    StaticMask,
    attach,
    param_groups,
)
from graddrop_fused.describe import HEADER, describe
from graddrop_fused.log_values import log_values
from graddrop_fused.policies import KEEP

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 200,
    "max_position_embeddings": 40,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES))


def kept_share(optimizer, group):
    """By drawing: the share of the group's elements that the coming step keeps."""
    masks = [optimizer.keep_mask(p) for p in group["params"]]
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


@pytest.mark.parametrize(
    "policy, tolerance",
    [
        (GradDrop(p=0.3), 0.02),
        (GradDrop(anneal=LinearAnneal(start=0.8, epochs=4)), 0.02),
        (GradDrop(p=0.5, block=128), 0.15),
        (GradDropEpoch(p=0.75), 0.02),
        (GradDropEpoch(p=0.75, toggle=True), 0.02),
        (LayerGradDrop(p=0.5), 0.0),
        (GradFreeze("top-down"), 0.0),
        (None, 0.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("epoch", [0, 2])
def test_shares_are_those_of_the_masks(model, policy, tolerance, epoch):
    optimizer = GradDropAdamW(param_groups(model, drop=policy), seed=3)
    optimizer.set_epoch(epoch)
    table = describe(optimizer)
    assert sum(row.parameters for row in table.rows) == sum(p.numel() for p in model.parameters())
    assert table.total.parameters == sum(p.numel() for p in model.parameters())
    drawn = {}
    for group in optimizer.param_groups:
        layer = drawn.setdefault((group["layer"], group["drop"] is None), [0, 0.0])
        elements = sum(p.numel() for p in group["params"])
        layer[0] += elements
        layer[1] += elements * kept_share(optimizer, group)
    for row in table.rows:
        elements, kept = drawn[row.layer, row.policy == "none"]
        assert row.parameters == elements
        assert row.active == pytest.approx(kept / elements, abs=tolerance)
    everything = sum(kept for _, kept in drawn.values()) / table.total.parameters
    assert table.total.active == pytest.approx(everything, abs=max(tolerance, 1e-9))
    masked = [row for row in table.rows if row.policy != "none"]
    if masked:
        share = sum(row.parameters * row.active for row in masked) / sum(row.parameters for row in masked)
        assert log_values(optimizer)["graddrop_active"] == pytest.approx(share)


def test_static_masks(model):
    torch.manual_seed(1)
    masks = {name: torch.rand(p.shape) < 0.25 for name, p in model.named_parameters() if "query" in name}
    optimizer = GradDropAdamW(model.named_parameters(), drop=StaticMask(masks))
    table = describe(optimizer)
    dropped = sum(int((~mask).sum()) for mask in masks.values())
    assert table.total.active == pytest.approx(1 - dropped / table.total.parameters)
    assert log_values(optimizer) == {"graddrop_active": pytest.approx(table.total.active), "graddrop_draw": 0}
    assert table.rows[0].policy == "StaticMask(6 masks)" and table.rows[0].layer == "group 0"


def test_groups_alone_are_shown_at_their_first_step(model):
    table = describe(param_groups(model, drop=GradFreeze("bottom-up")))
    active = {row.layer: row.active for row in table.rows}
    assert active == {"embeddings": 1.0, "layer.0": 0.0, "layer.1": 0.0, "layer.2": 0.0, "head": 1.0}
    assert {row.layer: row.effect for row in table.rows}["layer.0"] == "freeze"
    drawn_later = describe(param_groups(model, drop=LayerGradDrop(p=0.25)))
    assert drawn_later.rows[1].active == pytest.approx(0.75, abs=1e-3)


def test_unknown_epoch_is_said(model):
    optimizer = GradDropAdamW(param_groups(model, drop=GradDropEpoch(p=0.9), targets="attention"))
    table = describe(optimizer)
    assert table.total.active is None
    assert "epoch unknown" in str(table).splitlines()[-1]
    optimizer.set_epoch(1)
    assert describe(optimizer).total.active is not None


def test_text_and_html(model, capsys):
    table = describe(param_groups(model, drop=GradDrop(p=0.5), targets="attention"))
    printed = capsys.readouterr().out
    assert printed == f"{table}\n" == f"{table!r}\n"
    lines = printed.splitlines()
    assert lines[0].split("  ")[0] == "layer" and all(name in lines[0] for name in HEADER)
    assert lines[-1].startswith("all") and len(lines) == 2 + len(table.rows)
    assert [line.split()[0] for line in lines[2:4]] == ["layer.0", "layer.0"]  # with and without a policy
    assert "GradDrop(p=0.5)" in printed and "anneal" not in printed
    markup = table._repr_html_()
    assert markup.count("<tr>") == len(lines) and "<td>GradDrop(p=0.5)</td>" in markup


def test_a_prompt_shows_it_once(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    print(repr(describe(param_groups(model, drop=GradDrop(0.5)))))  # as the prompt does
    assert capsys.readouterr().out.count("active now") == 1


def test_handle_of_attach(model):
    optimizer = torch.optim.SGD(param_groups(model, drop=GradDrop(p=0.5)), lr=0.1)
    handle = attach(optimizer)
    for source in (handle, optimizer, Wrapper(optimizer)):
        assert describe(source).total.active == pytest.approx(0.5, abs=1e-3)
    handle.remove()
    for source in (torch.optim.SGD(model.parameters()), Wrapper(torch.optim.AdamW(model.parameters()))):
        with pytest.raises(TypeError, match="without masks"):
            describe(source)


def test_layers_of_a_handle_are_those_of_its_masks(model):
    handle = attach(torch.optim.SGD(param_groups(model, drop=LayerGradDrop(p=0.5)), lr=0.1), seed=4)
    shares = [row.active for row in describe(handle).rows]
    off = {id(p) for p in handle.dropped_layers()}
    assert set(shares) == {0.0, 1.0} and off
    for group in handle.groups:
        for p in group["params"]:
            assert bool(handle.keep_mask(p).any()) == (id(p) not in off)


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's AcceleratedOptimizer, which has little else of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def test_accelerate_s_wrapper(model):
    optimizer = GradDropAdamW(param_groups(model, drop=GradDrop(p=0.5)))
    assert str(describe(Wrapper(optimizer))) == str(describe(optimizer))
    assert log_values(Wrapper(optimizer)) == log_values(optimizer)


def test_a_masked_optimizer_that_has_another_one(model):
    optimizer = GradDropAdamW(param_groups(model, drop=GradDrop(0.5)))
    optimizer.optimizer = torch.optim.SGD([torch.ones(3)])
    assert log_values(optimizer)["graddrop_p"] == 0.5
    wrapped = SimpleNamespace(optimizer=optimizer)
    assert str(describe(optimizer)) == str(describe(wrapped)) and log_values(wrapped) == log_values(optimizer)
    with pytest.raises(TypeError, match="must not be a GradDropAdamW"):
        attach(optimizer, drop=GradDrop(0.5))


@dataclass(frozen=True)
class Listed(Schedule):
    values: tuple
    by = "step"

    @property
    def length(self):
        return len(self.values)

    def p(self, index):
        return self.values[index]


@dataclass(frozen=True)
class ByLayer(Policy):
    p: tuple

    def row(self, index, layer, layers):
        return KEEP


def test_log_values_of_ones_own_policies(model):
    optimizer = GradDropAdamW(param_groups(model, drop=GradDrop(anneal=Listed((0.5, 0.25)))))
    shown = []
    for _ in range(4):
        values = log_values(optimizer)
        shown.append((values["graddrop_p"], values["graddrop_active"]))
        optimizer.step()
    assert shown == [(0.5, 0.5), (0.25, 0.75), (0.25, 0.75), (0.25, 0.75)]
    assert "graddrop_p" not in log_values(GradDropAdamW(param_groups(model, drop=ByLayer((0.1, 0.2)))))


@pytest.mark.parametrize("source", [None, 3, "adamw", [torch.ones(2)], torch.nn.Linear(2, 2)])
def test_what_has_no_groups(source):
    with pytest.raises(TypeError, match="source must be an optimizer, a handle of attach"):
        describe(source)
