"""Compiles the native CPU op (kernels/cpu), for setup.py and for `python -m graddrop_fused build`.

setup.py loads this file by its path, before the package can be imported: it imports neither torch nor the package.

The op uses the LibTorch stable ABI and no Python symbol, so that one binary serves every torch >= 2.10 and Python >=
3.10. Which torch's headers it was compiled with makes no difference either, and a build that is isolated from the
environment it builds for may take that environment's.

CXX, CXXFLAGS and LDFLAGS are heeded. Test builds: GRADDROP_SANITIZE=address,undefined adds sanitizers;
GRADDROP_EMULATE_AVX512=1 runs the AVX-512 level on any x86-64 processor by SIMDe (Debian package libsimde-dev).
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

NAME = "_cpu.abi3.so"
COMMON = ["op", "stretch", "oracle", "level_default"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2, "-Wno-uninitialized"]  # gcc 12's own headers
LEVELS = {"level_avx2": AVX2, "level_avx512": AVX512}  # only these files may use instructions beyond the baseline
TEST_BUILDS = {"GRADDROP_SANITIZE", "GRADDROP_EMULATE_AVX512"}  # these must not go on without the op
TORCH_TARGET = "0x020a000000000000"  # 2.10
OLDEST_TORCH = (2, 10)
# results must not depend on whether a compiler fuses multiply-adds
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-fPIC"]
# gcc would move a round key's exclusive-or from beside a multiplication to behind it; clang does not know the flag
GCC_FLAGS = ["-fno-tree-reassoc"]
# clang says which of the portable level's loops it leaves alone, which costs only time
CLANG_FLAGS = ["-Wno-pass-failed"]


def compile_op(sources: Path, target: Path, torch_root: Path | None = None) -> None:
    """Compiles each instruction-set level with its own flags and links them into ``target``.

    Args:
        sources: the folder kernels/cpu.
        torch_root: torch's folder; found if not given.

    Raises:
        RuntimeError: in one line, if torch or a compiler is missing or the compiler fails.
    """
    if sys.platform == "win32":
        raise RuntimeError("it does not build on Windows yet")
    torch_root = torch_root or find_torch()
    x86 = platform.machine() in ("x86_64", "AMD64")
    emulate = bool(os.environ.get("GRADDROP_EMULATE_AVX512"))
    sanitizers = os.environ.get("GRADDROP_SANITIZE")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g1", "-O1"] if sanitizers else []
    flags_of_all = [*FLAGS, *(CLANG_FLAGS if _is_clang() else GCC_FLAGS)]
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    macros += ["-DGRADDROP_X86"] * x86 + ["-DGRADDROP_EMULATE_AVX512"] * emulate
    own = [*_words("CXXFLAGS"), *_words("CPPFLAGS")]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as objects, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(name: str) -> str:
            flags = LEVELS.get(name, [])
            if emulate and name == "level_avx512":
                flags = [*AVX2, "-Wno-psabi"]
            out = str(Path(objects, f"{name}.o"))
            include = ["-isystem", str(torch_root / "include")]
            source = str(sources / f"{name}.cpp")
            _run([*compiler(), *own, *flags_of_all, *macros, *include, *flags, *sanitize, "-c", source, "-o", out])
            return out

        files = list(pool.map(compile_one, COMMON + list(LEVELS) * x86))
        # whoever loads an op meanwhile must see a whole one
        with tempfile.TemporaryDirectory(dir=target.parent) as beside:
            whole = Path(beside, target.name)
            libraries = ["-L", str(torch_root / "lib"), "-ltorch_cpu"]
            _run([*compiler(), "-shared", *files, *libraries, *_words("LDFLAGS"), *sanitize, "-o", str(whole)])
            os.replace(whole, target)


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, or the first that is installed. Raises RuntimeError if none is."""
    if command := _words("CXX"):
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler is found: install g++ or clang++, or set CXX")


def _is_clang() -> bool:
    try:
        return "clang" in _said([*compiler(), "--version"]).stdout
    except OSError as error:
        raise RuntimeError(f"{compiler()[0]} does not run: {error}") from None


def find_torch() -> Path:
    """torch's folder, without importing it: where Python finds it, else in the environment that pip builds for.

    An isolated build does not see that environment's packages, but they lie where its interpreter installs.
    """
    found = []
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent)
    folders = [sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()]
    if "VIRTUAL_ENV" in os.environ:  # uv builds in an environment of its own
        folders.append(sysconfig.get_path("purelib", vars={"base": os.environ["VIRTUAL_ENV"]}))
    found += [Path(folder, "torch") for folder in folders]
    for root in found:
        version = _torch_version(root)
        if version is not None and tuple(int(n) for n in version.split(".")[:2]) >= OLDEST_TORCH:
            return root
    versions = [version for version in map(_torch_version, found) if version]
    said = f"torch {versions[0]} is older than 2.10" if versions else "torch is not visible to the build"
    raise RuntimeError(said)


def _torch_version(root: Path) -> str | None:
    file = root / "version.py"
    match = re.search(r"^__version__ = ['\"]([^'\"]+)", file.read_text(), re.MULTILINE) if file.is_file() else None
    return match.group(1) if match else None


def sources() -> Path:
    """The op's sources, as installed or in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "kernels" / "cpu"
    return inside if inside.is_dir() else here.parent / "kernels" / "cpu"  # an unpacked source archive has no links


def cached() -> Path:
    """Where `python -m graddrop_fused build` puts the op. The path holds a hash of the sources and the flags, so that
    an op of another version of this package is never taken for this one's."""
    told = os.environ.get("GRADDROP_CACHE")
    root = Path(told) if told else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "graddrop_fused")
    text = hashlib.sha256(repr((FLAGS, GCC_FLAGS, CLANG_FLAGS, LEVELS)).encode())
    for file in sorted(sources().glob("*")):
        text.update(file.name.encode() + file.read_bytes())
    return root / f"{sys.platform}-{platform.machine()}-{text.hexdigest()[:16]}" / NAME


def find(package: Path) -> Path | None:
    """The built op: in the package's folder, else in the cache, else None."""
    beside = sorted(path for path in package.glob("_cpu.*") if path.suffix in (".so", ".pyd", ".dylib"))
    if beside:
        return beside[0]
    try:
        path = cached()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # no home directory, or one of another user
        return None


def build() -> Path:
    """Builds the op for this environment: in place of one that is there already, else in the cache."""
    target = find(Path(__file__).parent) or cached()
    compile_op(sources(), target)
    return target


def _words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def _said(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, errors="replace")  # it may quote any bytes


def _run(command: list[str]) -> None:
    try:
        done = _said(command)
    except OSError as error:
        raise RuntimeError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError(f"{command[0]} failed: {lines[0] if lines else f'exit status {done.returncode}'}")
    if done.stderr:
        sys.stderr.write(done.stderr)
