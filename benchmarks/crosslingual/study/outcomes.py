"""The three outcomes of docs/study.md, from stored predictions."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.stats import t

from ..task import LANGUAGE, Task
from .bootstrap import Draws, Estimate, draw, estimate, holm
from .plan import BASELINE, CONTROL, CONTROLLED, TRUE, Plan
from .runs import digest, unpack

# GiB of text in CC-100, which XLM-R was trained on, and from which the embedded encoder descends.
# Source: Conneau et al. 2020, "Unsupervised Cross-lingual Representation Learning at Scale", table 6.
GIB = {
    "ar": 28.0, "bg": 57.5, "de": 66.6, "el": 46.9, "en": 300.8, "es": 53.3, "fr": 56.8, "hi": 20.2, "it": 30.2,
    "ja": 69.3, "nl": 29.3, "pl": 44.6, "pt": 49.1, "ru": 278.0, "th": 71.7, "tr": 20.9, "ur": 5.7, "vi": 137.3,
    "zh": 46.9,
}  # fmt: skip
OUTCOMES = ("score", "stability", "slope")


def slope_weights(languages: list[str]) -> np.ndarray:
    """What the gains of ``languages`` are multiplied by and summed to give their least-squares slope over log10(GiB).

    English, the language of training, has weight 0.
    """
    x = np.array([np.log10(GIB[language]) for language in languages])
    others = np.array([language != LANGUAGE for language in languages])
    centred = np.where(others, x - x[others].mean(), 0.0)
    return centred / (centred**2).sum()


@dataclass(frozen=True)
class Comparison:
    """``method`` minus ``base``, in points; the three outcomes, the last epoch's score and the gain of each language.
    ``spread`` is the standard deviation over seeds of outcome 1's difference."""

    method: str
    base: str
    noise: float
    score: Estimate
    stability: Estimate
    slope: Estimate
    last: Estimate
    languages: dict[str, Estimate]
    spread: float
    seeds: int

    def visible(self, tests: int) -> float:
        """The gain that passes Holm's first step of ``tests``, at 5 %, in four of five such studies."""
        if self.seeds < 2:
            return float("nan")
        freedom = self.seeds - 1
        error = (self.score.high - self.score.mean) / t.ppf(0.975, freedom)
        return float(error * (t.ppf(1 - 0.025 / tests, freedom) + t.ppf(0.8, freedom)))


class Predictions:
    """Which test sentences were labelled right, by method, epoch ("best" or "last") and seed, for one task and noise.

    Only seeds that every method has are used, so that all comparisons are paired alike.
    """

    def __init__(self, results: list[dict], task: Task, plan: Plan):
        self.task, self.noise = task, results[0]["noise"] if results else TRUE
        wanted = digest(task)
        by_method: dict[str, dict[int, dict]] = {}
        for result in results:
            if result["texts"] != wanted:
                raise ValueError(
                    f"{result['method']} seed {result['seed']} was tested on other sentences ({result['texts']}, now "
                    f"{wanted}): install the version of home-assistant-intents that the study ran with"
                )
            by_method.setdefault(result["method"], {})[result["seed"]] = result
        shared = set.intersection(*(set(runs) for runs in by_method.values())) if by_method else set()
        self.seeds = sorted(shared)
        self.runs = {method: [runs[seed] for seed in self.seeds] for method, runs in by_method.items()}
        self.languages = task.languages
        self.sizes = tuple(len(task.test[language]) for language in self.languages)
        self._plan = plan

    @cached_property
    def truth(self) -> np.ndarray:
        index = {label: i for i, label in enumerate(self.task.labels)}
        return np.array([index[example.label] for lang in self.languages for example in self.task.test[lang]])

    @cached_property
    def draws(self) -> Draws:
        parallel = self.task.name == "multiemo"
        return draw(self._plan.draws, len(self.seeds), self.sizes, parallel=parallel)

    def right(self, method: str, epoch: str) -> np.ndarray:
        """100 where a sentence was labelled right, else 0; shape (seeds, sentences)."""
        return 100.0 * np.array([unpack(run[f"{epoch}_labels"]) == self.truth for run in self.runs[method]])

    def scores(self, method: str, epoch: str = "best") -> np.ndarray:
        """The average over languages of each seed."""
        return np.array([run[epoch] for run in self.runs[method]])

    def compare(self, method: str, base: str) -> Comparison:
        best = self.right(method, "best") - self.right(base, "best")
        last = self.right(method, "last") - self.right(base, "last")
        gains, drawn = self.draws.gains(best)
        lasts, drawn_lasts = self.draws.gains(last)
        drops, drawn_drops = gains - lasts, drawn - drawn_lasts
        weights = slope_weights(self.languages)
        seeds = self.scores(method) - self.scores(base)
        return Comparison(
            method, base, self.noise,
            estimate(gains.mean(), drawn.mean(1), len(seeds)),
            estimate(drops.mean(), drawn_drops.mean(1), len(seeds)),
            estimate(gains @ weights, drawn @ weights, len(seeds)),
            estimate(lasts.mean(), drawn_lasts.mean(1), len(seeds)),
            {name: estimate(gains[i], drawn[:, i], len(seeds)) for i, name in enumerate(self.languages)},
            float(seeds.std(ddof=1)) if len(seeds) > 1 else float("nan"),
            len(seeds),
        )  # fmt: skip

    def comparisons(self) -> list[Comparison]:
        """Every method against the baseline, and the method that the control is for against the control."""
        found = [self.compare(method, BASELINE) for method in self.runs if method != BASELINE]
        if CONTROL in self.runs and CONTROLLED in self.runs:
            found.append(self.compare(CONTROLLED, CONTROL))
        return found


def corrected(family: list[Comparison], outcome: str) -> list[float]:
    """Holm's p of each comparison of a family, for one of OUTCOMES."""
    return holm([getattr(comparison, outcome).p for comparison in family])
