"""Sentiment of reviews in eleven languages: MultiEmo, as the PyPI source package of ``bigbench`` carries it.

The sentences are parallel: row i is the same sentence in every language. Splits are by row, so that no test sentence
translates a training sentence. The files ask not to be put into training corpora for language models: they are taken
from the package (358 MB, downloaded once, never installed) into a cache folder, and nowhere else.

Source: Kocon, Milkowski, Kanclerz 2021, "MultiEmo: Multilingual, Multilevel, Multidomain Sentiment Analysis Corpus".
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .task import LANGUAGE, Task, Text

REQUIREMENT = "bigbench==1.0.0"
PIP = "pip==25.3"  # newer ones refuse the package: it declares a direct URL dependency
LANGUAGES = ("de", "en", "es", "fr", "it", "ja", "nl", "pl", "pt", "ru", "zh")
PARALLEL_ROWS = 43_645  # further rows are shifted in the German and Portuguese files
TRAIN, DEV, TEST = 4_000, 400, 800  # rows
_MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/multiemo/all_sentence_{}/task.json"


def load() -> Task:
    """The task. Raises RuntimeError if the package is not there and cannot be downloaded."""
    folder = cache_folder()
    if not all((folder / f"{language}.json").exists() for language in LANGUAGES):
        _download(folder)
    files = {language: json.loads((folder / f"{language}.json").read_text("utf-8")) for language in LANGUAGES}
    splits = _rows()

    def texts(split: str, language: str) -> list[Text]:
        return [_example(files[language]["examples"][row]) for row in splits[split]]

    return Task(
        "multiemo",
        "classification",
        tuple(sorted(files[LANGUAGE]["examples"][0]["target_scores"])),
        texts("train", LANGUAGE),
        {language: texts("dev", language) for language in LANGUAGES},
        {language: texts("test", language) for language in LANGUAGES},
    )


def cache_folder() -> Path:
    """$GRADDROP_DATA/multiemo, else ~/.cache/graddrop_fused/multiemo."""
    return Path(os.environ.get("GRADDROP_DATA", Path.home() / ".cache" / "graddrop_fused")) / "multiemo"


def _example(example: dict) -> Text:
    scores = example["target_scores"]
    return Text(example["input"], max(scores, key=scores.get))


def _rows() -> dict[str, list[int]]:
    """Rows by split: evenly spaced over the corpus, which is sorted by subject, and dealt out in turn."""
    count = TRAIN + DEV + TEST
    rows = [i * PARALLEL_ROWS // count for i in range(count)]
    period = count // DEV
    tests = TEST // DEV
    return {
        "dev": [row for i, row in enumerate(rows) if i % period == 0],
        "test": [row for i, row in enumerate(rows) if 0 < i % period <= tests],
        "train": [row for i, row in enumerate(rows) if i % period > tests],
    }


def _download(folder: Path) -> None:
    print(f"downloading {REQUIREMENT} (358 MB, once) for {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    # Within the folder: files are moved there whole, whatever another process does at the same time
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        old_pip = Path(temporary) / "pip"
        _run_pip(["install", "--quiet", "--target", str(old_pip), PIP])
        options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", temporary]
        _run_pip(["download", "--quiet", *options, REQUIREMENT], PYTHONPATH=str(old_pip))
        members = {_MEMBER.format(language): language for language in LANGUAGES}
        with tarfile.open(next(Path(temporary).glob("bigbench-*"))) as archive:
            for member in archive:  # in the archive's order: looking members up would read it eleven times
                if member.name in members:
                    partial = Path(temporary) / "partial"
                    partial.write_bytes(archive.extractfile(member).read())
                    partial.replace(folder / f"{members.pop(member.name)}.json")
                if not members:
                    break
    if members:
        raise RuntimeError(f"{REQUIREMENT} lacks {', '.join(members)}")


def _run_pip(arguments: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
