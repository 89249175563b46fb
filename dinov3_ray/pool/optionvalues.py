"""Values of the command line's options, from what a person writes."""

from __future__ import annotations

import click

__all__ = ["parse_number", "parse_pairs", "parse_replicas"]


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
