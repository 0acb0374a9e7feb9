"""Commands about UltraMNIST sets: ``generate``, ``verify``, ``preview``."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from streamcnn.cli.arguments import FAILED, Json, exit_for_wrong_usage, parse
from streamcnn.cli.ending import keeping
from streamcnn.cli.images import progress_bar, verify_store
from streamcnn.support.text import as_text, printable
from streamcnn.support.units import format_bytes, format_duration, plural

app = typer.Typer(help="Make, check and look at UltraMNIST sets (arXiv 2206.12681).", no_args_is_help=True)

Store = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the tile store.")]


class RecipeName(enum.StrEnum):
    """The recipes; see docs/ultramnist.md."""

    BALANCED = "balanced"
    FAITHFUL = "faithful"
    SINGLE = "single"


@app.command()
def generate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the tile store.")],
    train: Annotated[int, typer.Option(min=0, help="Training images.")] = 28_000,
    test: Annotated[int, typer.Option(min=0, help="Test images.")] = 28_000,
    size: Annotated[int, typer.Option(min=64, help="Height and width of the images in pixels.")] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    recipe: Annotated[RecipeName, typer.Option(help="How digits are drawn.")] = RecipeName.BALANCED,
    digits: Annotated[
        str | None, typer.Option(help="Folder of MNIST's IDX files, mnist (downloads them), or uci.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one core each.")] = 1,
) -> None:
    """Write a set of images; started again, it goes on where it was stopped."""
    from streamcnn.data.tile_store import TileStore
    from streamcnn.data.ultramnist import Recipe, Spec, load_digits
    from streamcnn.data.ultramnist.generate import generate as write

    if not train + test:
        exit_for_wrong_usage("--train 0 and --test 0 are no images: give a number for one of them")
    console = Console()
    loaded = load_digits(digits)
    for note in loaded.notes:
        console.print(as_text(note), soft_wrap=True, highlight=False)
    spec = Spec(seed=seed, recipe=Recipe(recipe.value), size=size)
    started, first, stored, done = time.perf_counter(), None, 0, 0
    with keeping("finished images"), progress_bar(console, "images", train + test) as progress:
        for state in write(out, spec, loaded, num_train=train, num_test=test, workers=workers):
            first = state.done if first is None else first
            done, stored = state.done, state.stored_bytes
            progress.update(progress.task_ids[0], completed=done)
    made, seconds = done - (first or 0), time.perf_counter() - started
    there = TileStore(out)
    line = (
        f"{out}: {len(there.split('train'))} training and {len(there.split('test'))} test images of "
        f"{size}x{size} pixels, {made} of them made now in {format_duration(seconds)}"
    )
    line += f", {format_bytes(stored // made)} each on disk" if made else ""
    console.print(as_text(line), soft_wrap=True, highlight=False)


@app.command()
def verify(store: Store, as_json: Json = False) -> None:
    """Compare every file with its checksum and print counts and labels; exit status 1 if any differs."""
    if not verify_store(store, as_json=as_json):
        raise typer.Exit(FAILED)


@app.command()
def preview(
    store: Store,
    output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("preview.png"),
    split: Annotated[str, typer.Option(help="Split to take the images from.")] = "train",
    edge: Annotated[int, typer.Option(min=16, help="Edge of each image on the sheet, in pixels.")] = 320,
    boxes: Annotated[bool, typer.Option("--boxes", help="Mark the digits.")] = False,
) -> None:
    """Write a contact sheet with one image of each class."""
    from streamcnn.data.tile_store import TileStore
    from streamcnn.data.ultramnist.preview import require_picture, write_contact_sheet

    parse("--output", require_picture, output)
    count = write_contact_sheet(TileStore(store), output, split=split, edge=edge, boxes=boxes)
    typer.echo(printable(f"{output}: {plural(count, 'image')} of split {split}"))
