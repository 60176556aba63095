"""benchmarks.layer_sweep: its rows, and that its hooks would notice a wrong order."""

import csv
from pathlib import Path

import pytest
import transformers as hf

from benchmarks import layer_sweep
from graddrop_fused.layers import find_layers

TABLE = Path(__file__).parent.parent / "docs/layers/sweep.csv"


@pytest.mark.parametrize("cls", [hf.BertForSequenceClassification, hf.PvtForImageClassification])
def test_row_is_the_tables(cls):
    with TABLE.open(newline="") as file:
        (expected,) = (row for row in csv.DictReader(file) if row["class"] == cls.__name__)
    assert layer_sweep.row(cls) == expected
    assert expected["trace"] == "agrees: all"


def test_hooks_notice_a_wrong_order():
    model = layer_sweep.build(hf.BertForSequenceClassification, num_hidden_layers=3)
    layers = find_layers(model)
    assert layer_sweep.compare(model, layers) == "agrees: all"
    swapped = {**layers, "layer.0": layers["layer.2"], "layer.2": layers["layer.0"]}
    assert layer_sweep.compare(model, swapped).startswith("differs: layer.1")
    pooler = {name: param for name, param in layers["head"].items() if "pooler" in name}
    misplaced = {**layers, "embeddings": {**layers["embeddings"], **pooler}}
    assert layer_sweep.compare(model, misplaced) == "differs: bert.pooler.dense (embeddings) after layer.0"


def test_what_cannot_be_built_is_said():
    assert layer_sweep.row(hf.LayoutLMv2ForQuestionAnswering)["trace"].startswith("not built: ImportError")
