"""Numbers and sizes of the digits in generated UltraMNIST layouts, as a Markdown table of both recipes.

    python -m benchmarks.ultramnist_layouts --images 4200

No pixels are drawn, and the figures depend on the arguments alone, so nothing about the machine is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean, median
from typing import Annotated

import typer

from streamcnn.data.ultramnist import Layout, Recipe, Spec, make_layout

app = typer.Typer(add_completion=False)


@app.command()
def main(
    images: Annotated[int, typer.Option(help="Layouts of each recipe.")] = 4200,
    size: Annotated[int, typer.Option(help="Height and width of the canvas.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed of the sets.")] = 0,
) -> None:
    """Print the table."""
    columns = [
        dict(figures([make_layout(Spec(seed, recipe, size), "train", index) for index in range(images)]))
        for recipe in Recipe
    ]
    print("| | " + " | ".join(recipe.value for recipe in Recipe) + " |\n|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


def figures(layouts: list[Layout]) -> Iterator[tuple[str, str]]:
    """The name and value of each row of the table."""
    for count in (3, 4, 5):
        yield f"images with {count} digits", percent([len(layout.digits) == count for layout in layouts])
    smallest = [min(digit.side for digit in layout.digits) for layout in layouts]
    for largest in (14, 28, 56):
        yield f"smallest digit at most {largest} px", percent([side <= largest for side in smallest])
    digits = [digit for layout in layouts for digit in layout.digits]
    sides = [digit.side for digit in digits]
    yield "digits over 1000 px", percent([side > 1000 for side in sides])
    yield "digits over 2000 px", percent([side > 2000 for side in sides])
    yield "median side, px", f"{median(sides):.0f}"
    yield "mean side, px", f"{fmean(sides):.0f}"
    for value in range(10):
        yield (
            f"mean side of {value}, px",
            f"{fmean(digit.side for digit in digits if digit.value == value):.0f}",
        )


def percent(flags: list[bool]) -> str:
    """The percentage of flags that are set."""
    return f"{100 * fmean(flags):.1f} %"


if __name__ == "__main__":
    app()
