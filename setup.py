"""Builds the package and, where a C++ compiler and torch >= 2.10 are visible, its native CPU op.

The op is optional and torch is not a build requirement: pip's build isolation would download gigabytes for it. It uses
the LibTorch stable ABI and no Python symbol, so that one binary serves every torch >= 2.10 and Python >= 3.10.

Test builds: GRADDROP_SANITIZE=address,undefined adds sanitizers; GRADDROP_EMULATE_AVX512=1 runs the AVX-512 level on
any x86-64 processor by SIMDe (Debian package libsimde-dev).
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/cpu")
COMMON = ["op", "stretch", "oracle", "level_default"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2, "-Wno-uninitialized"]  # gcc 12's own headers
LEVELS = {"level_avx2": AVX2, "level_avx512": AVX512}  # only these files may use instructions beyond the baseline
TEST_BUILDS = {"GRADDROP_SANITIZE", "GRADDROP_EMULATE_AVX512"}  # these must not go on without the op
TORCH_TARGET = "0x020a000000000000"  # 2.10
# results must not depend on whether a compiler fuses multiply-adds
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno"]
# gcc would move a round key's exclusive-or from beside a multiplication to behind it
FLAGS += ["-fno-tree-reassoc", "-Wno-ignored-optimization-argument"]


class BuildOptionalOp(build_ext):
    """Compiles each instruction-set level with its own flags; says in one message why when it cannot."""

    def build_extension(self, ext):
        try:
            self.build_op(ext)
        except Exception as error:
            if TEST_BUILDS & os.environ.keys():
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            sys.stderr.write(
                f"\ngraddrop_fused: going on without the native CPU op ({reason}). The package works without it, more "
                "slowly. To get it, install torch >= 2.10 and a C++ compiler (g++ or clang++), then run: "
                "pip install --no-build-isolation -e .\n\n"
            )

    def build_op(self, ext):
        if sys.platform == "win32":
            raise RuntimeError("it does not build on Windows yet")
        torch_root = find_torch()
        x86 = platform.machine() in ("x86_64", "AMD64")
        emulate = bool(os.environ.get("GRADDROP_EMULATE_AVX512"))
        sanitizers = os.environ.get("GRADDROP_SANITIZE")
        sanitize = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g", "-O1"] if sanitizers else []
        macros = [("TORCH_TARGET_VERSION", TORCH_TARGET)]
        macros += [("GRADDROP_X86", None)] * x86 + [("GRADDROP_EMULATE_AVX512", None)] * emulate

        def compile_one(name):
            flags = LEVELS.get(name, [])
            if emulate and name == "level_avx512":
                flags = [*AVX2, "-Wno-psabi"]
            return self.compiler.compile(
                [str(SOURCES / f"{name}.cpp")],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=[str(torch_root / "include")],
                extra_postargs=[*FLAGS, *flags, *sanitize],
            )

        names = COMMON + list(LEVELS) * x86
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_one, names) for path in paths]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu"],
            library_dirs=[str(torch_root / "lib")],
            extra_postargs=sanitize,
            target_lang="c++",
        )


def find_torch() -> Path:
    """torch's folder, without importing it."""
    from importlib import metadata, util

    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not visible to the build")
    version = metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 10):
        raise RuntimeError(f"torch {version} is older than 2.10")
    return Path(spec.origin).parent


setup(
    name="graddrop_fused",
    version="0.1.0",
    description="AdamW with fused, counter-based gradient masks (GradDrop) for PyTorch",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    install_requires=["torch>=2.10", 'triton>=3.5; sys_platform == "linux"'],
    # "kernels" alone would shadow the package of that name that transformers looks for
    package_dir={"graddrop_fused.kernels": "kernels"},
    packages=[
        "graddrop_fused",
        "graddrop_fused.kernels",
        "graddrop_fused.kernels.cpu",
        "graddrop_fused.kernels.triton",
    ],
    package_data={"graddrop_fused.kernels": ["*.md"], "graddrop_fused.kernels.cpu": ["*.cpp", "*.h", "*.md"]},
    ext_modules=[
        Extension(
            "graddrop_fused._cpu",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildOptionalOp},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
