"""Builds vlpfast's compiled modules; everything else about the package is in pyproject.toml.

_C       C++ operators over the LibTorch stable ABI: one binary for torch 2.11 and later.
_C_cuda  CUDA operators, the same way; built where torch is a CUDA build and nvcc is found.
         VLPFAST_CUDA=0 leaves it out.
_host    pybind11 over NumPy: host code that has no Tensor in it.

Install with `pip install --no-build-isolation`, so that the build sees the torch it will run with.
"""

import os
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent
HEADERS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/include/vlpfast/*.*h"))
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020b000000000000")]  # torch 2.11
# Vectors are passed between inlined functions only, so how an ABI passes them does not matter.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"]
# sm_80 and sm_90a are what the tests compile for; the PTX lets later GPUs run it.
CUDA_ARCHS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in ROOT.glob(p))


def stable_module(kind: type, name: str, patterns: list[str], **flags: list[str]) -> Extension:
    return kind(
        name,
        sources(*patterns),
        include_dirs=[str(ROOT / "csrc/include")],
        define_macros=STABLE_ABI + ([("USE_CUDA", None)] if kind is CUDAExtension else []),
        extra_compile_args={"cxx": CXX_FLAGS, **flags},
        depends=HEADERS,
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    modules = [
        stable_module(CppExtension, "vlpfast._C", ["csrc/module.cpp", "csrc/cpu/*.cpp"]),
        Extension(
            "vlpfast._host",
            sources("csrc/host/*.cpp"),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=CXX_FLAGS,
            language="c++",
        ),
    ]
    if torch.version.cuda and CUDA_HOME and os.environ.get("VLPFAST_CUDA", "1") != "0":
        archs = [] if "TORCH_CUDA_ARCH_LIST" in os.environ else CUDA_ARCHS
        nvcc = ["-std=c++20", "-O3", *archs]
        cuda = ["csrc/cuda/*.cu", "csrc/cuda/*.cpp"]
        modules.append(stable_module(CUDAExtension, "vlpfast._C_cuda", cuda, nvcc=nvcc))
    return modules


class Build(BuildExtension):
    """BuildExtension that tells csrc/cuda/x.cu from csrc/cuda/x.cpp by their object files."""

    def build_extensions(self) -> None:
        plain = self.compiler.object_filenames

        def object_filenames(names: list[str], *args: object, **kwargs: object) -> list[str]:
            objects = plain(names, *args, **kwargs)
            return [
                f"{obj.removesuffix('.o')}.cu.o" if name.endswith(".cu") else obj
                for name, obj in zip(names, objects, strict=True)
            ]

        self.compiler.object_filenames = object_filenames
        super().build_extensions()


setup(
    packages=[*find_packages(include=["vlpfast", "vlpfast.*"]), "vlpfast.kernels"],
    package_dir={"vlpfast.kernels": "kernels"},
    package_data={"vlpfast": ["py.typed"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
)
