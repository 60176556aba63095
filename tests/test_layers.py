"""Layers and parameter groups, on tiny random models: no weights, no network."""

import re
from functools import partial

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from graddrop_fused import GradDrop, GradDropAdamW, GradFreeze, LayerGradDrop
from graddrop_fused.layers import find_layers, param_groups
from graddrop_fused.targets import attention_projections

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}

# family -> (config, name of the stack)
FAMILIES = {
    "XLMRoberta": (hf.XLMRobertaConfig(**SIZES), "roberta.encoder.layer"),
    "Bert": (hf.BertConfig(**SIZES), "bert.encoder.layer"),
    "Roberta": (hf.RobertaConfig(**SIZES), "roberta.encoder.layer"),
    "DistilBert": (
        hf.DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=48, vocab_size=60),
        "distilbert.transformer.layer",
    ),
    "Albert": (hf.AlbertConfig(**SIZES, embedding_size=16), "albert.encoder.albert_layer_groups"),
    "Electra": (hf.ElectraConfig(**SIZES, embedding_size=16), "electra.encoder.layer"),
    "DebertaV2": (hf.DebertaV2Config(**SIZES, **DISENTANGLED, conv_kernel_size=3), "deberta.encoder.layer"),
    "Llama": (hf.LlamaConfig(**SIZES, num_key_value_heads=2), "model.layers"),
    "GPT2": (
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=60, bos_token_id=0, eos_token_id=1, pad_token_id=1),
        "transformer.h",
    ),
}
HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering"]
BLOCKS = {"Albert": 1}  # one set of shared parameters


def build(family, head="SequenceClassification"):
    torch.manual_seed(0)
    return getattr(hf, f"{family}For{head}")(FAMILIES[family][0])


def every_name(layers):
    return [name for params in layers.values() for name in params]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_layer(family, head):
    model, stack = build(family, head), FAMILIES[family][1]
    if head == "QuestionAnswering" and family in ("Llama", "GPT2"):
        stack = stack.replace("model.", "transformer.")
    layers = find_layers(model)
    blocks = [f"layer.{i}" for i in range(BLOCKS.get(family, 3))]
    assert list(layers) == ["embeddings", *blocks, "head"]
    assert sorted(every_name(layers)) == sorted(name for name, _ in model.named_parameters())

    for i, block in enumerate(blocks):
        assert set(layers[block]) == {n for n, _ in model.named_parameters() if n.startswith(f"{stack}.{i}.")}
    base = stack.split(".")[0]
    for name in layers["embeddings"]:
        assert name.startswith(f"{base}.")
        assert "emb" in name or "wte" in name or "wpe" in name or family == "DebertaV2"
    for name in layers["head"]:
        assert not name.startswith(f"{base}.") or name.split(".")[1] in ("pooler", "norm", "ln_f")


def test_deberta_relative_embeddings_are_embeddings():
    layers = find_layers(build("DebertaV2"))
    beside = {name.split(".")[2] for name in layers["embeddings"] if name.startswith("deberta.encoder.")}
    assert beside == {"rel_embeddings", "conv"}
    assert any(name.startswith("pooler.") for name in layers["head"])


@pytest.mark.parametrize("family", ["Bert", "XLMRoberta", "DistilBert", "Albert", "Llama", "GPT2"])
def test_base_model_alone(family):
    model = build(family).base_model
    assert list(find_layers(model))[:2] == ["embeddings", "layer.0"]
    assert sorted(every_name(find_layers(model))) == sorted(name for name, _ in model.named_parameters())


def test_classifier_that_comes_first_is_the_last_layer():
    model = build("XLMRoberta")
    assert next(iter(model.named_parameters()))[0].startswith("classifier.")
    groups = param_groups(model, drop=GradDrop(p=0.1))
    assert [g["layer"] for g in groups if g["params"][0][0].startswith("classifier.")] == ["head", "head"]
    assert groups[0]["layer"] == "embeddings" and groups[-1]["layer"] == "head"


@pytest.mark.parametrize(
    "model",
    [
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        hf.GPT2LMHeadModel(FAMILIES["GPT2"][0]),
        hf.BertForMaskedLM(FAMILIES["Bert"][0]),
        hf.XLMRobertaForMaskedLM(FAMILIES["XLMRoberta"][0]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_tied_embeddings_are_embeddings(model):
    layers = find_layers(model)
    tied = model.get_output_embeddings().weight
    assert tied is model.get_input_embeddings().weight
    assert [layer for layer, params in layers.items() if any(p is tied for p in params.values())] == ["embeddings"]
    assert len(every_name(layers)) == len(list(model.parameters()))


class Wrapper(nn.Module):
    """What DDP does to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module


compiled = partial(torch.compile, backend="eager")


def compile_blocks(model):
    for i, block in enumerate(model.roberta.encoder.layer):
        model.roberta.encoder.layer[i] = compiled(block)
    return model


@pytest.mark.parametrize(
    "wrap",
    [compiled, Wrapper, lambda m: compiled(Wrapper(m)), compile_blocks],
    ids=["compiled", "DDP", "compiled DDP", "compiled blocks"],
)
def test_wrappers_change_nothing(wrap):
    model = build("XLMRoberta")
    before = [(g["layer"], [name for name, _ in g["params"]]) for g in param_groups(model)]
    after = [(g["layer"], [name for name, _ in g["params"]]) for g in param_groups(wrap(model))]
    assert before == after


def test_some_wrapped_blocks():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build("Bert")
    before = {layer: list(params) for layer, params in find_layers(model).items()}
    model.bert.encoder.layer[1] = checkpoint_wrapper(model.bert.encoder.layer[1])
    assert {layer: list(params) for layer, params in find_layers(model).items()} == before


def test_encoder_inside_a_users_module():
    class Ranker(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = nn.Linear(32, 1)
            self.encoder = build("Bert").bert

    layers = find_layers(Ranker())
    assert list(layers) == ["embeddings", "layer.0", "layer.1", "layer.2", "head"]
    assert {name.split(".")[0] for name in layers["layer.0"]} == {"encoder"}
    assert set(layers["head"]) == {
        "score.weight",
        "score.bias",
        "encoder.pooler.dense.weight",
        "encoder.pooler.dense.bias",
    }


def test_model_without_transformers():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 2)
            self.embed = nn.Embedding(10, 8)
            block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    layers = find_layers(Plain())
    assert list(layers) == ["embeddings", "layer.0", "layer.1", "head"]
    assert set(layers["head"]) == {"out.weight", "out.bias"}
    attention = {
        name
        for g in param_groups(Plain(), drop=GradDrop(p=0.5), targets="attention")
        if g["drop"]
        for name, _ in g["params"]
    }
    assert {name.split("self_attn.")[1] for name in attention} == {
        "in_proj_weight",
        "in_proj_bias",
        "out_proj.weight",
        "out_proj.bias",
    }


# Groups


def names(groups):
    return {name for group in groups for name, _ in group["params"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_decay_as_the_trainer_does(family):
    model = build(family)
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    groups = param_groups(model, weight_decay=0.25)
    assert {g["weight_decay"] for g in groups} == {0.0, 0.25}
    assert names(g for g in groups if g["weight_decay"]) == decayed
    assert names(groups) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_feed_torch_optimizers_with_names(family):
    model = build(family)
    opt = torch.optim.AdamW(param_groups(model, drop=GradDrop(p=0.1)), lr=1e-3)
    by_name = dict(model.named_parameters())
    seen = 0
    for group in opt.param_groups:
        assert all(by_name[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
        seen += len(group["params"])
    assert seen == len(by_name)


PROJECTIONS = {
    "XLMRoberta": ["attention.self.key", "attention.self.value", "attention.output.dense"],
    "DistilBert": ["attention.k_lin", "attention.v_lin", "attention.out_lin"],
    "Albert": ["attention.key", "attention.value", "attention.dense"],
    "DebertaV2": ["attention.self.key_proj", "attention.self.value_proj", "attention.output.dense"],
    "Llama": ["self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "GPT2": ["attn.c_attn", "attn.c_proj"],  # query, key and value are one matrix
}
PROJECTIONS |= dict.fromkeys(("Bert", "Roberta", "Electra"), PROJECTIONS["XLMRoberta"])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_targets(family):
    model = build(family)
    policy = GradDrop(p=0.5)
    groups = param_groups(model, drop=policy, targets="attention")
    targeted = names(g for g in groups if g["drop"] is policy)
    assert targeted == {
        name
        for name, _ in model.named_parameters()
        if any(f".{projection}." in name for projection in PROJECTIONS[family])
    }
    assert all(g["drop"] is None or g["drop"] is policy for g in groups)
    assert names(groups) == {name for name, _ in model.named_parameters()}


def test_pattern_and_exclude():
    model = build("Bert")
    groups = param_groups(model, drop=GradDrop(p=0.5), targets=r"encoder\.layer\.[01]\.", exclude="LayerNorm|bias")
    assert names(g for g in groups if g["drop"]) == {
        name for name, p in model.named_parameters() if p.dim() == 2 and (".layer.0." in name or ".layer.1." in name)
    }


@pytest.mark.parametrize("policy", [LayerGradDrop(p=0.5), GradFreeze("top-down")], ids=lambda p: type(p).__name__)
def test_head_is_new(policy):
    model = build("Bert")
    groups = param_groups(model, drop=policy)
    assert all((g["drop"] is None) == (g["layer"] == "head") for g in groups)
    assert all(g["drop"] is policy for g in param_groups(model, drop=policy, include_head=True))
    assert all(g["drop"] is not None for g in param_groups(model, drop=GradDrop(p=0.5)))
    groups = param_groups(model, drop=GradDrop(p=0.5), include_head=False)
    assert all((g["drop"] is None) == (g["layer"] == "head") for g in groups)


def test_gradual_unfreezing_freezes_decay_too():
    """Its policy's own effect: param_groups says nothing of it."""
    groups = param_groups(build("Bert"), drop=GradFreeze("bottom-up"), targets="attention")
    assert all("effect" not in group for group in groups)
    optimizer = GradDropAdamW(groups, lr=0.1, weight_decay=0.5)
    optimizer.set_epoch(0)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.5
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    before = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    frozen = set(optimizer.dropped_layers())
    optimizer.step()
    assert frozen and all(torch.equal(p, old) == (p in frozen) for p, old in before.items())


def test_frozen_parameters_are_left_out():
    model = build("Bert")
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    groups = param_groups(model, drop=GradDrop(p=0.5))
    assert names(groups) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert list(dict.fromkeys(g["layer"] for g in groups)) == ["layer.1", "layer.2", "head"]


# Bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"targets": "query_projection"},
            ValueError,
            "targets must be 'all', 'attention', 'attention\\+query' or a regular",
        ),
        ({"targets": "("}, ValueError, r"targets must be .* got '\('"),
        ({"targets": None}, TypeError, "targets must be .* got None"),
        ({"exclude": "no_such"}, ValueError, "exclude must be a regular expression or None .* 'no_such' matches none"),
        ({"exclude": 3}, TypeError, "exclude must be .* got 3"),
        ({"exclude": "."}, ValueError, "must leave a parameter to drop"),
        ({"targets": "classifier", "drop": LayerGradDrop(p=0.5)}, ValueError, "include_head=False must leave"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and at least 0, got -0.1"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite and at least 0, got nan"),
        ({"drop": 0.1}, TypeError, r"drop must be a policy, such as GradDrop\(0.1\), or None, got 0.1"),
        ({"stack": "bert.encoder"}, ValueError, r"stack must name a ModuleList .*\['bert.encoder.layer'\].*"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        param_groups(build("Bert"), **{"drop": GradDrop(p=0.5), **options})


def test_attention_of_unknown_names():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

    assert list(find_layers(Model())) == ["layer.0", "layer.1"]
    with pytest.raises(ValueError, match=r"knows none of this model's names \(blocks.0.mix.weight.*regular expression"):
        param_groups(Model(), targets="attention")


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 2),
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
        nn.ModuleDict({"classifiers": nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])}),
    ],
    ids=["leaf", "sequential", "list of leaves"],
)
def test_model_without_a_stack(model):
    with pytest.raises(ValueError, match=r"must have a stack .* has none among its parts .*stack='encoder.block'"):
        param_groups(model)


def tiny_t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    )


def test_encoder_then_decoder_or_one_of_them():
    layers = find_layers(tiny_t5())
    stacks = [{name.split(".")[0] for name in params} for layer, params in layers.items() if layer.startswith("layer.")]
    assert stacks == [{"encoder"}, {"encoder"}, {"decoder"}, {"decoder"}]
    assert "encoder.final_layer_norm.weight" in layers["layer.1"]
    assert list(layers["head"]) == ["decoder.final_layer_norm.weight"]  # lm_head is tied

    decoder = find_layers(tiny_t5(), stack="decoder.block")
    assert [layer for layer in decoder if layer.startswith("layer.")] == ["layer.0", "layer.1"]
    assert all(name.startswith("decoder.block.0.") for name in decoder["layer.0"])
    assert "encoder.final_layer_norm.weight" in decoder["embeddings"]


def test_stages_in_place_of_blocks():
    config = hf.SwinConfig(depths=[1, 2], num_heads=[1, 2], embed_dim=8, image_size=32, window_size=4)
    model = hf.SwinForImageClassification(config)
    assert [*find_layers(model)] == ["embeddings", "layer.0", "layer.1", "layer.2", "head"]
    stages = find_layers(model, stack="swin.encoder.layers")
    assert [*stages] == ["embeddings", "layer.0", "layer.1", "head"]
    assert all(name.startswith("swin.encoder.layers.1.") for name in stages["layer.1"])


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        return self.mix(x)


class Towers(nn.Module):
    """Registered in an order that is not that of its forward pass."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.late, self.early = (nn.ModuleList([Mixer(), Mixer()]) for _ in range(2))
        self.project = nn.Linear(4, 4)
        self.stem = nn.Linear(4, 4)


class Ordered(Towers):
    def forward(self, x):
        self.check(x)
        dtype = self.late[0].mix.weight.dtype  # touches the later stack and does not run it
        x = self.encode(x.to(dtype))
        for block in self.late:
            x = block(x)
        return self.norm(x)

    def check(self, x):
        for block in self.late:
            assert block.mix.weight.dtype == x.dtype

    def encode(self, x):
        x = self.stem(x)
        for block in self.early:
            x = block(x)
        return self.project(x)


def test_order_is_that_of_the_forward_pass():
    layers = find_layers(Ordered())
    assert {layer: sorted({name.split(".")[0] for name in params}) for layer, params in layers.items()} == {
        "embeddings": ["stem"],
        "layer.0": ["early"],
        "layer.1": ["early", "project"],
        "layer.2": ["late"],
        "layer.3": ["late"],
        "head": ["norm"],
    }


def test_order_that_nothing_tells_is_an_error():
    with pytest.raises(
        ValueError, match=r"in which order its stacks run.*of Towers.*lists of blocks are \['late', 'early'\]"
    ):
        find_layers(Towers())
    assert [*find_layers(Towers(), stack="early")][:2] == ["layer.0", "layer.1"]


# Adapters


PEFTS_OWN = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def peft_model(config, head="SequenceClassification", **options):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = build("Llama", head) if head == "SequenceClassification" else hf.LlamaForCausalLM(FAMILIES["Llama"][0])
    return peft.get_peft_model(model, getattr(peft, config)(**options))


@PEFTS_OWN
@pytest.mark.parametrize(
    "config, options",
    [
        ("LoraConfig", {"target_modules": "all-linear"}),
        ("LoraConfig", {"target_modules": "all-linear", "use_dora": True}),
        ("IA3Config", {"target_modules": ["q_proj", "k_proj", "v_proj"], "feedforward_modules": []}),
        ("LoHaConfig", {"target_modules": ["q_proj", "v_proj"]}),
        ("VeraConfig", {"target_modules": ["q_proj", "o_proj"]}),
    ],
)
def test_adapters_of_attention(config, options):
    model = peft_model(config, task_type="SEQ_CLS", **options)
    groups = param_groups(model, drop=LayerGradDrop(p=0.5), targets="attention")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = {name for name in trained if re.search(r"self_attn\.[kvo]_proj\.", name)}
    assert names(g for g in groups if g["drop"]) == wanted and wanted
    both = param_groups(model, drop=GradDrop(p=0.5), targets="attention+query")
    assert names(g for g in both if g["drop"]) == {name for name in trained if ".self_attn." in name}
    assert {g["layer"] for g in groups} == {"layer.0", "layer.1", "layer.2", "head"}


@PEFTS_OWN
@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_have_no_layers_to_choose_among(config):
    model = peft_model(config, head="CausalLM", task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert {g["layer"] for g in param_groups(model, drop=GradDrop(p=0.5))} == {"embeddings"}
    with pytest.raises(ValueError, match=r"LayerGradDrop.*chooses among layers.*prompt_encoder.*such as GradDrop"):
        param_groups(model, drop=LayerGradDrop(p=0.5))


@pytest.mark.parametrize(
    "name, role",
    [
        ("q_proj.lora_A.default.weight", "query"),
        ("v_proj.lora_magnitude_vector.default.weight", "attention"),
        ("o_proj.base_layer.weight", "attention"),
        ("k_proj.ia3_l.default", "attention"),
        ("v_proj.hada_w1_a.default", "attention"),
        ("q_norm.weight", None),
        ("rotary.weight", None),
    ],
)
def test_names_of_adapters(name, role):
    block = nn.ModuleDict({"self_attn": nn.Module(), "mlp": nn.Module()})
    found = [
        targets
        for targets in ("attention", "attention+query")
        if attention_projections(block, [f"self_attn.{name}", f"mlp.{name}"], targets) == {f"self_attn.{name}"}
    ]
    assert found == {"attention": ["attention", "attention+query"], "query": ["attention+query"], None: []}[role]


def test_model_that_is_all_frozen():
    model = build("Bert").requires_grad_(False)
    with pytest.raises(ValueError, match="all of its parameters are frozen"):
        param_groups(model)
