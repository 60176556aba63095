"""Results as JSON lines, one per run, so that an interrupted study goes on where it stopped."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from .task import Task
from .training import Settings, differences


def key(task: str, method: str, seed: int) -> tuple[str, str, int]:
    """What identifies a run within a study."""
    return task, method, seed


def _key_of(result: dict) -> tuple:
    return key(result["task"], result["method"], result["seed"])


def read(path: Path, key_of: Callable[[dict], tuple] = _key_of) -> dict[tuple, dict]:
    """Key -> result. A last line that an interruption cut short is left out.

    Raises:
        ValueError: if another line is no result, naming file and line.
    """
    found = {}
    lines = path.read_text("utf-8").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            result = json.loads(line)
            found[key_of(result)] = result
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):  # no newline behind it
                continue
            raise ValueError(f"{path}:{number}: not a result ({error!r})") from None
    return found


def append(path: Path, result: dict) -> None:
    """Add one line, on a line of its own even behind a cut one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        text = path.read_text("utf-8")
        if not text.endswith("\n"):
            path.write_text(text[: text.rfind("\n") + 1], "utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")


def check_comparable(results: Iterable[dict], task: Task, settings: Settings, path: Path) -> None:
    """Raises ValueError if ``path`` holds runs with other settings or examples than those to come."""
    wanted = json.loads(json.dumps(asdict(settings) | {"examples": task.counts()}))
    for result in results:
        other = differences({**result["settings"], "examples": result["examples"]}, wanted)
        if other:
            raise ValueError(
                f"{path} holds runs that cannot be compared with these (there, now): {other}; "
                "choose another --out, or the same settings"
            )


def check_alike(results: list[dict], path: Path) -> None:
    """Raises ValueError if ``path`` holds runs of several settings or examples, as where files were joined."""
    first, *others = results
    wanted = {**first["settings"], "examples": first["examples"]}
    for result in others:
        other = differences({**result["settings"], "examples": result["examples"]}, wanted)
        if other:
            raise ValueError(
                f"{path} holds runs that cannot be compared: {result['method']} seed {result['seed']} and "
                f"{first['method']} seed {first['seed']} differ in {other}; leave the lines of one of them out"
            )
