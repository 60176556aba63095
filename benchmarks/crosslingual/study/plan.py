"""What the study runs, as docs/study.md fixes it: methods, sizes, the search for learning rates, what is missing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

P = 0.5
BASELINE = "fine-tuning"
CONTROL = "fine-tuning-short"
CONTROLLED = "graddrop"  # whose shorter steps the control takes
TRUE, WRONG = 0.0, 0.3  # share of training labels that are wrong


class Arm(NamedTuple):
    """A method as the study runs it: a key of methods.METHODS with p and effect, and whose learning rate it takes."""

    name: str
    method: str
    p: float | None = None
    effect: str | None = None
    tuned: str | None = None  # another arm's name; None: its own is searched for


FIRST = (
    Arm(BASELINE, "fine-tuning"),
    Arm(CONTROL, "fine-tuning", tuned=CONTROLLED),
    Arm("graddrop", "graddrop", P),
    Arm("layer-graddrop", "layer-graddrop", P),
    Arm("anneal-graddrop", "anneal-graddrop", tuned="graddrop"),
    Arm("anneal-layer-graddrop", "anneal-layer-graddrop", tuned="layer-graddrop"),
    Arm("graddrop-epoch", "graddrop-epoch", tuned="graddrop"),
    Arm("graddrop-epoch-toggle", "graddrop-epoch-toggle", P, tuned="graddrop"),
    Arm("gradfreeze-top-down", "unfreezing-top-down"),
    Arm("gradfreeze-bottom-up", "unfreezing-bottom-up"),
)
NOISY = (BASELINE, CONTROL, "graddrop", "layer-graddrop", "graddrop-epoch")  # which of them see wrong labels, too
_OF_EFFECTS = ("graddrop", "layer-graddrop", "graddrop-epoch", "graddrop-epoch-toggle")
EFFECTS = (
    *(arm for arm in FIRST if arm.name in _OF_EFFECTS and arm.name not in NOISY),  # to compare with
    *(
        arm._replace(name=f"{arm.name}, {effect}", effect=effect, tuned=arm.tuned or arm.name)
        for arm in FIRST
        if arm.name in _OF_EFFECTS
        for effect in ("update", "freeze")
    ),
)
PARTS = ("tune", "first", "effects", "multiemo")


class Run(NamedTuple):
    """One training run. ``part`` "tune" tests nothing and keeps dev scores alone."""

    part: str
    task: str
    arm: Arm
    noise: float
    seed: int
    lr: float

    @property
    def key(self) -> tuple:
        """What identifies it. A learning rate does so only where it is searched for: elsewhere it follows from that."""
        rate = self.lr if self.part == "tune" else None
        return self.part, self.task, self.arm.name, self.noise, self.seed, rate


def key_of(result: dict) -> tuple:
    """The key of the run that ``result`` is of."""
    rate = result["lr"] if result["part"] == "tune" else None
    return result["part"], result["task"], result["method"], result["noise"], result["seed"], rate


@dataclass(frozen=True)
class Plan:
    """Sizes of the study; the defaults are those of docs/study.md."""

    model: str
    seeds: tuple[int, ...] = tuple(range(10))
    stage: int = 4  # seeds of the first stage, which is reported without claims
    tuning_seeds: tuple[int, ...] = (1000, 1001)  # one for each of noises
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    widenings: int = 2  # of the grid, each by a factor of two, where the best stands at an end
    epochs: int = 10
    train: int = 300
    dev: int = 10  # sentences a language
    test: int = 150  # sentences a language, where there are as many
    draws: int = 10_000  # of the bootstrap
    first: tuple[Arm, ...] = FIRST
    noisy: tuple[str, ...] = NOISY
    effects: tuple[Arm, ...] = EFFECTS
    effect_seeds: tuple[int, ...] = tuple(range(4))
    multiemo_seeds: tuple[int, ...] = tuple(range(5))
    multiemo_test: int = 100
    best: int = 4  # masked methods that go on to multiemo
    autocast: bool = False  # forward and backward in bfloat16
    task: str = "intents"
    noises: tuple[float, ...] = (TRUE, WRONG)

    @property
    def arithmetic(self) -> str:
        return "bfloat16 autocast" if self.autocast else "float32"

    def settings(self) -> dict:
        """What a result must have been run with to belong to this plan."""
        return {"model": self.model, "epochs": self.epochs, "train": self.train, "dev": self.dev, "test": self.test,
                "multiemo_test": self.multiemo_test}  # fmt: skip

    def pending(self, done: dict[tuple, dict], parts: Iterable[str] = PARTS) -> Iterator[Run]:
        """The runs that are missing and can begin now, in the order of their doing."""
        wanted = [run for part in parts for run in getattr(self, f"_{part}")(done)]
        return (run for run in wanted if run.key not in done)

    def count(self, done: dict[tuple, dict], parts: Iterable[str] = PARTS) -> int:
        """How many runs there are, done or not, as far as can be told: the search may still widen its grids."""
        sizes = {
            "tune": len(list(self._tune(done))),
            "first": sum(len(self.arms(noise)) for noise in self.noises) * len(self.seeds),
            "effects": len(self.effects) * len(self._effect_seeds),
            "multiemo": (self.best + 2) * len(self.multiemo_seeds) if self.best else 0,
        }
        return sum(sizes[part] for part in parts)

    def reported(self, done: dict[tuple, dict]) -> Iterator[Run]:
        """The runs, done or not, whose learning rates are known by now, but for those that search for them."""
        yield from self._first(done)
        yield from self._effects(done)
        yield from self._multiemo(done)

    def arms(self, noise: float) -> tuple[Arm, ...]:
        """Those of the first list that run with this share of wrong labels."""
        return tuple(arm for arm in self.first if noise == TRUE or arm.name in self.noisy)

    def lr(self, arm: Arm, done: dict[tuple, dict]) -> float | None:
        """The arm's learning rate, or None while it is being searched for."""
        if arm.tuned is not None:
            found = self.lr(next(a for a in self.first if a.name == arm.tuned), done)
            return found and found * (1 - P) ** (0.5 if arm.name == CONTROL else 0)
        rates, scores = self.searched(arm, done)
        return None if None in scores.values() else best_rate(scores)

    def searched(self, arm: Arm, done: dict[tuple, dict]) -> tuple[list[float], dict[float, float | None]]:
        """The grid as far as it goes by now, and the dev score at each of its rates; None where it is missing."""
        rates = sorted(self.rates)
        for widening in range(self.widenings + 1):
            scores = {rate: self._tuned_score(arm, rate, done) for rate in rates}
            if widening == self.widenings or None in scores.values():
                break
            best = best_rate(scores)
            if best == rates[0]:
                rates = [rates[0] / 2, *rates]
            elif best == rates[-1]:
                rates = [*rates, rates[-1] * 2]
            else:
                break
        return rates, scores

    def _tuned_score(self, arm: Arm, rate: float, done: dict[tuple, dict]) -> float | None:
        results = [done.get(run.key) for run in self._tuning_runs(arm, rate)]
        return None if None in results else fmean(max(result["dev"]) for result in results)

    def _tuning_runs(self, arm: Arm, rate: float) -> list[Run]:
        pairs = zip(self.tuning_seeds, self.noises, strict=True)
        return [Run("tune", self.task, arm, noise, seed, rate) for seed, noise in pairs]

    def _tune(self, done) -> Iterator[Run]:
        for arm in self.first:
            if arm.tuned is None:
                for rate in self.searched(arm, done)[0]:
                    yield from self._tuning_runs(arm, rate)

    def _first(self, done) -> Iterator[Run]:
        return self._runs("first", {noise: self.arms(noise) for noise in self.noises}, self.seeds, done)

    def _effects(self, done) -> Iterator[Run]:
        return self._runs("effects", {WRONG: self.effects}, self._effect_seeds, done)

    @property
    def _effect_seeds(self) -> tuple[int, ...]:
        """Those of the design that this machine does."""
        return tuple(seed for seed in self.effect_seeds if seed in self.seeds)

    def _runs(self, part: str, arms_of: dict[float, tuple[Arm, ...]], seeds, done) -> Iterator[Run]:
        rates = {arm: self.lr(arm, done) for arms in arms_of.values() for arm in arms}
        for seed in seeds:  # seed by seed: paired from the beginning
            for noise, arms in arms_of.items():
                for arm in arms:
                    if rates[arm] is not None:
                        yield Run(part, self.task, arm, noise, seed, rates[arm])

    def _multiemo(self, done) -> Iterator[Run]:
        arms = self.best_arms(done)
        for seed in self.multiemo_seeds:
            for arm in arms:
                yield Run("multiemo", "multiemo", arm, TRUE, seed, self.lr(arm, done))

    def best_arms(self, done: dict[tuple, dict]) -> list[Arm]:
        """The baseline, the control and the masked methods that go on; none before the first part is complete."""
        runs = list(self._first(done))
        complete = len(runs) == self.count(done, ["first"])
        if not self.best or not complete or any(run.key not in done for run in runs):
            return []

        def score(arm: Arm) -> float:
            return fmean(done[run.key]["best"] for run in runs if run.arm == arm and run.noise == TRUE)

        masked = [arm for arm in self.first if arm.name not in (BASELINE, CONTROL)]
        plain = [arm for arm in self.first if arm.name in (BASELINE, CONTROL)]
        return plain + sorted(masked, key=score, reverse=True)[: self.best]


def best_rate(scores: dict[float, float]) -> float:
    """The rate with the highest score; the lower one on a tie."""
    return max(scores, key=lambda rate: (scores[rate], -rate))


def quick(full: Plan) -> Plan:
    """The machinery in minutes of two cores: every stage but multiemo, with too little of everything."""
    names = (BASELINE, CONTROL, CONTROLLED, "layer-graddrop", "graddrop-epoch")
    return replace(
        full, seeds=(0, 1, 2), rates=(2e-4, 4e-4), widenings=0, epochs=4, train=100, dev=5, test=40, draws=2_000,
        first=tuple(arm for arm in full.first if arm.name in names),
        effects=tuple(arm for arm in full.effects if arm.name == "graddrop-epoch, update"), best=0,
    )  # fmt: skip
