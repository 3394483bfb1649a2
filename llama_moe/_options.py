"""Filling the native option structs, which check their own values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from . import _core
from .errors import InvalidOptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

OptionsT = TypeVar("OptionsT")
ValueT = TypeVar("ValueT")
ValueT_co = TypeVar("ValueT_co", covariant=True)

# Largest values of the native fields that are not 32-bit signed integers.
_UNSIGNED = {"seed": (1 << 32) - 1}
_OWN_CHOICE = ("threads", "threads_batch", "context_pool")


@dataclass(frozen=True, slots=True, repr=False)
class Default(Generic[ValueT_co]):
    """The value of an argument that its caller left alone; no caller gives one."""

    value: ValueT_co

    def __repr__(self) -> str:
        return repr(self.value)


def option_value(option: ValueT | Default[ValueT]) -> ValueT:
    """What was given, or the default."""
    return option.value if isinstance(option, Default) else option


def fill(options: OptionsT, values: Mapping[str, object]) -> OptionsT:
    """Sets the attributes of a native option struct and returns it.

    Raises:
        TypeError: a value has the wrong type; the message names the option.
        InvalidOptionError: an integer is beyond what the native field can hold.
    """
    for name, value in values.items():
        default = getattr(options, name)
        try:
            # pybind11 takes anything for a bool, and a bool for any number.
            if isinstance(value, bool) != isinstance(default, bool):
                raise TypeError
            setattr(options, name, value)
        except TypeError:
            # pybind11's own message names neither the option nor the value, and an integer that overflows is a TypeError to it.
            if isinstance(value, int) and isinstance(default, int | None) and bool not in (type(value), type(default)):
                low, high = (0, _UNSIGNED[name]) if name in _UNSIGNED else (-(1 << 31), (1 << 31) - 1)
                if not low <= value <= high:
                    raise InvalidOptionError(f"{name}: {value} is out of range; it must be from {low} to {high}") from None
            raise TypeError(f"{name} cannot be {value!r} ({type(value).__name__})") from None
    return options


def fill_context(options: OptionsT, **values: object) -> OptionsT:
    """Fills the native options of a context or an engine; where None means the core's own choice, that is 0 there."""
    return fill(options, {name: 0 if value is None and name in _OWN_CHOICE else value for name, value in values.items()})


def native_model(name: str, model: object) -> _core.Model:
    """What the native side knows of a `Model` that is an argument.

    Raises:
        TypeError: it is none; the message names the argument.
    """
    native = getattr(model, "_native", None)
    if not isinstance(native, _core.Model):
        raise TypeError(f"{name} must be a llama_moe.Model, not {model!r}")
    return native
