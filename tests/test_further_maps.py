"""Sources that go into a model beside the image: masks and weights of pixels, read by regions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
import zarr
from streaming_cases import TOLERANCE
from torch import Tensor, nn

from streamcnn import StreamingModel
from streamcnn.data.sources import ImageSource, TensorSource, open_image
from streamcnn.errors import DatasetMismatch, UnsupportedModel
from streamcnn.geometry.regions import Region

SIZE = (37, 45)
MASK = torch.randint(3, (2, *SIZE), generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.rand(2, 2, *SIZE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


class Masked(nn.Module):
    """A map of features, and what a mask and weights of pixels make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor, more: dict[str, Tensor] | None = None) -> Tensor:
        x = self.conv(x).tanh() * (mask[:, None] == 1)
        if more is not None:
            x = x * more["weights"].sum(1, keepdim=True)
        return x.sum((2, 3))


def an_image() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def masks_in(folder: Path, kind: str) -> list[ImageSource]:
    """The masks as files of bytes, one for each image."""
    found: list[ImageSource] = []
    for index, mask in enumerate(MASK.numpy().astype(np.uint8)):
        path = folder / f"{index}.{kind}"
        if kind == "tif":
            tifffile.imwrite(path, mask, tile=(16, 16))
        else:
            zarr.create_array(path, data=mask, chunks=(16, 16), dimension_names=("y", "x"))
        found.append(open_image(path))
    return found


def streamed_and_plain() -> tuple[StreamingModel, nn.Module]:
    net = Masked().double()
    model = StreamingModel(net, tile=16)
    model.resident_tail = False
    return model, copy.deepcopy(net)


def assert_same(
    model: nn.Module, plain: nn.Module, streamed: tuple[Any, ...], whole: tuple[Any, ...]
) -> None:
    results = model(an_image(), *streamed), plain(an_image(), *whole)
    for result in results:
        (result * torch.arange(1, 1 + result.numel()).reshape(result.shape)).sum().backward()
    torch.testing.assert_close(*results, rtol=TOLERANCE, atol=TOLERANCE)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_a_mask_may_be_in_files(tmp_path: Path, kind: str) -> None:
    model, plain = streamed_and_plain()
    assert_same(model, plain, (masks_in(tmp_path, kind),), (MASK,))


def test_sources_may_be_nested_among_tensors(tmp_path: Path) -> None:
    model, plain = streamed_and_plain()
    weights = [TensorSource(each) for each in WEIGHTS]
    assert_same(model, plain, (MASK, {"weights": weights}), (MASK, {"weights": WEIGHTS}))


def test_a_mask_is_read_in_tiles_and_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = streamed_and_plain()
    sources = [TensorSource(mask[None]) for mask in MASK]
    read: list[Region] = []
    original = TensorSource.read
    monkeypatch.setattr(
        TensorSource, "read", lambda source, region: read.append(region) or original(source, region)
    )
    model(an_image(), sources).sum().backward()
    assert read
    assert all(max(region.size) <= 16 for region in read)


def test_a_mask_may_be_read_whole_by_an_operator_without_a_rule() -> None:
    class Reordered(Masked):
        def forward(self, x: Tensor, mask: Tensor, more: Any = None) -> Tensor:
            order = torch.arange(mask.shape[2]).flip(0)
            return super().forward(x, mask.index_select(2, order), more)

    net = Reordered().double()
    model = StreamingModel(copy.deepcopy(net), tile=16)
    assert_same(model, net, ([TensorSource(mask[None]) for mask in MASK],), (MASK,))


def test_a_plan_counts_what_reading_a_mask_takes(tmp_path: Path) -> None:
    model = StreamingModel(Masked(), tile=512)
    size = (2048, 2048)
    path = tmp_path / "mask.zarr"
    zarr.create_array(path, data=np.ones(size, np.uint8), chunks=size, dimension_names=("y", "x"))
    plans = [
        model.plan((1, 3, *size), inputs=(mask,))
        for mask in (TensorSource(torch.zeros(1, *size, dtype=torch.uint8)), open_image(path))
    ]
    assert plans[1].projected_bytes >= plans[0].projected_bytes + size[0] * size[1]


def test_a_source_that_is_returned_is_the_one_that_was_passed() -> None:
    class Returned(Masked):
        def forward(self, x: Tensor, mask: Tensor, more: Any = None) -> Any:
            return super().forward(x, mask), mask

    source = [TensorSource(mask[None]) for mask in MASK]
    _, found = StreamingModel(Returned().double(), tile=16)(an_image(), source)
    assert found is source


def test_masks_that_are_no_batch_are_refused() -> None:
    model, _ = streamed_and_plain()
    sources = [TensorSource(MASK[:1]), TensorSource(MASK[1:, :20])]
    with pytest.raises(DatasetMismatch, match=r"image 1 of the batch is \(1, 20, 45\)"):
        model(an_image(), sources)


def test_a_source_is_not_overwritten() -> None:
    class Overwriting(Masked):
        def forward(self, x: Tensor, mask: Tensor, more: Any = None) -> Tensor:
            mask.clamp_(max=1)
            return super().forward(x, mask)

    model = StreamingModel(Overwriting().double(), tile=16)
    with pytest.raises(UnsupportedModel, match="written-to tensor"):
        model(an_image(), [TensorSource(mask[None]) for mask in MASK])


def test_results_that_depend_on_each_other_read_the_same_mask() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            features = self.conv(x)
            return features.mean((2, 3)), F.cross_entropy(features * 2, mask)

    net = Both().double()
    model, source = StreamingModel(copy.deepcopy(net), tile=16), [TensorSource(mask[None]) for mask in MASK]
    for ours, theirs in zip(model(an_image(), source), net(an_image(), MASK), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_source_has_no_values_to_decide_by() -> None:
    class Deciding(Masked):
        def forward(self, x: Tensor, mask: Tensor, more: dict[str, Tensor] | None = None) -> Tensor:
            return super().forward(x, mask) * (2 if mask.any() else 1)

    model = StreamingModel(Deciding().double(), tile=16)
    with pytest.raises(UnsupportedModel, match="reads a value of a tensor"):
        model(an_image(), [TensorSource(mask[None]) for mask in MASK])
