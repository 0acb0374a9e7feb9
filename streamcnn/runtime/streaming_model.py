"""StreamingModel: the user's module, trained on whole images tile by tile.

It joins capture and planning with the executor under a ceiling. To the user's training loop it is the module
itself: it has the same parameters and ``state_dict`` keys, and an output whose ``backward()`` fills in the
same gradients.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from streamcnn.capture.capture import device_of
from streamcnn.capture.forward_pass import ForwardPass
from streamcnn.ceiling.cuda import record_idle_memory
from streamcnn.ceiling.kept_blocks import give_back
from streamcnn.data.reader import BatchReader, Image, Preprocess
from streamcnn.errors import UnsupportedModel
from streamcnn.execution.executor import Observer
from streamcnn.graph.fakes import TRACING, is_fake
from streamcnn.plan.plan import Plan
from streamcnn.plan.reading import NO_READING, BatchCost
from streamcnn.planning.spec import Machine
from streamcnn.runtime.arguments import Arguments
from streamcnn.runtime.given_image import as_shape, image_by_name, is_image, like_image, require_values
from streamcnn.runtime.module_facade import ModuleFacade
from streamcnn.runtime.options import OPTIONS, as_folder, as_preprocess, as_tile
from streamcnn.runtime.passes import ImageSpec, ModuleCall, Passes, wants_gradient
from streamcnn.runtime.plan_cache import Planned, module_dtype
from streamcnn.runtime.prediction import Key, MapWriter, Output, PredictionCalls, evaluating
from streamcnn.runtime.report import Report
from streamcnn.runtime.streamed_pass import Keep
from streamcnn.runtime.target_errors import explaining
from streamcnn.runtime.transforms import refuse_transforms
from streamcnn.runtime.with_loss import Loss, LossCalls
from streamcnn.stores import SpareFiles, SparePinned
from streamcnn.support.units import format_bytes, parse_bytes


class StreamingModel(ModuleFacade):
    """Run ``net`` on images of any size, exactly, under a memory ceiling.

    Parameters
    ----------
    net
        The module to stream. Its parameters and buffers stay its own; it is not changed.
    budget
        Bytes that forward and backward may take: an int or a text such as "11GB" (10^9) or "11GiB" (2^30).
        On the CPU they count above what the process holds when the pass begins; on a GPU they are all that
        the process holds there, with weights, optimiser and CUDA's own memory. ``None`` leaves other limits:
        a GPU's free memory, the process's own limits and those of its control groups.
    tile
        Largest edge of a tile in input pixels, one number or (h, w). ``None`` leaves it to the planner.
    spill
        Existing folder for stored maps that memory has no room for. Later passes reuse their files, which are
        removed by :meth:`release`, after a failed pass, and with the model. ``None`` takes the system's
        temporary folder, or ``/var/tmp`` where that lies in memory itself.
    preprocess
        A pointwise function from a tile (N, C, h, w) as stored to the float tile that the model takes. It is
        called with tiles on the model's device. Integers stay integers until it makes floats of them:
        ``tile / 255`` and ``tile.float() * 2 - 255`` are allowed, ``tile * 2 - 255`` of bytes is refused, as
        its results do not fit into bytes. ``tile / tile.max()``, a blur or random numbers are refused, as
        their results depend on the tiles.
    device
        Where to compute; the module is moved there. ``None`` leaves it where it is.
    compile
        Whether Inductor compiles the computation of tiles, as ``torch.compile`` does for whole modules. A
        plan's first pass runs uncompiled; the parts that it met are compiled before the second one, which may
        take minutes. Results are the same up to rounding. Parts that cannot be compiled run uncompiled, with
        a warning.

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

    _passes: Passes
    _call: ForwardPass
    _losses: LossCalls
    _predictions: PredictionCalls

    def __init__(
        self,
        net: nn.Module,
        budget: int | str | None = None,
        *,
        tile: int | tuple[int, int] | None = None,
        spill: str | os.PathLike[str] | None = None,
        preprocess: Preprocess | None = None,
        device: torch.device | str | None = None,
        compile: bool = False,
    ) -> None:
        self.budget = parse_bytes(budget)
        self.tile = as_tile(tile)
        self.spill = as_folder(spill)
        self.preprocess = as_preprocess(preprocess)
        self.compiles = compile
        self.last_report: Report | None = None
        self.observer: Observer | None = None
        """Called when a part of a pass begins and when it ends."""
        self.resident_tail = True
        """Whether the layers after the last large map may run on whole maps."""
        self._spare_files = SpareFiles()
        self.spare_pinned = SparePinned()
        """Host memory that passes on a GPU have left for the maps of the next one."""
        super().__init__(net)
        # Before the model is moved: once it is on a GPU, the GPU is not idle.
        record_idle_memory()
        if device is not None:
            self.to(device)

    def _stand_in_for(self, net: nn.Module) -> None:
        super()._stand_in_for(net)
        # A streamed loss's captured calls hold the net itself.
        self.__dict__.update(_no_captures())

    def __setattr__(self, name: str, value: Any) -> None:
        # Options may be set between passes, in the same forms as in the constructor.
        understood = OPTIONS.get(name)
        super().__setattr__(name, value if understood is None else understood(value))

    def __getstate__(self) -> dict[str, Any]:
        # Captured graphs hold operators, which cannot be copied; they are captured again when needed.
        # An observer belongs to whoever set it.
        emptied: dict[str, Any] = {
            "_spare_files": SpareFiles(),
            "spare_pinned": SparePinned(),
            **_no_captures(),
            "last_report": None,
            "observer": None,
        }
        return {**self.__dict__, **emptied}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the module or change its type, and likewise ``preprocess`` if that is a module."""
        if isinstance(self.preprocess, nn.Module):
            self.preprocess.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        if isinstance(self.preprocess, nn.Module):
            self.preprocess._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return super()._apply(*args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which cannot compile a streamed pass."""
        raise UnsupportedModel(
            "the model is given to torch.jit.script() or to a module that is: give it the module itself, "
            "which is model.net"
        )

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        budget = "None" if self.budget is None else format_bytes(self.budget)
        return f"budget={budget}, tile={self.tile}"

    # --- planning ------------------------------------------------------------------------------------

    def plan(
        self,
        shape: tuple[int, int, int, int] | Image,
        dtype: torch.dtype | None = None,
        *,
        inputs: Sequence[Any] = (),
        named_inputs: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan for an image of ``shape`` (N, C, H, W) in the present mode.

        Given the images themselves, as for the model itself, the plan also counts the bytes of reading them.

        A plan that does not fit the budget is returned all the same; see ``Plan.fits``. With gradients
        disabled it is a plan for inference. A model on the meta device is planned as on the CPU.

        Parameters
        ----------
        shape
            Shape of the image, or the images as for the model itself.
        dtype
            Element type of the image; ``None`` for that of the module's parameters, or of the given images.
        inputs, named_inputs
            The module's further arguments after the image, in order and by name.

        Raises
        ------
        UnsupportedModel
            If the module cannot be captured at this shape.
        DatasetMismatch
            If the images are no batch.
        """
        image = self._image_spec(shape, dtype)
        planned = self.planned(
            image.shape,
            image.dtype,
            image_gradient=image.requires_grad,
            inputs=inputs,
            named=named_inputs,
            reading=image.reading,
        )
        return planned.plan

    def plan_loss(
        self,
        image: tuple[int, int, int, int] | Image,
        target: Any,
        loss: Loss,
        **maps: Any,
    ) -> Plan:
        """The plan of a streamed loss; takes the arguments of :meth:`streamed_loss`, or an image's shape.

        Raises
        ------
        UnsupportedModel
            If the module or the loss cannot be captured at this shape.
        DatasetMismatch
            If the images are no batch.
        """
        module, forward_pass = self._losses.of(self.net, loss)
        device = self.computing_device()
        call = ModuleCall(module, forward_pass, Arguments.of((target, maps), {}, device))
        return self._passes.planned(self, call, self._image_spec(image), device, None).plan

    def _image_spec(
        self,
        image: tuple[int, int, int, int] | Image,
        dtype: torch.dtype | None = None,
    ) -> ImageSpec:
        """The spec of images, or of a shape."""
        if not is_image(image):
            return ImageSpec(as_shape(image), dtype or module_dtype(self.net), requires_grad=False)
        reader = BatchReader(image, self.computing_device(), self.preprocess)
        return ImageSpec(reader.shape, dtype or reader.dtype, wants_gradient(image), reader.reading)

    def plan_for(
        self,
        machine: Machine,
        shape: tuple[int, int, int, int],
        *,
        inputs: Sequence[Any] = (),
        named_inputs: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan for an image of ``shape`` (N, C, H, W) on another machine than this.

        Raises
        ------
        UnsupportedModel
            If the module cannot be captured at this shape.
        """
        planned = self.planned(
            shape,
            module_dtype(self.net),
            image_gradient=False,
            inputs=inputs,
            named=named_inputs,
            machine=machine,
        )
        return planned.plan

    def planned(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        *,
        image_gradient: bool,
        inputs: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
        machine: Machine | None = None,
        reading: BatchCost = NO_READING,
    ) -> Planned:
        """Capture a call and plan it; the call ends where the plan would be carried out.

        Parameters
        ----------
        shape, dtype
            Shape (N, C, H, W) and element type of the image.
        image_gradient
            Whether the image requires a gradient.
        inputs, named
            The module's further arguments after the image, in order and by name.
        machine
            The machine to plan for; ``None`` for this one.
        reading
            Cost of reading the image.

        Raises
        ------
        UnsupportedModel
            If the module cannot be captured at this shape.
        """
        device = self.computing_device()
        call = ModuleCall(self.net, self._call, Arguments.of(tuple(inputs), named or {}, device))
        image = ImageSpec(shape, dtype, image_gradient, reading)
        return self._passes.planned(self, call, image, device, machine)

    @property
    def calls_collectives(self) -> bool:
        """Whether the module calls ``torch.distributed`` itself, in a forward pass planned or run so far.

        Processes then wait for each other within a pass, and must make equally many passes.
        """
        return self._passes.call_collectives()

    def computing_device(self) -> torch.device:
        """The device of the module, to which images are brought and on which passes run."""
        # While another thread's pass is captured, stand-ins take the places of parameters.
        with TRACING:
            return device_of(self.net)

    def release(self) -> None:
        """Give back memory and files on disk that passes have kept for the next one.

        Memory of live tensors stays. Other models' passes on the CPU lose their kept memory too. A model that
        is collected does this by itself.
        """
        give_back()
        self._spare_files.close()
        self.spare_pinned.close()

    @property
    def spare_files(self) -> SpareFiles:
        """Files on the disk of ``spill`` that passes have left for the maps of the next one."""
        if self._spare_files.parent != self.spill:
            self._spare_files.close()
            self._spare_files = SpareFiles(self.spill)
        return self._spare_files

    # --- running -------------------------------------------------------------------------------------

    @_disable_dynamo
    def forward(self, image: Image | None = None, *args: Any, **kwargs: Any) -> Any:
        """The module's output for whole images: a tensor (N, C, H, W), a source, or a list of sources.

        The module's other arguments are passed along, by position or by name: tensors on its device, small
        ones and maps, with gradients, and anything else. A source, or a list of sources, is a map that is
        read by regions: (N, H, W) if it has one channel, else (N, C, H, W), and int64 if it holds integers.

        Raises
        ------
        PlanDoesNotFit
            Before the first allocation, if no plan stays within the budget or its maps find no room on disk.
        BudgetExceeded
            If an allocation is refused all the same.
        UnsupportedModel, CorruptImage, DatasetMismatch
            For a module that cannot be captured and for images that cannot be used.
        """
        if image is None:
            image, kwargs = image_by_name(self.net, kwargs)
        if is_fake(image):
            # Inside another model, which is being captured.
            return self.net(image, *args, **kwargs)
        return like_image(image, self._streamed(self.net, self._call, image, args, kwargs))

    @_disable_dynamo
    def streamed_loss(self, image: Image, target: Any, loss: Loss, **maps: Any) -> Tensor:
        """Compute ``loss(net(image), target, **maps)``, whose backward gives the whole image's gradients.

        The net's output is a map like any other here: it need not be whole at any time.

        Parameters
        ----------
        image
            As for the model itself.
        target
            A tensor on the model's device, a source, or a list of sources. Sources are read by regions: those
            of one channel as (N, H, W), others as (N, C, H, W), integers as int64.
        loss
            A function or module, such as ``torch.nn.functional.cross_entropy``, with options bound by
            ``functools.partial``. Calls with an equal loss share their captures.
        maps
            The loss's further arguments by name, such as weights of pixels: tensors and sources like
            ``target``.

        Raises
        ------
        PlanDoesNotFit, BudgetExceeded, UnsupportedModel, CorruptImage
            As from the model itself.
        DatasetMismatch
            If a mask read from a source does not fit the output, or holds a class that the output lacks.
        """
        module, forward_pass = self._losses.of(self.net, loss)
        with explaining(image, target):
            result: Tensor = self._streamed(module, forward_pass, image, (target, maps), {})
        return result

    @_disable_dynamo
    def predict_to(
        self,
        image: Image,
        path: str | os.PathLike[str],
        *,
        output: Output = "values",
        key: Key = None,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
        inputs: Sequence[Any] = (),
        named_inputs: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Path:
        """Write the map that the module returns for one image to a file, and return the file's path.

        The module runs in eval mode. The map goes to disk tile by tile, to a temporary place first (see
        ``spill``), and is never whole in memory. The file gets its name only when it is complete.

        Parameters
        ----------
        image
            As for the model itself, one image.
        path
            A folder ``.zarr`` for OME-Zarr 0.5 or a file ``.tif`` or ``.tiff`` for a tiled BigTIFF. If the
            image's source has a pixel size or GeoTIFF tags, the map gets them, for its own pixels.
        output
            ``"values"``: the map as it is; ``"classes"``: the index of the largest channel, or, of one
            channel, whether it is positive, as uint8 (uint16 if there are more than 256); ``"softmax"`` and
            ``"sigmoid"``: probabilities as uint8, 255 being 1.
        key
            Name or index of the result to write, of several.
        dtype
            Element type of ``"values"``: float32 or float16.
        overwrite
            Whether to replace a map of the same format at ``path``.
        inputs, named_inputs
            The module's further arguments after the image, in order and by name.
        class_names
            Names of the classes 0, 1, …, which OME-Zarr keeps as the attribute ``class_names``; TIFF has no
            place for them.

        Raises
        ------
        ValueError
            If the path's ending or an option is none of these.
        CannotWrite
            If something is at ``path`` already, or it cannot be written; nothing of it is left then.
        PlanDoesNotFit, BudgetExceeded, UnsupportedModel, CorruptImage, DatasetMismatch
            As from the model itself; also where the result is no map (1, C, H, W), or images are several.
        """
        place = Path(path)
        module, forward_pass = self._predictions.of(self.net, output, key, dtype)
        writer = MapWriter(place, image, overwrite=overwrite, class_names=class_names)
        given = (tuple(inputs), dict(named_inputs or {}))
        with evaluating(self.net):
            result = self._streamed(module, forward_pass, image, given, {}, writer.keep)
        return writer.finished(result)

    def _streamed(
        self,
        net: nn.Module,
        forward_pass: ForwardPass,
        image: Image,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep: Keep | None = None,
    ) -> Any:
        """The result of ``net``, the module or one that contains it, for whole images.

        With ``keep``, results that are maps stay stored, and the stand-ins that it returns replace them.
        """
        refuse_transforms()
        device = self.computing_device()
        require_values(device, image)
        reader = BatchReader(image, device, self.preprocess)
        call = ModuleCall(net, forward_pass, Arguments.of(args, kwargs, reader.device))
        return self._passes.run(self, call, image, reader, keep)


def _no_captures() -> dict[str, Any]:
    """The attributes of a model that hold captured calls and plans, without any."""
    return {
        "_passes": Passes(),
        "_call": ForwardPass(),
        "_losses": LossCalls(),
        "_predictions": PredictionCalls(),
    }
