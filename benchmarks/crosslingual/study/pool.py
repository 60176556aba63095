"""All runs of the study, one process a core; each result is written when it is there, so nothing is done twice."""

import multiprocessing
import signal
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from benchmarks import progress

from .. import results
from .plan import PARTS, Plan, key_of
from .runs import execute, study_task


def read(path: Path, plan: Plan) -> dict[tuple, dict]:
    """Key -> result. Raises ValueError if the file holds runs of other sizes or learning rates than the plan's."""
    done = results.read(path, key_of)
    for result in done.values():
        if result["plan"] != plan.settings():
            other = {k: (v, plan.settings().get(k)) for k, v in result["plan"].items() if v != plan.settings().get(k)}
            raise ValueError(f"{path} holds runs of another study (there, now): {other}; choose another --out")
    _check_rates(plan, done, path)
    return done


def work(plan: Plan, path: Path, processes: int, parts: Iterable[str] = PARTS) -> dict[tuple, dict]:
    """Do what is missing of ``parts``, and return all results. Each finished run is a line of ``path`` at once."""
    parts = [*parts]
    done = read(path, plan)
    _check_arithmetic(plan, done, parts, path)
    with _executor(processes) as executor, _bar(plan, done, parts) as bar:
        flying: dict[Future, tuple] = {}
        try:
            while True:
                _fill(executor, flying, plan, done, parts, processes)
                if not flying:
                    return done
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    del flying[future]
                    result = future.result()
                    results.append(path, result)
                    done[key_of(result)] = result
                    finished, bar.total = sum(key[0] in parts for key in done), plan.count(done, parts)
                    bar.update()
                    progress.say(f"{finished}/{bar.total} {_described(result)}")
        except BaseException:  # an interruption, too: what workers are at is done again next time
            executor.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _fill(executor: Executor, flying: dict, plan: Plan, done: dict, parts: list[str], processes: int) -> None:
    for run in plan.pending(done, parts):
        if len(flying) >= processes:
            return
        if run.key not in flying.values():
            study_task(run.task, plan)  # what is to be downloaded is so once, and here, before workers read it
            flying[executor.submit(execute, run, plan)] = run.key


def _check_rates(plan: Plan, done: dict[tuple, dict], path: Path) -> None:
    for run in plan.reported(done):
        found = done.get(run.key)
        if found and abs(found["lr"] / run.lr - 1) > 1e-9:
            raise ValueError(
                f"{path}: {run.arm.name} seed {run.seed} ran with lr {found['lr']:g}, and the search says {run.lr:g}: "
                "files of several searches were joined; leave the lines of all but one out"
            )


def _check_arithmetic(plan: Plan, done: dict[tuple, dict], parts: list[str], path: Path) -> None:
    of_seed = {result["seed"]: result["arithmetic"] for result in done.values()}
    for run in plan.pending(done, parts):
        begun = of_seed.get(run.seed, plan.arithmetic)
        if begun != plan.arithmetic:
            raise ValueError(
                f"{path}: seed {run.seed} was begun in {begun}, and these runs would be in {plan.arithmetic}: go on "
                f"{'without' if plan.autocast else 'with'} --bfloat16, or begin with other --seeds"
            )


def _bar(plan: Plan, done: dict, parts: list[str]):
    finished = sum(key[0] in parts for key in done)
    return progress.bar(plan.count(done, parts), "study", "run", finished, leave=True)


def _described(result: dict) -> str:
    noise = f"{100 * result['noise']:.0f} % wrong"
    score = f"test {result['best']:.2f}" if "best" in result else f"dev {max(result['dev']):.2f}"
    return (
        f"{result['part']} {result['task']}, {result['method']}, {noise}, seed {result['seed']}, "
        f"lr {result['lr']:.3g}: {score} at epoch {result['chosen_epoch']} ({result['seconds']:.0f} s)"
    )


class _InProcess(Executor):
    """One process: this one."""

    def submit(self, function, /, *args, **kwargs) -> Future:
        future = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _executor(processes: int) -> Executor:
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes == 1:
        return _InProcess()
    # spawned: a forked process would inherit OpenMP's threads without their being there
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and ends us
    torch.set_num_threads(1)
