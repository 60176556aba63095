"""The study of docs/study.md: its plan, its statistics against simulation, and the whole of it in very small."""

import csv
import gc
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from crosslingual_files import write_model
from scipy.stats import linregress, t, ttest_1samp

from benchmarks.crosslingual import intents, reports, tables
from benchmarks.crosslingual.study import __main__ as command
from benchmarks.crosslingual.study import bootstrap, outcomes, plan, plots, pool, report, runs, savings
from benchmarks.crosslingual.task import Task, Text

FULL = plan.Plan("m")


# The plan


def _result(run, dev=50.0, best=50.0):
    return {"part": run.part, "task": run.task, "method": run.arm.name, "noise": run.noise, "seed": run.seed,
            "lr": run.lr, "dev": [dev - 1, dev], "best": best, "plan": FULL.settings(),
            "arithmetic": "float32"}  # fmt: skip


def _finish(the_plan, done, dev=lambda run: 50.0, best=lambda run: 50.0, parts=plan.PARTS):
    """Does all runs that become possible, without training, and returns them in their order."""
    order = []
    while pending := list(the_plan.pending(done, parts)):
        for run in pending:
            done[run.key] = _result(run, dev(run), best(run))
            assert plan.key_of(done[run.key]) == run.key
        order += pending
    return order


def test_the_plan_is_the_design_s():
    done = {}
    order = _finish(FULL, done, dev=lambda run: 60.0 - abs(np.log2(run.lr / 1e-4)))  # 1e-4 is best: no widening
    count = Counter(run.part for run in order)
    assert count == {"tune": 5 * 3 * 2, "first": (10 + 5) * 10, "effects": 9 * 4, "multiemo": 6 * 5}
    assert sum(count.values()) == FULL.count(done)
    assert {run.seed for run in order if run.part == "tune"} == {1000, 1001}
    assert {run.seed for run in order if run.part == "first"} == set(range(10))
    assert {run.arm.name for run in order if run.noise == plan.WRONG and run.part == "first"} == set(plan.NOISY)
    assert {run.noise for run in order if run.part == "effects"} == {plan.WRONG}
    control = {run.lr for run in order if run.arm.name == plan.CONTROL}
    assert control == {1e-4 * 0.5**0.5} and {run.lr for run in order if run.part == "first"} == control | {1e-4}
    assert not list(FULL.pending(done))


def test_the_grid_widens_where_the_best_stands_at_an_end():
    done = {}

    def dev(run):  # higher rates are better for GradDrop, lower ones for LayerGradDrop, all alike for the others
        return {"graddrop": 1, "layer-graddrop": -1}.get(run.arm.name, 0) * np.log2(run.lr) + 70

    order = _finish(FULL, done, dev, parts=["tune"])
    rates = {name: sorted({run.lr for run in order if run.arm.name == name}) for name in ("graddrop", "layer-graddrop")}
    assert rates["graddrop"] == [0.5e-4, 1e-4, 2e-4, 4e-4, 8e-4]
    assert rates["layer-graddrop"] == [0.125e-4, 0.25e-4, 0.5e-4, 1e-4, 2e-4]
    by_name = {arm.name: arm for arm in FULL.first}
    assert FULL.lr(by_name["graddrop"], done) == 8e-4 and FULL.lr(by_name["layer-graddrop"], done) == 0.125e-4
    assert FULL.lr(by_name[plan.CONTROL], done) == pytest.approx(8e-4 / 2**0.5)
    assert FULL.lr(by_name["graddrop-epoch"], done) == 8e-4 and FULL.lr(plan.EFFECTS[-1], done) == 8e-4
    assert FULL.lr(by_name["fine-tuning"], done) == 0.125e-4  # the lower one on a tie
    assert FULL.lr(by_name["graddrop"], {}) is None and FULL.lr(by_name[plan.CONTROL], {}) is None


def test_the_best_masked_methods_go_on_to_multiemo():
    done = {}
    score = {arm.name: i for i, arm in enumerate(FULL.first)} | {plan.BASELINE: 99}
    order = _finish(FULL, done, best=lambda run: score.get(run.arm.name, 100))
    found = dict.fromkeys(run.arm.name for run in order if run.part == "multiemo")
    assert list(found) == [plan.BASELINE, plan.CONTROL, *(arm.name for arm in FULL.first[:-5:-1])]
    assert all(run.noise == plan.TRUE and run.task == "multiemo" for run in order if run.part == "multiemo")
    del done[("first", "intents", "graddrop", plan.TRUE, 3, None)]
    assert FULL.best_arms(done) == []


def test_quick_is_small():
    quick = plan.quick(FULL)
    done = {}
    order = _finish(quick, done)
    assert 30 < len(order) < 50
    assert {run.part for run in order} == {"tune", "first", "effects"} and quick.settings() != FULL.settings()


# A run's training text


@pytest.fixture(scope="module")
def task():
    return intents.load()


def test_training_text_is_the_seed_s_own(task):
    first, again, other = (runs.training_text(task, 300, 0.0, seed) for seed in (0, 0, 1))
    assert first == again and len(first) == len(other) == 300
    assert {e.label for e in first} == set(task.labels) == {e.label for e in other}
    shared = len({e.text for e in first} & {e.text for e in other})
    assert 50 < shared < 130  # some 26 % by chance
    texts = [e.text for e in task.train]
    positions = [texts.index(e.text) for e in first]
    assert all(a <= b for a, b in pairwise(positions))
    with pytest.raises(ValueError, match=r"train must be 24 \(one a class\) to 1158, got 23"):
        runs.training_text(task, 23, 0.0, 0)


def test_wrong_labels_are_wrong_and_uniform(task):
    clean, noisy = (runs.training_text(task, 300, noise, 0) for noise in (0.0, 0.3))
    assert [e.text for e in clean] == [e.text for e in noisy]
    wrong = [(a, b) for a, b in zip(clean, noisy, strict=True) if a.label != b.label]
    assert len(wrong) == 90
    drawn = Counter(b.label for seed in range(60) for a, b in zip(runs.training_text(task, 300, 0.0, seed),
                    runs.training_text(task, 300, 0.3, seed), strict=True) if a.label != b.label)  # fmt: skip
    assert len(drawn) == 24 and max(drawn.values()) < 1.5 * min(drawn.values())  # 225 each, give or take 15


def test_predictions_are_packed_and_come_back():
    rng = np.random.default_rng(0)
    labels = {"en": rng.integers(0, 24, 160), "de": rng.integers(0, 24, 1222)}
    text = runs.pack(labels)
    assert runs.unpack(text).tolist() == [*labels["en"], *labels["de"]] and len(text) < 1382
    with pytest.raises(ValueError, match="classes below 256, got 256"):
        runs.pack({"en": np.array([256])})


# Statistics


def test_draws_are_of_whole_seeds_and_of_each_language_s_sentences():
    draws = bootstrap.draw(50, 4, (3, 5), seed=1)
    assert draws.seeds.shape == (50, 4) and draws.sentences.shape == (50, 8)
    assert (draws.seeds.sum(1) == 4).all()
    assert (draws.sentences[:, :3].sum(1) == 3).all() and (draws.sentences[:, 3:].sum(1) == 5).all()
    same = bootstrap.draw(50, 4, (5, 5), parallel=True).sentences
    assert (same[:, :5] == same[:, 5:]).all()
    with pytest.raises(ValueError, match=r"sizes must be equal with parallel sentences, got \(3, 5\)"):
        bootstrap.draw(5, 4, (3, 5), parallel=True)


def test_drawn_gains_are_those_of_the_drawn_sentences():
    """Against one draw written out: seeds and sentences repeated as often as they were drawn."""
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(4, 8))
    draws = bootstrap.draw(bootstrap._CHUNK + 3, 4, (3, 5), seed=2)
    observed, drawn = draws.gains(differences)
    assert observed == pytest.approx([differences[:, :3].mean(), differences[:, 3:].mean()])
    for i in (0, len(drawn) - 1):
        rows = np.repeat(np.arange(4), draws.seeds[i])
        columns = np.repeat(np.arange(8), draws.sentences[i])
        sample = differences[np.ix_(rows, columns)]
        assert drawn[i] == pytest.approx([sample[:, :3].mean(), sample[:, 3:].mean()])


@pytest.mark.parametrize("seeds", [4, 10])
@pytest.mark.parametrize("sentence_part", [0.2, 1.0])
def test_intervals_cover(sentence_part, seeds):
    """Studies drawn anew, with seeds and sentences that matter: 95 in 100 intervals or more hold the true gain."""
    rng = np.random.default_rng(3)
    sizes, covered = (20, 40, 60), []
    for _ in range(200):
        effects = rng.normal(size=(seeds, 1)) * 0.3 + rng.normal(size=(1, 120)) * sentence_part
        differences = 1.0 + effects + rng.normal(size=(seeds, 120))
        observed, drawn = bootstrap.draw(400, seeds, sizes, seed=int(rng.integers(1e9))).gains(differences)
        found = bootstrap.estimate(observed.mean(), drawn.mean(1), seeds)
        covered.append(found.low <= 1.0 <= found.high)
    assert 0.94 <= np.mean(covered) <= (0.995 if seeds == 10 else 1.0)  # four seeds: wide on purpose


def test_estimate_and_its_p():
    """Where draws are of seeds alone, it is Student's test of their mean."""
    rng = np.random.default_rng(0)
    gains = np.array([1.0, 2.5, -0.5, 3.0, 1.5])
    drawn = rng.choice(gains, size=(400_000, 5)).mean(1)
    found, expected = bootstrap.estimate(gains.mean(), drawn, 5), ttest_1samp(gains, 0)
    assert found.p == pytest.approx(expected.pvalue, rel=0.02)
    interval = expected.confidence_interval()
    assert (found.mean, found.low, found.high) == pytest.approx((1.5, interval.low, interval.high), abs=0.01)
    assert bootstrap.estimate(0.0, np.zeros(10), 5).p == 1.0 and bootstrap.estimate(0.5, np.full(10, 0.5), 5).p == 0.0
    alone = bootstrap.estimate(2.0, drawn, 1)
    assert alone.p == 1.0 and np.isnan([alone.low, alone.high]).all()


def test_holm_by_hand():
    # 0.01 * 4, 0.02 * 3, then 0.03 * 2 and 0.04 * 1, neither below the one before
    assert bootstrap.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert bootstrap.holm([0.5, 0.9]) == [1.0, 1.0] and bootstrap.holm([]) == []


def test_slope_is_least_squares_without_english():
    languages = ["en", "ar", "de", "ur", "vi"]
    gains = np.array([9.0, 1.0, -0.5, 3.0, 0.2])
    x = np.log10([outcomes.GIB[language] for language in languages[1:]])
    assert gains @ outcomes.slope_weights(languages) == pytest.approx(linregress(x, gains[1:]).slope)
    assert set(intents.LANGUAGES) <= set(outcomes.GIB)


def _predicted(method, seed, best, last, small, task, noise=0.0):
    def labels(right):
        return runs.pack({"all": np.array([0 if r else 1 for r in right])})

    return {"method": method, "seed": seed, "noise": noise, "best": 100 * np.mean(best), "last": 100 * np.mean(last),
            "best_labels": labels(best), "last_labels": labels(last), "texts": runs.digest(task), "dev": [1.0, 2.0],
            "lr": 1e-4, "chosen_epoch": 1}  # fmt: skip


def test_outcomes_by_hand():
    """Two seeds, English with two sentences and Urdu and German with one each; class 0 is always right."""
    test = {"en": [Text("a", "x"), Text("b", "x")], "de": [Text("c", "x")], "ur": [Text("d", "x")]}
    task = Task("intents", "classification", ("x", "y"), [], {}, test)
    results = []
    for seed in (0, 1):
        #                              en    de ur
        results.append(_predicted("fine-tuning", seed, [1, 1, 1, 0], [1, 0, 0, 0], None, task))
        results.append(_predicted("graddrop", seed, [1, seed, 1, 1], [1, seed, 1, 1], None, task))
    results.append(_predicted("layer-graddrop", 0, [1, 1, 1, 1], [1, 1, 1, 1], None, task))
    found = outcomes.Predictions(results[:4], task, replace(FULL, draws=200))
    comparison = found.compare("graddrop", "fine-tuning")
    # by language: en -50 in seed 0 and 0 in seed 1, de 0, ur +100
    assert {name: e.mean for name, e in comparison.languages.items()} == {"en": -25.0, "de": 0.0, "ur": 100.0}
    assert comparison.score.mean == pytest.approx(25.0)
    # best - last: fine-tuning loses 50, 100, 0; GradDrop nothing
    assert comparison.stability.mean == pytest.approx(-50.0)
    assert comparison.slope.mean == pytest.approx((0 - 100) / np.log10(66.6 / 5.7))
    assert [c.base for c in found.comparisons()] == ["fine-tuning"]
    assert comparison.last.mean == pytest.approx(75.0)  # in each language as at the best epoch, and 50, 100, 0 more
    half = t.ppf(0.975, 9) * 1.7 / 10**0.5
    wide = replace(comparison, score=bootstrap.Estimate(0.4, 0.4 - half, 0.4 + half, 0.5), seeds=10)
    assert wide.visible(1) == pytest.approx(1.69, abs=0.01) and wide.visible(15) == pytest.approx(2.6, abs=0.05)
    # a method without seed 1 takes seed 1 from all
    assert outcomes.Predictions(results, task, FULL).seeds == [0]
    results[0]["texts"] = "another"
    with pytest.raises(ValueError, match="fine-tuning seed 0 was tested on other sentences"):
        outcomes.Predictions(results, task, FULL)


def _comparison(method, noise, mean, base=plan.BASELINE):
    found = bootstrap.Estimate(mean, mean - 1, mean + 1, 0.5)
    return outcomes.Comparison(method, base, noise, *[found] * 4, {"en": found, "de": found}, 1.0, 10)


def test_a_panel_of_fewer_methods_has_each_in_its_row(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    true = [_comparison(name, 0.0, mean) for name, mean in (("a", 1), ("b", 2), ("c", 1.5), ("far", -30))]
    plots.forest([true, [_comparison("c", 0.3, 0.5)]], "score", "title", tmp_path / "forest.png")
    left, right = drawn[0].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["a", "b", "c", "far"]
    points = [
        [(*line.get_xdata(), *line.get_ydata()) for line in axes.get_lines() if line.get_marker() == "o"]
        for axes in (left, right)
    ]
    assert points == [[(1, 0), (2, 1), (1.5, 2)], [(0.5, 2)]]
    assert [text.get_text().split()[1] for text in left.texts] == ["-30.0"] and left.get_xlim()[0] > -10


# The whole, in very small


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    gc.freeze()  # the Trainer collects garbage in every run, which takes longer than a tiny run
    yield _tiny(tmp_path_factory)
    gc.unfreeze()


def _tiny(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    names = (plan.BASELINE, plan.CONTROL, plan.CONTROLLED, "gradfreeze-top-down")
    return replace(
        plan.Plan(str(model)), seeds=(0, 1), rates=(1e-3,), widenings=0, epochs=2, train=24, dev=1, test=2, draws=100,
        first=tuple(arm for arm in plan.FIRST if arm.name in names), effects=plan.EFFECTS[1:2], best=0, autocast=False,
    )  # fmt: skip


@pytest.fixture
def run_tiny(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "plan_of", lambda arguments: tiny)
    return lambda *flags: command.main(["--out", str(tmp_path), "--processes", "1", *flags])


def test_the_whole_study_in_very_small(run_tiny, tiny, tmp_path, capsys, monkeypatch):
    choosing = tmp_path / "choosing.md"
    choosing.write_text(f"# Choosing\n\nabove\n\n{report.BEGIN}\n{report.END}\n\nbelow\n")
    assert run_tiny("--parts", "first") == 2
    assert "no learning rate is known for fine-tuning" in capsys.readouterr().err
    assert run_tiny("--choosing", str(choosing)) == 0
    done = pool.read(tmp_path / "study.jsonl", tiny)
    assert len(done) == 3 * 2 + (4 + 3) * 2 + 2 == tiny.count(done)
    assert f"{len(done)}/{len(done)} effects intents" in capsys.readouterr().out  # a line for each run
    written = (tmp_path / "report.md").read_text()
    for name in ("scores-true", "score", "stability", "slope", "between", "effects-score", "rates", "languages-wrong"):
        with (tmp_path / f"{name}.csv").open() as file:
            assert tables.markdown(list(csv.reader(file))) in written, name
    for name in ("score", "stability", "slope", "curves", "languages-true", "languages-wrong"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"]({name}.png)" in written
    assert "14 of 14 runs of the first list" in written and "Incomplete" not in written
    text = choosing.read_text()
    assert text.startswith("# Choosing\n\nabove\n") and text.endswith("below\n") and "| graddrop " in text

    # the same again does nothing; a line that an interruption cut is done again; --report-only trains nothing
    lines = (tmp_path / "study.jsonl").read_text().splitlines(keepends=True)
    ran = []
    monkeypatch.setattr(pool, "execute", lambda run, p: ran.append(run.key) or runs.execute(run, p))
    assert run_tiny() == 0 and not ran
    (tmp_path / "study.jsonl").write_text("".join(lines[:-1]) + lines[-1][:50])
    assert run_tiny("--report-only") == 0 and not ran
    assert "Incomplete" not in (tmp_path / "report.md").read_text()  # an effect is missing; the first list is whole
    assert run_tiny() == 0 and len(ran) == 1
    assert pool.read(tmp_path / "study.jsonl", tiny).keys() == done.keys()


def test_an_interruption_keeps_what_is_finished(run_tiny, tiny, tmp_path, capsys, monkeypatch):
    execute, ran = pool.execute, []

    def interrupted(run, the_plan):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(run.key)
        return execute(run, the_plan)

    monkeypatch.setattr(pool, "execute", interrupted)
    assert run_tiny() == 130
    assert "goes on from there" in capsys.readouterr().err
    assert list(pool.read(tmp_path / "study.jsonl", tiny)) == ran


def test_runs_of_another_study_are_refused(run_tiny, tiny, tmp_path, capsys):
    assert run_tiny("--parts", "tune") == 0
    assert run_tiny("--dry-run") == 0
    assert "tune: 6 of 6 runs there" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds runs of another study \(there, now\): {'epochs': \(2, 3\)}"):
        pool.read(tmp_path / "study.jsonl", replace(tiny, epochs=3))
    done = pool.read(tmp_path / "study.jsonl", tiny)
    run = next(iter(tiny.pending(done)))
    other = _result(run) | {"lr": 0.5, "plan": tiny.settings()}
    pool.results.append(tmp_path / "study.jsonl", other)
    assert run_tiny() == 2
    assert "ran with lr 0.5, and the search says 0.001" in capsys.readouterr().err
    assert run_tiny("--report-only") == 2  # joined files' tables are no better
    assert "ran with lr 0.5, and the search says 0.001" in capsys.readouterr().err


def test_a_seed_has_one_arithmetic(tiny, tmp_path):
    path = tmp_path / "study.jsonl"
    pool.work(tiny, path, 1, ["tune"])
    other = replace(tiny, autocast=True)
    assert len(pool.work(other, path, 1, ["tune"])) == 6  # nothing is left to do
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="seed 100. was begun in float32, and .* without --bfloat16"):
        pool.work(other, path, 1, ["tune"])


@pytest.mark.parametrize(("flags", "message"), [
    (["--parts", "tuning"], "parts must be of tune, first, effects, multiemo, got tuning"),
    (["--seeds", "0-9"], "seeds must be of the design's 0-1, as in 0-4 or 0,3, got '0-9'"),
    (["--seeds", "x"], "seeds must be of the design's"),
    (["--processes", "0"], "processes must be at least 1, got 0"),
    (["--choosing", __file__ + ".md"], "must have the lines "),
    (["--report-only"], "no results of fine-tuning and another method on one seed yet"),
])  # fmt: skip
def test_it_says_what_is_wrong(flags, message, run_tiny, capsys, monkeypatch):
    monkeypatch.setattr(pool, "execute", lambda run, the_plan: pytest.fail("something ran"))
    assert run_tiny(*flags) == 2
    assert message in capsys.readouterr().err


def test_the_same_run_in_another_process_is_the_same(tiny):
    """What one core trains does not depend on what it trained before."""
    run = plan.Run("first", "intents", tiny.first[2], plan.WRONG, 1, 1e-3)
    first = runs.execute(run, tiny)
    runs.execute(run._replace(seed=0), tiny)
    again = runs.execute(run, tiny)
    same = ("best_labels", "last_labels", "dev", "best", "last", "texts", "chosen_epoch")
    assert {key: first[key] for key in same} == {key: again[key] for key in same}
    assert first["plan"] == tiny.settings() and asdict(tiny)["epochs"] == len(first["dev"])


def test_reports_keep_what_people_wrote(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("# Design\n\ntext")
    reports.write_below(path, "<!-- x -->", ["new"], "# Title")
    reports.write_below(path, "<!-- x -->", ["newer"], "# Title")
    assert path.read_text() == "# Design\n\ntext\n\n<!-- x -->\n\nnewer\n"
    with pytest.raises(ValueError, match="must have the lines '<begin>' and '<end>'"):
        reports.write_between(path, "<begin>", "<end>", "text")


def test_what_is_downloaded_is_so_before_processes_read_it(tiny, tmp_path, monkeypatch):
    def fails(name, the_plan):
        raise ValueError(f"no {name}")

    monkeypatch.setattr(pool, "study_task", fails)
    monkeypatch.setattr(pool, "execute", lambda run, the_plan: pytest.fail("something ran"))
    with pytest.raises(ValueError, match="no intents"):
        pool.work(tiny, tmp_path / "study.jsonl", 1, ["tune"])


# What savings do to scores: docs/memory.md


def test_savings_look_at_their_page_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pool, "work", lambda *_: pytest.fail("something ran"))
    assert savings.main(["--out", str(tmp_path), "--report", str(tmp_path / "none.md")]) == 2
    assert "none.md must have the lines" in capsys.readouterr().err


def test_savings_in_very_small(tiny, tmp_path, capsys, monkeypatch):
    small = replace(
        savings.plan(tiny.model), rates=(1e-3,), widenings=0, seeds=(0, 1), epochs=2, train=24, dev=1, test=2,
        draws=100, autocast=False,
    )  # fmt: skip
    monkeypatch.setattr(savings, "plan", lambda: small)
    page = tmp_path / "memory.md"
    page.write_text(f"above\n\n{savings.BEGIN}\n{savings.END}\n\nbelow\n")
    assert savings.main(["--out", str(tmp_path), "--processes", "1", "--report", str(page)]) == 0
    assert len(pool.read(tmp_path / "savings.jsonl", small)) == 3 + 3 * 2
    text = page.read_text()
    assert text.startswith("above") and text.endswith("below\n") and "2 of 2 seeds, 9 runs" in text
    assert "| all savings, p = 0.9 - fine-tuning |" in text and "| LoRA - fine-tuning " in text
    assert text.split(savings.END)[0].split(savings.BEGIN)[1].strip() in capsys.readouterr().out
