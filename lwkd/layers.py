"""Which layer of the student is compared to which layer of the teacher.

Names are those of ``named_modules()`` of the plain network (lwkd/names.py).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from lwkd import autopair
from lwkd.autopair import Shape, times
from lwkd.hooks import COMPILED, Capture, Features, compiled_module, keep, run, untouched
from lwkd.names import named_layers, plain_name, unwrap
from lwkd.ops.checks import flag, message, suggest

_OP = "pair_layers"
_SIDES = ("student", "teacher")
Modules = Mapping[str, nn.Module]
T = TypeVar("T")


@dataclass(frozen=True)
class LayerPair:
    """A layer of the student and the layer of the teacher that it is compared to.

    Attributes:
        student: Module name in the student.
        teacher: Module name in the teacher.
        student_shape: Shape of the student's output for the example inputs, None without them.
        teacher_shape: Shape of the teacher's.
        note: What happens where the shapes differ, why "auto" chose the pair, and what was seen
            of the outputs.
        changed: Which of "student" and "teacher" was seen to change this layer's output in place
            later (``nn.ReLU(inplace=True)``, ``+=``): ``LayerPairs.capture`` keeps a copy of it.
    """

    student: str
    teacher: str
    student_shape: Shape | None
    teacher_shape: Shape | None
    note: str
    changed: tuple[str, ...] = ()


class LayerPairs(Sequence[LayerPair]):
    """What :func:`pair_layers` returns: an immutable sequence of pairs and their two networks.

    ``str()`` is a table. A slice is again a ``LayerPairs``.
    """

    def __init__(
        self,
        pairs: Iterable[LayerPair],
        student: nn.Module,
        teacher: nn.Module,
        compiled: str | None = None,
        teacher_trains: bool = False,
    ) -> None:
        self._pairs = tuple(pairs)
        self._student, self._teacher = student, teacher
        self._compiled, self._teacher_trains = compiled, teacher_trains
        self._said = False  # that the teacher was in train mode
        inside = named_layers(student), named_layers(teacher)
        self._student_layers = tuple((p.student, inside[0][p.student]) for p in self._pairs)
        self._teacher_layers = tuple((p.teacher, inside[1][p.teacher]) for p in self._pairs)

    @property
    def student(self) -> nn.Module:
        """The student, unwrapped."""
        return self._student

    @property
    def teacher(self) -> nn.Module:
        """The teacher, unwrapped."""
        return self._teacher

    @property
    def names(self) -> list[str]:
        """The student's module names, in order, each once."""
        return [p.student for p in self._pairs]

    @property
    def student_layers(self) -> tuple[tuple[str, nn.Module], ...]:
        """(name, module) of the student's layers, in order."""
        return self._student_layers

    @property
    def teacher_layers(self) -> tuple[tuple[str, nn.Module], ...]:
        """(name, module) of the teacher's layers, in order."""
        return self._teacher_layers

    def capture(self) -> Features:
        """Return a context manager that keeps the paired layers' activations, graph included.

        Its ``.student`` and ``.teacher`` are lists of L tensors, to be read as soon as the
        networks have run. They stay alive as long as the object does. Each is the layer's own
        output, or a copy of it where :func:`pair_layers` saw, on its ``example_inputs``, that a
        later module changes it in place. A teacher in train mode is put in eval mode first.

        Returns:
            The context manager; for one with-block at a time.

        Raises:
            RuntimeError: Here, on a compiled network. On reading: for a layer that did not run, or
                ran several times; whose activation was changed in place afterwards; or, in the
                student, that ran without a graph in a block with gradients (reentrant activation
                checkpointing). Each names the layer.
            TypeError: From the forward, for a layer that returns no tensor.

        >>> import torch
        >>> student, teacher = nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 5))
        >>> pairs = pair_layers(student, teacher.eval(), ["0"])
        >>> with pairs.capture() as features:
        ...     _ = student(torch.ones(2, 4)), teacher(torch.ones(2, 4))
        >>> [tuple(x.shape) for x in features.student + features.teacher]
        [(2, 3), (2, 5)]
        """
        op = "LayerPairs.capture"
        self.refuse_compiled(op)
        self.teacher_in_eval(op)
        student, teacher = (
            self.watch(op, side, partial(keep, [side in pair.changed for pair in self]))
            for side in _SIDES
        )
        return Features(student, teacher, any(p.student_shape is not None for p in self))

    def watch(self, op: str, side: str, transform: Callable[[int, Tensor], T]) -> Capture[T]:
        """Return what records one network's paired layers.

        Args:
            op: The public name of the caller, for errors.
            side: "student" or "teacher".
            transform: What to keep of an output, from the pair's index and the output.

        Returns:
            The recorder, to be entered.
        """
        network = self._student if side == "student" else self._teacher
        layers = self._student_layers if side == "student" else self._teacher_layers
        current = partial(named_layers, network)
        return Capture(op, layers, transform, argument=side, current=current)

    def refuse_compiled(self, op: str) -> None:
        """Raise where hooks would not fire.

        Args:
            op: The public name of the caller, for the error.

        Raises:
            RuntimeError: If a network, or a module inside one, is compiled.
        """
        for side, network in (("student", self._student), ("teacher", self._teacher)):
            inside = compiled_module(network)
            if self._compiled == side or inside is not None:
                raise RuntimeError(message(op, side, *COMPILED, layer=inside or None))

    def teacher_in_eval(self, op: str) -> None:
        """Put a teacher that is in train mode, or has a module that is, in eval mode; say so once.

        Dropout would change from batch to batch what the student is compared to, and BatchNorm
        would take its statistics from the student's data.

        Args:
            op: The public name of the caller, for the warning.
        """
        if self._teacher_trains:
            return
        found = {m: name for name, m in self._teacher.named_modules() if m.training}
        shared = set(self._student.modules()) if found else set()
        found = {m: name for m, name in found.items() if m not in shared}
        if self._teacher in shared or not found:
            return
        for module in found:
            module.training = False
        if not self._said:
            self._said = True
            expected = "a network in eval mode (pair_layers(..., teacher_trains=True) for one that "
            got = "one in train mode: it is put in eval mode"
            layer = next(iter(found.values())) or None  # the teacher itself, or one inside
            expected += "is trained beside the student)"
            text = message(op, "teacher", expected, got, layer=layer)
            warnings.warn(text, UserWarning, stacklevel=3)

    @overload
    def __getitem__(self, index: int) -> LayerPair: ...
    @overload
    def __getitem__(self, index: slice) -> LayerPairs: ...
    def __getitem__(self, index: int | slice) -> LayerPair | LayerPairs:
        if isinstance(index, slice):
            options = self._compiled, self._teacher_trains
            return LayerPairs(self._pairs[index], self._student, self._teacher, *options)
        return self._pairs[index]

    def __len__(self) -> int:
        return len(self._pairs)

    def __str__(self) -> str:
        rows = [("student layer", "shape", "teacher layer", "shape", "note")]
        rows += [
            (p.student, times(p.student_shape), p.teacher, times(p.teacher_shape), p.note or "-")
            for p in self._pairs
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * w for w in widths))  # type: ignore[arg-type]
        lines = ("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def pair_layers(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Any = "auto",
    *,
    example_inputs: Any = None,
    teacher_trains: bool = False,
) -> LayerPairs:
    """Pair layers of a student with layers of its teacher.

    ``"auto"`` runs both networks once on ``example_inputs`` and takes the layers where resolution
    or channel count changes: the last module with weights before each change along the forward
    order (only what has weights can be given a rate). A stem of
    single layers in front of composite blocks, stages without parameters (pooling) and layers of
    one position are passed over. Networks of equal blocks (transformers) have no such changes:
    their blocks are taken. Student and teacher are matched in order, each layer of the one with
    fewer to the layer of the other that is nearest in relative depth (the share of weight layers
    before it).

    Args:
        student: The student; wrappers (DDP, ``torch.compile``) are looked through.
        teacher: The teacher.
        pairs: One of

            - a list of module names, the same in both networks, or (student, teacher) tuples of
              names;
            - a dict from student names to teacher names;
            - a list of (regex, regex): a tuple that is not two module names. Each must match
              module names in full, equally many on both sides, paired in order;
            - ``"auto"``.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments for both
            networks. Needed by "auto"; otherwise optional, to show shapes and check that the layers
            run. The networks run in eval mode without gradients, on their own devices; modes,
            buffers, generators, hooks and ``.grad`` are left as they were.
        teacher_trains: The teacher is trained too (mutual learning): its mode is its own. Else one
            that is in train mode where its activations are captured or measured is put in eval
            mode, which is said once.

    Returns:
        The pairs, with ``.student`` and ``.teacher`` unwrapped.

    Raises:
        ValueError: For an unknown name (with close matches), a student layer that occurs twice, an
            empty choice, a regex without match or with different counts, a container that never
            runs, lazy modules to be run that never ran, or networks that "auto" cannot pair.
        TypeError: If a network is no module, ``pairs``, ``example_inputs`` or ``teacher_trains``
            none of the above, or a layer returns no dense tensor.
        RuntimeError: If a chosen layer did not run on ``example_inputs``.

    >>> import torch
    >>> from torch import nn
    >>> def cnn(width):
    ...     return nn.Sequential(
    ...         nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    ...         nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
    ...         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
    >>> pairs = pair_layers(cnn(4), cnn(8), example_inputs=torch.zeros(2, 1, 8, 8))
    >>> [(p.student, p.student_shape, p.teacher) for p in pairs]
    [('0', (2, 4, 8, 8), '0'), ('3', (2, 8, 4, 4), '3')]
    >>> print(pairs[0].note)
    channels differ: fine, maps compare; auto: last at 4x8x8 | last at 8x8x8
    >>> pair_layers(cnn(4), cnn(8), ["5", ("1", "4")]).names
    ['5', '1']
    """
    sides = ("student", student), ("teacher", teacher)
    for side, network in sides:
        if not isinstance(network, nn.Module):
            raise TypeError(message(_OP, side, "an nn.Module", _short(network)))
    flag(_OP, "teacher_trains", teacher_trains)
    compiled = next((side for side, n in sides if compiled_module(n) is not None), None)
    networks = unwrap(student), unwrap(teacher)
    if networks[0] is networks[1]:
        raise ValueError(message(_OP, "teacher", "another network", "the student itself"))
    layers = named_layers(networks[0]), named_layers(networks[1])
    if isinstance(pairs, str):
        if pairs != "auto":
            expected = '"auto", or a list of module names or pairs'
            raise ValueError(message(_OP, "pairs", expected, repr(pairs)))
        chosen = _auto(networks, layers, example_inputs)
    else:
        chosen = [(s, t, "") for s, t in _explicit(pairs, layers)]
        _check(chosen, layers)
    return LayerPairs(
        _describe(chosen, networks, layers, example_inputs), *networks, compiled, teacher_trains
    )


# --- explicit pairs ----------------------------------------------------------------------------


def _explicit(pairs: Any, layers: tuple[Modules, Modules]) -> list[tuple[str, str]]:
    """Turn every accepted form of ``pairs`` into (student name, teacher name)."""
    if not isinstance(pairs, (Mapping, list, tuple)):
        expected = 'a list of names or (student, teacher) tuples, a dict, or "auto"'
        raise TypeError(message(_OP, "pairs", expected, type(pairs)))
    chosen: list[tuple[str, str]] = []
    items = [tuple(i) for i in pairs.items()] if isinstance(pairs, Mapping) else pairs
    for item in items:
        both = (item, item) if isinstance(item, str) else item
        if not isinstance(both, tuple) or [type(b) for b in both] != [str, str]:
            expected = "a module name or a (student, teacher) tuple of names or regexes"
            raise TypeError(message(_OP, "pairs", expected, _short(item)))
        names = plain_name(both[0], layers[0]), plain_name(both[1], layers[1])
        if names[0] in layers[0] and names[1] in layers[1]:
            chosen.append(names)
        elif isinstance(item, str) or isinstance(pairs, Mapping):
            for side, name, known in zip(("student", "teacher"), names, layers, strict=True):
                if name not in known:
                    expected = f"the name of a module of the {side}"
                    got = repr(name) + suggest(name, known)
                    raise ValueError(message(_OP, "pairs", expected, got))
        else:
            chosen += _match(both, layers)
    return chosen


def _short(x: object) -> str:
    """Return the repr on one line; a module's own would fill the screen."""
    text = " ".join(repr(x).split())
    return text if len(text) <= 80 else f"{text[:80]}…"


def _match(patterns: tuple[str, ...], layers: tuple[Modules, Modules]) -> list[tuple[str, str]]:
    """Pair, in order, the modules whose names the two regexes match in full."""
    found = []
    for side, pattern, known in zip(("student", "teacher"), patterns, layers, strict=True):
        expected = f"the name of a module of the {side}, or a regex that matches some in full"
        bare = re.sub(r"(^|(?<=\.))((module|_orig_mod)\\?\.)+", "", pattern)
        try:
            names = [n for n in known if re.fullmatch(pattern, n)]
            names = names or [n for n in known if re.fullmatch(bare, n)]
        except re.error as error:
            got = f"{pattern!r} ({error})"
            raise ValueError(message(_OP, "pairs", expected, got)) from None
        if not names:
            got = f"{pattern!r}, which matches none" + suggest(pattern, known)
            raise ValueError(message(_OP, "pairs", expected, got))
        found.append(names)
    if len(found[0]) != len(found[1]):
        expected = f"regexes {patterns} with equally many matches"
        raise ValueError(message(_OP, "pairs", expected, f"{found[0]} and {found[1]}"))
    return list(zip(*found, strict=True))


def _check(chosen: Sequence[tuple[str, str, str]], layers: tuple[Modules, Modules]) -> None:
    if not chosen:
        raise ValueError(message(_OP, "pairs", "at least one pair", "none"))
    seen: dict[nn.Module, str] = {}
    for s, t, _ in chosen:
        for side, name, known in (("student", s, layers[0]), ("teacher", t, layers[1])):
            if type(known[name]).forward is nn.Module.forward:
                children = [f"{name}.{child}" for child, _ in known[name].named_children()]
                expected = f"a module of the {side} that runs"
                got = f"a {type(known[name]).__name__}, which never does; pair its children"
                raise ValueError(message(_OP, "pairs", expected, f"{got} {children}", layer=name))
        module = layers[0][s]
        if module in seen:
            got = "it twice" if seen[module] == s else f"it also as {seen[module]!r}"
            raise ValueError(message(_OP, "pairs", "each student layer once", got, layer=s))
        if module is layers[1][t]:
            expected = "different modules in student and teacher"
            raise ValueError(message(_OP, "pairs", expected, "one that they share", layer=s))
        seen[module] = s


# --- what a pair looks like --------------------------------------------------------------------


def _describe(
    chosen: Sequence[tuple[str, str, str]],
    networks: tuple[nn.Module, nn.Module],
    layers: tuple[Modules, Modules],
    example_inputs: Any,
) -> list[LayerPair]:
    """Add shapes and notes, by running the networks if there are inputs for it."""
    if example_inputs is None:
        return [LayerPair(s, t, None, None, why) for s, t, why in chosen]
    looks: list[list[_Look]] = []
    for side, network in enumerate(networks):
        named = [(c[side], layers[side][c[side]]) for c in chosen]
        looks.append(_look(_SIDES[side], network, named, example_inputs))
    described = []
    for (s, t, why), *both in zip(chosen, *looks, strict=True):
        changed = tuple(side for side, look in zip(_SIDES, both, strict=True) if look.changed)
        normed = tuple(side for side, look in zip(_SIDES, both, strict=True) if look.normed)
        shapes = both[0].shape, both[1].shape
        notes = (_mismatch(*shapes), why, _of(changed, _COPIED), _of(normed, _NORMED))
        described.append(LayerPair(s, t, *shapes, "; ".join(filter(None, notes)), changed))
    return described


class _Look(NamedTuple):
    """What was seen of a layer's output in one run of its network."""

    shape: Shape
    changed: bool
    normed: bool


_COPIED = "changed in place later: a copy is kept"
_NORMED = "ends in a norm over channels: map nearly constant, see docs/maths.md"


def _of(sides: tuple[str, ...], text: str) -> str:
    """Say text of both networks, of one, or nothing."""
    return text if len(sides) == 2 else " ".join((*sides, text)) if sides else ""


def _look(
    side: str, network: nn.Module, named: Sequence[tuple[str, nn.Module]], inputs: Any
) -> list[_Look]:
    """Run a network and look at its layers' outputs, when they are produced and at the end."""
    latest: list[tuple[Tensor, int | Tensor]] = []  # a norm's output, and its state

    def norm(_: int, x: Tensor) -> None:
        latest[:] = [(x, _state(x))]

    def note(_: int, x: Tensor) -> tuple[Tensor, int | Tensor, bool]:
        normed = any(_shares(x, y) and not _changed(y, state) for y, state in latest)
        return x, _state(x), normed

    norms = [(name, m) for name, m in named_layers(network).items() if _channel_norm(m)]
    with (
        untouched(network),
        Capture(_OP, norms, norm, lenient=True),  # first, so that a norm itself may be chosen
        Capture(_OP, named, note, argument=side) as capture,
    ):
        run(_OP, network, inputs, side, "example_inputs")
    return [
        _Look(tuple(calls[0][0].shape), any(_changed(x, v) for x, v, _ in calls), calls[-1][2])
        for calls in map(capture.calls, range(len(named)))
    ]


def _shares(x: Tensor, y: Tensor) -> bool:
    """Whether one is a view of the other."""
    return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)


def _state(x: Tensor) -> int | Tensor:
    """Return what tells later whether x was changed in place: inference tensors have no version."""
    return x.clone() if x.is_inference() else x._version


def _changed(x: Tensor, state: int | Tensor) -> bool:
    return not torch.equal(x, state) if isinstance(state, Tensor) else x._version != state


def _channel_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm over one dimension; other people's by name."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def _mismatch(a: Shape, b: Shape) -> str:
    """Say what the attention kind does with two shapes."""
    if min(len(a), len(b)) < 3:
        return "no space axis: maps cannot compare them"
    if len(a) == len(b) == 3:
        hint = "pass channel_dim (-1 for tokens, 1 for signals)"
        few, many = sorted((a[1], b[1]))
        return hint if few == many else f"{hint}; as tokens, maps pooled {many} -> {few}"
    if len(a) == 3 or len(b) == 3:
        folds = [_fold(x) if len(x) == 3 else "None" for x in (a, b)]
        return f"pass tokens=({folds[0]}, {folds[1]})"
    if len(a) != len(b):
        return "different numbers of dimensions: maps cannot compare them"
    space = tuple(map(min, a[2:], b[2:]))
    notes = [
        f"{side}maps pooled {times(x[2:])} -> {times(space)}"
        for side, x in (("student ", a), ("teacher ", b))
        if x[2:] != space
    ]
    notes = [n.split(" ", 1)[1] for n in notes] if len(notes) == 1 else notes
    return "; ".join(notes + ["channels differ: fine, maps compare"] * (a[1] != b[1]))


def _fold(shape: Shape) -> str:
    """Guess (h, w, prefix) of [N, T, D]: the largest square, if few tokens are left over."""
    side = isqrt(shape[1])
    prefix = shape[1] - side * side
    return f"({side}, {side}, {prefix})" if prefix <= 5 else "(h, w, prefix)"


# --- auto --------------------------------------------------------------------------------------


def _auto(
    networks: tuple[nn.Module, nn.Module], layers: tuple[Modules, Modules], inputs: Any
) -> list[tuple[str, str, str]]:
    if inputs is None:
        raise ValueError(message(_OP, "example_inputs", 'inputs to run, for pairs="auto"', "None"))
    found = []
    for side, network, known in zip(("student", "teacher"), networks, layers, strict=True):
        events = _trace(side, network, known, inputs)
        found_here = autopair.candidates(events)
        if not found_here:
            names = [e.name for e in events][:8]
            expected = f"layers of more than one position [N, C, *space] or [N, T, D] in the {side}"
            got = (
                f"none in {type(network).__name__}, where these ran: {names}; "
                "pass pairs=[('student layer', 'teacher layer'), ...]"
            )
            raise ValueError(message(_OP, "pairs='auto'", expected, got))
        found.append(found_here)
    chosen = [(s.name, t.name, f"auto: {s.why} | {t.why}") for s, t in autopair.align(*found)]
    _check(chosen, layers)
    return chosen


def _trace(side: str, network: nn.Module, layers: Modules, inputs: Any) -> list[autopair.Event]:
    """Run a network; list the modules that ran once and put out a tensor with the batch first."""
    unique: dict[nn.Module, str] = {}
    for name, module in layers.items():
        unique.setdefault(module, name)
    named = [(name, module) for module, name in unique.items()]
    events: list[autopair.Event] = []
    weights = 0

    def record(i: int, x: Tensor) -> None:
        nonlocal weights
        name, module = named[i]
        weights += any(p.dim() > 1 for p in module.parameters(recurse=False))
        events.append(autopair.Event(name, module, tuple(x.shape), weights))

    with untouched(network), Capture(_OP, named, record, lenient=True):
        run(_OP, network, inputs, side, "example_inputs")
    calls = Counter(e.name for e in events)
    batch = _batch(inputs)
    return [e for e in events if calls[e.name] == 1 and e.shape[:1] == (batch,)]


def _batch(inputs: Any) -> int | None:
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.dim() else None
    items = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next((x.shape[0] for x in items if isinstance(x, Tensor) and x.dim()), None)
