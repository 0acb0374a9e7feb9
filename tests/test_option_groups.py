"""Commands whose options are fields of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from streamcnn.cli.option_groups import with_option_groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a board."""

    rows: Annotated[int, typer.Option(help="Needed.")]
    columns: Annotated[int, typer.Option(min=1, help="From top to bottom.")] = 3


def test_the_fields_of_a_group_are_options_in_its_place() -> None:
    seen: list[tuple[str, Size, bool]] = []

    @with_option_groups
    def lay(
        name: Annotated[str, typer.Argument()],
        size: Size,
        wide: Annotated[bool, typer.Option("--wide")] = False,
    ) -> None:
        """Lay a board."""
        seen.append((name, size, wide))

    app = typer.Typer(rich_markup_mode=None)
    app.command()(lay)
    for arguments in (["a", "--rows=2", "--wide"], ["b", "--columns=5", "--rows=4"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == [("a", Size(rows=2), True), ("b", Size(rows=4, columns=5), False)]
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "Lay a board." in shown
    places = [shown.index(text) for text in ("--rows", "--columns", "[default: 3; x>=1]", "--wide")]
    assert places == sorted(places)


def test_what_is_wrong_with_a_field_is_told_as_of_any_option() -> None:
    @with_option_groups
    def lay(size: Size) -> None:
        raise AssertionError(size)

    app = typer.Typer(rich_markup_mode=None)
    app.command()(lay)
    for arguments, said in (([], "Missing option '--rows'"), (["--rows=1", "--columns=0"], "--columns")):
        found = CliRunner().invoke(app, arguments)
        assert found.exit_code == 2
        assert said in found.output
