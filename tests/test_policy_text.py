"""Policies as text: what is written, what it means, what comes back."""

import argparse
import json
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graddrop_fused import GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop, LinearAnneal, Policy, StaticMask
from graddrop_fused.policy_text import PolicyTextError, policy, policy_to_text

TEXTS = {
    "graddrop:p=0.1": GradDrop(p=0.1),
    "GradDrop(p=0.1)": GradDrop(p=0.1),
    "graddrop:0.1": GradDrop(p=0.1),
    " Grad-Drop : p = 1e-1 , rescale = False ": GradDrop(p=0.1, rescale=False),
    "graddrop:p=0.25,block=1024": GradDrop(p=0.25, block=1024),
    "graddrop:p=0.1,distribution=gaussian": GradDrop(p=0.1, distribution="gaussian"),
    "graddrop:p=0.1,distribution='gaussian'": GradDrop(p=0.1, distribution="gaussian"),
    "graddrop_epoch:p=0.9,toggle": GradDropEpoch(p=0.9, toggle=True),
    "graddrop-epoch:0.9,replacement": GradDropEpoch(p=0.9, replacement=True),
    "layer-graddrop:p=0,per=epoch": LayerGradDrop(p=0, per="epoch"),
    "layer-graddrop:anneal=linear-anneal(epochs=10)": LayerGradDrop(anneal=LinearAnneal(epochs=10)),
    "graddrop:anneal=linear-anneal(0.5,total_steps=100),rescale=false": GradDrop(
        anneal=LinearAnneal(0.5, total_steps=100), rescale=False
    ),
    "gradfreeze": GradFreeze(),
    "gradfreeze:": GradFreeze(),
    "GradFreeze()": GradFreeze(),
    "gradfreeze:bottom-up,layers_per_epoch=2": GradFreeze("bottom-up", 2),
    "none": None,
    "None": None,
}
POLICIES = [p for p in TEXTS.values() if p is not None]


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_text_means(text):
    assert policy(text) == TEXTS[text]


@pytest.mark.parametrize("made", POLICIES, ids=repr)
def test_what_comes_back(made):
    assert policy(policy_to_text(made)) == made
    assert policy(repr(made)) == made
    assert policy(made) is made


def test_the_shortest_text():
    texts = {policy_to_text(policy(text)) for text in TEXTS if TEXTS[text] is not None}
    assert {"graddrop:p=0.1", "graddrop-epoch:p=0.9,toggle", "gradfreeze"} < texts
    assert "layer-graddrop:anneal=linear-anneal(epochs=10)" in texts
    assert policy_to_text(None) == "none"


probabilities = st.floats(0.0, 0.99)
anneals = st.builds(LinearAnneal, start=probabilities, epochs=st.integers(2, 10**6))
rescales = st.sampled_from([None, True, False])


@given(
    st.one_of(
        st.builds(GradDrop, p=probabilities, rescale=rescales, block=st.sampled_from([1, 128, 4096])),
        st.builds(GradDrop, anneal=anneals, rescale=rescales),
        st.builds(LayerGradDrop, p=probabilities, per=st.sampled_from(["step", "epoch"]), rescale=rescales),
        st.builds(GradFreeze, st.sampled_from(["top-down", "bottom-up"]), st.integers(1, 99)),
    )
)
def test_fuzz_what_comes_back(made):
    assert policy(policy_to_text(made)) == policy(repr(made)) == made


@given(st.text(max_size=40) | st.from_regex(r"(graddrop|gradfreeze)[:(][a-z=,.()'0-9]{0,20}", fullmatch=True))
def test_fuzz_any_text_is_a_policy_or_a_policy_text_error(text):
    try:
        made = policy(text)
    except PolicyTextError:
        return
    assert made is None or isinstance(made, Policy)


ERRORS = {
    "": "a policy must be written as name:argument=value,..., got ''",
    "0.1": "a policy must be written as name:argument=value,..., got '0.1'",
    "grad drop": "a policy must be written as name:argument=value",
    "dropout:p=0.1": "the policy must be one of graddrop, graddrop-epoch, .*, got 'dropout' in 'dropout:p=0.1'",
    "graddrop:q=0.1": "graddrop takes the arguments p, anneal, rescale, block, distribution, hold; got 'q' in",
    "graddrop:p=0.1,0.2": "graddrop takes the arguments .*; got '0.2' in",
    "graddrop:p=0.1,p=0.2": "p must be given once, got it twice in",
    "graddrop:p=0.1,,": "an argument must stand between two commas, got none in",
    "graddrop:p=": "an argument must have a value behind '=', got none in",
    "graddrop:p=1.5": r"p must .*1.5.*, in 'graddrop:p=1.5'",
    "graddrop:p": "p must be a number in .*, got True, in",
    "graddrop": "GradDrop takes exactly one of p and anneal",
    "graddrop-epoch:toggle": "GradDropEpoch takes exactly one of p and anneal, got p=None and anneal=None, in",
    "graddrop-epoch:p=0.9,toggle=1": "toggle must be True or False, got 1, in",
    "graddrop:anneal=linear-anneal(epochs=1)": "epochs must be an integer in .*, got 1, in",
    "gradrop-epoch:p=0.1": "got 'gradrop-epoch' \\(did you mean graddrop-epoch\\?\\)",
    "graddrop:anneal=cosine(epochs=3)": "the schedule must be one of linear-anneal.*, got 'cosine' in",
    "graddrop:anneal=linear-anneal(epochs=3": "parentheses and quotes must be closed, got",
    "graddrop:p='0.1": "parentheses and quotes must be closed, got",
    "graddrop:p=0.1)": "parentheses and quotes must be closed, got",
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    with pytest.raises(PolicyTextError, match=ERRORS[text]):
        policy(text)


def test_another_type():
    with pytest.raises(TypeError, match="a policy must be a text, a mapping, a Policy or None, got 0.1"):
        policy(0.1)


def test_masks_have_no_text():
    masks = StaticMask([torch.ones(3, dtype=torch.bool)])
    with pytest.raises(TypeError, match="StaticMask.masks must be a number, a word, .* for a text, got <class 'list'>"):
        policy_to_text(masks)
    with pytest.raises(PolicyTextError, match="masks must be a dict"):
        policy("staticmask:masks=fisher")


def test_a_command_line(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--drop", type=policy, default="graddrop:p=0.1")
    assert parser.parse_args([]).drop == GradDrop(p=0.1)
    assert parser.parse_args(["--drop", "none"]).drop is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--drop", "graddrop:p=2"])
    assert "argument --drop: p must" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, made",
    [
        ('{"policy": "graddrop", "p": 0.1, "block": 1024}', GradDrop(p=0.1, block=1024)),
        ('{"policy": "GradDropEpoch", "p": 0.9, "toggle": true}', GradDropEpoch(0.9, toggle=True)),
        (
            '{"policy": "layer-graddrop", "anneal": {"schedule": "linear-anneal", "epochs": 3}}',
            LayerGradDrop(anneal=LinearAnneal(epochs=3)),
        ),
        (
            '{"policy": "layer-graddrop", "anneal": "linear-anneal:epochs=3"}',
            LayerGradDrop(anneal=LinearAnneal(epochs=3)),
        ),
        ('{"policy": "gradfreeze", "direction": "bottom-up"}', GradFreeze("bottom-up")),
        ('{"policy": "none"}', None),
        ('{"policy": null}', None),
    ],
)
def test_a_mapping_of_a_file(source, made):
    assert policy(json.loads(source)) == made


def test_errors_in_a_mapping():
    with pytest.raises(PolicyTextError, match="a mapping must name its class under 'policy', got {'p': 0.1}"):
        policy({"p": 0.1})
    with pytest.raises(PolicyTextError, match="unexpected keyword argument 'q', in"):
        policy({"policy": "graddrop", "q": 0.1})
    with pytest.raises(PolicyTextError, match="the policy must be one of graddrop, .* got 'none' in"):
        policy({"policy": "none", "p": 0.1})


def test_a_policy_of_ones_own():
    @dataclass(frozen=True)
    class EveryOther(Policy):
        parity: int = 0
        name: str = "even, or (odd)"

    assert policy("every-other:parity=1") == EveryOther(1)
    assert policy(policy_to_text(EveryOther(1, "no 'quotes'"))) == EveryOther(1, "no 'quotes'")
    assert policy_to_text(EveryOther(name="1e5")) == "every-other:name='1e5'"
    for name in ("'both' \"kinds\"", "'\"\\", "\\", "\\'\"", "a=b, c(", "\n"):
        assert policy(policy_to_text(EveryOther(name=name))) == EveryOther(name=name)


def test_a_class_with_underscores_in_its_name():
    @dataclass(frozen=True)
    class _Drop_Late(Policy):
        after: int

    for text in ("_Drop_Late(after=3)", "drop-late:3", "droplate:after=3", policy_to_text(_Drop_Late(3))):
        assert policy(text) == _Drop_Late(3)
