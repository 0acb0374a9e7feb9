"""What a forward pass asks of tensors without values: answered as in plain PyTorch, or refused by name."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import assert_streamed_equals_plain
from torch import Tensor, nn

from streamcnn import StreamingModel, UnsupportedModel
from streamcnn.capture.lines import shortened

Body = Callable[[Tensor], Tensor]


class Named(Tensor):
    """A class without functions of its own."""


class Net(nn.Module):
    """``body`` between two convolutions; ``on_image`` runs on the image."""

    def __init__(self, body: Body = lambda x: x, on_image: Body = lambda x: x) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.body, self.on_image = body, on_image

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.body(self.first(self.on_image(x)))).mean((2, 3))


def _as_plain(x: Tensor) -> Tensor:
    return x.as_subclass(Tensor) * 2


def _by_its_gradient(x: Tensor) -> Tensor:
    return x * 2 if x.grad is None else x * 3


def _by_whether_it_is_a_leaf(x: Tensor) -> Tensor:
    return x * 2 if x.is_leaf else x * 3


def _elsewhere(x: Tensor) -> Tensor:
    return x * x.to("meta").shape[2]


def _by_its_entries(x: Tensor) -> Tensor:
    limits = torch.tensor([1.0, 3.0])
    return x * len(f"{limits[1]:.1f} {limits}") * complex(limits[1]).real * (2 if 3.0 in limits else 5)


def _joined(x: Tensor) -> Tensor:
    means = [x.mean().detach(), x[0].mean().detach()]
    joined = torch.tensor([means, [1.0, 2.0]]).sum() + torch.as_tensor(means).sum()
    return x * (joined + x.new_tensor(means, dtype=torch.float64).sum().to(x.dtype))


def _combined(x: Tensor) -> Tensor:
    v = x.mean((2, 3))[0]
    return x * (torch.combinations(v).prod(1).sum() + torch.combinations(v, 3, True).sum())


def _split_by_a_tensor(x: Tensor) -> Tensor:
    return torch.cat(x.tensor_split(torch.tensor([1, 3]), 1)[::-1], 1)


_LIKE_PLAIN = [
    _as_plain,
    _by_its_gradient,
    _by_whether_it_is_a_leaf,
    _elsewhere,
    _by_its_entries,
    _joined,
    _combined,
    _split_by_a_tensor,
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("body", _LIKE_PLAIN)
@pytest.mark.parametrize("unguarded", [False, True])
def test_as_in_plain_pytorch(body: Body, unguarded: bool) -> None:
    def run(x: Tensor) -> Tensor:
        if unguarded:
            print(end="")
        return body(x)

    torch.manual_seed(0)
    assert_streamed_equals_plain(Net(run), (2, 3, 29, 37), tile=16)


def _hooked(x: Tensor) -> Tensor:
    torch.autograd.graph.register_multi_grad_hook((x,), lambda gradients: None)
    return x


def _named(x: Tensor) -> Tensor:
    print(end="")
    return x.as_subclass(Named)


def _through_numpy(x: Tensor) -> Tensor:
    print(end="")
    return torch.from_numpy(x.detach().numpy() + 1)


def _formatted(x: Tensor) -> Tensor:
    print(end=f"{x.detach().mean():.0f}")
    return x


def _stored(x: Tensor) -> Tensor:
    x.detach().untyped_storage().fill_(0)
    return x


def _packed(x: Tensor) -> Tensor:
    sequences = nn.utils.rnn.pack_padded_sequence(x.mean(2), torch.tensor([4, 2]), batch_first=True)
    return x * sequences.data.sum()


_STORAGE = r"the memory of a tensor \(storage\(\), untyped_storage\(\)\)"


REFUSED: dict[str, tuple[Body, str]] = {
    "copy": (copy.copy, r"copy\.copy\(\) or pickles a tensor, which has no values yet: use x\.clone\(\)"),
    "pickle": (lambda x: pickle.loads(pickle.dumps(x)), r"pickles a tensor"),
    "share_memory_": (lambda x: x.share_memory_(), r"share_memory_\(\) on a tensor that has no memory"),
    "is_set_to": (lambda x: x * x.is_set_to(x), r"is_set_to\(\) on a tensor that has no memory"),
    "apply_": (lambda x: x * x.detach().clone().apply_(abs), r"apply_\(\), .* values of a tensor one by one"),
    "map_": (lambda x: x * torch.ones(2).map_(torch.ones(2), max).sum(), r"map_\(\), .* one by one"),
    "from_dlpack": (lambda x: x * torch.from_dlpack(x.detach()), r"__dlpack__\(\) .* to another library"),
    "a storage is read": (lambda x: x * x.detach().untyped_storage()[0], _STORAGE),
    "a storage is written": (_stored, _STORAGE),
    "lstsq": (
        lambda x: x * torch.linalg.lstsq(x[0, 0], x[0, 0]).solution.sum(),
        r"calls linalg_lstsq, and values decide .* Multiply by torch\.linalg\.pinv",
    ),
    "pack_padded_sequence": (_packed, r"calls _pack_padded_sequence, .* Keep the sequences padded"),
    "as_nested_tensor": (
        lambda x: x * torch.nested.as_nested_tensor([x[0], x[1]], layout=torch.jagged).values().sum(),
        "makes a nested tensor: pad what differs in length",
    ),
    "register_multi_grad_hook": (_hooked, r"register_multi_grad_hook\(\), .* set a hook on each tensor"),
    "as_subclass": (_named, r"it makes a tensor of class Named, .* use tensors of torch\.Tensor within it"),
    "numpy": (_through_numpy, "values to NumPy.* convert it outside of the model"),
    "format": (_formatted, "it reads a value of a tensor"),
    "_nnz": (lambda x: x * x.detach().to_sparse()._nnz(), r"_nnz\(\) of a sparse tensor, .* outside of"),
    "nested": (
        lambda x: torch.nested.nested_tensor([x[0], x[1]]).to_padded_tensor(0.0),
        r"it calls aten\._nested_tensor_from_tensor_list\.default, which does not say what it gives",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, text = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=text):
        StreamingModel(Net(body))(torch.randn(2, 3, 29, 37))


@pytest.mark.parametrize("name", ["grad", "is_leaf"])
def test_what_only_the_callers_image_tells_is_refused(name: str) -> None:
    net = Net(on_image=lambda x: x * 2 if getattr(x, name) else x)
    with pytest.raises(UnsupportedModel, match=rf"reads \.{name} of the image, .* further argument"):
        StreamingModel(net)(torch.randn(2, 3, 29, 37, requires_grad=True))


def test_a_map_beside_the_image_has_no_values() -> None:
    class Instances(nn.Module):
        def forward(self, x: Tensor, instances: Tensor) -> Tensor:
            return sum(x * (instances == each) for each in np.unique(instances.numpy()))

    with pytest.raises(UnsupportedModel, match=r"maps beside it .* convert an argument before the call"):
        StreamingModel(Instances())(torch.randn(2, 3, 29, 37), torch.randint(3, (2, 1, 29, 37)))


MOVES_LAYERS = r"makes or moves layers with parameters \(Module\.to\)"


def test_layers_are_not_made_within() -> None:
    def body(x: Tensor) -> Tensor:
        return nn.Conv2d(4, 4, 1, dtype=torch.float32).to(x.dtype)(x)

    with pytest.raises(UnsupportedModel, match=MOVES_LAYERS):
        StreamingModel(Net(body).double())(torch.randn(2, 3, 29, 37, dtype=torch.float64))


def test_a_layer_that_is_moved_within_stays_as_it_is() -> None:
    held = [nn.Conv2d(4, 4, 1)]

    def body(x: Tensor) -> Tensor:
        return held[0].to(x.dtype)(x)

    with pytest.raises(UnsupportedModel, match=MOVES_LAYERS):
        StreamingModel(Net(body).double())(torch.randn(2, 3, 29, 37, dtype=torch.float64))
    assert type(held[0].weight) is nn.Parameter
    assert held[0].weight.dtype == torch.float32


def test_a_long_line_of_code_is_cut() -> None:
    assert shortened("    return x\n") == "return x"
    assert shortened("x" * 500) == "x" * 100 + " …"


def test_a_result_may_be_elsewhere() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net.register_forward_hook(lambda module, inputs, output: output.to("meta"))
    found = StreamingModel(net, tile=16)(torch.randn(2, 3, 29, 37))
    assert (found.device.type, found.shape) == ("meta", (2, 4, 27, 35))


def _tried(x: Tensor) -> Tensor:
    try:
        return x * float(x.mean())
    except Exception:
        return x * 3


def _suppressed(x: Tensor) -> Tensor:
    factor = 1.0
    with contextlib.suppress(Exception):
        factor = x.max().item()
    return x * factor


def _tried_as_array(x: Tensor) -> Tensor:
    print(end="")
    try:
        return x * float(x.detach().numpy().mean())
    except (RuntimeError, TypeError):
        return x * 3


def _tried_as_mask(x: Tensor) -> Tensor:
    try:
        return x + x[x > 0].mean()
    except Exception:
        return x


def _tried_to_seed(x: Tensor) -> Tensor:
    try:
        torch.manual_seed(0)
    except Exception:
        return x * 3
    return x


@pytest.mark.parametrize("body", [_tried, _suppressed, _tried_as_array, _tried_as_mask, _tried_to_seed])
def test_an_error_for_the_lack_of_values_is_not_caught_by_the_code(body: Body) -> None:
    with pytest.raises(UnsupportedModel, match=r"captured|random state"):
        StreamingModel(Net(body))(torch.randn(2, 3, 29, 37))


def test_an_error_that_plain_pytorch_raises_is_caught_by_the_code() -> None:
    def body(x: Tensor) -> Tensor:
        print(end="")
        try:
            return x + torch.ones(5, 7)
        except RuntimeError:
            return x * 3

    torch.manual_seed(0)
    assert_streamed_equals_plain(Net(body), (2, 3, 29, 37), tile=16)
