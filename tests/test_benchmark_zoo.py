"""Models of other libraries: which are listed, what is found of one, what is said of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import families as listing
from benchmarks.zoo import one, results
from benchmarks.zoo.families import ENCODERS, Family, Variant, families, smallest, variants
from benchmarks.zoo.numerics import ROUNDING, TOLERANCE, compare, judged
from benchmarks.zoo.page import page
from benchmarks.zoo.planned import planned
from benchmarks.zoo.results import Row
from benchmarks.zoo.sizes import NoSize, fitted
from benchmarks.zoo.states import without_chance
from benchmarks.zoo.traits import further_convolutions, has_attention
from streamcnn.errors import BudgetExceeded, UnsupportedModel
from streamcnn.verification import Verification, rounding

# timm asks for a deprecated annotation when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

SHAPE = (2, 3, 24, 32)


def net(*middle: nn.Module, width: int = 6) -> nn.Module:
    """A small classifier with something on its map."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), *middle),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)),
    )


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# --- the list ----------------------------------------------------------------------------------------


def test_every_library_is_listed_once_and_whole() -> None:
    found = families()
    assert len(set(found)) == len(found)
    timm = pytest.importorskip("timm")
    assert [family.name for family in found if family.library == "timm"] == timm.list_modules()
    names = {str(family) for family in found}
    assert {"torchvision/resnet", "torchvision/segmentation.fcn", "smp/Unet dpn"} <= names
    assert {f"smp/Segformer {ENCODERS[0]}", f"smp/DeepLabV3Plus {ENCODERS[0]}"} <= names
    # Detectors, videos and quantised copies are other tasks.
    assert not [name for name in names if "detection" in name or "video" in name or "quant" in name]


def test_every_encoder_of_the_list_exists_and_goes_with_some_decoder() -> None:
    named = [family.name for family in families("smp/")]
    assert all(any(name.endswith(f" {encoder}") for name in named) for encoder in ENCODERS)
    assert [variant.name for variant in variants(Family("smp", "Unet vgg"))][:2] == [
        "Unet vgg11",
        "Unet vgg11_bn",
    ]


def test_patterns_choose() -> None:
    assert [str(family) for family in families("vision/squeeze")] == ["torchvision/squeezenet"]
    several = families("vision/squeeze", "vision/alex", "squeezenet")
    assert [family.name for family in several] == ["squeezenet", "alexnet"]


def test_the_smallest_variant_is_the_one_with_the_fewest_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_values() -> nn.Module:
        torch.ones(1).item()
        return net(width=1)

    made = [Variant(str(width), lambda width=width: net(width=width)) for width in (8, 4, 16)]
    every = [Variant("values", needs_values), *made]
    monkeypatch.setattr(listing, "_LIBRARIES", {"some": (list, lambda name: every)})
    # What cannot be counted without memory is not the smallest, even if it is.
    assert smallest(Family("some", "net")).name == "4"


def test_a_size_goes_to_models_that_take_one() -> None:
    sized = Variant("sized", lambda size=None: net(width=size[0] if size else 1), "size")
    assert sized((5, 7))[0].out_channels == 5
    assert sized()[0].out_channels == 1
    assert Variant("free", lambda: net(width=2), "size")((5, 7))[0].out_channels == 2

    def faulty(size: tuple[int, int]) -> nn.Module:
        raise TypeError("something else")

    with pytest.raises(TypeError, match="something else"):
        Variant("faulty", faulty, "size")((5, 7))


def test_weights_are_the_same_whenever_they_are_made() -> None:
    variant = Variant("net", net)
    first, again = variant(), variant()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


# --- what kind of model ------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if self.fused:
            mixed = F.scaled_dot_product_attention(tokens, tokens, tokens)
        else:
            mixed = (tokens @ tokens.transpose(1, 2)).softmax(-1).clone() @ tokens
        return mixed.transpose(1, 2).reshape(x.shape)


def _branches(x: Tensor) -> Tensor:
    """Two branches added up by shares (as in split attention)."""
    both = torch.stack([x, x.relu()], 1)
    return (both * both.mean((3, 4), keepdim=True).softmax(1)).sum(1)


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        (Attention(fused=True), True),
        (Attention(fused=False), True),
        (Applied(_branches), False),
        (nn.ReLU(), False),
    ],
)
def test_attention_is_a_product_with_a_softmax(middle: nn.Module, expected: bool) -> None:
    assert has_attention(net(middle).eval(), SHAPE) is expected


def test_the_first_convolution_does_not_count() -> None:
    assert further_convolutions(nn.Sequential(nn.Linear(2, 2))) == 0
    assert further_convolutions(net()) == 0
    assert further_convolutions(net(nn.Conv2d(6, 6, 1), nn.ConvTranspose2d(6, 6, 2, 2))) == 2


def test_nothing_is_dropped_any_more() -> None:
    class DropPath(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_prob, self.scale, self.p = 0.5, 0.5, 0.5

    dense = nn.Linear(2, 2)
    dense.drop_rate, dense.p = 0.3, 0.3
    without_chance(nn.Sequential(path := DropPath(), nn.Sequential(dropout := nn.Dropout(0.2), dense)))
    assert (path.drop_prob, path.scale, path.p, dropout.p) == (0.0, 0.5, 0.0, 0.0)
    assert (dense.drop_rate, dense.p) == (0.0, 0.3)


# --- sizes -------------------------------------------------------------------------------------------


def _multiples_of_8(x: Tensor) -> Tensor:
    if x.shape[2] % 8 or x.shape[3] % 8:
        raise AssertionError(f"{tuple(x.shape[2:])} is no multiple of 8")
    return x


@pytest.mark.parametrize("fake", [True, False])
def test_the_first_size_that_plain_pytorch_takes(fake: bool) -> None:
    variant = Variant("net", lambda: net(Applied(_multiples_of_8)))
    made, shape = fitted(variant, ((13, 17), (16, 24), (8, 8)), (2,), fake=fake)
    assert shape == (2, 3, 16, 24)
    assert made.training
    assert fake or made[1].num_batches_tracked == 0
    with pytest.raises(NoSize, match=r"13x17: AssertionError: \(13, 17\) is no multiple of 8"):
        fitted(variant, ((13, 17),), (2,), fake=fake)


def test_two_images_where_one_is_too_few() -> None:
    pooled = Variant(
        "net", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    )
    assert fitted(pooled, ((9, 9),), (1, 2), fake=True)[1] == (2, 3, 9, 9)


# --- streamed and plain ------------------------------------------------------------------------------


def verification(**errors: float) -> Verification:
    return Verification(errors=errors, num_tiles=4, num_phases=2, sizes={})


def test_an_error_above_the_tolerance_is_wrong() -> None:
    exact = judged(verification(a=1e-15, b=1e-12), {})
    assert (exact["error"], exact["num_wrong"], exact["blurred"]) == (1e-12, 0, 0)
    wrong = judged(verification(a=1e-15, b=1e-8), {"a": 1e-16, "b": 1e-16})
    assert (wrong["error"], wrong["wrong"], wrong["blurred"]) == (1e-8, {"b": 1e-8}, 0)
    nothing = judged(verification(a=math.inf), {"a": 0.0})
    assert nothing["num_wrong"] == 1


def test_what_rounding_blurs_is_compared_with_rounding() -> None:
    noise = {"a": 1e-16, "b": 1e-8}
    blurred = judged(verification(a=1e-12, b=5e-8), noise)
    assert (blurred["error"], blurred["num_wrong"], blurred["blurred"]) == (1e-12, 0, 1)
    assert judged(verification(a=1e-12, b=5e-6), noise)["wrong"] == {"b": 5e-6}
    assert judged(verification(a=1e-12, b=math.nan), noise)["num_wrong"] == 1


class Float32Inside(nn.Module):
    """A mean over space in float32, whatever the model's type."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.conv(image).float().mean((2, 3)).to(image.dtype)
        return found


def test_a_part_in_float32_is_compared_in_float64() -> None:
    found = compare(Float32Inside(), (1, 3, 40, 40), train=True)
    assert (found["wrong"], found["blurred"]) == ({}, 0)
    assert found["error"] < 1e-12


def test_rounding_shows_where_it_is_magnified() -> None:
    assert max(rounding(net(nn.ReLU()), SHAPE).values()) < TOLERANCE / 1e3
    # Batch norm of two values gives plus and minus one, whatever they are, and no gradient but rounding.
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4, eps=1e-30))
    found = rounding(pooled, SHAPE)
    assert ROUNDING * found["gradient of 0.weight"] > TOLERANCE
    assert found["buffer 2.running_mean"] < TOLERANCE


@pytest.mark.parametrize("name", ["torchvision/squeezenet", "timm/edgenext", "smp/Linknet resnet18"])
def test_models_of_other_libraries_stream_exactly(name: str) -> None:
    family = families(name)[0]
    made, shape = fitted(smallest(family), ((75, 67), (64, 96)), (2,), fake=False)
    found = compare(made, shape, train=True)
    assert found["num_wrong"] == 0
    assert found["error"] <= TOLERANCE
    assert found["blurred"] < found["compared"] / 10
    assert found["tiles"] == 4


# --- planned -----------------------------------------------------------------------------------------


def test_products_that_stream_are_told_from_those_that_do_not() -> None:
    # No rule can stream the sort: any position may come to be any other one.
    sorted_map = Applied(lambda x: x.flatten(2).sort(-1).values.view(x.shape))
    found = planned(net(nn.Conv2d(6, 6, 3), sorted_map, nn.Conv2d(6, 6, 3)), (1, 3, 90, 100))
    assert found["fits"]
    assert (found["num_streamed"], found["num_products"]) == (3, 3)
    assert 0 < found["streamed_flops"] <= found["flops"]
    (resident, *_) = found["residents"]
    assert "flatten" in resident["reason"] or "sort" in resident["reason"]
    assert resident["bytes"] >= 6 * 88 * 98 * 4
    streamed = planned(net(nn.Conv2d(6, 6, 3)), (1, 3, 90, 100))
    assert (streamed["num_streamed"], streamed["num_products"], streamed["residents"]) == (2, 2, [])
    assert streamed["streamed_flops"] == streamed["flops"] == 2 * 9 * (18 * 90 * 100 + 36 * 88 * 98)


# --- one family --------------------------------------------------------------------------------------


def examined_parts(monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module]) -> dict[str, Any]:
    """What `examine` says of a family of one model."""
    monkeypatch.setattr(one, "SMALL", ((24, 32),))
    monkeypatch.setattr(one, "LARGE", ((90, 100),))
    every = [Variant("one", build)]
    monkeypatch.setattr(listing, "_LIBRARIES", {"some": (list, lambda name: every)})
    parts: dict[str, Any] = {}
    one.examine(Family("some", "net"), lambda **part: parts.update(part))
    return parts


def deep(*middle: nn.Module) -> nn.Module:
    """A net with enough convolutions not to be excluded."""
    return net(*(nn.Conv2d(6, 6, 1, bias=False) for _ in range(3)), *middle)


def test_a_family_is_examined_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = examined_parts(monkeypatch, deep)
    assert list(parts) == ["variant", "parameters", "convolutions", "attention", "train", "eval", "plan"]
    row = Row(Family("some", "net"), parts)
    assert row.verdict == results.EXACT
    assert row.reason == ""


def test_transformers_are_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = examined_parts(monkeypatch, net)
    assert parts["excluded"] == "0 convolutions besides the first"
    assert "train" not in parts


def test_what_plain_pytorch_does_not_run_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    parts = examined_parts(monkeypatch, lambda: deep(Applied(fails)))
    assert parts["excluded"] == "plain PyTorch runs it at no size that was tried: 24x32: RuntimeError: no"


def test_a_refusal_and_a_fault_are_told_apart() -> None:
    def raises(error: Exception) -> Callable[[], dict[str, Any]]:
        def part() -> dict[str, Any]:
            raise error

        return part

    assert one.outcome(raises(UnsupportedModel("why"))) == {"refused": "why"}
    assert one.outcome(raises(NoSize("why"))) == {"unfit": "why"}
    refused = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    for error in (refused, BudgetExceeded("a tile")):
        assert one.outcome(raises(error)) == {"unfit": "it takes more than 12.0 GiB of address space"}
    (failed,) = one.outcome(raises(IndexError("why"))).items()
    assert failed[0] == "failed"
    assert failed[1].startswith("IndexError: why (test_benchmark_zoo.py:")


def test_a_pass_that_memory_ended_shows_nothing() -> None:
    unfit = row(train={"unfit": "too large"})
    assert (unfit.verdict, unfit.reason) == (results.UNFINISHED, "too large")


# --- verdicts and the page ---------------------------------------------------------------------------


def a_pass(mode: str = "train", **fields: Any) -> dict[str, Any]:
    begin = {"mode": mode, "shape": [2, 3, 107, 135], "error": 1e-14, "compared": 50, "blurred": 0}
    return {**begin, "wrong": {}, "num_wrong": 0, "tiles": 4, "phases": 2, "residents": 0, **fields}


def a_plan(**fields: Any) -> dict[str, Any]:
    begin = {"shape": [1, 3, 4000, 4000], "fits": True, "projected_bytes": 2**30, "plain_bytes": 2**32}
    work = {"flops": 200, "streamed_flops": 200, "num_products": 4, "num_streamed": 4}
    return {**begin, **work, "projected_seconds": 3.0, "residents": [], **fields}


def row(name: str = "net", library: str = "timm", **fields: Any) -> Row:
    origin = {
        "date": "2026-01-01",
        "commit": "abc",
        "device": "a machine",
        "torch": "2",
        "versions": {"timm": "1"},
    }
    found = {"variant": f"{name}_small", "attention": False, "train": a_pass(), "eval": a_pass("eval")}
    return Row(Family(library, name), {**origin, **found, "plan": a_plan(), **fields})


RESIDENT = [{"reason": "aten.bmm: it has no rule", "source": "a (B)", "times": 3, "bytes": 9}]
VERDICTS = {
    "exact": row(),
    "exact with residents": row("held", plan=a_plan(residents=RESIDENT, streamed_flops=50)),
    "refused": row("no", train={"refused": "for a reason"}),
    "WRONG": row("bad", eval=a_pass("eval", num_wrong=2, wrong={"output 0": 0.5}, error=0.5)),
    "FAILED": row("fault", train={"failed": "IndexError: x"}),
    "unfinished": Row(Family("smp", "slow"), {**row().fields, "eval": {}, "ended": "SIGSEGV: words"}),
    "excluded": row("vit", excluded="0 convolutions besides the first"),
}
VERDICTS["unfinished"] = Row(
    Family("smp", "slow"),
    {key: value for key, value in VERDICTS["unfinished"].fields.items() if key not in ("eval", "plan")},
)
REASONS = {
    "exact": "",
    "exact with residents": "aten.bmm: it has no rule",
    "refused": "for a reason",
    "WRONG": "eval: 2 of 50, output 0 5.0e-01",
    "FAILED": "IndexError: x",
    "unfinished": "SIGSEGV: words",
    "excluded": "0 convolutions besides the first",
}


@pytest.mark.parametrize("verdict", results.VERDICTS)
def test_verdicts_and_their_reasons(verdict: str) -> None:
    assert VERDICTS[verdict].verdict == verdict
    assert VERDICTS[verdict].reason == REASONS[verdict]


def test_the_page_has_every_row_and_the_totals() -> None:
    text = page([*VERDICTS.values(), row("big", plan=a_plan(fits=False, projected_bytes=2**33))], 0)
    assert "| convolutional | 7 | 2 | 1 | 1 | 1 | 1 | 1 | 88% |" in text
    assert "Of 6 plans 5 fit in 11GB; plain PyTorch would fit with 6." in text
    assert "More memory than plain PyTorch, and how many times as much: timm/big (2.00)." in text
    assert "| 1 | aten.bmm: it has no rule | held |" in text
    assert "| vit_small | 0 convolutions besides the first |" in text.replace("timm vit", "vit")
    assert "at commit abc, 2026-01-01, on a machine, with PyTorch 2, timm 1." in text
    held = "| held_small | convolutional | 107x135 | exact with residents | 1e-14 | 25% | 4000x4000 | yes |"
    why = "aten.bmm: it has no rule, in a (B), 3 times, 9 bytes"
    assert f"{held} 1.00 GiB | 4.00 GiB | 3.00 s | {why} |" in text
    assert "## segmentation-models-pytorch" in text
    assert "## torchvision" not in text.replace("torchvision,", "")


def test_the_page_says_of_how_many_images_a_plan_is() -> None:
    assert "| 2 of 64x96 |" in page([row(plan=a_plan(shape=[2, 3, 64, 96]))], 0)


def test_the_page_says_how_much_is_blurred() -> None:
    assert "| 1e-14, 3 of 100 blurred |" in page([row(train=a_pass(blurred=3))], 0)
