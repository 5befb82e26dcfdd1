"""A convolution's gradient by its weight, sample by sample: its patches, or the whole.

``form`` are the integers that say what an item is, as ``lwkd.ops.factors.form_of`` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def patches_of(x: Tensor, d: Tensor, form: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Gather the patches of a convolution: of x, or, of a transposed one, of d.

    Returns:
        Both factors, [N, G, T, d_in] and [N, G, T, d_out].
    """
    groups, front = form[1], 5 - d.dim()
    kernel, stride, padding, dilation = (form[3 + 3 * i : 6 + 3 * i] for i in range(4))
    patches, other = (d, x) if form[2] else (x, d)
    for _ in range(front):
        patches, other = patches.unsqueeze(2), other.unsqueeze(2)
    patches = F.pad(patches, [p for p in reversed(padding) for _ in "lr"])
    for k in range(3):
        reach = dilation[k] * (kernel[k] - 1) + 1
        patches = patches.unfold(2 + k, reach, stride[k])[..., :: dilation[k]]
        patches = patches.narrow(2 + k, 0, other.shape[2 + k])
    n, c = patches.shape[:2]
    patches = patches.reshape(n, groups, c // groups, *patches.shape[2:])
    a = patches.permute(0, 1, 3, 4, 5, 2, 6, 7, 8).flatten(5).flatten(2, 4)
    return a, other.reshape(n, groups, other.shape[1] // groups, -1).transpose(2, 3)


def weight_of(x: Tensor, d: Tensor, form: Sequence[int]) -> Tensor:
    """Return every sample's gradient of the weight, [n, ...]: a group of channels a sample."""
    n, groups, transposed, space = len(x), form[1], bool(form[2]), x.dim() - 2
    kernel, stride, padding, dilation = (
        list(form[6 + 3 * i - space : 6 + 3 * i]) for i in range(4)
    )
    if 0 in x.shape or 0 in d.shape:
        return x.new_zeros(n, 1)
    longer = [0] * space
    if transposed:
        for k in range(space):
            reach = dilation[k] * (kernel[k] - 1) + 1
            longer[k] = d.shape[2 + k] - (x.shape[2 + k] - 1) * stride[k] + 2 * padding[k] - reach
    first, second = (x, d) if transposed else (d, x)
    like = x.new_empty(1).expand(n * first.shape[1], second.shape[1] // groups, *kernel)
    images = [z.reshape(1, n * z.shape[1], *z.shape[2:]) for z in (d, x)]
    weight: Tensor = torch.ops.aten.convolution_backward(
        images[0], images[1], like, None, stride, padding, dilation, transposed, longer,
        n * groups, [False, True, False],
    )[1]  # fmt: skip
    return weight.reshape(n, -1)
