"""Commands that explain a trained classifier's scores: ``explain``, and ``view`` for its pages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from streamcnn.cli.arguments import (
    Budget,
    ChannelsLast,
    Device,
    Inputs,
    Level,
    OtherPixels,
    Series,
    choice_of,
    exit_for_wrong_usage,
    parse,
)
from streamcnn.cli.classifying import open_images
from streamcnn.cli.trained import Run, Trust, columns_of, load_trained
from streamcnn.support.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from streamcnn import StreamingModel
    from streamcnn.attribution.explanation import Facts
    from streamcnn.attribution.methods import Method, Request
    from streamcnn.attribution.survey import Survey
    from streamcnn.data.sources import ImageChoice, ImageSource
    from streamcnn.plan.plan import Plan
    from streamcnn.training import TrainedRun

_MOST_SHOWN = 5
"""Largest number of classes whose probabilities the page shows."""


class MethodName(StrEnum):
    """Ways to explain a score."""

    grad_cam = "grad-cam"
    grad_cam_plus_plus = "grad-cam++"
    gradient = "gradient"
    input_x_gradient = "input-x-gradient"
    smoothgrad = "smoothgrad"
    integrated_gradients = "integrated-gradients"


def explain(
    run: Run,
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="An image, or a CSV file that names one and its inputs.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page, pictures and numbers; a new one.")],
    method: Annotated[MethodName, typer.Option(help="How to explain the score.")] = MethodName.grad_cam,
    layer: Annotated[
        str | None, typer.Option(help="Of grad-cam and grad-cam++; default: the last that returns a map.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Name or number; default: the one that is predicted.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Of smoothgrad: noisy images; default: 10.")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(min=0, help="Of smoothgrad: standard deviation; pixels are from -1 to 1; default: 0.3."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of integrated-gradients: gradients to compute; default: 50.")
    ] = None,
    colours: Annotated[str | None, typer.Option(metavar="NAME", help="A colour map of matplotlib.")] = None,
    inputs: Inputs = None,
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
    budget: Budget = None,
    device: Device = None,
    trust: Trust = None,
    other_pixels: OtherPixels = False,
) -> None:
    """Show which parts of an image a class's score depends on, at full resolution."""
    from streamcnn.attribution.explanation import require_new
    from streamcnn.attribution.heat_map import colour_table
    from streamcnn.attribution.methods import METHODS, Request

    chosen = METHODS[method.value]
    if layer is not None and not chosen.of_layer:
        exit_for_wrong_usage(f"--layer: {method.value} explains by pixels: leave it out, or take grad-cam")
    options = _options_given(method.value, chosen.options, samples=samples, noise=noise, steps=steps)
    require_new(out)
    parse("--colours", partial(colour_table, is_signed=chosen.is_signed), colours)
    trained = load_trained(run, budget, device, trust)
    _require_classifier(run, trained)
    columns = columns_of(trained, inputs)
    choice = choice_of(series, level, channels_last, otherwise=trained.choice)
    subject = _one_image(image, columns, choice, trained.config.device)
    if not other_pixels:
        trained.require_as_trained(subject.source, subject.name)
    from streamcnn.attribution.explanation import write_explanation
    from streamcnn.attribution.survey import survey_of

    found = survey_of(trained.model, [subject.source], subject.further)
    names = _class_names(found, trained)
    label = None if target is None else parse("--target", partial(_label_of, names=names), target)
    if chosen.of_layer:
        layer = found.last_map if layer is None else layer
        parse("--layer", found.map_shape, layer)
    console = Console(stderr=True)
    with console.status("predicting"):
        probabilities, plan = _prediction(trained.model, subject)
    label = probabilities.index(max(probabilities)) if label is None else label
    asked = {"target": label, "further": subject.further, "layer": layer, **options}
    request = Request(model=trained.model, image=[subject.source], **asked)
    with console.status(f"computing {method.value} of {names[label]}"):
        attribution, seconds = _timed(chosen, request)
    facts = _facts(trained, subject, method, request, (probabilities, plan), seconds)
    with console.status(f"writing {out}"):
        write_explanation(
            out, subject.source, attribution, facts, is_signed=chosen.is_signed, colours=colours
        )
    predicted, share = facts.predictions[0]
    typer.echo(printable(f"{subject.name}: {predicted}, {share:.1%}; {method.value} of {names[label]}"))
    typer.echo(printable(f"page: {out / 'index.html'}"))


def view(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that explain wrote.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of this machine; 0: any that is free.")] = 8000,
) -> None:
    """Serve the page of an explanation to browsers on this machine, until Ctrl-C."""
    if not (folder / "index.html").is_file():
        exit_for_wrong_usage(f"FOLDER: {folder} has no index.html: give a folder that explain wrote")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Quiet, directory=str(folder)))
    except OSError as error:
        exit_for_wrong_usage(f"--port: {port} cannot be used: {error.strerror}; give another, or 0 for any")
    with server:
        typer.echo(f"http://127.0.0.1:{server.server_port}/  (Ctrl-C ends)")
        server.serve_forever()


class _Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a folder and prints nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a page requests hundreds of tiles."""


def _options_given(method: str, allowed: Sequence[str], **options: float | None) -> dict[str, Any]:
    """The methods' options that are given; ends the command if this method does not take one of them."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in allowed:
            taken = " and ".join(f"--{each}" for each in allowed) or "neither samples, noise nor steps"
            exit_for_wrong_usage(f"--{name}: {method} takes {taken}: leave it out, or take another method")
    return given


def _require_classifier(run: Path, trained: TrainedRun) -> None:
    """End the command if the run is not a classifier's."""
    if trained.config.task != "classification":
        exit_for_wrong_usage(
            f"RUN: {run} is of the task {trained.config.task}: allowed are classifiers, whose scores have an "
            "explanation; `streamcnn predict --output` writes maps of classes"
        )


@dataclass(frozen=True, slots=True)
class _Subject:
    """The image to explain."""

    name: str
    source: ImageSource
    further: tuple[Tensor, ...]
    """Its further inputs as a batch of one, on the model's device."""


def _one_image(path: Path, columns: tuple[str, ...], choice: ImageChoice, device: str) -> _Subject:
    """Open the only image at a path; ends the command if there are several."""
    found = list(islice(open_images([path], columns, choice), 2))
    if len(found) != 1:
        what = "no image" if not found else "several images"
        exit_for_wrong_usage(f"IMAGE: {path} holds {what}: allowed is one")
    name, source, *numbers = found[0]
    return _Subject(str(name), source, tuple(each[None].to(device) for each in numbers))


def _class_names(found: Survey, trained: TrainedRun) -> list[str]:
    """The names of the classes that the model's scores are for, in order."""
    from streamcnn.attribution.scores import require_target

    require_target(found.output, 0)
    return [trained.class_name(label) for label in range(found.output.shape[1])]


def _timed(method: Method, request: Request) -> tuple[Tensor, float]:
    """An attribution, and the seconds that it took."""
    began = time.perf_counter()
    attribution = method.run(request)
    return attribution, time.perf_counter() - began


def _facts(
    trained: TrainedRun,
    subject: _Subject,
    method: MethodName,
    request: Request,
    prediction: tuple[list[float], Plan],
    seconds: float,
) -> Facts:
    """The facts about an explanation, for its files and its page."""
    from streamcnn.attribution.explanation import Facts, tile_borders
    from streamcnn.attribution.methods import METHODS

    probabilities, plan = prediction
    assert isinstance(request.target, int)
    likely = sorted(range(len(probabilities)), key=lambda each: -probabilities[each])[:_MOST_SHOWN]
    rows, cols = tile_borders(plan)
    return Facts(
        image=subject.name,
        shape=subject.source.shape,
        model=trained.config.model,
        method=method.value,
        layer=request.layer,
        target=request.target,
        target_name=trained.class_name(request.target),
        predictions=[(trained.class_name(each), probabilities[each]) for each in likely],
        tile_rows=rows,
        tile_cols=cols,
        options={name: getattr(request, name) for name in METHODS[method.value].options},
        seconds=seconds,
        budget=trained.model.budget,
    )


def _label_of(text: str, names: Sequence[str]) -> int:
    """The number of a class, given its name or number.

    Raises
    ------
    ValueError
        If there is no such class.
    """
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(names):
        return int(text)
    from streamcnn.errors import some

    raise ValueError(f"no class {text!r}: allowed are {some(names)}, and numbers up to {len(names) - 1}")


def _prediction(model: StreamingModel, subject: _Subject) -> tuple[list[float], Plan]:
    """The probabilities of the classes, and the plan of the pass that computed them."""
    import torch

    from streamcnn.training.evaluation import require_finite_logits
    from streamcnn.training.naming import naming

    with torch.no_grad(), naming("prediction", [0], [subject.name]):
        logits = model([subject.source], *subject.further)
        plan = model.plan([subject.source], inputs=subject.further)
    require_finite_logits(logits, [0], [subject.name])
    return logits[0].double().softmax(0).tolist(), plan
