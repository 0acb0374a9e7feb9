"""What was found as a page of Markdown: totals, what is held back and why, a table for every library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from benchmarks.zoo.numerics import ROUNDING, TOLERANCE
from benchmarks.zoo.planned import BUDGET
from benchmarks.zoo.results import EXACT, EXCLUDED, VERDICTS, WITH_RESIDENTS, Row
from benchmarks.zoo.traits import FEWEST_CONVOLUTIONS
from streamcnn.support.units import format_bytes, format_duration, parse_bytes, plural

LIBRARIES = {
    "timm": "timm, a model for each module file",
    "torchvision": "torchvision, a model for each module file",
    "smp": "segmentation-models-pytorch, a decoder with an encoder",
}
_KINDS = {"convolutional": False, "hybrid": True}
_MOST_REASONS = 25
_WIDTH = 200
"""Characters of a cell."""
_COLUMNS = (
    ("model", ""),
    ("kind", ""),
    ("checked at", ""),
    ("verdict", ""),
    ("error", "r"),
    ("heavy streamed", "r"),
    ("planned at", ""),
    ("fits", ""),
    ("streamed", "r"),
    ("plain", "r"),
    ("time", "r"),
    ("resident, or why not", ""),
)

_HEAD = f"""# Models of other libraries

This page says which models of timm, torchvision (classifiers and segmentation models) and
segmentation-models-pytorch stream exactly, and what a training step with each is planned to take.
`python -m benchmarks zoo` examines one model of every family, with random weights;
`--table` writes this page.

**Which models.** Programs make the list: the variant with the fewest parameters of each module file, and a
few encoders for each decoder (`benchmarks/zoo/families.py`). Excluded are models with fewer than
{FEWEST_CONVOLUTIONS} convolutions besides the first (transformers and MLPs on patches), and those that plain
PyTorch runs at no size that was tried. Each model has a process of its own and a line in
`benchmarks/results/zoo.jsonl`; a model that has one is left out the next time. `--only timm/res` chooses,
`--fresh` begins anew, `--jobs 2` examines two at a time.

**Are the gradients right?** Every model is made in float64, for two images of the first size that plain
PyTorch takes: odd, a multiple of 32 and one, multiples of 32, square sizes. A forward and a backward pass,
streamed in four tiles, is compared with the plain one in train mode and in evaluation mode: outputs, the
gradients of all parameters and of the image, and all buffers afterwards. Layers that drop values at random
are set to drop none. Scales and shifts that begin at 0 or 1 are moved, so that no branch is switched off.

* **{EXACT}**: no error is above {TOLERANCE:.0e}, and every operator on a map streams.
* **{WITH_RESIDENTS}**: the same, and some operators run on whole maps.
* **refused**: an error says why, before anything is computed.
* **WRONG**: an error is above {TOLERANCE:.0e}.
* **FAILED**: an error without a reason, which is a fault.
* **unfinished**: the process ended or had no more time.

*Error* is the largest `|a - b| / max(|b|, 1e-6 * largest)`. Some models magnify rounding, by batch norm of
two pooled vectors or by attention that saturates: plain PyTorch then differs from itself when the image
changes in its last digit. Values for which that difference is more than {TOLERANCE / ROUNDING:.0e} are
*blurred*: their error may be {ROUNDING} times that difference, and the column leaves them out.

**What does a step take?** A training step on one image of 4000 x 4000, or of the nearest size that the model
takes, is planned in {BUDGET} of memory on a CPU, in float32, without being run. *Heavy* operators are
convolutions and matrix products on maps; *heavy streamed* is the share of their arithmetic that streams.
*Streamed* and *plain* are projected bytes, and *time* is projected with nominal rates. A *hybrid* multiplies
matrices by a softmax, or calls PyTorch's attention.
"""


def page(rows: Sequence[Row], num_waiting: int) -> str:
    """The rows as a page, which says how many families have none yet."""
    examined = [row for row in rows if row.verdict != EXCLUDED]
    parts = [_HEAD, _origin(rows, num_waiting), "## Totals\n", _totals(examined), _planned(examined)]
    parts += ["## What is held back\n", _reasons(examined)]
    for library, title in LIBRARIES.items():
        of_library = [row for row in examined if row.family.library == library]
        if of_library:
            parts += [f"## {title}\n", _table(_COLUMNS, map(_row, of_library))]
    parts += ["## Excluded\n", _excluded(rows)]
    return "\n".join(parts)


def _origin(rows: Sequence[Row], num_waiting: int) -> str:
    """With what, when and where the rows were found, and how many are missing."""

    def some(of: Callable[[Row], str]) -> str:
        return ", ".join(sorted({of(row) for row in rows}))

    versions = {f"{name} {version}" for row in rows for name, version in row.fields["versions"].items()}
    missing = f" Still to be examined: {plural(num_waiting, 'model')}." if num_waiting else ""
    return (
        f"Found by `python -m benchmarks zoo` at commit {some(lambda row: row.fields['commit'])}, "
        f"{some(lambda row: row.fields['date'])}, on {some(lambda row: row.fields['device'])}, with PyTorch "
        f"{some(lambda row: row.fields['torch'])}, {', '.join(sorted(versions))}.{missing}\n"
    )


def _totals(rows: Sequence[Row]) -> str:
    """How many rows have each verdict, by kind and in all."""
    shown = [verdict for verdict in VERDICTS if verdict != EXCLUDED]
    groups = {kind: [row for row in rows if _kind(row) == kind] for kind in _KINDS}
    unknown = [row for row in rows if _kind(row) not in _KINDS]
    groups |= {"unknown": unknown} if unknown else {}
    lines = (
        [name, str(len(group)), *(str(_count(group, verdict)) for verdict in shown), _share(group)]
        for name, group in {**groups, "all": rows}.items()
    )
    columns = [("", ""), ("models", "r"), *((verdict, "r") for verdict in shown), ("heavy streamed", "r")]
    return _table(columns, lines)


def _planned(rows: Sequence[Row]) -> str:
    """How many plans fit, and which take more memory than plain PyTorch."""
    planned = [row for row in rows if row.is_planned]
    fit = sum(row.plan["fits"] for row in planned)
    plain_fits = sum(row.plan["plain_bytes"] <= parse_bytes(BUDGET) for row in planned)
    text = (
        f"Of {plural(len(planned), 'plan')} {fit} fit in {BUDGET}; plain PyTorch would fit with "
        f"{plain_fits}. *Heavy streamed* is the mean over the models.\n"
    )
    beyond = [f"{row.family} ({_ratio(row):.2f})" for row in planned if row.exceeds_plain]
    if beyond:
        text += f"\nMore memory than plain PyTorch, and how many times as much: {', '.join(beyond)}.\n"
    return text


def _reasons(rows: Sequence[Row]) -> str:
    """Why operators are resident, by the number of models; what follows from those is not named again."""
    models: Counter[str] = Counter()
    for row in rows:
        models.update(row.resident_reasons)
    named = {
        reason: ", ".join(row.family.name for row in rows if reason in row.resident_reasons)
        for reason in models
    }
    lines = ([str(count), reason, named[reason]] for reason, count in models.most_common(_MOST_REASONS))
    return _table((("models", "r"), ("reason", ""), ("which", "")), lines)


def _excluded(rows: Sequence[Row]) -> str:
    lines = (
        [f"{row.family.library} {row.fields.get('variant', row.family.name)}", row.reason]
        for row in rows
        if row.verdict == EXCLUDED
    )
    return _table((("model", ""), ("why", "")), lines)


def _row(row: Row) -> list[str]:
    return [
        str(row.fields.get("variant", row.family.name)),
        _kind(row),
        _size(row.passes[0].get("shape"), 2) if row.passes else "",
        row.verdict,
        _error(row),
        _percent(row),
        _size(row.plan.get("shape"), 1),
        {True: "yes", False: "**no**"}[row.plan["fits"]] if row.is_planned else "",
        _bytes(row, "projected_bytes") + (" **more**" if row.exceeds_plain else ""),
        _bytes(row, "plain_bytes"),
        format_duration(row.plan["projected_seconds"]) if row.is_planned else "",
        _why(row),
    ]


def _why(row: Row) -> str:
    """What is resident: why, where, how often and with how many bytes; else why there is no plan."""
    if row.verdict != WITH_RESIDENTS or not row.is_planned:
        return row.reason or str(row.plan.get("unfit", "") or row.fields.get("ended", ""))
    found = []
    for reason in row.resident_reasons:
        alike = [each for each in row.plan["residents"] if each["reason"] == reason]
        times, nbytes = (sum(each[name] for each in alike) for name in ("times", "bytes"))
        often = "" if times == 1 else f", {times} times"
        found.append(f"{reason}, in {alike[0]['source']}{often}, {format_bytes(nbytes)}")
    return "; ".join(found)


def _kind(row: Row) -> str:
    attention = row.fields.get("attention")
    return next((kind for kind, has in _KINDS.items() if has is attention), "")


def _error(row: Row) -> str:
    """The largest error that is clear of rounding, and how many values are not."""
    compared = [each for each in row.passes if "error" in each]
    if not compared:
        return ""
    blurred = sum(each["blurred"] for each in compared)
    total = sum(each["compared"] for each in compared)
    text = f"{max(each['error'] for each in compared):.0e}"
    return f"{text}, {blurred} of {total} blurred" if blurred else text


def _count(rows: Iterable[Row], verdict: str) -> int:
    return sum(row.verdict == verdict for row in rows)


def _share(rows: Iterable[Row]) -> str:
    """The mean share of arithmetic that streams."""
    shares = [share for row in rows if (share := _streamed(row)) is not None]
    return f"{sum(shares) / len(shares):.0%}" if shares else ""


def _percent(row: Row) -> str:
    share = _streamed(row)
    return "" if share is None else f"{share:.0%}"


def _streamed(row: Row) -> float | None:
    return row.plan["streamed_flops"] / row.plan["flops"] if row.plan.get("flops") else None


def _ratio(row: Row) -> float:
    return row.plan["projected_bytes"] / row.plan["plain_bytes"]


def _bytes(row: Row, name: str) -> str:
    return format_bytes(row.plan[name]) if row.is_planned else ""


def _size(shape: Sequence[int] | None, usual: int) -> str:
    """Height by width, after the number of images where that is not the usual one."""
    if shape is None:
        return ""
    number, _, height, width = shape
    return f"{height}x{width}" if number == usual else f"{number} of {height}x{width}"


def _table(columns: Sequence[tuple[str, str]], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; columns with an ``r`` are flush right."""
    head = f"| {' | '.join(name for name, _ in columns)} |"
    rule = f"|{'|'.join('--:' if side else '---' for _, side in columns)}|"
    return "\n".join([head, rule, *(f"| {' | '.join(map(_cell, line))} |" for line in lines), ""])


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= _WIDTH else f"{line[:_WIDTH]} …"
