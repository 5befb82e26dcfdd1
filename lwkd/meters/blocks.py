"""What all meters share: with-blocks around training steps, and which of them are due."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

from lwkd.layers import LayerPairs
from lwkd.ops.backends import check_name
from lwkd.ops.checks import message

SIDES = ("student", "teacher")
_Recorder = TypeVar("_Recorder")
_Self = TypeVar("_Self", bound="Blocks[Any]")


class Blocks(ABC, Generic[_Recorder]):
    """A meter's with-blocks: every ``every``-th is due and watched, in the others no hooks live.

    A block that ends with an exception leaves nothing and is not counted.

    Args:
        op: The public name of the meter, for errors.
        pairs: From :func:`lwkd.pair_layers`.
        seed: Of random numbers.
        every: Measure in every k-th block.
        backend: Of the comparison: None, "reference", "compiled" or "triton".
    """

    def __init__(
        self, op: str, pairs: LayerPairs, *, seed: int, every: int, backend: str | None
    ) -> None:
        if not isinstance(pairs, LayerPairs):
            raise TypeError(message(op, "pairs", "LayerPairs, from pair_layers", type(pairs)))
        if type(seed) is not int:
            raise TypeError(message(op, "seed", "an int", repr(seed)))
        if type(every) is not int or every < 1:
            raise ValueError(message(op, "every", "an int ≥ 1", repr(every)))
        check_name(op, backend)
        self.pairs, self.seed, self.every = pairs, seed, every
        self._op = op
        self._calls = 0
        self._hooks: ExitStack | None = None
        self._sides: tuple[_Recorder, _Recorder] | None = None  # of the last block, if it was due
        self._ready = False

    @abstractmethod
    def _watch(self, stack: ExitStack) -> tuple[_Recorder, _Recorder]:
        """Install the hooks of a block on both networks; the stack removes them."""

    def __enter__(self: _Self) -> _Self:
        if self._hooks is not None:
            raise RuntimeError(message(self._op, "with-block", "one entry at a time", "a second"))
        self.pairs.refuse_compiled(self._op)  # due or not: it fails in its first block or never
        self.pairs.teacher_in_eval(self._op)
        due = self._calls % self.every == 0
        self._ready, self._sides = False, None
        with ExitStack() as stack:
            self._sides = self._watch(stack) if due else None
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.__exit__(*exception)
        self._ready = exception[0] is None
        self._calls += self._ready
        if not self._ready:
            self._sides = None

    def _check_ended(self, expected: str) -> None:
        """Raise unless a block has ended well."""
        if not self._ready:
            got = "one inside the block" if self._hooks is not None else "no such block"
            raise RuntimeError(message(f"{self._op}.discrepancy", "with-block", expected, got))

    def _check_outside(self) -> None:
        """Raise inside a block."""
        if self._hooks is not None:
            expected, got = "a call outside the block, which would record it", "one inside"
            raise RuntimeError(message(f"{self._op}.measure", "with-block", expected, got))

    def state_dict(self) -> dict[str, int]:
        """Return {"calls": the number of with-blocks so far}."""
        return {"calls": self._calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue counting where ``state_dict`` left off.

        Args:
            state: From :meth:`state_dict`.

        Raises:
            ValueError: If it holds anything but a count.
        """
        calls = state.get("calls") if isinstance(state, dict) and len(state) == 1 else None
        if type(calls) is not int or calls < 0:
            expected = '{"calls": int ≥ 0}'
            raise ValueError(message(f"{self._op}.load_state_dict", "state", expected, repr(state)))
        self._calls = calls
