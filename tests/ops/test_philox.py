"""Signs from counters: the known answers, and that nothing but element, seed, layer and probe
decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lwkd.ops import philox

F = 0xFFFFFFFF
# Of the authors' Random123: key, counter, words.
KNOWN = (
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((F, F), (F, F, F, F), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
)  # fmt: skip


@pytest.mark.parametrize(("key", "counter", "words"), KNOWN)
def test_known_answers(key: tuple[int, int], counter: tuple[int, ...], words: str) -> None:
    got = philox.words(key, [torch.tensor(c) for c in counter])
    assert " ".join(f"{w:08x}" for w in got.tolist()) == words


def plain(element: int, seed: int, layer: int, probe: int) -> int:
    """One sign in Python's own integers."""
    block, bit = divmod(element, 128)
    x = [block & F, block >> 32, layer, probe]
    key = [seed & F, seed >> 32 & F]
    for _ in range(10):
        p, q = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [q >> 32 ^ x[1] ^ key[0], q & F, p >> 32 ^ x[3] ^ key[1], p & F]
        key = [(key[0] + 0x9E3779B9) & F, (key[1] + 0xBB67AE85) & F]
    return 2 * (x[bit // 32] >> bit % 32 & 1) - 1


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1, -1])
def test_signs(seed: int) -> None:
    for shape, layer, probe in (((5, 77), 0, 0), ((129,), philox.OUTPUTS, 3), ((1,), 9, F)):
        got = philox.signs(torch.empty(shape), seed, layer, probe)
        want = [plain(e, seed, layer, probe) for e in range(got.numel())]
        assert got.flatten().tolist() == want


def test_a_shape_takes_the_beginning_of_a_longer_one_in_any_layout() -> None:
    long = philox.signs(torch.empty(1000), 3, 1)
    for like in (torch.empty(10, 70), torch.empty(70, 10).t(), torch.empty(7, 10, 10).bfloat16()):
        got: Tensor = philox.signs(like, 3, 1)
        assert got.dtype == like.dtype
        assert torch.equal(got.flatten().float(), long[: like.numel()])
    assert philox.signs(torch.empty(0, 3), 3, 1).shape == (0, 3)


def test_torchs_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    mean = philox.signs(torch.empty(1 << 20), 1, 2).mean()
    assert torch.equal(before, torch.get_rng_state())
    assert abs(mean) < 5 / 1024
