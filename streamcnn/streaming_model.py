"""StreamingModel: the user's module, trained on whole images tile by tile.

It joins the two halves: capture and planning on one side, the executor under a ceiling on the other. To
the user's training loop it is the module itself: same parameters, same ``state_dict`` keys, and an output
whose ``backward()`` fills the same gradients.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamcnn.capture import RawGraph, capture
from streamcnn.ceiling.cpu import Baseline, DataLimit, is_out_of_memory
from streamcnn.data.reader import BatchReader, Image, Preprocess
from streamcnn.errors import BudgetExceeded
from streamcnn.executor import Execution
from streamcnn.plan import Home, Plan
from streamcnn.planner import PlanRequest, make_plan
from streamcnn.program import Program, differentiated, substitute
from streamcnn.report import Report
from streamcnn.stores import MemoryStore, SpillFolder, Store, StoreSpec, ZarrStore
from streamcnn.tracing import trace
from streamcnn.units import format_bytes, parse_bytes

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
        Bytes that forward and backward may take above what the process holds when they begin: an int or
        a text such as "11GB" (10^9) or "11GiB" (2^30). ``None`` sets no ceiling.
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
        self._resident_tail = True
        self._graphs: OrderedDict[Any, RawGraph] = OrderedDict()
        self._plans: OrderedDict[Any, tuple[Program, Plan]] = OrderedDict()
        self.training = net.training
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
        return {**self.__dict__, "_graphs": OrderedDict(), "_plans": OrderedDict(), "last_report": None}

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
        return self._planned(shape, dtype or self._dtype(), image_gradient=False)[1]

    def _planned(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, *, image_gradient: bool
    ) -> tuple[Program, Plan]:
        states = self._states()
        trainable = frozenset(name for name, state in states.items() if state.requires_grad)
        wanted = trainable if torch.is_grad_enabled() else frozenset()
        device = self._device()
        casts = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        settings = (device, _settings(self.net), _specs(states))
        key = (shape, dtype, settings, casts, wanted, image_gradient, self.budget, self.tile)
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        # Casts are left out of the capture, so it must be at a type that the module takes without them.
        graph = self._captured(shape, dtype if casts is None else self._dtype(), settings)
        found = _find_plan(graph, states, dtype, device, _Wish(shape, wanted, image_gradient, self))
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
        program, plan = self._planned(reader.shape, reader.dtype, image_gradient=image_gradient)
        plan.validate()
        run = _Run(self, program, plan, reader)
        names = program.output_names
        if not plan.training:
            values = run.forward()
            outputs = tuple(values[name] for name in names)
        else:
            anchors = [run.states[name] for name in run.leaf_states]
            if image_gradient:
                assert isinstance(image, Tensor)
                anchors.append(image)
            outputs = _Streamed.apply(run, *anchors)  # type: ignore[no-untyped-call]
        by_name = dict(zip(names, outputs, strict=True))
        return substitute(program.outputs, by_name.__getitem__)


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
        tile=wish.model.tile,
        spill_home=Home.DISK if device.type == "cpu" else Home.HOST,
        tail=wish.model._resident_tail,
    )

    def retrace(tail: str | None) -> Program:
        return trace(graph, states, dtype, device, tail=tail)

    def gradients(program: Program) -> frozenset[str]:
        return differentiated(program, request.leaves & program.nodes.keys())

    return make_plan(retrace, request, gradients)


class _Run:
    """One pass: an execution under its ceiling, and the report of both directions."""

    def __init__(self, model: StreamingModel, program: Program, plan: Plan, reader: BatchReader) -> None:
        self.model = model
        self.program = program
        self.plan = plan
        known = model._states()
        self.states = {name: known[qualified] for name, qualified in program.states.items()}
        self.states.update({name: c.to(reader.device) for name, c in program.constants.items()})
        self.leaf_states = tuple(name for name in program.states if name in plan.differentiated)
        self.on_cpu = reader.device.type == "cpu"
        self.baseline = Baseline.now()
        self.seconds = 0.0
        self.peak: int | None = None
        self.stores = _Stores(model.spill, reader.device)
        self.execution = Execution(program, plan, self.states, reader, self.stores.open)

    def forward(self) -> dict[str, Any]:
        """Run forward and, if that succeeds, give the module's buffers their new values."""
        with self._ceiling("forward"), _random_state_kept(self.execution.device):
            values = self.execution.forward()
        buffers = self.model._states()
        with torch.no_grad():
            for qualified, name in self.program.updates.items():
                buffers[qualified].copy_(values[name])
        if not self.plan.training:
            self.close()
        return values

    def backward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by node name of the parameters and the image."""
        try:
            with self._ceiling("backward"):
                return self.execution.backward(gradients)
        finally:
            self.close()

    def recomputed_from(self) -> list[Tensor]:
        """States without a gradient that the backward pass reads once more."""
        read = {
            operand
            for phase in self.plan.phases
            if phase.differentiated
            for name in phase.nodes
            for operand in self.program.nodes[name].operands
        }
        return [self.states[n] for n in self.program.states if n in read and n not in self.leaf_states]

    def close(self) -> None:
        """Free all stores and their folder."""
        self.execution.close()
        self.stores.close()

    @contextmanager
    def _ceiling(self, direction: str) -> Iterator[None]:
        """Enforce the budget, measure, and name the budget in an out-of-memory error."""
        start = time.perf_counter()
        budget = self.plan.budget if self.on_cpu else None
        limit = DataLimit(budget, baseline=self.baseline, reuse_heap=self.plan.reuses_heap)
        try:
            with limit:
                yield
        except BaseException as error:
            self.close()
            plan = self.plan
            if plan.budget is not None and is_out_of_memory(error):
                raise BudgetExceeded(
                    f"an allocation in the {direction} pass was refused: budget {format_bytes(plan.budget)}, "
                    f"projected {format_bytes(plan.projected_bytes)} with tiles of "
                    f"{plan.tile[0]}x{plan.tile[1]} pixels. Nothing was changed; raise budget= or set a "
                    "smaller tile="
                ) from error
            raise
        finally:
            self.seconds += time.perf_counter() - start
        self._note(limit)

    def _note(self, limit: DataLimit) -> None:
        if self.on_cpu and limit.peak_bytes is not None:
            self.peak = max(self.peak or 0, limit.peak_bytes)
        self.model.last_report = Report(
            budget=self.plan.budget,
            projected_bytes=self.plan.projected_bytes,
            measured_bytes=self.peak,
            reading=limit.reading if self.on_cpu else "unknown",
            seconds=self.seconds,
            phases=tuple(self.execution.reports),
        )


class _Stores:
    """Opens the stores of one pass. It does not know the pass, so that dropping that frees them at once."""

    def __init__(self, spill: Path | None, device: torch.device) -> None:
        self._parent = spill
        self._device = device
        self._folder: SpillFolder | None = None

    def open(self, spec: StoreSpec, home: Home, tile: tuple[int, int]) -> Store:
        """An empty store in ``home``."""
        if home is Home.DISK:
            self._folder = self._folder or SpillFolder(self._parent)
            return ZarrStore(spec, self._folder.new_folder(), tile, self._device)
        return MemoryStore(spec, torch.device("cpu") if home is Home.HOST else self._device, self._device)

    def close(self) -> None:
        """Remove the folder on disk, if there is one."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the random state back if the pass fails."""
    state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)
        raise


class _Streamed(torch.autograd.Function):
    """A streamed pass as one node of the user's autograd graph."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *anchors: Tensor) -> tuple[Tensor, ...]:
        values = run.forward()
        names = run.program.output_names
        # Saved only so that autograd notices a state or the image being changed before backward.
        ctx.save_for_backward(*anchors, *run.recomputed_from())
        ctx.run = run
        # Aliases: the run keeps its values, and autograd makes an output keep the run.
        outputs = {name: values[name].detach() for name in names}
        ctx.mark_non_differentiable(*(outputs[n] for n in names if n not in run.plan.differentiated))
        ctx.set_materialize_grads(False)
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run | None = ctx.run
        if run is None:
            raise RuntimeError(
                "this streamed output has been differentiated already and its stores are freed: "
                "run the forward pass again for another backward()"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a streamed pass can only be differentiated once: call backward() or grad() without "
                "create_graph=True"
            )
        ctx.run = None
        _ = ctx.saved_tensors
        arriving = {n: g for n, g in zip(run.program.output_names, grads, strict=True) if g is not None}
        found = run.backward(arriving)
        image = (run.program.image,) if run.program.image in run.plan.differentiated else ()
        return None, *(found.get(name) for name in (*run.leaf_states, *image))
