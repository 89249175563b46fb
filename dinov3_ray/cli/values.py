"""Values of the command line's options, from what a person writes."""

from __future__ import annotations

import click

__all__ = ["parse_bytes", "parse_image_size", "parse_number", "parse_pairs", "parse_replicas"]


def parse_replicas(_context: click.Context, _option: click.Parameter, value: str) -> int | str | tuple[int, int]:
    """``4``, ``2-8``, or ``auto``; the pool judges the numbers."""
    low, dash, high = value.partition("-")
    if low.isdecimal() and (high.isdecimal() or not dash):
        return (int(low), int(high)) if dash else int(low)
    if value == "auto":
        return value
    raise click.BadParameter(f"{value!r} is no number of replicas: write 4, or 2-8 for a range")


def parse_pairs(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE``, any number of times."""
    for value in values:
        if not value.partition("=")[0] or "=" not in value:
            raise click.BadParameter(f"{value!r} is no NAME=VALUE")
    return dict(value.split("=", 1) for value in values)


def parse_number(text: str) -> int | float | str:
    """A pool option's value; what is no number is left to the pool to judge."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_image_size(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, int]:
    """``518`` or ``384x640`` (height x width), as (h, w)."""
    sides = value.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise click.BadParameter(f"{value!r} is no size: write 518, or 384x640 (height x width)")
    return int(sides[0]), int(sides[-1])


def parse_bytes(_context: click.Context, _option: click.Parameter, value: str) -> int:
    """``5GB``, ``500MB``, ``1000000``; decimal units."""
    text = value.upper().replace(" ", "").removesuffix("B")
    number = text.rstrip("KMG")
    unit = text[len(number) :]
    if not number.isdecimal() or unit not in _UNITS or int(number) == 0:
        raise click.BadParameter(f"{value!r} is no file size: write 500MB or 5GB")
    return int(number) * _UNITS[unit]


_OUTPUTS = {"cls": "cls", "map": "feature_map", "registers": "registers"}


def parse_outputs(_context: click.Context, _option: click.Parameter, value: str) -> dict[str, bool]:
    """``cls,map`` as fields of a FeatureSpec."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    for name in names:
        if name not in _OUTPUTS:
            raise click.BadParameter(f"must be of {', '.join(_OUTPUTS)}, separated by commas; got {name!r}")
    return {_OUTPUTS[name]: True for name in names}


def parse_integers(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    """``4,11,-1`` as a tuple."""
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise click.BadParameter(f"must be integers separated by commas; got {value!r}") from error


def parse_size(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """``32`` or ``24x32`` (height x width)."""
    if value is None:
        return None
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"must be SIZE or HEIGHTxWIDTH, at least 1; got {value!r}")
    return int(parts[0]), int(parts[-1])


def parse_colour(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, int, int]:
    """``255,255,255``."""
    parts = value.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) <= 255 for part in parts):
        raise click.BadParameter(f"must be R,G,B in 0..255; got {value!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])
