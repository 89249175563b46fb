"""pydantic's errors in this project's words: parameter, rule, value, remedy; all problems of one input at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from dinov3_ray.errors import ConfigError

__all__ = ["CheckedModel", "broken_rule", "check", "from_list", "raise_problems", "rule", "whole_numbers"]


class CheckedModel(BaseModel):
    """Base of this package's pydantic models: immutable, and a key that does not exist is an error.

    The string below a field is its documentation, in JSON schemas too.
    pydantic converts by default ("4" becomes 4, True becomes 1). Fields refuse that by ``Field(strict=True)``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    #: What the error for an unknown key calls a known one, and all of them.
    key_is: ClassVar[str] = "a key"
    keys_are: ClassVar[str] = "keys"


Model = TypeVar("Model", bound=BaseModel)


def rule(text: str) -> WrapValidator:
    """The rule of a field in words, such as "must be an integer >= 1"; it replaces what pydantic says of a value."""

    def validate(value: object, validate_type: Callable[[object], object]) -> object:
        try:
            return validate_type(value)
        except ValidationError as error:
            raise broken_rule(text) from error

    return WrapValidator(validate)


def broken_rule(text: str) -> PydanticCustomError:
    """What a validator raises: the rule that the value breaks. :func:`check` adds the parameter and the value."""
    return PydanticCustomError("rule", text)


#: JSON and YAML have lists where this package has tuples. (In its lax mode, pydantic would take sets as well.)
from_list = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

#: 16.0 is how some writers spell 16.
whole_numbers = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)


def check(model: type[Model], values: object, *, path: Path | None = None, context: object = None) -> Model:
    """``values`` as a ``model``.

    Args:
        path: the file that they come from, for the error.
        context: what the model's validators may compare with.

    Raises:
        ConfigError: one line per problem, or one sentence if there is one problem.
    """
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        problems = [_describe(model, one) for one in error.errors(include_url=False)]
        raise_problems(problems, path)
        raise AssertionError("a ValidationError has at least one error") from error


def raise_problems(problems: list[str], path: Path | None = None) -> None:
    """Raise ``problems`` together.

    Raises:
        ConfigError: unless there are none.
    """
    if len(problems) == 1:
        raise ConfigError(f"{path}: {problems[0]}" if path else problems[0])
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{f'{path} has ' if path else ''}{len(problems)} problems:{lines}")


def _describe(model: type[BaseModel], error: ErrorDetails) -> str:
    name = ".".join(map(str, error["loc"])) or "the file"
    kind, value = error["type"], error["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown_key(model, error["loc"])
    if kind in ("model_type", "dict_type"):
        return f"{name} must hold `key: value` lines; got {value!r}"
    if kind == "value_error":
        return str(error["ctx"]["error"])  # a whole sentence of this package's own
    text = error["msg"] if kind == "rule" else f"is wrong: {error['msg']}"
    return f"{name} {text}; got {value!r}"


def _unknown_key(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    for section in location[:-1]:
        model = cast(type[BaseModel], model.model_fields[str(section)].annotation)
    known, words = list(model.model_fields), cast(type[CheckedModel], model)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f" ({words.keys_are}: {', '.join(known)})"
    return f"{'.'.join(map(str, location))!r} is not {words.key_is}{hint}"
