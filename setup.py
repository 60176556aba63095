"""Builds the package and, where a C++ compiler and torch >= 2.10 are found, its native CPU op.

The op is optional and torch is not a build requirement: pip's build isolation would download gigabytes for it. A wheel
without the op is tagged py3-none-any, so that it never passes for one that has it. docs/install.md says why so.
Metadata are in pyproject.toml; graddrop_fused/build_op.py has the compiler's flags.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/cpu")

spec = importlib.util.spec_from_file_location("build_op", Path("graddrop_fused", "build_op.py").resolve())
build_op = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_op)


class BuildOptionalOp(build_ext):
    """Says in one message why when it cannot build."""

    built = False  # by this process

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        if not self.force and self.built and target.exists():
            return  # making a wheel runs this command twice
        try:
            build_op.compile_op(SOURCES, target)
            BuildOptionalOp.built = True
        except Exception as error:
            if build_op.TEST_BUILDS & os.environ.keys():
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            sys.stderr.write(
                f"\ngraddrop_fused: going on without the native CPU op ({reason}). The package works without it, more "
                "slowly. To get it, install torch >= 2.10 and a C++ compiler (g++ or clang++), then run: "
                "python -m graddrop_fused build\n\n"
            )


class HonestWheel(bdist_wheel):
    """Tagged for one platform only if the op was built."""

    def run(self):
        self.run_command("build")
        build = self.get_finalized_command("build_ext")
        if not all(Path(build.get_ext_fullpath(ext.name)).exists() for ext in build.extensions or ()):
            self.root_is_pure, self.py_limited_api = True, False
            self.distribution.ext_modules = []
        super().run()


def options() -> dict:
    found = {"bdist_wheel": {"py_limited_api": "cp310"}}
    if not os.access(".", os.W_OK):  # read-only sources: nothing may be written beside them
        work = tempfile.mkdtemp(prefix="graddrop_fused-")
        found |= {"build": {"build_base": work}, "egg_info": {"egg_base": work}}
    return found


setup(
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
    cmdclass={"build_ext": BuildOptionalOp, "bdist_wheel": HonestWheel},
    options=options(),
)
