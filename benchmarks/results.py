"""A run of the suite, read back from pytest-benchmark's JSON: a file for each sweep, their turns pooled."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.harness import Timing
from benchmarks.run import Result


@dataclass
class CaseResult:
    """Facts, times and ratios of a case."""

    name: str
    question: str
    base: str
    x: float | None
    dtype: str
    state_dtype: str
    elements: int
    tensors: int
    threads: int
    red: dict[str, str]
    missing: dict[str, str]
    timing: Timing = field(default_factory=lambda: Timing({}))
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, result: Result) -> "CaseResult":
        timing = result.timing or Timing({})
        return cls(**facts(case, result), timing=timing, traffic=result.traffic)

    @property
    def names(self) -> list[str]:
        return list(self.timing.seconds)

    def has(self, *names: str) -> bool:
        return all(name in self.timing.seconds for name in names)

    def ratio(self, name: str, to: str | None = None) -> tuple[float, float, float]:
        """(median, lower quartile, upper quartile) of name's time divided by ``to``'s, the base's if not given."""
        return self.timing.ratio(name, to or self.base)

    def nanoseconds(self, name: str) -> float:
        """Median per element."""
        return self.timing.median(name) / self.elements * 1e9


def facts(case: Case, result: Result) -> dict:
    """What the JSON says of a case beside times."""
    return {
        "name": case.name,
        "question": case.question,
        "base": case.base,
        "x": case.x,
        "dtype": str(case.dtype).removeprefix("torch."),
        "state_dtype": str(case.state_dtype or case.dtype).removeprefix("torch."),
        "elements": result.elements,
        "tensors": result.tensors,
        "threads": result.threads,
        "red": result.red,
        "missing": result.missing,
    }


@dataclass
class Run:
    size: str
    device: str
    date: str
    machine: dict
    sweeps: int
    cases: dict[str, CaseResult]

    def of(self, question: str) -> list[CaseResult]:
        return [case for case in self.cases.values() if case.question == question]


def files(folder: str | Path) -> list[Path]:
    """A run's JSON, one file for each sweep, by number: other files of the folder are left alone."""
    return sorted(Path(folder).glob("[0-9]*.json"))


def load(folder: str | Path) -> Run:
    """Raises ValueError if the folder does not hold JSON of this suite."""
    sweeps = [json.loads(file.read_text()) for file in files(folder)]
    if not sweeps or not all("suite" in data for data in sweeps):
        raise ValueError(
            f"{folder} must be a folder with JSON of this suite (python -m benchmarks), got {files(folder)}"
        )
    found: dict[str, CaseResult] = {}
    for data in sweeps:
        _add(data, found)
    for case in found.values():
        for name in case.red:  # in any sweep
            case.timing.seconds.pop(name, None)
    suite = sweeps[0]["suite"]
    return Run(suite["size"], suite["device"], sweeps[0]["datetime"], sweeps[0]["machine_info"], len(sweeps), found)


def _add(data: dict, found: dict[str, CaseResult]) -> None:
    for of_case in data["suite"]["cases"]:
        case = found.setdefault(of_case["name"], CaseResult(**of_case))
        case.red.update(of_case["red"])
    for entry in data["benchmarks"]:
        case, name = found[entry["params"]["case"]], entry["params"]["contestant"]
        case.timing.seconds.setdefault(name, []).extend(entry["stats"]["data"])
        if "memory" in entry["extra_info"]:
            case.memory[name] = entry["extra_info"]["memory"]
        if entry["extra_info"]["traffic"] is not None:
            case.traffic[name] = entry["extra_info"]["traffic"]
