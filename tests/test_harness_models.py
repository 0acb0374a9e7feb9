"""The UltraMNIST harness: its images, and what the methods train."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.attempts import Refused
from benchmarks.harness.classifiers import (
    LearnedResizer,
    PatchGD,
    TileVote,
    WholeImages,
    grid_size,
    make_net,
)
from benchmarks.harness.images import ShrunkImages, read_whole, shrink, steps_to
from benchmarks.harness.kinds.patchgd import PatchGDTrainer
from benchmarks.harness.kinds.tiles import PiecesTrainer
from benchmarks.harness.legibility import legibility_ceiling
from benchmarks.harness.pyramid import FIELD, ScalePyramid, scale_pyramid
from benchmarks.harness.row_ceiling import RowCeiling
from benchmarks.harness.scales import SCALES
from streamcnn import TensorSource, verify
from streamcnn.data.dataset import TileDataset
from streamcnn.data.tile_store import TileStore
from streamcnn.training import TrainSettings


def constant(value: float, size: int = 40) -> TensorSource:
    return TensorSource(torch.full((1, size, size), value))


def test_images_are_shrunk_by_area_and_small_ones_in_two_steps(
    tiny_images: TileStore, tmp_path: Path
) -> None:
    assert steps_to(256, SCALES["paper"]) == (512, 256)
    assert steps_to(512, SCALES["paper"]) == (512,)
    assert steps_to(1024, SCALES["single"]) == (131,)
    pixels = torch.randint(256, (1, 64, 64), dtype=torch.uint8)
    blocks = pixels.float().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4))
    assert torch.equal(shrink(pixels, (16,)).float(), blocks.round())
    images = ShrunkImages(tiny_images, "train", (32, 16), tmp_path, positions=(3, 1))
    whole, label = TileDataset(tiny_images, "train")[3]
    source, found_label = images[0]
    assert found_label == label
    expected = shrink(read_whole(whole), (32, 16))
    assert torch.equal(read_whole(source), expected)
    # Another instance finds the array that is there.
    again = ShrunkImages(tiny_images, "train", (32, 16), tmp_path)
    assert torch.equal(read_whole(again[3][0]), expected)
    otherwise_shrunk = ShrunkImages(tiny_images, "train", (16,), tmp_path, positions=(3, 1))
    assert images.fingerprint != otherwise_shrunk.fingerprint


def test_what_is_legible_depends_on_the_smallest_digit() -> None:
    single = SCALES["single"]
    # Every digit has 14 pixels or more on a canvas of 512, and half of 14 is 7.
    assert legibility_ceiling(single, 512) == legibility_ceiling(single, 256) == 1.0
    shares = [legibility_ceiling(single, resolution) for resolution in (16, 33, 66, 131)]
    assert shares == sorted(shares)
    assert 0.6 < shares[-1] < 0.8


def test_timm_heads_are_two_layers_with_a_relu_between() -> None:
    for model in ("resnet18", "mobilenetv3_small_050"):
        net = make_net(model, 28, 64, pretrained=False)
        head = list(net.children())[-3:]
        assert [type(layer) for layer in head] == [nn.Linear, nn.ReLU, nn.Linear]
        assert head[0].out_features == 100
        assert net.eval()(torch.zeros(2, 1, 64, 64)).shape == (2, 28)


@pytest.mark.parametrize(("size", "levels"), [(33, 1), (131, 2), (512, 4), (4000, 7)])
def test_a_pyramid_has_levels_that_look_at_half_of_the_image(size: int, levels: int) -> None:
    net = scale_pyramid(10, size)
    assert net.num_levels == levels
    assert FIELD * 2 ** (levels - 1) >= size / 2


def test_a_pyramids_feature_looks_at_so_many_pixels() -> None:
    net = ScalePyramid(3, num_levels=1).eval().double()
    image = torch.zeros(1, 1, 160, 160, dtype=torch.float64, requires_grad=True)
    for layer in net.trunk:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1.0)
    features = net.trunk(image + 1.0)
    (gradient,) = torch.autograd.grad(features[0, 0, 10, 10], image)
    rows = gradient[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == FIELD


def test_a_streamed_pyramid_is_exact() -> None:
    verification = verify(scale_pyramid(10, 200), (2, 1, 200, 200), tile=64)
    assert max(verification.errors.values()) < 1e-9
    assert verification.num_tiles > 4


def test_a_learned_resizer_adds_a_branch_to_bilinear_resizing() -> None:
    net = LearnedResizer(20).eval()
    image = torch.rand(2, 1, 50, 60)
    assert net(image).shape == (2, 1, 20, 20)
    nn.init.zeros_(net.after.weight)
    nn.init.zeros_(net.after.bias)
    assert torch.allclose(net(image), F.interpolate(image, (20, 20), mode="bilinear"), atol=1e-6)


class Means(nn.Module):
    """The mean of a piece in each of three outputs, for what only arranges pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((1, 2, 3))[:, None] * self.weight


def test_pieces_cover_the_image_and_vote_by_their_mean() -> None:
    model = TileVote(Means(), tile=16, share=0.5).eval()
    source = TensorSource(torch.rand(1, 40, 33))
    seen = torch.zeros(40, 33)
    for piece in model.grid(source):
        seen[piece.rows.start : piece.rows.stop, piece.cols.start : piece.cols.stop] += 1
    assert (seen > 0).all()
    assert len(model.grid(source)) == 9
    other = TensorSource(torch.rand(1, 40, 33))
    found = model([source, other])
    for each, logits in zip((source, other), found, strict=True):
        means = [each.read(piece).mean() for piece in model.grid(each)]
        expected = (torch.stack(means).mean() - 0.5) / 0.5
        assert torch.allclose(logits, expected.expand(3), atol=1e-6)
    assert model.sample_size(9) == 4
    assert model.train()([source, other]).shape == (2, 3)


def test_patchgd_learns_through_the_sampled_patches_alone() -> None:
    torch.manual_seed(0)
    model = PatchGD(Means(), 10, 0.25, width=3, grid_size=grid_size(40, 10), num_classes=2)
    sources = [TensorSource(torch.rand(1, 40, 40)) for _ in range(2)]
    model.train()
    model.begin(sources)
    before = model.filled
    assert before is not None
    assert before.shape == (2, 16, 3)
    with torch.no_grad():
        model.net.weight.mul_(2)
    for step in range(1, model.num_inner_steps + 1):
        model.zero_grad()
        model(sources).sum().backward()
        assert model.net.weight.grad is not None
        # A quarter of 16 patches each time; what was put in stays for the next inner step.
        assert (model.filled != before).any(2).sum(1).tolist() == [4 * step, 4 * step]
    assert model.num_inner_steps == 4
    assert torch.allclose(model.filled, 2 * before)
    assert model.eval()(sources).shape == (2, 2)


def test_patchgd_adds_the_gradients_of_its_inner_steps(tmp_path: Path, tiny_images: TileStore) -> None:
    torch.manual_seed(0)
    model = PatchGD(Means(), 32, 1.0, width=3, grid_size=grid_size(64, 32), num_classes=10)
    images = TileDataset(tiny_images, "train")
    trainer = PatchGDTrainer(model, images, images, TrainSettings(epochs=1), tmp_path)
    trainer.begin()
    source, label = images[0]
    trainer.differentiate([source], torch.tensor([label]), 1.0)
    assert model.net.weight.grad is not None
    found = model.net.weight.grad.clone()
    # With all patches in the sample, there is one inner step, and it has the gradient of the whole.
    model.zero_grad()
    model.begin([source])
    F.cross_entropy(model([source]), torch.tensor([label])).backward()
    assert torch.allclose(found, model.net.weight.grad, atol=1e-6)


def test_gradients_of_pieces_that_overflow_are_left_out(tiny_images: TileStore, tmp_path: Path) -> None:
    images = TileDataset(tiny_images, "train")
    model = TileVote(Means(), tile=8, share=0.5).train()
    assert isinstance(model.net, Means)
    trainer = PiecesTrainer(model, images, images, TrainSettings(epochs=1), tmp_path / "run")
    trainer.begin()
    model.net.weight.register_hook(lambda gradient: gradient * torch.tensor([1.0, math.nan, math.inf]))
    trainer.differentiate([images[0][0]], torch.tensor([1]), 1.0)
    assert model.net.weight.grad is not None
    assert model.net.weight.grad[0] != 0
    assert model.net.weight.grad[1:].tolist() == [0.0, 0.0]


def test_whole_images_are_normalised_and_stacked() -> None:
    found = WholeImages(Means())([constant(0.75), constant(0.25)])
    assert torch.allclose(found, torch.tensor([[0.5] * 3, [-0.5] * 3]))


def test_memory_that_a_factory_is_refused_is_refused_to_its_method() -> None:
    """What makes a network says in words of its own that it cannot be made, with the error beside it."""
    refusal = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
    ceiling = RowCeiling("cpu", 10**9)
    with pytest.raises(Refused, match=r"^DefaultCPUAllocator"), ceiling.limited(reuse_heap=True):
        raise ValueError("cannot be made: give other options") from refusal
    with pytest.raises(ValueError, match=r"^another"), ceiling.limited(reuse_heap=True):
        raise ValueError("another") from KeyError("model")
