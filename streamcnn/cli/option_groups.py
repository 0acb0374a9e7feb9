"""Groups of options: a command's function gets a dataclass, whose fields are options of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import Any, get_type_hints


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer in which each parameter that is a dataclass is replaced by its fields.

    Parameters
    ----------
    command
        A function with dataclasses among its parameters, whose fields are annotated for Typer.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {
        name: kind for name, kind in hints.items() if is_dataclass(kind) and isinstance(kind, type)
    }
    flat: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            flat += _parameters(groups[parameter.name])
        else:
            annotation = hints[parameter.name]
            flat.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=annotation))

    def grouped(**values: Any) -> None:
        made = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**values, **made)

    grouped.__name__, grouped.__doc__ = command.__name__, command.__doc__
    grouped.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    grouped.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return grouped


def _parameters(group: type[Any]) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
