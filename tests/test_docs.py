"""Docs tell the truth about names: links and paths lead somewhere, commands exist, Python in them compiles or runs."""

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("kernels/**/*.md"), *ROOT.glob("examples/*.md")]
)
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
# Commands of sh blocks that no test runs as they stand: why
LONG = {
    "make demo": "minutes; tests/test_crosslingual_runs.py runs its parts",
    "make test": "this suite",
    "make bench": "minutes; tests/test_benchmarks.py runs it in its smallest size",
    "make gpu": "needs a GPU; tests/test_gpu_run.py rehearses it",
    "make test-matrix": "downloads other versions of torch",
    "make wheel": "downloads tools; tests/test_packaging.py builds wheels",
    "make fuzz": "hours",
    "make sanitize": "minutes",
    "python -m pytest tests/": "a part of this suite",
    "pip ": "changes the environment; tests/test_packaging.py installs",
    "python -m benchmarks": "minutes; tests/test_benchmarks.py runs it in its smallest size",
    "python -m benchmarks.crosslingual": "hours; tests/test_crosslingual_runs.py runs it with tiny models",
    "python -m graddrop_fused build": "a minute; tests/test_packaging.py runs it with a quick compiler",
    "GRADDROP_": "a test build",
}
RUN = {"python -m graddrop_fused"}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, name, code in found if name in languages]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or anchor and anchor not in anchors(file):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_paths_exist(page):
    """Whatever in backticks looks like a path of this repository."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0].isalpha())
    looks = re.compile(rf"(?:{folders})/[\w./-]+")
    found = [word for word in INLINE.findall(prose(page)) if looks.fullmatch(word)]
    generated = ("results/", "build/", "dist/", "docs/gpu-run")
    assert not [word for word in found if not (ROOT / word).exists() and not word.startswith(generated)]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of sh blocks."""
    found = []
    for page in PAGES:
        for block in blocks(page, "sh", "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(named(page), line.split(" #")[0].strip()) for line in lines if line and line[0] != "#"]
    return found


def in_prose() -> list[tuple[str, str]]:
    """(page, command) in backticks."""
    found = [(named(page), word) for page in PAGES for word in INLINE.findall(prose(page))]
    return [(page, word) for page, word in found if re.match(r"(\S*=\S* )*(make|python|\S+/python) \S", word)]


def plain(command: str) -> list[str]:
    """Its words, without assignments in front; the interpreter is called python."""
    words = shlex.split(command)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    return ["python" if re.search(r"python[\d.]*$", words[0]) else words[0], *words[1:]] if words else []


@pytest.mark.parametrize("page, command", sorted(set(commands())), ids=lambda value: value[:60])
def test_every_command_is_run_or_known_to_be_long(page, command):
    words = " ".join(plain(command)) or command
    if words in RUN:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, *shlex.split(words)[1:]], cwd=ROOT, env=environment, timeout=300)
        assert done.returncode == 0
    else:
        assert any(f"{words} ".startswith(known) or command.startswith(known) for known in LONG), (
            "run it, or say why not"
        )


@functools.cache
def help_of(module: str) -> str:
    """In this process, since each new one would import torch and transformers again."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: that the module is imported already
        patch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
    assert not end.value.code
    return printed.getvalue()


@pytest.mark.parametrize("page, command", sorted({*commands(), *in_prose()}), ids=lambda value: value[:60])
def test_commands_exist_with_their_options(page, command):
    words = plain(command)
    if words[:1] == ["make"]:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
    elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("benchmarks", "graddrop_fused"):
        options = [word.split("=")[0] for word in words[3:] if word.startswith("--")]
        # pytest's own options pass through the suite
        assert [option for option in options if option not in help_of(words[2])] == []
    elif words[:1] == ["python"] and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists()


def code_blocks() -> list[tuple[str, str]]:
    return [(named(page), code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.parametrize("page, code", code_blocks(), ids=lambda value: value[:40].replace("\n", " "))
def test_python_compiles_and_imports_what_exists(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("graddrop_fused", "benchmarks"):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readmes_script_runs_as_pasted(tmp_path):
    (script,) = (code for code in blocks(ROOT / "README.md", "python") if "import torch\n" in code)
    assert len(script.splitlines()) <= 20
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *_, first, last = (float(line.split()[-1]) for line in done.stdout.splitlines())
    assert last < 0.1, done.stdout


def test_the_readmes_first_lines_are_code_before_figures():
    """What it is, a picture, a table of three numbers, then what to type."""
    before = (ROOT / "README.md").read_text().split("```")[0]
    assert len(before.split()) < 150
    rows = [line for line in before.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    for word in ("Philox", "stream", "window", "packed", "draw"):
        assert word not in before


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md", "gpu-run.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()
