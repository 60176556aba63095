"""Reports in Markdown that commands write anew and people write above or around."""

import os
from pathlib import Path


def write_below(report: Path, marker: str, parts: list[str], title: str) -> None:
    """Write ``parts`` below the line ``marker``. What stands above it in a report that is there already is kept: it is
    its readers' own text. A new report, or one without the line, begins with ``title``, or with all of its text.
    """
    text = report.read_text("utf-8") if report.exists() else ""
    own = text.partition(marker)[0].rstrip() or title
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n\n".join([own, marker, *parts]) + "\n", encoding="utf-8")


def write_between(report: Path, begin: str, end: str, text: str) -> None:
    """Put ``text`` between the lines ``begin`` and ``end``. Raises ValueError if the report lacks them."""
    before, after = around(report, begin, end)
    report.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def around(report: Path, begin: str, end: str) -> tuple[str, str]:
    """What stands before ``begin`` and after ``end``. Raises ValueError if the report lacks these lines."""
    whole = report.read_text("utf-8") if report.exists() else ""
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{report} must have the lines {begin!r} and {end!r}, between which results are written")
    return before, after


def link(path: Path, report: Path, what: str) -> str:
    """The picture at ``path``, as ``report`` shows it."""
    return f"![{what}]({Path(os.path.relpath(path, report.parent)).as_posix()})"
