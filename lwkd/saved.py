"""Reads a state_dict that may be anything: every reader returns a checked value or raises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from lwkd import rates
from lwkd.ops import checks

SCALARS = ("multiplier", "distance", "weight", "skipped")
"""What `LayerwiseLR` keeps of every layer, beside its policy's own state."""


class SavedState:
    """A state_dict under examination: every reader returns a checked value or raises."""

    def __init__(self, op: str, state: object) -> None:
        self._op = op
        if not isinstance(state, dict):
            raise ValueError(checks.message(op, "state_dict", "a dict", type(state).__name__))
        self._state = state

    def fail(self, expected: object, got: object, layer: str | None = None) -> NoReturn:
        """Raise, naming what is wrong."""
        raise ValueError(checks.message(self._op, "state_dict", expected, got, layer=layer))

    def get(self, key: str, kind: type) -> Any:
        """Return a value of the right type."""
        if key not in self._state:
            self.fail(f"the key {key!r}", f"the keys {list(self._state)}")
        value = self._state[key]
        if not isinstance(value, kind):
            self.fail(f"{key!r} to be a {kind.__name__}", type(value).__name__)
        return value

    def expect(self, key: str, value: object) -> None:
        """Raise unless a key has this value."""
        got = self.get(key, type(value))
        if got != value or type(got) is not type(value):  # True is 1
            self.fail(f"{key} {value!r}", repr(got))

    def count(self, key: str) -> int:
        """Return a whole number >= 0 that a counter can have reached."""
        value: int = self.get(key, int)
        if isinstance(value, bool) or not 0 <= value < 2**63:
            self.fail(f"{key!r} to be a number >= 0 of 63 bits", value)
        return value

    def same_names(self, what: str, got: list[str], expected: list[str]) -> None:
        """Raise unless both lists hold the same names."""
        missing = [name for name in expected if name not in got]
        unknown = [name for name in got if name not in expected]
        if missing or unknown:
            hint = checks.suggest(str(unknown[0]), expected) if unknown else ""
            self.fail(f"{what} {expected}", f"missing {missing}, unknown {unknown}{hint}")

    def tensors(self, key: str, device: torch.device) -> dict[str, Tensor]:
        """Return copies of a dict of tensors."""
        values = self.get(key, dict)
        for name, value in values.items():
            if not _holds_data(value):
                self.fail(f"{key}[{name!r}] to be a tensor that holds data", _kind(value))
        return {name: value.detach().to(device, copy=True) for name, value in values.items()}

    def layers(
        self, names: Sequence[str], like: Tensor, template: list[str] | None, unseen: float
    ) -> dict[str, Tensor]:
        """Stack each layer's values in the order of ``names``; template: of a named policy."""
        saved = self.get("layers", dict)
        self.same_names("layers", list(saved), list(names))
        first = saved[names[0]] if isinstance(saved[names[0]], dict) else {}
        own = [key for key in first if str(key).startswith("policy.")]
        if own and template is not None:
            own = [f"policy.{key}" for key in template]
        for name in names:
            row = saved[name]
            if not isinstance(row, dict) or not all(map(_holds_data, row.values())):
                self.fail("a dict of tensors that hold data", type(row).__name__, name)
            self.same_names(f"layer {name!r}:", list(row), [*SCALARS, *own])
            for key, value in row.items():
                scalar = key in SCALARS or template is not None
                shape = () if scalar else tuple(first[key].shape)
                if value.shape != shape:
                    self.fail(f"{key!r} of shape {shape}", tuple(value.shape), name)
                if scalar:
                    self._check_scalar(key, value, 0.0 if key in SCALARS else unseen, name)
        stacked = {k: torch.stack([saved[n][k] for n in names]).to(like.device) for k in first}
        if template is not None:
            self.same_names("shared", list(self.get("shared", dict)), [])
            stacked.update({key: stacked[key].to(like.dtype) for key in own})
        return stacked

    def _check_scalar(self, key: str, value: Tensor, low: float, layer: str) -> None:
        whole = key == "skipped"
        if value.is_complex() or value.dtype == torch.bool or value.is_floating_point() == whole:
            self.fail(f"{key!r} to be {'whole' if whole else 'floating'}", value.dtype, layer)
        if not low <= float(value) < math.inf:
            self.fail(f"{key!r} finite, at least {low}", float(value), layer)

    def groups(self, keys: Sequence[str]) -> list[float | Tensor]:
        """Return the rates of all groups, in their order."""
        saved = self.get("groups", dict)
        self.same_names("groups", list(saved), list(keys))
        if list(saved) != list(keys):
            self.fail(f"groups in the order {list(keys)}", list(saved))
        for key, value in saved.items():
            if isinstance(value, Tensor) and not _holds_data(value):
                self.fail(f"the rate of group {key!r} to hold data", _kind(value))
            try:
                rates.check(self._op, "state_dict", value)
            except (TypeError, ValueError):
                self.fail(f"the rate of group {key!r} to be a number >= 0", value)
        return list(saved.values())

    def check_base(self, now: dict[str, Any], saved: object, path: str = "base") -> None:
        """Compare the layout of a scheduler's state to that of the one in use."""
        if not isinstance(saved, dict):
            self.fail(f"{path} to be a dict", type(saved).__name__)
        self.same_names(path, list(saved), list(now))
        for key, value in now.items():
            other, inner = saved[key], f"{path}[{key!r}]"
            if isinstance(value, list):
                if not isinstance(other, list) or len(other) != len(value):
                    self.fail(f"{inner} to be a list of {len(value)}", other)
                for i, (a, b) in enumerate(zip(value, other, strict=True)):
                    if key == "_schedulers":
                        self.check_base(a, b, f"{inner}[{i}]")
                    elif _sort(a) != _sort(b):
                        self.fail(f"{inner}[{i}] to be a {_sort(a)}", _sort(b))
            elif None not in (value, other) and _sort(value) != _sort(other):
                self.fail(f"{inner} to be a {_sort(value)}", _sort(other))


def _holds_data(value: object) -> bool:
    """Tell whether a value is a tensor with numbers that can be read, laid out as ours are."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized)
    )


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.layout} tensor on {value.device}"
    return type(value).__name__


def _sort(value: object) -> str:
    """Name the kind of a value, numbers being of one kind."""
    if isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return "number"
    return "dict" if isinstance(value, dict) else type(value).__name__
