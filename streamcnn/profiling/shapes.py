"""Drawings as plain data: shapes in pixels, y downwards; drawn as SVG here, and as PNG in `figures`."""

from __future__ import annotations

from dataclasses import dataclass

from streamcnn.support.text import html_text as escape

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; its position is that of its upper left corner."""

    x: float
    y: float
    width: float
    height: float
    fill: str = "none"
    stroke: str = "none"

    def to_svg(self) -> str:
        """The shape as an SVG element."""
        return (
            f'<rect x="{self.x:.1f}" y="{self.y:.1f}" width="{self.width:.1f}" height="{self.height:.1f}" '
            f'fill="{self.fill}" stroke="{self.stroke}"/>'
        )


@dataclass(frozen=True, slots=True)
class Lines:
    """Straight strokes of one colour, each from one point to another."""

    strokes: tuple[tuple[Point, Point], ...]
    color: str
    width: float = 1.0

    def to_svg(self) -> str:
        """The shape as an SVG element."""
        path = "".join(f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" for (x0, y0), (x1, y1) in self.strokes)
        return f'<path d="{path}" fill="none" stroke="{self.color}" stroke-width="{self.width}"/>'


@dataclass(frozen=True, slots=True)
class Arc:
    """A curve that hangs between two points of the same height, with an arrow head at its end."""

    start: Point
    stop: Point
    sag: float
    """Distance of the curve's handles below its end points."""
    color: str

    def handles(self) -> tuple[Point, Point, Point, Point]:
        """The cubic Bézier curve's points."""
        (x0, y0), (x1, y1) = self.start, self.stop
        return (x0, y0), (x0, y0 + self.sag), (x1, y1 + self.sag), (x1, y1)

    def head(self) -> tuple[Point, Point, Point]:
        """The arrow head's corners, its tip first."""
        x, y = self.stop
        return (x, y - 3), (x - 3, y + 3), (x + 3, y + 3)

    def to_svg(self) -> str:
        """The shape as SVG elements."""
        a, b, c, d = (f"{x:.1f} {y:.1f}" for x, y in self.handles())
        tip, left, right = (f"{x:.1f} {y:.1f}" for x, y in self.head())
        return (
            f'<path d="M{a}C{b} {c} {d}" fill="none" stroke="{self.color}" stroke-width="1.3"/>'
            f'<path d="M{tip}L{left}L{right}z" fill="{self.color}"/>'
        )


@dataclass(frozen=True, slots=True)
class Label:
    """Text; its position is that of the baseline at the left end or, if centred, in the middle."""

    x: float
    y: float
    text: str
    color: str = "#1c2430"
    size: float = 11.0
    bold: bool = False
    centred: bool = True

    def to_svg(self) -> str:
        """The shape as an SVG element."""
        anchor = "middle" if self.centred else "start"
        weight = ' font-weight="600"' if self.bold else ""
        return (
            f'<text x="{self.x:.1f}" y="{self.y:.1f}" text-anchor="{anchor}" font-size="{self.size}"'
            f'{weight} fill="{self.color}">{escape(self.text)}</text>'
        )


Shape = Box | Lines | Arc | Label


@dataclass(frozen=True, slots=True)
class Group:
    """Shapes that belong together; the first one is highlighted when the pointer is on the group."""

    shapes: tuple[Shape, ...]
    info: str = ""
    """The text that is shown when the pointer is on the group."""

    def to_svg(self) -> str:
        """The shapes as an SVG element, which has keyboard focus if there is a text."""
        inside = "".join(shape.to_svg() for shape in self.shapes)
        said = escape(self.info)
        about = f' class="column" tabindex="0" role="img" aria-label="{said}" data-info="{said}"'
        return f"<g{about if said else ''}>{inside}</g>"


@dataclass(frozen=True, slots=True)
class Drawing:
    """Groups of shapes; later ones are drawn over earlier ones."""

    width: float
    height: float
    groups: tuple[Group, ...]

    def to_svg(self, label: str) -> str:
        """The drawing as an ``<svg>`` element of its size in pixels, ``label`` for a screen reader."""
        size = f'width="{self.width:.0f}" height="{self.height:.0f}"'
        inside = "\n".join(group.to_svg() for group in self.groups)
        box = f"0 0 {self.width:.0f} {self.height:.0f}"
        return f'<svg {size} viewBox="{box}" role="group" aria-label="{escape(label)}">\n{inside}\n</svg>'
