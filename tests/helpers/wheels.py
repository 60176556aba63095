"""Wheels built from a copy of the sources, so that a build leaves nothing in the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
NO_COMPILER = {"CXX": "false"}


def copy_sources(target: Path, *more: str) -> Path:
    """What a wheel is built from, and ``more`` of the checkout, in the new folder ``target``."""
    ignore = shutil.ignore_patterns("_cpu.*", "__pycache__")
    for name in ("graddrop_fused", "kernels", *FILES, *more):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target)
    return target


def wheel(source: Path, out: Path, environment: dict[str, str], prefix: tuple[str, ...] = ()) -> tuple[Path, str]:
    """(the wheel that ``pip wheel`` makes of ``source`` in the folder ``out``, what it said). prefix: runs pip."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(out)]
    built = subprocess.run(
        [*prefix, *command, str(source)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stdout
    (found,) = out.glob("*.whl")
    return found, built.stdout


def unpack(file: Path, site: Path) -> Path:
    """``site`` with the wheel's content, to be put on PYTHONPATH."""
    zipfile.ZipFile(file).extractall(site)
    return site


def run(code: str, cwd: Path, *path: Path, python: str = sys.executable, **environment: str) -> str:
    """What ``python -c code`` prints, with ``path`` on PYTHONPATH."""
    result = subprocess.run(
        [python, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()
