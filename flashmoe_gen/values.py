"""Numbers and flags as users write them, NumPy's too, as plain Python values of one kind; or a refusal that names them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection

import numpy as np

from .errors import SpecError, UnsupportedError

INT32_MAX = 2**31 - 1  # of the kernels' int fields


def integer(name: str, value: object, low: int, high: int, *, words: str = "") -> int:
    """The value as an ``int`` from ``low`` to ``high``; ``words`` say in the message what it must be.

    Raises:
        SpecError: it is out of range, or no integer; a bool is none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SpecError(f"{name}={value!r} is not valid. Must be {words or 'an integer'} between {low} and {high}.")
    number = int(value)
    if not low <= number <= high:
        raise SpecError(
            f"{name}={shown(number)} is not valid. Must be {words}{' ' * bool(words)}between {low} and {high}."
        )
    return number


def number(name: str, value: object, *, words: str = "a finite number", positive: bool = False) -> float:
    """The value as a finite ``float``.

    Raises:
        SpecError: it is infinite, NaN, not positive where it must be, or no real number; a bool is none.
    """
    result = math.nan
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            result = float(value)
        except OverflowError:  # an integer
            result = math.inf
    if not math.isfinite(result) or (positive and result <= 0.0):
        raise SpecError(f"{name}={shown(value)} is not valid. Must be {words}.")
    return result


def flag(name: str, value: object) -> bool:
    """The value as a ``bool``.

    Raises:
        SpecError: it is none.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise SpecError(f"{name}={value!r} is not valid. Must be True or False.")
    return bool(value)


def choice(name: str, value: object, choices: Collection[str], *, also: str = "") -> str:
    """The value as one of some strings.

    Raises:
        SpecError: it is another, or no string.
    """
    if not isinstance(value, str) or value not in choices:
        raise SpecError(f"{name}={value!r} is not valid. Must be one of {', '.join(map(repr, choices))}{also}.")
    return next(plain for plain in choices if plain == value)


def shown(value: object) -> str:
    """``repr``, of a huge integer its beginning: Python refuses to write out thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"{'-' if value < 0 else ''}(an integer of {abs(value).bit_length()} bits)"
    return repr(value)


def require_counts(what: str, **counts: int) -> None:
    """Refuse sizes that a kernel's 32-bit counters cannot hold.

    Raises:
        UnsupportedError: names what asks for so much, and the count.
    """
    for name, count in counts.items():
        if count > INT32_MAX:
            raise UnsupportedError(f"{what} is not supported: {name}={shown(count)} is over {INT32_MAX}.")
