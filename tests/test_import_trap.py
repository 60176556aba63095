"""Our kernels/ must never be taken for the Hugging Face package `kernels`, which transformers looks for."""

from pathlib import Path

import pytest
import wheels
from wheels import ROOT, run


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(folder of an installed wheel, what its build said). Built without a compiler, which must not break it."""
    work = tmp_path_factory.mktemp("wheel")
    (work / "source").mkdir()
    file, said = wheels.wheel(wheels.copy_sources(work / "source"), work, wheels.NO_COMPILER)
    return wheels.unpack(file, work / "site"), said


def test_wheel_holds_kernels_inside_the_package_only(installed):
    site, _ = installed
    assert sorted(p.name for p in site.iterdir() if p.suffix != ".dist-info") == ["graddrop_fused"]
    for source in ("README.md", "cpu/op.cpp", "triton/philox.py"):
        ours = (ROOT / "kernels" / source).read_bytes()
        assert (site / "graddrop_fused" / "kernels" / source).read_bytes() == ours


@pytest.mark.parametrize("where", ["repository root", "elsewhere"])
def test_transformers_finds_no_kernels_of_ours(installed, where):
    site, _ = installed
    code = (
        "import graddrop_fused\n"
        "import transformers.integrations.hub_kernels as hub\n"
        "from transformers.utils import import_utils\n"
        "import importlib.metadata as m\n"
        "there = any(d.metadata['Name'] == 'kernels' for d in m.distributions())\n"
        "assert there or not import_utils.is_kernels_available(), 'took our folder for the package'\n"
        "import graddrop_fused.kernels.triton.philox as philox\n"
        "print(philox.__name__)"
    )
    cwd = ROOT if where == "repository root" else site.parent
    assert run(code, cwd, site) == "graddrop_fused.kernels.triton.philox"


def test_import_kernels_from_elsewhere_is_not_ours(installed):
    site, _ = installed
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    found = run(code, site.parent, site)
    assert found == "None" or not Path(found).is_relative_to(site) and not Path(found).is_relative_to(ROOT / "kernels")


def test_a_real_kernels_package_wins_in_the_repository_root(installed, tmp_path):
    """A kernels/__init__.py of ours would shadow it: the working directory comes first on sys.path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True\n")
    assert run("import kernels; print(kernels.real)", ROOT, tmp_path) == "True"
