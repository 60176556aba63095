"""The bootstrap over seeds and test sentences together, and Holm's correction.

Both are drawn with replacement and independently of each other (Owen 2007, "The pigeonhole bootstrap"): seeds, and
within each language its sentences. The same draws serve every comparison, so that comparisons stay paired.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import t

_CHUNK = 500  # draws at a time: of 2,458 sentences, 5 MB


class Estimate(NamedTuple):
    """A mean with its 95 % interval and the two-sided p of its being zero."""

    mean: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Draws:
    """How often each draw takes each seed, shape (draws, seeds), and each sentence, (draws, sentences).

    Sentences stand language after language; ``sizes`` says how many each language has.
    """

    seeds: np.ndarray
    sentences: np.ndarray
    sizes: tuple[int, ...]

    def gains(self, differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean difference by language: as observed, shape (languages,), and drawn, (draws, languages).

        ``differences``: shape (seeds, sentences).
        """
        starts = np.cumsum((0, *self.sizes[:-1]))
        sizes = np.array(self.sizes, float)
        observed = np.add.reduceat(differences.mean(0), starts) / sizes
        drawn = np.empty((len(self.seeds), len(sizes)))
        by_seed = self.seeds / self.seeds.sum(1, keepdims=True)
        for at in range(0, len(drawn), _CHUNK):
            part = slice(at, at + _CHUNK)
            means = (by_seed[part] @ differences) * self.sentences[part]
            drawn[part] = np.add.reduceat(means, starts, axis=1) / sizes
        return observed, drawn


def draw(count: int, seeds: int, sizes: tuple[int, ...], *, parallel: bool = False, seed: int = 0) -> Draws:
    """``count`` draws of ``seeds`` seeds and of the sentences of languages with ``sizes`` sentences.

    Args:
        parallel: every language has the same sentences, translated: they are drawn once for all languages.
    """
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, size=count)
    if parallel:
        if len(set(sizes)) > 1:
            raise ValueError(f"sizes must be equal with parallel sentences, got {sizes}")
        parts = [rng.multinomial(sizes[0], [1 / sizes[0]] * sizes[0], size=count)] * len(sizes)
    else:
        parts = [rng.multinomial(size, [1 / size] * size, size=count) for size in sizes]
    return Draws(of_seeds, np.concatenate([part.astype(np.uint8) for part in parts], axis=1), sizes)


def estimate(observed: float, drawn: np.ndarray, seeds: int) -> Estimate:
    """Student's interval and p around ``observed``, with the standard deviation of ``drawn`` as its standard error.

    Percentiles of draws are far too narrow with few seeds: five that agree by chance leave no draw on the other side
    of zero. So there are as many degrees of freedom as seeds less one, and the draws' variance, of which seeds give
    (seeds - 1) / seeds, is made up for that as a whole: intervals are on the wide side. One seed says nothing: nan.
    """
    if seeds < 2:
        return Estimate(float(observed), float("nan"), float("nan"), 1.0)
    error = float(drawn.std()) * (seeds / (seeds - 1)) ** 0.5
    half = float(t.ppf(0.975, seeds - 1)) * error
    if error == 0:
        p = float(observed == 0)
    else:
        p = 2 * float(t.sf(abs(observed) / error, seeds - 1))
    return Estimate(float(observed), float(observed) - half, float(observed) + half, p)


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values: below 5 % means significant with the whole family at 5 %.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted
