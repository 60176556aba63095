"""Runs of benchmarks/crosslingual, end to end on a tiny random model: training, methods, resuming, tables, figures."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from crosslingual_files import write, write_model
from scipy.stats import t, ttest_rel

from benchmarks.crosslingual import __main__ as study
from benchmarks.crosslingual import demo, methods, models, results, tables, tasks, training, xglue
from benchmarks.crosslingual.heads import HEADS
from graddrop_fused import GradDropAdamW, param_groups


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def xglue_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xglue")
    for name in xglue.TASKS:
        write(name, folder)
    return folder


@pytest.fixture(scope="module")
def settings(model_folder):
    return training.Settings(model=str(model_folder), epochs=2, batch_size=4, max_length=40)


@pytest.mark.parametrize("name", xglue.TASKS)
def test_every_xglue_task_runs(name, xglue_folder, settings):
    task = xglue.load(name, xglue_folder)
    result = training.run(task, "graddrop-epoch", 0, replace(settings, curves=True), progress=False)
    assert list(result["test"]) == list(result["dev"]) == task.languages
    assert all(0 <= score <= 100 for score in (*result["test"].values(), *result["dev"].values()))
    assert result["test_average"] == pytest.approx(np.mean(list(result["test"].values())))
    assert [round(point["epoch"]) for point in result["curve"]] == [1, 2]
    assert {language: result["curve"][-1][language] for language in task.languages} == result["test"]
    assert result["curve"][-1]["dev"] == result["dev"]["en"]
    assert result["optimizer"].startswith("graddrop_fused.GradDropAdamW (")
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_runs(name, xglue_folder, settings):
    task = xglue.load("nc", xglue_folder)
    result = training.run(task, name, 0, replace(settings, lr=5e-3), progress=False)
    assert result["method"] == name and list(result["test"]) == task.languages
    assert [record["epoch"] for record in result["masks"]] == [0, 1] and result["steps"] == 6
    assert list(result["masks"][0]["layers"]) == LAYERS
    kept = [layer["kept"] for record in result["masks"] for layer in record["layers"].values()]
    assert (min(kept) == 1) == (name == "fine-tuning")


@pytest.mark.parametrize("name", ["ner", "pos", "wpr", "mlqa"])
def test_heads_learn_what_they_score(name, xglue_folder, settings):
    """A model that has learnt its training text scores high on it: labels, features and scores belong together."""
    task = xglue.load(name, xglue_folder)
    task = replace(task, dev={}, test={"en": task.train})
    long = replace(settings, epochs=60, lr=1e-2, batch_size=6, max_length=128)
    scores = training.run(task, "fine-tuning", 0, long, progress=False)["test"]
    assert scores["en"] > (70 if name == "mlqa" else 95)


@pytest.fixture
def last_logits(monkeypatch):
    """What the last scored language's logits were."""
    last = []

    def score(self, examples, features, outputs, language):
        last[:] = outputs.flatten().tolist()
        return 0.0

    monkeypatch.setattr(HEADS["classification"], "score", score)
    return last


def test_curves_change_nothing(xglue_folder, settings, last_logits):
    """Testing after every epoch must not move the random numbers of dropout."""
    task = xglue.load("nc", xglue_folder)
    logits = []
    for curves in (False, True):
        result = training.run(task, "fine-tuning", 0, replace(settings, epochs=3, curves=curves), progress=False)
        assert len(result["curve"]) == (3 if curves else 0)
        logits.append(list(last_logits))
    assert logits[0] == logits[1]


@pytest.mark.parametrize("name", ["graddrop", "layer-graddrop", "skip-update"])
def test_methods_are_paired(name, xglue_folder, settings, last_logits):
    """With nothing dropped a method is plain fine-tuning: same head, batches, dropout, schedule and decay."""
    task = xglue.load("nc", xglue_folder)
    settings = replace(settings, lr=5e-3, p=0.0)
    training.run(task, "fine-tuning", 0, settings, progress=False)
    plain = list(last_logits)
    training.run(task, name, 0, settings, progress=False)
    np.testing.assert_allclose(last_logits, plain, rtol=1e-3, atol=1e-4)
    training.run(task, "fine-tuning", 1, settings, progress=False)
    assert not np.allclose(last_logits, plain, rtol=1e-2, atol=1e-3)


def test_same_seed_same_run(xglue_folder, settings):
    task = xglue.load("qam", xglue_folder)
    drop = ("dev", "test", "curve", "masks")
    first, again, other = (
        training.run(task, "graddrop", seed, replace(settings, curves=True), progress=False) for seed in (3, 3, 4)
    )
    assert [first[name] for name in drop] == [again[name] for name in drop]
    assert first["masks"] != other["masks"]


# Methods


def _optimizer(name, model, epochs=4, **options):
    method = methods.METHODS[name]
    schedule = methods.Schedule(epochs, steps_per_epoch=1, layers=methods.count_layers(model))
    if method.fisher:
        torch.manual_seed(0)
        options["fisher"] = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    return method.optimizer(model, schedule, lr=1e-3, weight_decay=0.01, seed=1, **options)


def _kept(optimizer):
    """Layer -> share of elements that the next step keeps."""
    kept, count = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            kept[group["layer"]] = kept.get(group["layer"], 0) + optimizer.keep_mask(p).sum().item()
            count[group["layer"]] = count.get(group["layer"], 0) + p.numel()
    return {layer: kept[layer] / count[layer] for layer in kept}


def _shares(name, model):
    """The share of kept elements by layer, in each of four epochs of one step."""
    optimizer = _optimizer(name, model)
    shares = []
    for _ in range(4):
        shares.append(_kept(optimizer))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return shares


@pytest.fixture
def model(model_folder, xglue_folder):
    torch.manual_seed(0)
    return models.load(str(model_folder), xglue.load("qam", xglue_folder), HEADS["classification"].auto_model)[0]


LAYERS = ["embeddings", "layer.0", "layer.1", "head"]


def test_names_and_layers(model):
    assert [g["layer"] for g in param_groups(model)][0] == "embeddings" and methods.count_layers(model) == 4
    assert set(tables.PAPER) <= set(methods.METHODS) and len(methods.METHODS) == 12


def test_fine_tuning_is_torch_adamw(model):
    optimizer = _optimizer("fine-tuning", model)
    assert type(optimizer) is torch.optim.AdamW
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.01}


@pytest.mark.parametrize(("name", "shares"), [
    ("graddrop", [0.8] * 4), ("skip-update", [0.8] * 4), ("child-tuning-f", [0.3] * 4),
    ("anneal-graddrop", [0.1, 0.4, 0.7, 1.0]),
    ("graddrop-epoch", [0.25, 0.5, 0.75, 1.0]), ("graddrop-epoch-toggle", [0.25] * 4),
])  # fmt: skip
def test_element_methods_keep_their_share(name, shares, model):
    for found, share in zip(_shares(name, model), shares, strict=True):
        for layer in LAYERS:
            tolerance = 5 * (share * (1 - share) / 500) ** 0.5 if share < 1 else 0  # the head has 306 + elements
            assert found[layer] == pytest.approx(share, abs=tolerance), (layer, found)


@pytest.mark.parametrize("name", ["layer-graddrop", "anneal-layer-graddrop"])
def test_layer_methods_drop_whole_layers_but_the_head(name, model):
    shares = _shares(name, model)
    assert all(share in (0.0, 1.0) for epoch in shares for share in epoch.values())
    assert all(epoch["head"] == 1.0 for epoch in shares)
    if name.startswith("anneal"):
        assert set(shares[-1].values()) == {1.0}


def test_gradfreeze_thaws_all_layers_in_time(model):
    top = [[layer for layer in LAYERS if epoch[layer] == 1.0] for epoch in _shares("gradfreeze-top-down", model)]
    assert top == [LAYERS[3:], LAYERS[2:], LAYERS[1:], LAYERS]
    bottom = [[layer for layer in LAYERS[:3] if epoch[layer]] for epoch in _shares("gradfreeze-bottom-up", model)]
    assert bottom == [LAYERS[:1], LAYERS[:2], LAYERS[:3], LAYERS[:3]]


def test_child_tuning_keeps_the_largest_fisher_information(model):
    kept = _kept(_optimizer("child-tuning-d", model))
    assert kept["embeddings"] == kept["head"] == 1.0
    assert (kept["layer.0"] + kept["layer.1"]) / 2 == pytest.approx(methods.CHILD, abs=1e-3)
    masks = methods.largest({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[4.0], [2.0]])}, 0.5)
    assert masks["a"].tolist() == [False, True] and masks["b"].tolist() == [[True], [False]]


def test_flags_reach_the_optimizer(model):
    optimizer = _optimizer("graddrop", model, p=0.5, targets="attention", backend="reference")
    assert isinstance(optimizer, GradDropAdamW) and optimizer.backend == "reference" and optimizer.seed == 1
    kept = _kept(optimizer)
    assert kept["embeddings"] == kept["head"] == 1.0 and kept["layer.0"] < 0.95
    assert [g["effect"] for g in _optimizer("skip-update", model).param_groups][0] == "update"


@pytest.mark.parametrize("name", ["layer-graddrop", "gradfreeze-top-down"])
def test_skipping_dropped_layers_changes_nothing(name, xglue_folder, settings, monkeypatch):
    task = xglue.load("nc", xglue_folder)
    long = replace(settings, epochs=3, lr=1e-2, curves=True, p=0.6)
    skipping = training.run(task, name, 0, long, progress=False)
    monkeypatch.setitem(methods.METHODS, name, replace(methods.METHODS[name], by_layer=False))
    assert training.run(task, name, 0, long, progress=False)["curve"] == skipping["curve"]


# Interruptions


class Interruption(Exception):
    pass


def test_an_interrupted_run_goes_on(xglue_folder, settings, tmp_path, monkeypatch):
    task = xglue.load("pos", xglue_folder)
    long = replace(settings, epochs=4, lr=5e-3, curves=True)
    whole = training.run(task, "graddrop-epoch", 0, long, checkpoints=tmp_path / "whole", progress=False)
    original = training._Masks.on_epoch_begin

    def fail(self, args, state, control, **kwargs):
        if state.global_step >= 6:
            raise Interruption
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Masks, "on_epoch_begin", fail)
    with pytest.raises(Interruption):
        training.run(task, "graddrop-epoch", 0, long, checkpoints=tmp_path / "cut", progress=False)
    monkeypatch.setattr(training._Masks, "on_epoch_begin", original)
    resumed = training.run(task, "graddrop-epoch", 0, long, checkpoints=tmp_path / "cut", progress=False)
    assert resumed["resumed"] and not whole["resumed"]
    for name in ("dev", "test", "curve", "masks", "steps"):
        assert resumed[name] == whole[name], name


@pytest.fixture
def scripted_dev(monkeypatch):
    """English dev scores to come, which the test sets, and what was scored with which weights: [(name, sum)]."""
    dev, weights = [], []
    score = training._CrossLingualTrainer.scores

    def scripted(self, by_language, name):
        weights.append((name, next(self.model.parameters()).sum().item()))
        return {"en": dev.pop(0)} if name is None else score(self, by_language, name)

    monkeypatch.setattr(training._CrossLingualTrainer, "scores", scripted)
    return dev, weights


def test_early_stopping_keeps_the_best_epoch(xglue_folder, settings, tmp_path, scripted_dev):
    task = xglue.load("qam", xglue_folder)
    dev, weights = scripted_dev
    dev[:] = [10.0, 30.0, 20.0, 20.0, 20.0]
    stopping = replace(settings, epochs=9, patience=2)
    result = training.run(task, "fine-tuning", 0, stopping, checkpoints=tmp_path, progress=False)
    assert result["epochs"] == 4 and [point["dev"] for point in result["curve"]] == [10.0, 30.0, 20.0, 20.0]
    by_epoch, tested = [w for name, w in weights if name is None], [w for name, w in weights if name is not None]
    assert len(set(by_epoch)) == 4 and tested == [by_epoch[1]] * 2
    with pytest.raises(ValueError, match="patience needs a checkpoints folder"):
        training.run(task, "fine-tuning", 0, stopping, progress=False)


def test_an_interruption_resets_no_patience(xglue_folder, settings, tmp_path, scripted_dev, monkeypatch):
    task = xglue.load("qam", xglue_folder)
    dev, _ = scripted_dev
    dev[:] = [30.0, 20.0, 20.0, 20.0, 20.0]
    stopping = replace(settings, epochs=9, patience=3)
    original = training._Masks.on_epoch_begin

    def fail(self, args, state, control, **kwargs):
        if round(state.epoch) == 3:
            raise Interruption
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Masks, "on_epoch_begin", fail)
    with pytest.raises(Interruption):
        training.run(task, "graddrop", 0, stopping, checkpoints=tmp_path, progress=False)
    monkeypatch.setattr(training._Masks, "on_epoch_begin", original)
    result = training.run(task, "graddrop", 0, stopping, checkpoints=tmp_path, progress=False)
    assert result["resumed"] and result["epochs"] == 4


# The commands


def _study(xglue_folder, model_folder, out, *more):
    flags = ["--tasks", "qam,wpr", "--methods", "fine-tuning,graddrop,layer-graddrop", "--seeds", "0,1",
             "--xglue", str(xglue_folder), "--model", str(model_folder), "--epochs", "2", "--max-length", "32",
             "--patience", "1", "--out", str(out), *more]  # fmt: skip
    return study.main(flags)


def test_study_writes_tables_and_figures_and_goes_on(xglue_folder, model_folder, tmp_path, monkeypatch, capsys):
    assert _study(xglue_folder, model_folder, tmp_path) == 0
    for name in ("masks", "curves", "gains"):
        assert (tmp_path / f"qam-{name}.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.md").read_text()
    assert "| method " in report and " 79.97 |" in report and "![gain by language](wpr-gains.png)" in report
    for name in ("understanding", "qam-methods", "qam-languages", "wpr-methods", "wpr-languages"):
        with (tmp_path / f"{name}.csv").open() as file:
            assert tables.markdown(list(csv.reader(file))) in report, name
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 * (3 + 7)  # splits, methods, seeds, languages of both tasks
    assert not list((tmp_path / "checkpoints").iterdir())

    ran = []
    run = training.run
    monkeypatch.setattr(training, "run", lambda *a, **k: ran.append(a[1:3]) or run(*a, **k))
    lines = (tmp_path / "qam.jsonl").read_text().splitlines()
    (tmp_path / "qam.jsonl").write_text("\n".join([*lines[:5], lines[5][:40]]))  # the last line was cut short
    assert _study(xglue_folder, model_folder, tmp_path) == 0
    assert ran == [("layer-graddrop", 1)]
    assert len(results.read(tmp_path / "qam.jsonl")) == 6

    assert _study(xglue_folder, model_folder, tmp_path, "--lr", "0.5") == 2
    assert "cannot be compared with these (there, now): {'lr': (5e-06, 0.5)}" in capsys.readouterr().err
    (tmp_path / "qam.jsonl").write_text("{}\n" + "\n".join(lines) + "\n")
    assert _study(xglue_folder, model_folder, tmp_path) == 2
    assert "qam.jsonl:1: not a result" in capsys.readouterr().err


def test_report_keeps_what_its_readers_wrote(xglue_folder, model_folder, tmp_path):
    report = tmp_path / "docs" / "study.md"
    flags = ["--methods", "fine-tuning", "--report", str(report)]
    assert _study(xglue_folder, model_folder, tmp_path / "results", *flags) == 0
    written = report.read_text()
    assert "](../results/qam-masks.png)" in written and written.startswith("# Zero-shot")
    report.write_text(written.replace("# Zero-shot cross-lingual results", "# Ours\n\nA reading.", 1) + "\nstale\n")
    assert _study(xglue_folder, model_folder, tmp_path / "results", *flags, "--report-only") == 0
    again = report.read_text()
    assert again.startswith("# Ours\n\nA reading.\n\n<!-- results") and "stale" not in again
    assert again.partition("## qam")[2] == written.partition("## qam")[2]


@pytest.mark.parametrize(("flags", "message"), [
    (["--seeds", "0,x"], "seeds must be comma-separated integers, got '0,x'"),
    (["--tasks", "xnly"], "unknown task xnly: choose from all-xglue, intents"),
    (["--methods", "adam"], "unknown method adam: choose from all, fine-tuning"),
    (["--tasks", "nc"], "needs the folder of XGLUE's data"),
    (["--report-only"], "no results"),
])  # fmt: skip
def test_study_names_what_is_wrong(flags, message, tmp_path, capsys):
    assert study.main([*flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_recipes():
    assert study.recipe("xnli").epochs == 10 and study.recipe("mlqa").max_length == 384
    assert study.recipe("xnli").patience and not study.recipe("intents").patience
    assert all(study.recipe(name).curves for name in tasks.TASKS)  # a figure of the report needs them


def test_demo_prints_the_table_and_saves_it(xglue_folder, model_folder, tmp_path, capsys):
    flags = ["--data", "nc", "--xglue", str(xglue_folder), "--model", str(model_folder), "--epochs", "2",
             "--out", str(tmp_path), "--backend", "reference"]  # fmt: skip
    assert demo.main(flags) == 0
    printed = capsys.readouterr().out
    assert "graddrop_fused.GradDropAdamW (reference backend)" in printed
    for line in (tmp_path / "table.md").read_text().splitlines():
        assert line in printed
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [result["method"] for result in saved] == list(demo.DEFAULT_METHODS)
    assert (tmp_path / "languages.png").exists() and (tmp_path / "masks.png").exists()
    assert demo.main(["--methods", "adam"]) == 2


# Tables


def _result(method, seed, test, task="xnli"):
    return {"task": task, "method": method, "seed": seed, "test": test, "metric": "accuracy", "train_seconds": 1.0,
            "test_average": float(np.mean(list(test.values())))}  # fmt: skip


def test_table_statistics():
    base, ours = [60.0, 62.0, 61.0], [63.0, 64.5, 62.5]
    runs = [_result("fine-tuning", seed, {"en": a + 5, "de": a - 5}) for seed, a in enumerate(base)]
    runs += [_result("graddrop", seed, {"en": a + 5, "de": a - 5}) for seed, a in enumerate(ours)]
    row = tables.by_method(runs)[2]
    expected = ["graddrop", "3", f"{np.mean(ours):.2f}", f"{np.std(ours, ddof=1):.2f}"]
    half = t.ppf(0.975, df=2) * np.std(np.subtract(ours, base), ddof=1) / 3**0.5
    interval = f"{7 / 3 - half:+.2f} to {7 / 3 + half:+.2f}"
    assert row[:4] == expected and row[6:9] == ["+2.33", interval, f"{ttest_rel(ours, base).pvalue:.3f}"]
    assert tables.by_method(runs)[1][6:9] == ["", "", ""]
    assert tables.by_language(runs)[1][1:4] == ["66.0", "56.0", "61.0"]
    assert tables.paired({0: 63.0, 7: 1.0}, {0: 60.0}) == (3.0, None, None, None)  # one seed has no significance
    assert tables.paired({0: 63.0}, {}) is None


def test_sampling_error():
    """Against the spread of simulated test sets."""
    runs = [_result("fine-tuning", 0, {"en": 80.0, "de": 80.0}) | {"examples": {"test": 100}}]
    drawn = np.random.default_rng(0).binomial(50, 0.8, (20_000, 2)) / 50 * 100
    assert tables.sampling_error(runs) == pytest.approx((drawn[:, 0].std(), drawn.mean(1).std()), rel=0.03)


def test_understanding_score_is_the_mean_over_tasks():
    names = list(xglue.TASKS)
    by_task = {name: [_result("fine-tuning", 0, {"en": 50.0 + i}, name)] for i, name in enumerate(names)}
    header, row = tables.understanding(by_task)
    assert row[header.index("understanding score")] == "54.00" and row[-1] == "77.45"
    del by_task["nc"]
    assert "mean of 8" in tables.understanding(by_task)[0]
