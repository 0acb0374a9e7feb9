"""StreamingModel: the user's module, trained on whole images tile by tile.

It joins the two halves: capture and planning on one side, the executor under a ceiling on the other. To
the user's training loop it is the module itself: same parameters, same ``state_dict`` keys, and an output
whose ``backward()`` fills the same gradients.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.autocast import autocast, autocast_state
from streamcnn.capture import RawGraph, capture
from streamcnn.ceiling.cuda import note_idle
from streamcnn.ceiling.device import reserved_bytes
from streamcnn.data.reader import BatchReader, Image, Preprocess
from streamcnn.executor import Observer
from streamcnn.plan import Home, Plan
from streamcnn.planner import PlanRequest, make_plan
from streamcnn.program import Program, differentiated, substitute
from streamcnn.report import Report
from streamcnn.streamed_pass import Pass, Shrink, Streamed
from streamcnn.tracing import trace
from streamcnn.units import format_bytes, parse_bytes

_SMALLEST_TILE = 32
"""Edge in pixels; below it, halos are nearly all of the work."""
_CACHED_PLANS = 8
"""Captured graphs and plans kept, the most recently used ones."""
_SHARED_REGISTRIES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class StreamingModel(nn.Module):
    """``net`` on images of any size, exactly, under a memory ceiling.

    Parameters
    ----------
    net
        The module to stream. Its parameters and buffers stay its own; it is not changed.
    budget
        Bytes that forward and backward may take: an int or a text such as "11GB" (10^9) or "11GiB" (2^30).
        On the CPU above what the process holds when they begin; on a GPU all that the process holds there,
        weights, optimiser and CUDA's own memory included. ``None`` sets no ceiling.
    tile
        Largest edge of a tile in input pixels, one number or (h, w). ``None`` leaves it to the planner.
    spill
        Existing folder under which stored maps go that memory has no room for; they are removed at the end of
        the pass. ``None`` takes the system's temporary folder.
    preprocess
        A pointwise function of a tile (N, C, h, w) as stored to the float tile that the model takes.
    device
        Where to compute; the module is moved there. ``None`` leaves it where it is.

    Raises
    ------
    ValueError
        If an argument has no meaning; the text says what is allowed.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1))
    >>> model = StreamingModel(net, budget="1GiB", tile=64)
    >>> model(torch.rand(1, 3, 200, 150)).shape
    torch.Size([1, 8, 1, 1])
    """

    net: nn.Module

    def __init__(
        self,
        net: nn.Module,
        budget: int | str | None = None,
        *,
        tile: int | tuple[int, int] | None = None,
        spill: str | os.PathLike[str] | None = None,
        preprocess: Preprocess | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._adopt(net)
        self.budget = parse_bytes(budget)
        self.tile = _as_tile(tile)
        self.spill = _as_folder(spill)
        self.preprocess = preprocess
        self.last_report: Report | None = None
        self.observer: Observer | None = None
        """Told when a part of a pass begins and when it ends."""
        self._resident_tail = True
        self._graphs: OrderedDict[Any, RawGraph] = OrderedDict()
        self._plans: OrderedDict[Any, tuple[Program, Plan]] = OrderedDict()
        self.training = net.training
        # Before the model is moved: once it is on a GPU, the GPU is not idle.
        note_idle()
        if device is not None:
            self.to(device)

    # --- being the module ----------------------------------------------------------------------------

    def _adopt(self, net: nn.Module) -> None:
        """Share the module's registries, so that names, keys and moves are its own."""
        if not isinstance(net, nn.Module):
            raise ValueError(f"net is {net!r}: allowed is a torch.nn.Module")
        object.__setattr__(self, "net", net)
        for registry in _SHARED_REGISTRIES:
            object.__setattr__(self, registry, getattr(net, registry))

    def train(self, mode: bool = True) -> StreamingModel:
        """Set train or eval mode of the module and everything in it."""
        self.net.train(mode)
        self.training = mode
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.net._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.net._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Captured graphs hold operators, which cannot be copied; they are made again when needed.
        # An observer belongs to whoever set it.
        emptied: dict[str, Any] = {
            "_graphs": OrderedDict(),
            "_plans": OrderedDict(),
            "last_report": None,
            "observer": None,
        }
        return {**self.__dict__, **emptied}

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        budget = "None" if self.budget is None else format_bytes(self.budget)
        return f"budget={budget}, tile={self.tile}"

    # --- planning ------------------------------------------------------------------------------------

    def plan(self, shape: tuple[int, int, int, int], dtype: torch.dtype | None = None) -> Plan:
        """How an image of ``shape`` (N, C, H, W) would be run now, in the present mode.

        A plan that does not fit the budget is returned all the same; see ``Plan.fits``. With gradients
        disabled it is a plan for inference.

        Raises
        ------
        UnsupportedModel
            If the module cannot be captured at this shape.
        """
        reserved = reserved_bytes(self._device())
        return self._planned(shape, dtype or self._dtype(), image_gradient=False, reserved=reserved)[1]

    def _planned(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        *,
        image_gradient: bool,
        reserved: int = 0,
        tile: tuple[int, int] | None = None,
    ) -> tuple[Program, Plan]:
        tile = tile or self.tile
        states = self._states()
        trainable = frozenset(name for name, state in states.items() if state.requires_grad)
        wanted = trainable if torch.is_grad_enabled() else frozenset()
        device = self._device()
        casts = autocast_state(device)
        settings = (device, _settings(self.net), _specs(states))
        key = (shape, dtype, settings, casts, wanted, image_gradient, self.budget, reserved, tile)
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        # Casts are left out of the capture, so it must be at a type that the module takes without them.
        graph = self._captured(shape, dtype if casts is None else self._dtype(), settings)
        wish = _Wish(shape, wanted, image_gradient, tile, reserved, self)
        found = _find_plan(graph, states, dtype, device, wish)
        self._plans[key] = found
        if len(self._plans) > _CACHED_PLANS:
            self._plans.popitem(last=False)
        return found

    def _captured(self, shape: tuple[int, int, int, int], dtype: torch.dtype, settings: Any) -> RawGraph:
        key = (shape, dtype, settings)
        if key not in self._graphs:
            self._graphs[key] = capture(self.net, shape, dtype)
            if len(self._graphs) > _CACHED_PLANS:
                self._graphs.popitem(last=False)
        return self._graphs[key]

    def _states(self) -> dict[str, Tensor]:
        """Parameters and buffers under all their names: tied ones have several."""
        parameters = self.net.named_parameters(remove_duplicate=False)
        return {**dict(parameters), **dict(self.net.named_buffers(remove_duplicate=False))}

    def _device(self) -> torch.device:
        first = next(iter(self._states().values()), None)
        return torch.device("cpu") if first is None else first.device

    def _dtype(self) -> torch.dtype:
        first = next(self.net.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    # --- running -------------------------------------------------------------------------------------

    def forward(self, image: Image) -> Any:
        """The module's output for whole images: a tensor (N, C, H, W), a source, or a list of sources.

        Raises
        ------
        PlanDoesNotFit
            Before the first allocation, if no plan stays within the budget.
        BudgetExceeded
            If an allocation is refused all the same.
        UnsupportedModel, CorruptImage, DatasetMismatch
            For a module that cannot be captured and for images that cannot be used.
        """
        reader = BatchReader(image, self._device(), self.preprocess)
        image_gradient = isinstance(image, Tensor) and image.requires_grad and torch.is_grad_enabled()
        if image_gradient and self.preprocess is not None:
            raise ValueError(
                "the image requires a gradient and preprocess= is set: the gradient would be that of the "
                "preprocessed image; preprocess the image yourself, or detach it"
            )
        reserved = reserved_bytes(reader.device)
        program, plan = self._planned(
            reader.shape, reader.dtype, image_gradient=image_gradient, reserved=reserved
        )
        plan.validate()
        shrink = self._shrink(reader, reserved, image_gradient=image_gradient)
        run = Pass((program, plan), reader, self._states(), self, shrink)
        names = program.output_names
        if not plan.training:
            values = run.forward()
            outputs = tuple(values[name] for name in names)
        else:
            anchors = [run.states[name] for name in run.leaf_states]
            if image_gradient:
                assert isinstance(image, Tensor)
                anchors.append(image)
            outputs = Streamed.apply(run, *anchors)  # type: ignore[no-untyped-call]
        by_name = dict(zip(names, outputs, strict=True))
        return substitute(program.outputs, by_name.__getitem__)

    def _shrink(self, reader: BatchReader, reserved: int, *, image_gradient: bool) -> Shrink:
        """How the pass that begins now is planned again, whenever that is, if it is refused memory."""
        grad, casts = torch.is_grad_enabled(), autocast_state(reader.device)

        def shrink(plan: Plan) -> tuple[Program, Plan] | None:
            tile = _halved(plan.tile)
            if tile is None:
                return None
            with torch.set_grad_enabled(grad), autocast(reader.device, casts):
                planned = self._planned(
                    reader.shape,
                    reader.dtype,
                    image_gradient=image_gradient,
                    reserved=reserved,
                    tile=tile,
                )
            return planned if planned[1].fits else None

        return shrink


def _halved(tile: tuple[int, int]) -> tuple[int, int] | None:
    """Half of a tile, or None where that would be of no use."""
    height, width = tile
    smaller = (min(height, max(_SMALLEST_TILE, height // 2)), min(width, max(_SMALLEST_TILE, width // 2)))
    return None if smaller == tile else smaller


def _as_tile(tile: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if tile is None:
        return None
    edges = tuple(tile) if isinstance(tile, (tuple, list)) else (tile, tile)
    if len(edges) != 2 or any(not isinstance(e, int) or isinstance(e, bool) or e < 1 for e in edges):
        raise ValueError(
            f"tile={tile!r}: allowed are a positive whole number of pixels or a pair (h, w) of them"
        )
    return (edges[0], edges[1])


def _as_folder(spill: str | os.PathLike[str] | None) -> Path | None:
    if spill is None:
        return None
    folder = Path(spill)
    if not folder.is_dir():
        raise ValueError(f"spill={str(spill)!r} is no folder: create it, or pass None for the temporary one")
    return folder


def _settings(net: nn.Module) -> tuple[Any, ...]:
    """What a captured graph has taken in besides states: each module's class and plain attributes."""
    return tuple(
        (name, type(module), *(item for item in vars(module).items() if _is_plain(item[1])))
        for name, module in net.named_modules()
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _specs(states: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple((name, state.shape, state.dtype) for name, state in states.items())


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a plan is wanted for."""

    shape: tuple[int, int, int, int]
    trainable: frozenset[str]
    image_gradient: bool
    tile: tuple[int, int] | None
    reserved: int
    model: StreamingModel


def _find_plan(
    graph: RawGraph, states: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, wish: _Wish
) -> tuple[Program, Plan]:
    """Trace and plan, with and without a resident tail."""
    leaf_names = {name for name, qualified in graph.states.items() if qualified in wish.trainable}
    if wish.image_gradient:
        leaf_names.add(graph.image)
    request = PlanRequest(
        image_shape=wish.shape,
        dtype=str(dtype).removeprefix("torch."),
        leaves=frozenset(leaf_names),
        budget=wish.model.budget,
        tile=wish.tile,
        spill_home=Home.DISK if device.type == "cpu" else Home.HOST,
        reserved=wish.reserved,
        tail=wish.model._resident_tail,
    )

    def retrace(tail: str | None) -> Program:
        return trace(graph, states, dtype, device, tail=tail)

    def gradients(program: Program) -> frozenset[str]:
        return differentiated(program, request.leaves & program.nodes.keys())

    return make_plan(retrace, request, gradients)
