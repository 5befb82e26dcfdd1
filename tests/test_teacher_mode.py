"""A teacher that somebody has left in train mode is put in eval mode, and that is said once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from lwkd import AttentionMeter, HessianMeter, JacobianMeter, LayerPairs, pair_layers

Block = Callable[[LayerPairs], AbstractContextManager[Any]]
BLOCKS: dict[str, Block] = {
    "LayerPairs.capture": lambda pairs: pairs.capture(),
    "AttentionMeter": AttentionMeter,
    "JacobianMeter": lambda pairs: JacobianMeter(pairs, projection="loss"),
    "HessianMeter": HessianMeter,
}


def network(width: int) -> nn.Module:
    body = [nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(36 * width, 3))


@pytest.mark.parametrize("op", BLOCKS)
def test_it_is_put_in_eval_mode_and_said_once(op: str) -> None:
    student, teacher = network(4), network(4)
    pairs = pair_layers(student, teacher, ["0"])
    assert teacher.training  # pairing alone changes nothing
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with BLOCKS[op](pairs):
            assert not any(m.training for m in teacher.modules())
            assert all(m.training for m in student.modules())
            _ = [net(torch.rand(2, 1, 8, 8)) for net in (student, teacher)]
    assert len(said) == 1
    assert re.match(rf"lwkd\.{op}: teacher: .*train mode: .*eval", str(said[0].message))
    assert int(teacher[1].num_batches_tracked) == 0
    teacher.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with BLOCKS[op](pairs):
            assert not teacher.training  # again, without a word


@pytest.mark.parametrize("op", BLOCKS)
def test_a_module_of_it_in_train_mode(op: str) -> None:
    """The teacher itself is in eval mode, one BatchNorm in it is not."""
    student, teacher = network(4), network(4).eval()
    teacher[1].train()
    pairs = pair_layers(student, teacher, ["0"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with BLOCKS[op](pairs):
            assert not any(m.training for m in teacher.modules())
            _ = [net(torch.rand(2, 1, 8, 8)) for net in (student, teacher)]
    assert len(said) == 1
    assert re.match(rf"lwkd\.{op}: teacher \(layer '1'\): .*train mode", str(said[0].message))
    assert int(teacher[1].num_batches_tracked) == 0


def test_a_teacher_that_is_trained_too() -> None:
    student, teacher = network(4), network(4)
    pairs = pair_layers(student, teacher, ["0", "2"], teacher_trains=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for some in (pairs, pairs[:1]):
            with some.capture() as features:
                _ = [net(torch.rand(2, 1, 8, 8)) for net in (student, teacher)]
            assert teacher.training
            assert len(features.teacher) == len(some)
    with pytest.raises(TypeError, match=r"lwkd\.pair_layers: teacher_trains: "):
        pair_layers(student, teacher, ["0"], teacher_trains="yes")  # type: ignore[arg-type]


def test_what_the_student_shares_stays_in_train_mode() -> None:
    """Two heads on one body, and a student that holds its own teacher."""
    student = network(4)
    teacher = nn.Sequential(*student[:5], nn.Linear(144, 3))
    pairs = pair_layers(student, teacher, [("0", "5")])
    with pytest.warns(UserWarning, match="train mode"):
        pairs.capture()
    assert [m.training for m in teacher] == [True] * 5 + [False]
    assert all(m.training for m in student.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs.capture()  # in train mode is only what the student shares
    holder = nn.ModuleDict({"own": network(4), "teacher": network(4)})
    pairs = pair_layers(holder, holder["teacher"], [("own.0", "0")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs.capture()
    assert all(m.training for m in holder.modules())
