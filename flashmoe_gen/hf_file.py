"""A Hugging Face ``config.json``: read, and asked for its fields, so that every error names field and file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import SpecError, UnsupportedError
from .values import INT32_MAX, flag, integer, number, shown

ConfigLike = str | os.PathLike[str] | Mapping[str, Any]
_T = TypeVar("_T")
_MOST_BYTES = 16 << 20
_WORDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


class Config:
    """The parsed JSON and where it came from."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, kind: type[_T], *names: str, default: _T | None = None, low: int = 1, positive: bool = False) -> _T:
        """What ``names``, of which one or more may be present, say; without a default, absence is an error.

        Args:
            kind: of the value: bool, int (from ``low`` on), float (finite, and more than 0 if ``positive``) or str.
            names: of one thing. Null counts as absent.

        Raises:
            SpecError: none is present, a value is of another kind, or two of them differ.
        """
        found = {name: self._value(kind, name, low, positive) for name in names if self.values.get(name) is not None}
        if not found:
            if default is None:
                raise SpecError(f"{names[0]} is missing from {self.source}.")
            return default
        first, *others = found
        for other in others:
            if found[other] != found[first]:
                raise SpecError(
                    f"{first}={found[first]!r} and {other}={found[other]!r} in {self.source} contradict each other. "
                    "They are names of one thing: remove one, or make them equal."
                )
        result: _T = found[first]
        return result

    def _value(self, kind: type, name: str, low: int, positive: bool) -> Any:
        value = self.values[name]
        try:
            if kind is bool:
                return flag(name, value)
            if kind is int:
                return integer(name, value, low, INT32_MAX)
            if kind is float:
                return number(name, value, positive=positive)
        except SpecError:
            value, words = shown(value), _WORDS[kind]
            limits = f" between {low} and {INT32_MAX}" if kind is int else " above 0" if positive else ""
            raise SpecError(f"{name}={value} in {self.source} is not valid. Must be {words}{limits}.") from None
        if not isinstance(value, str):
            raise SpecError(f"{name}={shown(value)} in {self.source} is not valid. Must be a string.")
        return str(value)

    def integers(self, name: str) -> list[int] | None:
        """A list of integers from 0 on, or ``None`` when it is absent or null.

        Raises:
            SpecError: it is something else.
        """
        values = self.values.get(name)
        if values is None:
            return None
        try:
            if isinstance(values, (list, tuple)):
                return [integer(name, value, 0, INT32_MAX) for value in values]
        except SpecError:
            pass
        raise SpecError(f"{name}={shown(values)} in {self.source} is not valid. Must be a list of integers from 0 on.")

    def unsupported(self, name: str, why: str) -> UnsupportedError:
        value = repr(self.values.get(name))
        value = value if len(value) <= 100 else value[:100] + "..."
        return UnsupportedError(f"{name}={value} in {self.source} is not supported. {why}")

    def require(self, name: str, *supported: str) -> None:
        """Refuse a value that selects another function; an absent field means the first."""
        if self.get(str, name, default=supported[0]) not in supported:
            raise self.unsupported(name, f"Must be {' or '.join(map(repr, supported))}.")

    def require_flag(self, name: str, value: bool) -> None:
        """Refuse a flag that selects another function."""
        if self.get(bool, name, default=value) is not value:
            raise self.unsupported(name, f"Must be {value}.")


def load(config: ConfigLike) -> Config:
    """Read a config; of a ``llama4`` one its ``text_config``.

    Raises:
        SpecError: it cannot be read, or is no JSON object.
    """
    if isinstance(config, Mapping):
        values, source = config, "the config"
    elif isinstance(config, (str, os.PathLike)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        source = str(path)
        try:
            with path.open("rb") as file:  # not all of it: a device may have no end
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise SpecError(f"config={source!r} is not valid. Must hold at most {_MOST_BYTES} bytes.")
            values = json.loads(data.decode("utf-8"))
        except OSError as error:
            raise SpecError(
                f"config={source!r} cannot be read: {error.strerror or error}. "
                "Must be a local config.json or the folder that holds it."
            ) from error
        except SpecError:
            raise
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            raise SpecError(f"config={source!r} is not valid JSON: {error}") from error
    else:
        raise SpecError(f"config={config!r} is not valid. Must be a path or a dict.")
    if not isinstance(values, Mapping):
        raise SpecError(f"config={source!r} is not valid. Must hold a JSON object.")
    text = values.get("text_config")
    if values.get("model_type") == "llama4" and isinstance(text, Mapping):
        shared = ("torch_dtype", "dtype", "quantization_config", "compression_config")
        outer = {name: values[name] for name in shared if values.get(name) is not None}
        inner = {name: value for name, value in text.items() if value is not None}
        for name in ("torch_dtype", "dtype"):
            if name in outer and name in inner and outer[name] != inner[name]:
                raise SpecError(
                    f"{name}={outer[name]!r} in {source} and {name}={inner[name]!r} in its text_config contradict each other."
                )
        return Config({"model_type": "llama4_text", **outer, **inner}, f"text_config of {source}")
    return Config(values, source)
