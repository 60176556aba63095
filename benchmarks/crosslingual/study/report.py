"""The study's tables and figures, from its results."""

from pathlib import Path

import numpy as np

from .. import reports, tables
from . import plots
from .bootstrap import estimate
from .outcomes import OUTCOMES, Comparison, Predictions, corrected
from .plan import BASELINE, TRUE, WRONG, Arm, Plan
from .runs import study_task

MARKER = "<!-- results: python -m benchmarks.crosslingual.study writes all that follows -->"
BEGIN, END = "<!-- the study's results: begin -->", "<!-- the study's results: end -->"
MASKED = {"score": "gain in score", "stability": "stability, best minus last", "slope": "slope over pre-training text"}


def write(plan: Plan, done: dict[tuple, dict], folder: Path, report: Path, choosing: Path | None, command: str) -> None:
    """All tables, also as CSV in ``folder``, and figures. Raises ValueError without a finished pair of methods."""
    first = {noise: _predictions(plan, done, "first", noise) for noise in plan.noises}
    first = {noise: found for noise, found in first.items() if BASELINE in found.runs and len(found.runs) > 1}
    first = {noise: found for noise, found in first.items() if found.seeds}
    if not first:
        raise ValueError(f"{folder}: no results of {BASELINE} and another method on one seed yet")
    families = {noise: found.comparisons() for noise, found in first.items()}
    parts = [f"`{command}`", _state(plan, done, first), "## First list"]
    for noise, found in first.items():
        parts += [f"### {_named(noise)}", _table(scores_table(found), folder, f"scores-{_slug(noise)}")]
    whole = [comparison for family in families.values() for comparison in family]
    for outcome in OUTCOMES:
        title = MASKED[outcome]
        parts += [f"### {title[0].upper()}{title[1:]}", _table(family_table(whole, outcome), folder, outcome)]
        path = folder / f"{outcome}.png"
        plots.forest([*families.values()], outcome, title, path)
        parts.append(reports.link(path, report, title))
    parts += ["### Gain at the last epoch (exploratory)", _table(_last_epoch(whole), folder, "last")]
    if len(families) == 2:
        parts += ["### Gains with wrong labels less gains with true ones (exploratory)",
                  _table(_between(first[TRUE], first[WRONG]), folder, "between")]  # fmt: skip
    plots.curves([*first.values()], folder / "curves.png")
    parts.append(reports.link(folder / "curves.png", report, "dev score over epochs"))
    for noise, family in families.items():
        path = folder / f"languages-{_slug(noise)}.png"
        plots.languages(family, path)
        parts += [reports.link(path, report, f"gain by language, {_named(noise)}"),
                  _table(_by_language(family), folder, f"languages-{_slug(noise)}")]  # fmt: skip
    parts += _exploratory(plan, done, folder)
    parts += ["## Learning rates", _table(rates_table(plan, done), folder, "rates")]
    reports.write_below(report, MARKER, parts, "# The study's results")
    if choosing is not None:
        reports.write_between(choosing, BEGIN, END, tables.markdown(_choosing(plan, families)))


def _predictions(plan: Plan, done: dict[tuple, dict], part: str, noise: float) -> Predictions:
    task = "multiemo" if part == "multiemo" else plan.task
    results = [result for key, result in done.items() if key[0] == part and key[3] == noise]
    if part == "effects":  # against their policies' own effect, and the baseline
        results += [result for key, result in done.items() if key[0] == "first" and key[3] == noise]
    return Predictions(results, study_task(task, plan), plan)


def _named(noise: float) -> str:
    return f"{100 * noise:.0f} % wrong labels" if noise else "True labels"


def _slug(noise: float) -> str:
    return "wrong" if noise else "true"


def _table(rows: tables.Rows, folder: Path, name: str) -> str:
    tables.write_csv(rows, folder / f"{name}.csv")
    return tables.markdown(rows)


def _state(plan: Plan, done: dict[tuple, dict], first: dict[float, Predictions]) -> str:
    runs = [result for key, result in done.items() if key[0] != "tune"]
    hours = sum(result["cpu_seconds"] for result in done.values()) / 3600
    machines = sorted({f"{result['machine']}, {result['arithmetic']}" for result in runs})
    seeds = " and ".join(f"{len(found.seeds)} seeds ({_named(noise).lower()})" for noise, found in first.items())
    wanted = plan.count(done, ["first"])
    complete = sum(key[0] == "first" for key in done)
    text = (
        f"{complete} of {wanted} runs of the first list, {len(done)} runs in all, {hours:.1f} core-hours; "
        f"{'; '.join(machines)}. Compared on {seeds}."
        " Scores in per cent, differences in points; 95 % intervals and p by Student's t, with the standard error of "
        f"{plan.draws:,} draws of seeds and sentences; intervals pointwise, Holm's p over the table that it stands in. "
        "Visible gain: what comes first in its table after Holm's correction in four of five studies with such an "
        "interval."
    )
    if complete >= wanted:
        return text
    if len(first) == len(plan.noises) and all(len(found.seeds) >= plan.stage for found in first.values()):
        return f"**First stage: intervals to go by, no claims.** {text}"
    return f"**Incomplete: nothing is to be read from it.** {text}"


def scores_table(found: Predictions) -> tables.Rows:
    rows = [
        ["method", "lr", "best epoch", "best is last", "score", "std over seeds", "last epoch's score", "best - last"]
    ]
    for method, runs in found.runs.items():
        best, last = found.scores(method), found.scores(method, "last")
        epochs = [run["chosen_epoch"] for run in runs]
        ended = sum(epoch == len(run["dev"]) for epoch, run in zip(epochs, runs, strict=True))
        spread = f"{best.std(ddof=1):.2f}" if len(best) > 1 else ""
        rows.append([
            method, f"{runs[0]['lr']:.3g}", f"{np.mean(epochs):.1f}", f"{ended} of {len(runs)}",
            f"{best.mean():.2f}", spread, f"{last.mean():.2f}", f"{(best - last).mean():.2f}",
        ])  # fmt: skip
    return rows


def family_table(family: list[Comparison], outcome: str) -> tables.Rows:
    scores = outcome == "score"
    rows = [["difference", "labels", "points", "95 % interval", "p", "p (Holm)"]]
    rows[0] += ["std over seeds", "visible gain"] * scores
    for comparison, adjusted in zip(family, corrected(family, outcome), strict=True):
        found = getattr(comparison, outcome)
        rows.append([
            f"{comparison.method} - {comparison.base}", _slug(comparison.noise), f"{found.mean:+.2f}",
            f"{found.low:+.2f} to {found.high:+.2f}", f"{found.p:.4f}", f"{adjusted:.4f}",
            *[f"{comparison.spread:.2f}", f"{comparison.visible(len(family)):.2f}"] * scores,
        ])  # fmt: skip
    return rows


def _last_epoch(family: list[Comparison]) -> tables.Rows:
    rows = [["difference", "labels", "points", "95 % interval"]]
    for comparison in family:
        found = comparison.last
        rows.append([
            f"{comparison.method} - {comparison.base}", _slug(comparison.noise), f"{found.mean:+.2f}",
            f"{found.low:+.2f} to {found.high:+.2f}",
        ])  # fmt: skip
    return rows


def _between(true: Predictions, wrong: Predictions) -> tables.Rows:
    """The difference of two gains: same seeds, same sentences, other training labels."""
    rows = [["method", "points", "95 % interval"]]
    if true.seeds != wrong.seeds:
        return rows
    for method in true.runs:
        if method != BASELINE and method in wrong.runs:
            pairs = [found.right(method, "best") - found.right(BASELINE, "best") for found in (wrong, true)]
            observed, drawn = true.draws.gains(pairs[0] - pairs[1])
            gain = estimate(observed.mean(), drawn.mean(1), len(true.seeds))
            rows.append([method, f"{gain.mean:+.2f}", f"{gain.low:+.2f} to {gain.high:+.2f}"])
    return rows


def _by_language(family: list[Comparison]) -> tables.Rows:
    family = [comparison for comparison in family if comparison.base == BASELINE]
    languages = [*family[0].languages]
    rows = [["gain", *languages, "mean"]]
    for comparison in family:
        gains = [comparison.languages[language].mean for language in languages]
        rows.append([comparison.method, *(f"{gain:+.1f}" for gain in gains), f"{comparison.score.mean:+.2f}"])
    return rows


def _exploratory(plan: Plan, done: dict[tuple, dict], folder: Path) -> list[str]:
    parts = []
    if any(key[0] == "effects" for key in done):
        found = _predictions(plan, done, "effects", WRONG)
        names = {arm.name: arm.name.partition(",")[0] for arm in plan.effects if arm.effect}
        family = [found.compare(name, base) for name, base in names.items() if {name, base} <= found.runs.keys()]
        if family and found.seeds:
            parts += [f"## Effects, against the paper's (exploratory; {_named(WRONG)})",
                      _table(family_table(family, "score"), folder, "effects-score"),
                      _table(family_table(family, "stability"), folder, "effects-stability")]  # fmt: skip
    if any(key[0] == "multiemo" for key in done):
        found = _predictions(plan, done, "multiemo", TRUE)
        if BASELINE in found.runs and found.seeds:
            family = found.comparisons()
            parts += ["## multiemo (exploratory)", _table(scores_table(found), folder, "multiemo-scores"),
                      _table(family_table(family, "score"), folder, "multiemo-score")]  # fmt: skip
    return parts


def rates_table(plan: Plan, done: dict[tuple, dict]) -> tables.Rows:
    """Dev scores of the search."""
    searched: dict[Arm, dict[float, float | None]] = {
        arm: plan.searched(arm, done)[1] for arm in plan.first if arm.tuned is None
    }
    rates = sorted({rate for scores in searched.values() for rate in scores})
    rows = [["dev score at lr", *(f"{rate:g}" for rate in rates), "chosen"]]
    for arm, scores in searched.items():
        cells = ["" if scores.get(rate) is None else f"{scores[rate]:.2f}" for rate in rates]
        chosen = plan.lr(arm, done)
        rows.append([arm.name, *cells, f"{chosen:g}" if chosen else ""])
    return rows


def _choosing(plan: Plan, families: dict[float, list[Comparison]]) -> tables.Rows:
    """What docs/choosing.md shows: the gains of both conditions side by side."""
    rows = [["against plain fine-tuning", *(f"gain, {_named(noise).lower()}" for noise in families)]]
    names = [c.method for c in next(iter(families.values())) if c.base == BASELINE]
    for name in names:
        cells = []
        for family in families.values():
            found = next((c.score for c in family if c.method == name and c.base == BASELINE), None)
            cells.append(f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})" if found else "")
        rows.append([name, *cells])
    return rows
