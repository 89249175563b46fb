"""The values that the command line's options take, as click parameter types, and the option that several share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar, cast, get_args

import click

from dinov3_ray.config import CompileChoice, CompileMode
from dinov3_ray.config.preprocessing import Size, ViewSize

__all__ = [
    "Bytes",
    "Colour",
    "Command",
    "CompileValue",
    "ImageSize",
    "InputSize",
    "Integers",
    "Outputs",
    "Pair",
    "PillowPlugin",
    "PoolOption",
    "Replicas",
    "address_option",
]

Command = TypeVar("Command", bound=Callable[..., Any])
"""What an option decorates."""

address_option = click.option(
    "--address",
    metavar="HOST:PORT",
    help="The Ray to join. [default: RAY_ADDRESS, or a Ray that is started for this run]",
)


class _Value(click.ParamType):  # type: ignore[type-arg]  # no generic class at run time before click 8.2
    """A value that is read from text. Other values, such as an option's default, stay as they are."""

    rule = ""

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # noqa: ARG002 (click's)
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except ValueError:
            self.fail(f"must be {self.rule}; got {value!r}", param, ctx)

    def parse(self, text: str) -> Any:
        """The value that ``text`` stands for; raises ValueError where it breaks the rule."""
        raise NotImplementedError


class Replicas(_Value):
    """``4``, ``2-8`` as (2, 8), or ``auto``, unless that is left out; the pool checks the numbers."""

    def __init__(self, *, auto: bool) -> None:
        self._auto = auto
        self.name = "N|MIN-MAX|auto" if auto else "N|MIN-MAX"
        self.rule = f"a number or a range, such as 4 or 2-8{', or auto' if auto else ''}"

    def parse(self, text: str) -> int | str | tuple[int, int]:
        if text == "auto" and self._auto:
            return text
        low, dash, high = text.partition("-")
        return (_natural(low), _natural(high)) if dash else _natural(low)


class Pair(_Value):
    """``NAME=VALUE`` as (name, value)."""

    name = "NAME=VALUE"
    rule = "NAME=VALUE"

    def parse(self, text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError
        return name, value


class PoolOption(Pair):
    """``NAME=VALUE``, with numbers as numbers; the pool checks anything else."""

    def parse(self, text: str) -> tuple[str, int | float | str]:
        name, value = super().parse(text)
        for kind in (int, float):
            try:
                return name, kind(value)
            except ValueError:
                continue
        return name, value


_COMPILE_CHOICES: dict[str, CompileChoice] = {
    "auto": "auto",
    "true": True,
    "false": False,
    **{mode: mode for mode in get_args(CompileMode)},
}


class CompileValue(_Value):
    """``auto``, ``true`` and ``false``, or a mode of torch.compile, as a DinoV3Config takes them."""

    name = "auto|true|false|MODE"
    rule = f"one of {', '.join(_COMPILE_CHOICES)}"

    def parse(self, text: str) -> CompileChoice:
        if text not in _COMPILE_CHOICES:
            raise ValueError
        return _COMPILE_CHOICES[text]


class ImageSize(_Value):
    """The size of an image or a map: ``512`` as (512, 512), ``384x640`` as (384, 640)."""

    name = "SIZE"
    rule = "SIZE or HEIGHTxWIDTH, at least 1, such as 512 or 384x640"

    def parse(self, text: str) -> Size | ViewSize:
        sides = [_natural(side) for side in text.lower().split("x")]
        if len(sides) > 2 or min(sides) < 1:
            raise ValueError
        return sides[0], sides[-1]


class InputSize(ImageSize):
    """The size of a model's input: one of an image, or ``input`` or ``input/2``, which follow the images."""

    name = f"SIZE|{'|'.join(get_args(ViewSize))}"
    rule = f"{ImageSize.rule}, or {' or '.join(get_args(ViewSize))}"

    def parse(self, text: str) -> Size | ViewSize:
        return cast(ViewSize, text) if text in get_args(ViewSize) else super().parse(text)


class Bytes(_Value):
    """``5GB``, ``500MB``, ``1000000``: decimal units."""

    name = "BYTES"
    rule = "a size in bytes, at least 1, such as 500MB or 5GB"
    _units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}  # noqa: RUF012 - it is never changed

    def parse(self, text: str) -> int:
        plain = text.upper().replace(" ", "").removesuffix("B")
        number = plain.rstrip("KMG")
        unit = plain[len(number) :]
        if unit not in self._units or _natural(number) == 0:
            raise ValueError
        return int(number) * self._units[unit]


class Outputs(_Value):
    """``cls,map`` as fields of a FeatureSpec: {"cls": True, "feature_map": True}."""

    name = "OUTPUTS"
    _fields = {"cls": "cls", "map": "feature_map", "registers": "registers"}  # noqa: RUF012 - it is never changed
    rule = f"of {', '.join(_fields)}, separated by commas"

    def parse(self, text: str) -> dict[str, bool]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if not set(names) <= set(self._fields):
            raise ValueError
        return {self._fields[name]: True for name in names}


class Integers(_Value):
    """``4,11,-1`` as a tuple."""

    name = "INTEGERS"
    rule = "integers separated by commas, such as 4,11,-1"

    def parse(self, text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(",") if part.strip())


class Colour(_Value):
    """``255,0,0`` as (255, 0, 0)."""

    name = "R,G,B"
    rule = "R,G,B, each from 0 to 255, such as 255,255,255"

    def parse(self, text: str) -> tuple[int, int, int]:
        red, green, blue = (_natural(part.strip()) for part in text.split(","))
        if max(red, green, blue) > 255:
            raise ValueError
        return red, green, blue


class PillowPlugin(_Value):
    """``module`` is imported, and the function of ``module:function`` called, which registers a format with Pillow."""

    name = "MODULE[:FUNCTION]"
    rule = "a module that can be imported, or MODULE:FUNCTION, such as pillow_heif:register_heif_opener"

    def parse(self, text: str) -> str:
        module, _, function = text.partition(":")
        try:
            imported = import_module(module)
            if function:
                getattr(imported, function)()
        except (ImportError, AttributeError) as error:
            raise ValueError from error
        return text


def _natural(text: str) -> int:
    """The number that ASCII digits stand for: unlike ``int``, this takes no sign, blanks or underscores."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError
    return int(text)
