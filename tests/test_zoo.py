"""Whole networks, streamed and plain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_streamed_equals_plain, calibrated, randomized
from torch import Tensor, nn

from benchmarks.networks import UNet
from streamcnn.support.models import load_model

# timm asks for a deprecated annotation when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

SIZE = (331, 287)
SIZES = {"hrnet_w18_small": (352, 288)}
"""Sizes of networks that take no odd ones."""
BEFORE_NORM = {"vgg16_bn": "", "resnest50d": ".fc1"}
"""Endings of the names of convolutions with a bias in front of batch norm."""
MIN_BATCH = {"resnest50d": 3}
"""Images that a network needs in train mode, as it normalises pooled vectors over the batch."""


class GatedAttentionPooling(nn.Module):
    """Attention-based pooling of the positions of a feature map (Ilse et al. 2018)."""

    def __init__(self, features: nn.Module, channels: int, hidden: int = 16) -> None:
        super().__init__()
        self.features = features
        self.value = nn.Linear(channels, hidden)
        self.gate = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)
        self.classifier = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, 3) of an image (N, 3, H, W)."""
        bag = self.features(x).flatten(2).transpose(1, 2)
        score = self.score(torch.tanh(self.value(bag)) * torch.sigmoid(self.gate(bag)))
        return self.classifier((torch.softmax(score, dim=1) * bag).sum(1))


def _mil(name: str = "resnet18") -> nn.Module:
    features = load_model(name, num_classes=0, global_pool="")
    return GatedAttentionPooling(features, features.num_features)


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: load_model(name, num_classes=5, **options)


NETS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: _timm(name)
        for name in (
            "resnet18",
            "resnet50",
            "efficientnet_b0",
            "mobilenetv3_large_100",
            "convnext_tiny",
            "convnextv2_atto",
            "densenet121",
            "regnety_008",
            "inception_v3",
            "hrnet_w18_small",
            "res2net50_26w_4s",
            "resnest50d",
        )
    },
    # Its own head turns a map of 7 x 7 positions into a vector, which no larger image gives.
    "vgg16_bn": lambda: nn.Sequential(
        load_model("vgg16_bn", features_only=True, out_indices=(5,)), _Pooled(512)
    ),
    "unet": lambda: UNet(6),
    "resnet18 and gated attention": _mil,
}


class _Pooled(nn.Module):
    """Global average pooling and a linear layer, for the last of a list of maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(channels, 5)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classifier(maps[-1].mean((2, 3)))


def _assert_streams(name: str, size: tuple[int, int], *, tile: int, batch: int, train: bool) -> float:
    build = NETS.get(name, _timm(name))
    batch = max(batch, MIN_BATCH.get(name, 1)) if train else batch
    net = randomized(build())
    net = net.train() if train else calibrated(net, (2, 3, *size))
    resident = True if "attention" in name else None
    zeros = _biases_before_norm(net, BEFORE_NORM[name]) if train and name in BEFORE_NORM else frozenset()
    found = assert_streamed_equals_plain(net, (batch, 3, *size), tile=tile, resident=resident, zeros=zeros)
    return found.max_error


def _biases_before_norm(net: nn.Module, ending: str) -> frozenset[str]:
    """Biases of convolutions whose names end so: normalisation takes them away, so their gradient is zero."""
    convolutions = {name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    return frozenset(f"{name}.bias" for name in convolutions if name.endswith(ending))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tile", [64, 97, 160])
@pytest.mark.parametrize("name", NETS)
def test_network(
    name: str, tile: int, batch: int, train: bool, record_property: Callable[[str, object], None]
) -> None:
    error = _assert_streams(name, SIZES.get(name, SIZE), tile=tile, batch=batch, train=train)
    record_property("error", error)


@pytest.mark.parametrize(
    ("name", "size", "tile", "batch", "train"),
    [
        ("resnet18", (67, 59), 30, 2, True),
        ("mobilenetv3_small_050", (75, 67), 40, 2, True),
        ("convnextv2_atto", (75, 67), 40, 1, True),
        ("unet", (53, 61), 24, 2, True),
    ],
)
def test_network_at_a_small_size(
    name: str, size: tuple[int, int], tile: int, batch: int, train: bool
) -> None:
    _assert_streams(name, size, tile=tile, batch=batch, train=train)
