"""Builds mrl_fast._C: SIMD kernels behind pybind11, with no dependence on torch or CUDA."""

import os
import platform
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# On ARM, compilers fuse multiplies and adds on their own; without that scores have x86's bits.
UNFUSED = ["-ffp-contract=off"] if platform.machine() in ("aarch64", "arm64") else []

ParallelCompile("MRL_FAST_BUILD_JOBS", default=os.cpu_count() or 1).install()

setup(
    # `kernels/` cannot be installed under its own name: PyPI has a package called kernels.
    package_dir={"mrl_fast": "mrl_fast", "mrl_fast.kernels": "kernels"},
    packages=[
        *find_packages(include=["mrl_fast*"]),
        *(f"mrl_fast.{name}" for name in find_packages(include=["kernels*"])),
    ],
    ext_modules=[
        Pybind11Extension(
            "mrl_fast._C",
            sorted(glob("csrc/**/*.cpp", recursive=True)),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", *UNFUSED],
            extra_link_args=["-pthread"],
            libraries=["dl"],
        )
    ],
)
