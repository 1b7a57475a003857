"""Build the CPU engine (csrc/cpu) into the package; everything else about the package is in pyproject.toml.

The engine is optional: where it cannot be built, the package is installed without it and uses PyTorch operators.
"""

import platform
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = "csrc/cpu"
KERNELS = ("forward_rows", "logit_gradient", "quantise_rows")
# Kernels are compiled once per instruction set, into a namespace of its own; the name chooses nothing but the object.
BUILDS = {
    "avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512vnni", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c"],
    "avx512_vnni": ["-mavx512f", "-mavx512bw", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
    "avx_vnni": ["-mavxvnni", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
}
FLAGS = [
    "-std=c++17",
    "-O3",
    # A product and a sum round as written, so that the same expression has the same bits in both passes.
    "-ffp-contract=off",
    # Nobody reads errno after exp; no other rule of floating-point arithmetic is relaxed.
    "-fno-math-errno",
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=hidden",
    "-fopenmp",
    "-g0",
    "-Wall",
    "-Wextra",
    # GCC before 13 takes the deliberately undefined operands in its own intrinsics for mistakes.
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]


class BuildEngine(build_ext):
    """Compile each kernel per instruction set, and link without naming an OpenMP runtime: PyTorch brings its own."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a file name without a Python ABI: the library is loaded with ctypes."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build the one library of this package."""
        objects = self.compiler.compile([f"{SOURCES}/dispatch.cpp"], self.build_temp, extra_postargs=FLAGS)
        for build, flags in BUILDS.items():
            kernels = [f"{SOURCES}/{name}.cpp" for name in KERNELS]
            output_dir = f"{self.build_temp}/{build}"
            objects += self.compiler.compile(kernels, output_dir, depends=ext.depends, extra_postargs=FLAGS + flags)
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), target_lang="c++")


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: the library knows nothing of Python."""
        return ("py3", "none", super().get_tag()[2])


def engine() -> list[Extension]:
    """Return the engine where its sources make sense; `optional`: a failed build is a warning."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return []
    headers = [f"{SOURCES}/{name}.h" for name in ("abi", "simd", "operands", "tile")]
    kernels = [f"{SOURCES}/{name}.cpp" for name in ("dispatch", *KERNELS)]
    return [Extension("fastpref.kernels.libfastpref_cpu", kernels, depends=headers, language="c++", optional=True)]


setup(ext_modules=engine(), cmdclass={"build_ext": BuildEngine, "bdist_wheel": PlatformWheel})
