"""How modules factor: every parameter's gradient, sample by sample, against torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations

from lwkd import factoring
from lwkd.ops import ConvFactors, Factors, layer_discrepancy
from tests import cases
from tests.ops.test_factors import distance, gradient

F64 = torch.float64
N = 3


def draw(*shape: int, seed: int = 1) -> Tensor:
    return cases.draw(shape, F64, seed)


def rows(*shape: int, high: int = 6) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


def evaluated(module: nn.Module) -> nn.Module:
    """In eval mode, with running statistics that say something."""
    for name, buffer in module.named_buffers():
        if name in ("running_mean", "running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(3)) + 0.5)
    return module.eval()


class Scaled(nn.Linear):
    """A Linear with a forward of its own: what it does is not in the table."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x).tanh()


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift).sin()


# name: (module, input): what factors.
TABLE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | Tensor]] = {
    "Linear": (lambda: nn.Linear(4, 5), (N, 4)),
    "Linear, tokens": (lambda: nn.Linear(4, 5), (N, 7, 4)),
    "Linear, a grid of tokens": (lambda: nn.Linear(4, 5, bias=False), (N, 2, 3, 4)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3, 2, 1), (N, 3, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), (N, 3, 6, 5)),
    "Conv2d, everything": (
        lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (2, 1), (1, 2), 2), (N, 4, 7, 6)
    ),
    "Conv2d, same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (N, 2, 5, 6)),
    "Conv2d, valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (N, 2, 5, 6)),
    "Conv2d, reflect": (
        lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (N, 2, 5, 6)
    ),
    "Conv2d, circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (N, 2, 5, 6)
    ),
    "Conv1d, replicate": (
        lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="replicate"), (N, 2, 8)
    ),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, 1, 1, groups=4), (N, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), 1, (0, 1, 1)), (N, 2, 3, 4, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 4, 2, 1), (N, 3, 5)),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2, dilation=2),
        (N, 4, 3, 4),
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, (1, 2, 1)), (N, 2, 2, 3, 2)),
    "Embedding": (lambda: nn.Embedding(6, 4), rows(N, 7)),
    "Embedding, padded": (lambda: nn.Embedding(6, 4, padding_idx=2), rows(N, 2, 5)),
    "LayerNorm": (lambda: nn.LayerNorm(6), (N, 5, 6)),
    "LayerNorm of everything": (lambda: nn.LayerNorm((2, 3)), (N, 2, 3)),
    "LayerNorm, two dimensions": (lambda: nn.LayerNorm((2, 3), eps=0.1), (N, 4, 2, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (N, 5, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (N, 6, 4, 3)),
    "BatchNorm1d": (lambda: evaluated(nn.BatchNorm1d(5)), (N, 5)),
    "BatchNorm1d, a line": (lambda: evaluated(nn.BatchNorm1d(5)), (N, 5, 4)),
    "BatchNorm2d": (lambda: evaluated(nn.BatchNorm2d(3, eps=0.1)), (N, 3, 4, 2)),
    "BatchNorm3d": (lambda: evaluated(nn.BatchNorm3d(2)), (N, 2, 2, 3, 2)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True), (N, 3, 4, 5)),
    "InstanceNorm1d, fixed": (
        lambda: evaluated(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)), (N, 3, 6)
    ),
}  # fmt: skip
# What takes torch.func.
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a forward of its own": (lambda: Scaled(4, 5), (N, 4)),
    "parameters of its own": (Own, (N, 5)),
    "PReLU": (lambda: nn.PReLU(3), (N, 3, 4)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), (N, 2, 5, 5)),
    "spectral_norm, frozen": (
        lambda: parametrizations.spectral_norm(nn.Linear(4, 5)).eval(), (N, 4)
    ),
}  # fmt: skip


def per_sample(module: nn.Module, x: Tensor, d: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient [N, ...], by torch.func."""
    params = {n: p.detach() for n, p in module.named_parameters()}

    def scalar(p: dict[str, Tensor], x: Tensor, d: Tensor) -> Tensor:
        return (functional_call(module, p, (x[None],)) * d[None]).sum()

    return vmap(grad(scalar), in_dims=(None, 0, 0))(params, x, d)


def check(module: nn.Module, x: Tensor) -> dict[str, Any]:
    module = module.double()
    out = module(x)
    d = draw(*out.shape, seed=9)
    items = factoring.factor("test", "layer", module, [x], d)
    want = per_sample(module, x, d)
    assert items.keys() == want.keys()
    for name, item in items.items():
        g = gradient(item, 6)
        torch.testing.assert_close(g, want[name].flatten(1), rtol=1e-10, atol=1e-12)
    return items


@pytest.mark.parametrize("name", TABLE)
def test_modules_that_factor(name: str) -> None:
    torch.manual_seed(0)
    make, shape = TABLE[name]
    module = make()
    assert factoring.supports(module)
    items = check(module, shape if isinstance(shape, Tensor) else draw(*shape))
    assert all(isinstance(item, (Factors, ConvFactors)) for item in items.values())


@pytest.mark.parametrize("name", OTHERS)
def test_modules_that_do_not(name: str) -> None:
    torch.manual_seed(0)
    make, shape = OTHERS[name]
    module = make()
    assert not factoring.supports(module)
    check(module, draw(*shape))


# --- multi-head attention: its projections are used without their modules ------------------------

_PADDED = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
_CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
# name: (how it is made, tokens of query, key and value: the same where equal, how it is called)
ATTENTION: dict[str, tuple[dict[str, Any], tuple[int, int, int], dict[str, Any]]] = {
    "self": ({}, (5, 5, 5), {}),
    "self, no weights asked for": ({}, (5, 5, 5), {"need_weights": False}),
    "self, no bias": ({"bias": False}, (5, 5, 5), {}),
    "padded": ({}, (5, 5, 5), {"key_padding_mask": _PADDED}),
    "padded by numbers": ({}, (5, 5, 5), {"key_padding_mask": draw(N, 5, seed=7)}),
    "causal": ({}, (5, 5, 5), {"attn_mask": _CAUSAL, "is_causal": True, "need_weights": False}),
    "both masks": ({}, (5, 5, 5), {"attn_mask": _CAUSAL, "key_padding_mask": _PADDED}),
    "a mask a head": ({}, (5, 5, 5), {"attn_mask": draw(2 * N, 5, 5, seed=8)}),
    "cross": ({}, (5, 4, 4), {}),
    "cross, as long": ({}, (5, -5, -5), {}),
    "cross, no bias": ({"bias": False}, (3, 6, 6), {}),
    "keys with positions": ({}, (5, 5, -5), {}),
    "widths of their own": ({"kdim": 6, "vdim": 7}, (5, 4, 4), {}),
    "dropout, evaluated": ({"dropout": 0.5}, (5, 5, 5), {}),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_multi_head_attention(name: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    options, tokens, keywords = ATTENTION[name]
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).double().eval()
    assert factoring.supports(module)
    widths = (8, module.kdim, module.vdim)
    drawn = {(t, w): draw(N, abs(t), w, seed=t + w) for t, w in zip(tokens, widths, strict=True)}
    sides = [drawn[key] for key in zip(tokens, widths, strict=True)]
    if not batch_first:
        drawn = {key: x.transpose(0, 1) for key, x in drawn.items()}
        sides = [drawn[key] for key in zip(tokens, widths, strict=True)]
    out = module(*sides, **keywords)[0]
    d = draw(*out.shape, seed=9)
    items = factoring.factor("test", "attention", module, sides, d, keywords=keywords)
    assert list(items) == [n for n, _ in module.named_parameters()]
    for n in range(N):
        one = torch.zeros_like(d)
        if batch_first:
            one[n] = d[n]
        else:
            one[:, n] = d[:, n]
        out = module(*sides, **keywords)[0]
        want = torch.autograd.grad(out, list(module.parameters()), one)
        for item, w in zip(items.values(), want, strict=True):
            torch.testing.assert_close(gradient(item)[n], w.flatten(), rtol=1e-9, atol=1e-12)


def test_attention_called_by_keywords() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x, d = draw(N, 5, 8), draw(N, 5, 8, seed=9)
    given = {"query": x, "key": x, "value": x}
    items = factoring.factor("test", "attention", module, [], d, keywords=given)
    want = factoring.factor("test", "attention", module, [x, x, x], d)
    for name, item in items.items():
        assert torch.equal(gradient(item), gradient(want[name]))


def test_attention_that_does_not_factor() -> None:
    """What is appended to keys and values goes to torch.func; what is random, nowhere."""
    torch.manual_seed(0)
    x, d = draw(N, 5, 8), draw(N, 5, 8, seed=9)
    module = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True).double()
    assert not factoring.supports(module)
    items = factoring.factor("test", "attention", module, [x, x, x], d)
    assert items.keys() == dict(module.named_parameters()).keys()
    random = nn.MultiheadAttention(8, 2, 0.5, batch_first=True).double()
    with pytest.raises(RuntimeError, match=r"module \(layer 'attention'\): .*randomness"):
        factoring.factor("test", "attention", random, [x, x, x], d)
    with pytest.raises(ValueError, match=r"query \(layer 'attention'\): expected a query of three"):
        factoring.factor("test", "attention", random.eval(), [x[0]] * 3, d[0])


@pytest.mark.parametrize("make", [Own, lambda: nn.MultiheadAttention(5, 1, batch_first=True)])
def test_under_autocast_the_parameters_dtype_counts(make: Callable[[], nn.Module]) -> None:
    """The input and the gradient are those of the forward, in bfloat16."""
    torch.manual_seed(0)
    module = make()
    x, d = draw(N, 4, 5).bfloat16(), draw(N, 4, 5, seed=9).bfloat16()
    inputs = [x] if isinstance(module, Own) else [x, x, x]
    items = factoring.factor("test", "layer", module, inputs, d)
    with torch.autocast("cpu", torch.bfloat16):
        inside = factoring.factor("test", "layer", module, inputs, d)
    wide = factoring.factor("test", "layer", module, [z.float() for z in inputs], d.float())
    for name, item in items.items():
        assert item.d.dtype == torch.float32
        assert torch.equal(gradient(item), gradient(wide[name]))
        assert torch.equal(gradient(item), gradient(inside[name]))


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(4, 5).double()
    module.weight.requires_grad_(False)
    assert factoring.factor("test", "fc", module, [draw(N, 4)], draw(N, 5)).keys() == {"bias"}
    module = Own()
    module.scale.requires_grad_(False)
    assert factoring.factor("test", "own", module, [draw(N, 5)], draw(N, 5)).keys() == {"shift"}


def test_old_weight_norm_is_seen() -> None:
    """Its weight is no parameter: what factors would be lost in silence."""
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.Linear(4, 5))
    assert not factoring.supports(module)


# --- a parameter that is used more than once -----------------------------------------------------


def test_a_module_called_twice() -> None:
    for module, shapes in (
        (nn.Linear(4, 5), ((N, 4), (N, 3, 4))),
        (nn.Conv2d(2, 3, 3, padding=1), ((N, 2, 5, 5), (N, 2, 4, 6))),
        (nn.ConvTranspose2d(2, 3, 3), ((N, 2, 2, 2), (N, 2, 3, 2))),
        (nn.LayerNorm(4), ((N, 5, 4), (N, 2, 4))),
    ):
        module = module.double()
        calls, want = [], []
        for k, shape in enumerate(shapes):
            x = draw(*shape, seed=k)
            d = draw(*module(x).shape, seed=5 + k)
            calls.append(factoring.factor("test", "m", module, [x], d))
            want.append(per_sample(module, x, d))
        for name in calls[0]:
            item = factoring.add([items[name] for items in calls])
            g = sum(w[name].flatten(1) for w in want)
            got = gradient(item)
            if isinstance(module, nn.ConvTranspose2d) and name == "weight":
                assert got.shape == g.shape
                got, g = got.norm(dim=1), g.norm(dim=1)  # unfolded, its order is another
            torch.testing.assert_close(got, g, rtol=1e-10, atol=1e-12)


def test_a_weight_tied_to_an_embedding() -> None:
    emb, head = nn.Embedding(6, 4).double(), nn.Linear(4, 6, bias=False).double()
    head.weight = emb.weight
    x, d = rows(N, 7), draw(N, 7, 6)
    h = emb(x).detach()
    first = factoring.factor("test", "emb", emb, [x], d @ head.weight.detach())["weight"]
    second = factoring.factor("test", "head", head, [h], d)["weight"]
    item = factoring.add([first, second])

    def scalar(weight: Tensor, x: Tensor, d: Tensor) -> Tensor:
        return (F.linear(F.embedding(x, weight), weight) * d).sum()

    want = vmap(grad(scalar), in_dims=(None, 0, 0))(emb.weight.detach(), x, d)
    torch.testing.assert_close(gradient(item), want.flatten(1), rtol=1e-10, atol=1e-12)


# --- whole networks: all factors from one backward pass ------------------------------------------


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.norm = evaluated(nn.BatchNorm2d(width))
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.down = nn.Conv2d(width, 2 * width, 1, 2)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.conv(x).relu_()
        return self.head(self.down(x).flatten(2).mean(2))


class Encoder(nn.Module):
    """Of torch's own layers, the mask by keyword; the second of them has another layout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, width, 2, 2)
        self.first = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
        self.mix = nn.MultiheadAttention(width, 3, 0.0, kdim=width, vdim=width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        # Of x's dtype: torch's fused attention reads a mask of another one as if it were of that.
        x = self.first(x, src_mask=x.new_ones(x.shape[1], x.shape[1]).triu(1))
        x = x.transpose(0, 1)
        x = x + self.mix(x[:4], key=x, value=x, need_weights=False)[0].mean(0)
        return self.head(x.mean(0))


class Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(2, width, 2, 2)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        q, k, v = self.qkv(self.norm1(x)).chunk(3, 2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def items_of(net: nn.Module, x: Tensor, v: Tensor) -> dict[str, Any]:
    """The items of every module's parameters, a tuple a module, by hooks on tensors."""
    calls: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def run(module: nn.Module, inputs: Any, out: Tensor) -> None:
            kept = [z.detach().clone() for z in inputs]
            out.register_hook(lambda g: calls.__setitem__(name, (module, kept, g)))

        return run

    handles = [m.register_forward_hook(hook(n)) for n, m in net.named_modules()
               if not list(m.children())]  # fmt: skip
    (net(x) * v).sum().backward()
    for handle in handles:
        handle.remove()
    for p in net.parameters():
        p.grad = None
    return {
        name: tuple(factoring.factor("test", name, m, kept, g).values())
        for name, (m, kept, g) in calls.items()
    }


@pytest.mark.parametrize("kind", [Residual, Transformer])
def test_a_network(kind: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    nets = [kind(6).double() for _ in "st"]
    x, v = draw(N, 2, 6, 6), draw(N, 4, seed=4).sign()
    sides = [items_of(net, x, v) for net in nets]
    got = layer_discrepancy(
        list(sides[0].values()), list(sides[1].values()), kind="jacobian", reduction="none"
    )
    full = [per_sample(net, x, v) for net in nets]
    order = list(sides[0])
    assert len(order) >= 5
    for i, layer in enumerate(order):
        flat = [
            torch.cat([g.flatten(1) for n, g in grads.items() if n.rsplit(".", 1)[0] == layer], 1)
            for grads in full
        ]
        torch.testing.assert_close(got[i], distance(*flat, "normalized"), rtol=1e-9, atol=1e-13)


# --- bad input ---------------------------------------------------------------------------------


def test_coupled_samples() -> None:
    for module in (nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False).eval()):
        text = r"lwkd\.test: module \(layer 'bn'\): expected BatchNorm in eval mode.*coupled"
        with pytest.raises(ValueError, match=text):
            factoring.factor("test", "bn", module, [torch.rand(N, 3, 2, 2)], torch.rand(N, 3, 2, 2))


def test_what_torch_func_cannot_take() -> None:
    class Branches(Own):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    text = r"lwkd\.test: module \(layer 'b'\): expected a module that torch.func can run"
    with pytest.raises(RuntimeError, match=text):
        factoring.factor("test", "b", Branches(), [torch.rand(N, 5)], torch.rand(N, 5))


def test_an_output_without_the_batch_first() -> None:
    text = r"output \(layer 'fc'\): expected an output with the batch, 3, first"
    with pytest.raises(ValueError, match=text):
        factoring.factor("test", "fc", nn.Linear(4, 5), [torch.rand(3, 4)], torch.rand(2, 5))
