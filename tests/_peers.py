"""Peer libraries as oracles, imported where a plain import would not do."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

# What torchvision registers meta kernels for when it is imported.
_TORCHVISION_OPS = (
    "nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d",
    "_roi_align_backward", "_roi_pool_backward", "_ps_roi_align_backward",
    "_ps_roi_pool_backward", "_deform_conv2d_backward",
)  # fmt: skip
_registered: list[torch.library.Library] = []


def open_clip() -> ModuleType:
    """The whole of open_clip; skips the test where it or the torchvision it imports is missing.

    No torchvision is built for the CPU build of torch used here. Its Python part is enough once
    the names of its compiled operators exist.
    """
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("open_clip's models need torchvision, which is not installed")
    if not _registered:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _TORCHVISION_OPS:
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor x) -> Tensor")
        _registered.append(library)
    return importlib.import_module("open_clip")


def open_clip_model(module: str = "model", *, with_timm: bool = False) -> ModuleType:
    """open_clip's model.py (or another module of it) with the modules of the package that it
    imports, and no others.

    What its transformers do not use is hidden meanwhile: transformers and (unless asked for) timm,
    which it can do without, and torchvision, of which it wants one class.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    if with_timm:
        timm()
    bare = ModuleType("open_clip_bare" + ("_timm" if with_timm else ""))
    batch_norm = ModuleType("torchvision.ops.misc")
    bare.__path__ = list(package.submodule_search_locations)
    batch_norm.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    stubs = {"transformers": None, batch_norm.__name__: batch_norm}
    stubs |= {} if with_timm else {"timm": None}
    stubs |= {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    before = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.setdefault(bare.__name__, bare)
    sys.modules.update(stubs)
    try:
        return importlib.import_module(f"{bare.__name__}.{module}")
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(before)


def open_clip_losses() -> ModuleType:
    """open_clip's loss.py alone, which needs nothing but torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _AnyName(type):
    """A class that has every attribute: its name as a string."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _AnyModule(ModuleType):
    """A package that has every name: an empty class."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for torchvision while a library is imported that can do without what is in it."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _AnyModule(spec.name)

    def exec_module(self, module) -> None:
        pass


def timm() -> ModuleType:
    """timm's models; skips the test where timm is missing.

    timm imports torchvision for its data loading, which no model uses.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    if importlib.util.find_spec("torchvision") is not None or "timm" in sys.modules:
        return importlib.import_module("timm")
    finder = _NoTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
