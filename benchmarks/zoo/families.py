"""The models of timm, torchvision and segmentation-models-pytorch, listed by asking the libraries.

A family is one module file of timm or torchvision, or one decoder of segmentation-models-pytorch with one
encoder or with one module file of encoders. Of several models the one with the fewest parameters is taken.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import nn

from streamcnn.support import torchvision_import
from streamcnn.support.extras import require

NUM_CLASSES = 10
ENCODERS = ("resnet18", "efficientnet-b0", "mobilenet_v2", "tu-regnety_002")
"""The first goes with every decoder, the others in turn; those of other files go with U-Net."""

_Builder = Callable[..., nn.Module]


@dataclass(frozen=True, slots=True)
class Family:
    """What one row of the zoo stands for."""

    library: str
    """``timm``, ``torchvision`` or ``smp``."""
    name: str
    """The module's file without ``.py``; of segmentation-models-pytorch, decoder and encoder."""

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of a family, not built yet."""

    name: str
    build: _Builder
    size_option: str = ""
    """Keyword that some models of its library take their image's size (H, W) by."""

    def __call__(self, size: tuple[int, int] | None = None) -> nn.Module:
        """The model with seeded weights, for images of ``size`` (H, W) where it is made for one."""
        torch.manual_seed(0)
        if size is None or not self.size_option:
            return self.build()
        try:
            return self.build(**{self.size_option: size})
        except TypeError as error:
            if self.size_option not in str(error):
                raise
        torch.manual_seed(0)
        return self.build()


def families(*patterns: str) -> list[Family]:
    """Every family whose text contains one of the ``patterns``, in their order; without any, all of them.

    Raises
    ------
    MissingExtra
        If one of the libraries is not installed.
    """
    every = [Family(library, name) for library, (names, _) in _LIBRARIES.items() for name in names()]
    chosen = (family for pattern in patterns or ("",) for family in every if pattern in str(family))
    return list(dict.fromkeys(chosen))


def variants(family: Family) -> Sequence[Variant]:
    """All models of a family."""
    return _LIBRARIES[family.library][1](family.name)


def smallest(family: Family) -> Variant:
    """The model with the fewest parameters, of those that can be built without memory; else the first."""
    every = variants(family)
    counted = {variant: count for variant in every if (count := _num_parameters(variant)) is not None}
    return min(counted, key=counted.__getitem__, default=every[0])


def skeleton(variant: Variant) -> nn.Module:
    """The model without memory for its weights, where its library can build that; else with."""
    try:
        with torch.device("meta"):
            return variant()
    except Exception:
        # Libraries fail in their own ways where a constructor reads a value of a tensor.
        return variant()


def _num_parameters(variant: Variant) -> int | None:
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in variant().parameters())
    except Exception:
        # As in `skeleton`.
        return None


def _library(name: str) -> Any:
    torchvision_import.install()
    return require(name, extra="zoo")


def _timm_families() -> list[str]:
    return list(_library("timm").list_modules())


def _timm_variants(name: str) -> list[Variant]:
    timm = _library("timm")
    create = partial(timm.create_model, pretrained=False, num_classes=NUM_CLASSES)
    # The library's own tests have toys of some families.
    names = [each for each in timm.list_models(module=name) if not each.startswith("test_")]
    return [Variant(each, partial(create, each), "img_size") for each in names]


def _torchvision_by_family() -> Mapping[str, list[str]]:
    models = _library("torchvision").models
    found: dict[str, list[str]] = {}
    for module in (models, models.segmentation):
        for name in models.list_models(module=module):
            file = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
            found.setdefault(file, []).append(name)
    return found


def _torchvision_variants(name: str) -> list[Variant]:
    models = _library("torchvision").models
    options = {"weights": None, "num_classes": NUM_CLASSES}
    if name.startswith("segmentation."):
        options["weights_backbone"] = None
    create = partial(models.get_model, **options)
    return [Variant(each, partial(create, each), "input_size") for each in _torchvision_by_family()[name]]


def _smp_families() -> Iterator[str]:
    smp = _library("segmentation_models_pytorch")
    first, *others = ENCODERS
    for decoder, other in zip(smp.MODEL_ARCHITECTURES_MAPPING.values(), cycle(others), strict=False):
        timm_alone = inspect.signature(decoder).parameters["encoder_name"].default.startswith("tu-")
        for encoder in (first, other):
            if encoder.startswith("tu-") or not timm_alone:
                yield f"{decoder.__name__} {encoder}"
    by_file = _encoders_by_file()
    done = {file for file, names in by_file.items() if any(name in ENCODERS for name in names)}
    yield from (f"Unet {file}" for file in by_file if file not in done)


def _encoders_by_file() -> Mapping[str, list[str]]:
    smp = _library("segmentation_models_pytorch")
    found: dict[str, list[str]] = {}
    for name, entry in smp.encoders.encoders.items():
        found.setdefault(entry["encoder"].__module__.rpartition(".")[2], []).append(name)
    return found


def _smp_variants(name: str) -> list[Variant]:
    smp = _library("segmentation_models_pytorch")
    decoder, encoder = name.split()
    create = partial(smp.create_model, decoder.lower(), encoder_weights=None, classes=NUM_CLASSES)
    encoders = _encoders_by_file().get(encoder, [encoder])
    return [Variant(f"{decoder} {each}", partial(create, encoder_name=each)) for each in encoders]


_LIBRARIES: Mapping[str, tuple[Callable[[], Any], Callable[[str], list[Variant]]]] = {
    "timm": (_timm_families, _timm_variants),
    "torchvision": (_torchvision_by_family, _torchvision_variants),
    "smp": (_smp_families, _smp_variants),
}


def versions() -> dict[str, str]:
    """Of the libraries that the models are from."""
    names = ("timm", "torchvision", "segmentation_models_pytorch")
    for name in names:
        _library(name)
    return {name: importlib.import_module(name).__version__ for name in names}
