"""What is installed: wheels with and without the op, the source archive, and one binary for every torch."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import torch
import wheels
from wheels import ROOT

import graddrop_fused
from graddrop_fused import build_op, cpu

OP = build_op.find(Path(cpu.__file__).parent)
needs_op = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason="the native CPU op is not built here"
)
REPORT = "import sys; from graddrop_fused import __main__ as m; sys.exit(m.main({}))"


def compiler(folder: Path, body: str) -> str:
    """A value of CXX: a shell script with a space in its path."""
    script = folder / "a compiler"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return f"'{script}'"


def copying_compiler(folder: Path) -> str:
    """A "compiler" that links by copying the op that is built here, at once. A real one runs in one test below."""
    copies = f'case " $* " in *" -shared "*) cp "{OP}" "$last";; *) : > "$last";; esac'
    return compiler(folder, f'[ "$*" = --version ] && exit\nfor last; do :; done\n{copies}')


@pytest.fixture(scope="module")
def without_op(tmp_path_factory):
    """(a wheel built without a compiler, what its build said)."""
    work = tmp_path_factory.mktemp("without")
    (work / "source").mkdir()
    return wheels.wheel(wheels.copy_sources(work / "source"), work, wheels.NO_COMPILER)


@pytest.fixture(scope="module")
def site(without_op, tmp_path_factory):
    return wheels.unpack(without_op[0], tmp_path_factory.mktemp("site"))


def test_a_wheel_without_the_op_does_not_pass_for_one_that_has_it(without_op):
    file, said = without_op
    assert file.name.endswith("-py3-none-any.whl")
    assert said.count("going on without the native CPU op") == 1
    content = zipfile.ZipFile(file).namelist()
    assert not [name for name in content if "_cpu." in name]
    assert "graddrop_fused/py.typed" in content
    (metadata,) = (name for name in content if name.endswith("/METADATA"))
    fields = message_from_string(zipfile.ZipFile(file).read(metadata).decode())
    assert fields["Version"] == graddrop_fused.__version__
    assert fields["License-Expression"] == "BSD-3-Clause"
    assert "torch>=2.10" in fields.get_all("Requires-Dist")


def test_without_the_op_the_report_and_the_first_use_say_how_to_get_it(site, tmp_path):
    say = "python -m graddrop_fused build"
    report = wheels.run(REPORT.format("[]"), tmp_path, site, GRADDROP_CACHE=str(tmp_path))
    assert say in report and "is reference" in report
    first_use = (
        "import warnings, torch\n"
        "from graddrop_fused import GradDrop, GradDropAdamW\n"
        "weight = torch.nn.Parameter(torch.ones(3)); weight.grad = torch.ones(3)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    optimizer = GradDropAdamW([weight], drop=GradDrop(0.5))\n"
        "    optimizer.step(); optimizer.step()\n"
        "print(*[w.message for w in caught], sep='\\n')"
    )
    (said,) = wheels.run(first_use, tmp_path, site, GRADDROP_CACHE=str(tmp_path)).splitlines()
    assert said.endswith(say)


@needs_op
def test_build_puts_the_op_into_the_cache_once(site, tmp_path):
    options = {"GRADDROP_CACHE": str(tmp_path / "cache"), "CXX": copying_compiler(tmp_path)}
    first = wheels.run(REPORT.format("['build']"), tmp_path, site, **options)
    assert "built in" in first and "is cpu" in first
    (op,) = (tmp_path / "cache").rglob("_cpu.abi3.so")
    assert [path.name for path in op.parent.iterdir()] == [op.name]
    assert "built in" not in wheels.run(REPORT.format("['build']"), tmp_path, site, **options)
    changed = "from graddrop_fused import build_op; build_op.FLAGS.append('-g'); print(build_op.cached())"
    assert Path(wheels.run(changed, tmp_path, site, **options)) != op, "other flags must not find this op"


@needs_op
def test_a_stale_op_is_refused_and_build_replaces_it(site, tmp_path):
    """As after an upgrade that left the old version's op: only the number of the contract tells them apart."""
    stale = tmp_path / "site"
    shutil.copytree(site, stale)
    contract = stale / "graddrop_fused" / "contract.py"
    text, count = re.subn(r"^(CONTRACT_VERSION = )(\d+)", r"\g<1>999", contract.read_text(), flags=re.MULTILINE)
    assert count == 1
    contract.write_text(text)
    shutil.copy(OP, stale / "graddrop_fused" / "_cpu.abi3.so")
    report = wheels.run(REPORT.format("[]"), tmp_path, stale)
    assert "_cpu.abi3.so was built for another version of this package" in report and "is reference" in report
    (stale / "graddrop_fused" / "contract.py").write_text(
        (site / "graddrop_fused" / "contract.py").read_text()  # the op that the compiler copies fits this one
    )
    (stale / "graddrop_fused" / "_cpu.abi3.so").write_bytes(b"an older one")
    assert "is cpu" in wheels.run(REPORT.format("['build']"), tmp_path, stale, CXX=copying_compiler(tmp_path))


@pytest.mark.slow
@pytest.mark.nightly
@needs_op
def test_a_wheel_with_the_op_from_a_path_with_spaces(tmp_path):
    source = tmp_path / "a path with spaces"
    source.mkdir()
    quick = compiler(tmp_path, f'exec {" ".join(build_op.compiler())} "$@" -O0')
    options = {"TMPDIR": str(source), "CXX": quick}
    file, _ = wheels.wheel(wheels.copy_sources(source), tmp_path / "out", options)
    assert re.search(r"-cp310-abi3-(linux|macosx)_\w+\.whl$", file.name)
    site = wheels.unpack(file, tmp_path / "its site")
    assert "is cpu" in wheels.run(REPORT.format("[]"), tmp_path, site)
    if nm := shutil.which("nm"):
        listing = subprocess.run(
            [nm, "-D", "--undefined-only", site / "graddrop_fused/_cpu.abi3.so"], capture_output=True, text=True
        )
        assert listing.returncode == 0
        assert not re.findall(r" _?Py\w+", listing.stdout), "a Python symbol ties the op to a Python version"


@needs_op
def test_sources_that_cannot_be_written_to(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    wheels.copy_sources(source)
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:  # whom permissions do not stop: a read-only mount does
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        prefix = ("unshare", "--mount", "sh", "-c", mount, str(source))
        if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
            pytest.skip("root without the right to mount cannot make sources read-only")
    else:
        for path in (source, *source.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
    try:
        file, said = wheels.wheel(source, tmp_path / "out", {"CXX": copying_compiler(tmp_path)}, prefix)
    finally:
        for path in (source, *source.rglob("*")) if not prefix else ():
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    assert "graddrop_fused/_cpu.abi3.so" in zipfile.ZipFile(file).namelist(), said


def test_an_isolated_build_finds_the_environments_torch():
    """Without site-packages on sys.path, as pip's isolation leaves it."""
    code = (
        "import importlib.util, sys\n"
        "sys.path = [path for path in sys.path if 'site-packages' not in path]\n"
        "assert importlib.util.find_spec('torch') is None\n"
        f"spec = importlib.util.spec_from_file_location('build_op', {str(build_op.__file__)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "print(module.find_torch())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == Path(torch.__file__).parent


def test_a_build_goes_on_without_torch(tmp_path):
    (tmp_path / "source").mkdir()
    source = wheels.copy_sources(tmp_path / "source")
    code = (
        "import runpy, site, sys, sysconfig\n"
        "sys.modules['torch'], get_path = None, sysconfig.get_path\n"
        "site.getsitepackages, site.getusersitepackages = list, str\n"
        "sysconfig.get_path = lambda name, *a, **k: '' if name == 'purelib' else get_path(name, *a, **k)\n"
        "sys.argv = ['setup.py', '-q', 'build']; runpy.run_path('setup.py')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("going on without the native CPU op (torch is not visible to the build)") == 1
    assert "python -m graddrop_fused build" in done.stderr
    assert next(source.glob("build/lib*/graddrop_fused/cpu.py")).exists()


def test_an_old_torch_and_a_missing_compiler_are_named(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    monkeypatch.setattr(build_op, "find_spec", lambda name: None)
    monkeypatch.setattr(build_op.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(build_op.sysconfig, "get_path", lambda *args, **more: str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match=r"torch 2\.9\.1\+cpu is older than 2\.10"):
        build_op.find_torch()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build_op.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="install g\\+\\+ or clang\\+\\+, or set CXX"):
        build_op.compiler()


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "CXX", r"sh -c 'printf \\377 >&2; echo first line >&2; echo x.cpp:1: error: no such thing >&2; exit 1'"
    )
    with pytest.raises(RuntimeError, match="sh failed: x.cpp:1: error: no such thing"):
        build_op.compile_op(build_op.sources(), tmp_path / "op.so")
    assert not (tmp_path / "op.so").exists()


def test_the_source_archive_has_what_its_tests_need(tmp_path):
    more = (
        "benchmarks",
        "docs",
        "examples",
        "tests",
        ".ci",
        "Makefile",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
    )
    more += ("SECURITY.md", "requirements-dev.txt", "requirements-tools.txt")
    (tmp_path / "source").mkdir()
    source = wheels.copy_sources(tmp_path / "source", *more)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    made = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        found = {name.partition("/")[2] for name in tar.getnames()}
    ours = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and "egg-info" not in str(p)}
    ours = {name for name in ours if not name.startswith("graddrop_fused/kernels/")}  # the link's other side
    assert ours - found == set()
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


OTHERS = [path for path in os.environ.get("GRADDROP_INTERPRETERS", "").replace(os.pathsep, " ").split() if path]


@needs_op
@pytest.mark.parametrize(
    "python",
    OTHERS or [pytest.param("", marks=pytest.mark.skip(reason="GRADDROP_INTERPRETERS lists no other interpreters"))],
)
def test_one_binary_serves_other_versions(python, site, tmp_path):
    """Interpreters with a torch of their own, none of which has this package: `make test-matrix` makes some."""
    own = tmp_path / "site"
    shutil.copytree(site, own)
    shutil.copy(OP, own / "graddrop_fused" / "_cpu.abi3.so")
    report = wheels.run(REPORT.format("[]"), tmp_path, own, python=python)
    assert "is cpu" in report and "self-check passed" in report
    assert f"graddrop_fused {graddrop_fused.__version__}, " in report.splitlines()[0]


def test_versions_agree():
    version = graddrop_fused.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1) == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_public_name_is_type_checked():
    """`make lint` checks the types; this, that none is left out."""
    user = (ROOT / "tests" / "helpers" / "typed_user.py").read_text()
    assert [name for name in graddrop_fused.__all__ if not re.search(rf"^    {name},$", user, re.M)] == []
