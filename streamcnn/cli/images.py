"""Commands about images: ``info`` and ``convert``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from streamcnn.cli.arguments import ChannelsLast, Json, Level, Series, choice_of, exit_for_wrong_usage
from streamcnn.cli.ending import keeping
from streamcnn.support.text import as_text, printable
from streamcnn.support.units import format_bytes, plural

if TYPE_CHECKING:
    from streamcnn.data.sources import ImageChoice, ImageSource
    from streamcnn.data.tile_store import TileStore

_TILE = 512
"""Height and width in pixels of the tile for which reading costs are stated."""
_FOLDERS = 10
"""Largest number of folders that are listed."""


def info(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="An image, its URL, or a folder of images or of a tile store."),
    ],
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
    as_json: Json = False,
) -> None:
    """Print what an image, a folder of images or a tile store is, without reading pixels.

    Of an image that is all its series and levels, and which of them is taken.
    """
    from streamcnn.data.file_dataset import refuse_choice
    from streamcnn.data.sources import is_image
    from streamcnn.data.sources.places import place
    from streamcnn.data.tile_store import TileStore, is_tile_store

    where, choice = place(path), choice_of(series, level, channels_last)
    if is_tile_store(where):
        refuse_choice(where, choice)
        facts = store_facts(TileStore(where))
    elif isinstance(where, Path) and where.is_dir() and not is_image(where):
        facts = _folder_facts(where, choice)
    else:
        facts = image_facts(where, choice)
    _print_facts(facts, as_json=as_json)


def convert(
    sources: Annotated[list[Path], typer.Argument(metavar="SRC", help="Images, or folders of them.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the tile store.")],
    labels: Annotated[
        Path | None, typer.Option(help="CSV with the columns image, label and, if wanted, split.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of images of which the CSV says none; default: what they have in OUT, or train."
        ),
    ] = None,
    series: Series = None,
    level: Level = None,
    channels_last: ChannelsLast = None,
) -> None:
    """Write images of any format into a tile store, or add them to one."""
    from streamcnn.data.convert import convert as write
    from streamcnn.data.image_files import find_images

    if split is not None and not split.strip():
        exit_for_wrong_usage(f"--split: {split!r} is blank: give a name, such as train or test")
    console = Console()
    found = find_images(sources, series)
    with keeping("finished images"), progress_bar(console, "images", len(found)) as progress:
        present = progress.add_task("pixels of the present one", total=None)

        def on_shard(done: int, total: int) -> None:
            progress.update(present, completed=done, total=total)

        records = write(
            found,
            out,
            labels=labels,
            split=split,
            choice=choice_of(series, level, channels_last),
            on_shard=on_shard,
        )
        num_left = len(found)
        for record in records:
            num_left -= 1
            progress.advance(progress.task_ids[0])
            line = f"{record.name}: {_by(record.shape)} {record.dtype}, {format_bytes(record.stored_bytes)}"
            progress.console.print(as_text(line), soft_wrap=True, highlight=False)
    if num_left:
        typer.echo(f"{plural(num_left, 'image')} already in the store")


def store_facts(store: TileStore) -> dict[str, Any]:
    """Facts about a tile store: counts, balance of the labels, sizes, codec and compression ratio."""
    splits = sorted({record.split for record in store.records})
    stored = sum(record.stored_bytes for record in store.records)
    pixels = sum(record.pixel_bytes for record in store.records)
    facts: dict[str, Any] = {
        "kind": store.head.kind,
        **store.head.provenance,
        "images": {split: len(store.split(split)) for split in splits},
        "labels": {split: _balance(store.label_counts(split)) for split in splits},
        "classes": None if store.head.classes is None else list(store.head.classes),
        "shapes": sorted({_by(record.shape) for record in store.records}),
        "dtypes": sorted({record.dtype for record in store.records}),
        "codec": _codec(store),
        "pixel_bytes": pixels,
        "stored_bytes": stored,
        "ratio": round(pixels / stored, 1) if stored else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def verify_store(path: Path, *, as_json: bool) -> bool:
    """Compare a store with its manifest, print its facts, and return whether everything is as written."""
    from streamcnn.data.tile_store import TileStore

    store = TileStore(path)
    errors = {}
    with progress_bar(Console(stderr=True), "images", len(store)) as progress:
        for record, error in store.verify():
            progress.advance(progress.task_ids[0])
            if error is not None:
                errors[record.name] = str(error)
    for message in errors.values():
        typer.echo(printable(f"streamcnn: error: {message}", keep="\n"), err=True)
    _print_facts({**store_facts(store), "damaged": len(errors)}, as_json=as_json)
    return not errors


def _codec(store: TileStore) -> str | None:
    from streamcnn.errors import CorruptImage

    try:
        return store.codec()
    except CorruptImage as error:
        return f"unknown ({error})"


@contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Progress]:
    """A progress bar with the time left on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        progress.add_task(what, total=total)
        yield progress


def image_facts(path: Path | str, choice: ImageChoice) -> dict[str, Any]:
    """Facts about an image, as JSON types."""
    from streamcnn.data.sources import ZarrSource, largest_of, open_chosen
    from streamcnn.data.sources.listing import series_of
    from streamcnn.data.sources.series import taken_of

    source = open_chosen(path, choice)
    facts: dict[str, Any] = {"shape": source.shape, "dtype": str(source.dtype).removeprefix("torch.")}
    if source.largest != largest_of(source.dtype):
        facts["largest"] = source.largest
    listed = series_of(path, source)
    if listed:
        taken = taken_of(listed, choice.series)
        for each in listed:
            facts[f"series {each.number}"] = {
                **({"name": each.name} if each.name else {}),
                "levels": [_by(size) for size in each.levels],
                "opened": "yes" if each is taken else "no",
            }
        facts["taken"] = {"series": taken.number, "level": choice.level}
    if isinstance(source, ZarrSource):
        facts["chunks"] = source.chunks
    facts |= _reading_facts(source)
    return facts


def _reading_facts(source: ImageSource) -> dict[str, Any]:
    """How an image is stored, and the cost of reading its pixels."""
    channels, height, width = source.shape
    takes = source.reading_bytes((min(_TILE, height), min(_TILE, width)))
    return {
        "stored_as": source.pieces,
        "pixel_bytes": channels * height * width * source.dtype.itemsize,
        "held_bytes": takes.held,
        "tile_bytes": takes.transient,
    }


def _folder_facts(folder: Path, choice: ImageChoice) -> dict[str, Any]:
    """Facts about a folder: the number of images of each kind, and the path of the first."""
    from streamcnn.data.image_files import find_images

    found = find_images([folder], choice.series)
    endings = Counter(Path(image.relative).suffix.lower() or "none" for image in found)
    folders = sorted({image.relative.rpartition("/")[0] or "." for image in found})
    return {
        "kind": "folder of images",
        "images": len(found),
        "endings": dict(sorted(endings.items())),
        "folders": folders if len(folders) <= _FOLDERS else [*folders[:_FOLDERS], "..."],
        "first": found[0].relative,
    }


def _balance(counts: Counter[int | None]) -> str:
    """The numbers of images per label, as short text."""
    unlabelled = counts[None]
    labelled = {label: count for label, count in counts.items() if label is not None}
    if not labelled:
        return "none"
    fewest, most = min(labelled.values()), max(labelled.values())
    each = plural(most, "image") if fewest == most else f"{fewest} to {plural(most, 'image')}"
    text = f"{plural(len(labelled), 'label')}, {each} each"
    return f"{text}, {unlabelled} without" if unlabelled else text


def _print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        if name == "classes":
            # With their numbers, since names may have commas in them.
            value = dict(enumerate(value))
        typer.echo(printable(f"{name:{width}}  {_text(name, value)}"))


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_text(str(key), item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, tuple):
        return _by(value)
    return format_bytes(value) if name.endswith("_bytes") else str(value)


def _by(extents: tuple[int, ...]) -> str:
    return " x ".join(map(str, extents))
