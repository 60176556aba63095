"""Layers and attention targets of 40 model classes of many kinds, on the meta device, as a reader of their source says.

docs/layers/sweep.csv is the table of all classes.
"""

import pytest
import torch
import transformers as hf

from graddrop_fused import GradDrop, param_groups
from graddrop_fused.layers import find_layers

KVO = "k_proj v_proj o_proj"
BART = "k_proj v_proj out_proj"
BERT = "attention.self.key attention.self.value attention.output.dense"
VIT = "attention.k_proj attention.v_proj attention.o_proj"
MLA = "kv_a_proj_with_mqa kv_b_proj o_proj"
FEW = {"num_hidden_layers": 3}

# class -> options of its config, blocks, modules of the head, modules between blocks and where they belong, projections
SAMPLE = {
    "AlbertForQuestionAnswering": ({}, 1, "qa_outputs", {}, "attention.key attention.value attention.dense"),
    "BertForSequenceClassification": (FEW, 3, "bert.pooler classifier", {}, BERT),
    "BertLMHeadModel": (FEW, 3, "cls.predictions", {}, BERT),
    "MegatronBertForTokenClassification": (FEW, 3, "bert.encoder.ln classifier", {}, BERT),
    "XLMRobertaXLForSequenceClassification": (FEW, 3, "roberta.encoder.LayerNorm classifier", {}, BERT),
    "XLMForSequenceClassification": ({"n_layers": 3}, 3, "sequence_summary", {}, "k_lin v_lin out_lin"),
    "XLNetForTokenClassification": ({"n_layer": 3}, 3, "classifier", {}, "rel_attn.k rel_attn.v rel_attn.o"),
    "FunnelForTokenClassification": (
        {"block_sizes": [2, 2, 2]},
        8,
        "classifier",
        {},
        "attention.k_head attention.v_head attention.post_proj",
    ),
    "SqueezeBertForSequenceClassification": (
        FEW,
        3,
        "transformer.pooler classifier",
        {},
        "attention.key attention.value post_attention.conv1d",
    ),
    "LlamaForCausalLM": (FEW, 3, "model.norm lm_head", {}, KVO),
    "Qwen3ForSequenceClassification": (FEW, 3, "model.norm score", {}, KVO),
    "DeepseekV3ForCausalLM": (FEW, 3, "model.norm lm_head", {}, MLA),
    "JambaForCausalLM": ({"num_hidden_layers": 8}, 8, "model.final_layernorm lm_head", {}, KVO),
    "GPTNeoXForCausalLM": (
        FEW,
        3,
        "gpt_neox.final_layer_norm lm_head",
        {},
        "attention.query_key_value attention.dense",
    ),
    "GPT2ForTokenClassification": ({"n_layer": 3}, 3, "transformer.ln_f classifier", {}, "attn.c_attn attn.c_proj"),
    "MptForSequenceClassification": (FEW, 3, "transformer.norm_f score", {}, "attn.Wqkv attn.out_proj"),
    "BioGptForSequenceClassification": (FEW, 3, "biogpt.layer_norm score", {}, BART),
    "XGLMForCausalLM": ({"num_layers": 3}, 3, "model.layer_norm", {}, BART),
    "PegasusForCausalLM": ({"decoder_layers": 3}, 3, "model.decoder.layer_norm", {}, BART),
    "OPTForCausalLM": (FEW, 3, "model.decoder.final_layer_norm", {}, BART),
    "MambaForCausalLM": (FEW, 3, "backbone.norm_f", {}, ""),
    "RwkvForCausalLM": (FEW, 3, "rwkv.ln_out head", {}, "attention.key attention.value attention.output"),
    "BartForSequenceClassification": (
        {"encoder_layers": 2, "decoder_layers": 3},
        5,
        "classification_head",
        {},
        BART,
    ),
    "T5ForConditionalGeneration": (
        {"num_layers": 2, "num_decoder_layers": 3},
        5,
        "decoder.final_layer_norm",
        {"encoder.final_layer_norm": "layer.1"},
        "SelfAttention.k SelfAttention.v SelfAttention.o EncDecAttention.k EncDecAttention.v EncDecAttention.o",
    ),
    "WhisperForConditionalGeneration": (
        {"encoder_layers": 2, "decoder_layers": 3},
        5,
        "model.decoder.layer_norm",
        {"model.encoder.layer_norm": "layer.1"},
        BART,
    ),
    "WhisperForAudioClassification": (
        {"encoder_layers": 2},
        2,
        "encoder.layer_norm projector classifier",
        {},
        BART,
    ),
    "Wav2Vec2ForCTC": (FEW, 3, "lm_head", {}, "attention.k_proj attention.v_proj attention.out_proj"),
    "Wav2Vec2ForSequenceClassification": (
        {**FEW, "do_stable_layer_norm": True},
        3,
        "wav2vec2.encoder.layer_norm projector classifier",
        {},
        "attention.k_proj attention.v_proj attention.out_proj",
    ),
    "ASTForAudioClassification": (FEW, 3, "audio_spectrogram_transformer.layernorm classifier", {}, VIT),
    "ViTForImageClassification": (FEW, 3, "vit.layernorm classifier", {}, VIT),
    "CLIPForImageClassification": ({}, 12, "vision_model.post_layernorm classifier", {}, BART),
    "SwinForImageClassification": (
        {"depths": [1, 2, 1], "num_heads": [1, 2, 4]},
        4,
        "swin.layernorm classifier",
        {"swin.encoder.layers.0.downsample": "layer.0", "swin.encoder.layers.1.downsample": "layer.2"},
        VIT,
    ),
    "ConvNextForImageClassification": (
        {"depths": [1, 2, 1], "hidden_sizes": [8, 16, 32], "num_stages": 3},
        4,
        "convnext.layernorm classifier",
        {
            "convnext.encoder.stages.1.downsampling_layer": "layer.1",
            "convnext.encoder.stages.2.downsampling_layer": "layer.3",
        },
        "",
    ),
    "ResNetForImageClassification": ({"depths": [1, 2, 1, 3]}, 7, "classifier", {}, ""),
    "SegformerForImageClassification": (
        {"depths": [1, 2, 1, 1]},
        5,
        "segformer.stages.3.layer_norm classifier",
        {"segformer.stages.0.layer_norm": "layer.0", "segformer.stages.1.patch_embeddings": "layer.1"},
        VIT,
    ),
    "PvtForImageClassification": (
        {"depths": [1, 2, 1, 1]},
        5,
        "pvt.encoder.layer_norm classifier",
        {"pvt.encoder.patch_embeddings.1": "layer.1", "pvt.encoder.patch_embeddings.2": "layer.3"},
        BERT,
    ),
    "LxmertForQuestionAnswering": (
        {"l_layers": 3, "r_layers": 2, "x_layers": 2},
        7,
        "lxmert.pooler answer_head",
        {},
        "self.key self.value output.dense att.key att.value",
    ),
    "Kosmos2ForConditionalGeneration": (
        {},
        48,
        "text_model.model.layer_norm",
        {"image_to_text_projection": "layer.23"},
        BART,
    ),
    "LlavaForConditionalGeneration": (
        {},
        56,
        "model.language_model.norm lm_head",
        {"model.vision_tower.post_layernorm": "layer.23", "model.multi_modal_projector": "layer.23"},
        f"{BART} o_proj",
    ),
    "PPFormulaNetForConditionalGeneration": (
        {},
        20,
        "model.decoder.layer_norm lm_head",
        {},
        f"{BART} attn.qkv attn.proj",
    ),
}


@pytest.fixture(scope="module", params=SAMPLE)
def sample(request):
    options, *expected = SAMPLE[request.param]
    cls = getattr(hf, request.param)
    with torch.device("meta"):
        model = cls(cls.config_class(**options))
    return model, find_layers(model), *expected


def test_every_parameter_once(sample):
    model, layers, *_ = sample
    assert sorted(n for params in layers.values() for n in params) == sorted(n for n, _ in model.named_parameters())


def test_blocks_head_and_what_lies_between(sample):
    model, layers, blocks, head, between, _ = sample
    assert [*layers] == ["embeddings", *(f"layer.{i}" for i in range(blocks)), "head"]
    for module in head.split():
        assert any(f"{name}.".startswith(f"{module}.") for name in layers["head"]), module
    outside = [n for n in layers["head"] if not any(f"{n}.".startswith(f"{m}.") for m in head.split())]
    assert not outside
    for module, layer in between.items():
        assert any(name.startswith(f"{module}.") for name in layers[layer]), (module, layer)


def test_attention_targets(sample):
    model, layers, _, _, _, projections = sample
    if not projections:
        with pytest.raises(ValueError, match="must find attention projections"):
            param_groups(model, drop=GradDrop(p=0.5), targets="attention")
        return
    groups = param_groups(model, drop=GradDrop(p=0.5), targets="attention")
    dropped = {
        name.removesuffix(".weight").removesuffix(".bias") for g in groups if g["drop"] for name, _ in g["params"]
    }
    ends = {next((end for end in projections.split() if f".{name}".endswith(f".{end}")), name) for name in dropped}
    assert ends == set(projections.split())
