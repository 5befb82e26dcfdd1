"""The attention meter against a float64 oracle on plainly captured activations."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lwkd.layers import pair_layers
from lwkd.meters import AttentionMeter
from lwkd.ops import layer_discrepancy
from tests.growth import live_tensors
from tests.test_hooks import Checkpointed, compiled_forms, hooks, net
from tests.test_layers import IMAGE, ResNet, ViT, one_thread, plain

__all__ = ["one_thread"]  # a fixture


# --- oracle ------------------------------------------------------------------------------------


def activations(network, layers, *inputs):
    """The outputs of layers, copied by a hook of the test's own, one list a call."""
    kept = [[] for _ in layers]
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda m, a, out, k=k: k.append((out[0] if isinstance(out, tuple) else out).clone())
        )
        for name, k in zip(layers, kept, strict=True)
    ]
    for x in inputs:
        network(x)
    for handle in handles:
        handle.remove()
    return kept


def amap(x, p=2.0, fold=None):
    x = x.detach().double().abs() ** p
    if fold is not None:
        h, w, prefix = fold
        return x.sum(-1)[:, prefix:].reshape(len(x), h, w)
    return x.sum(1)


def oracle(s, t, divergence="l2", beta=0.5, mask=None):
    """D[n] of two maps [N, *space] in float64, from the definition."""
    space = [min(a, b) for a, b in zip(s.shape[1:], t.shape[1:], strict=True)]
    s, t = (F.adaptive_avg_pool2d(m[:, None], space)[:, 0] for m in (s, t))
    if mask is not None:
        s, t = s * mask, t * mask
    s, t = s.flatten(1), t.flatten(1)
    if divergence == "l2":
        s, t = (m / m.norm(dim=1, keepdim=True).clamp_min(1e-12) for m in (s, t))
        return (s - t).square().sum(1)
    s, t = (m / m.sum(1, keepdim=True) for m in (s, t))
    entropy = lambda q: -torch.xlogy(q, q).sum(1)  # noqa: E731
    return entropy(beta * s + (1 - beta) * t) - beta * entropy(s) - (1 - beta) * entropy(t)


def expected(pairs, student, teacher, *inputs, folds=(None, None), p=2.0, **options):
    out = []
    kept = (
        activations(student, [q.student for q in pairs], *inputs),
        activations(teacher, [q.teacher for q in pairs], *inputs),
    )
    for s, t in zip(*kept, strict=True):
        d = [
            oracle(amap(a, p, folds[0]), amap(b, p, folds[1]), **options)
            for a, b in zip(s, t, strict=True)
        ]
        out.append(torch.cat(d).mean())
    return torch.stack(out)


def close(got, want, rtol=1e-5, atol=1e-7):
    assert got.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return ResNet().eval(), ResNet((1, 2, 1, 1), 6, bottleneck=True).eval()


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"p": 1.0}, {"p": 3.5}, {"divergence": "js"}, {"divergence": "js", "beta": 0.2, "p": 1.0}],
)
def test_distances_equal_the_oracle(networks, options):
    pairs = pair_layers(*networks, example_inputs=IMAGE)
    meter = AttentionMeter(pairs, **options)
    with meter, torch.no_grad():
        [n(IMAGE) for n in networks]
    want = expected(pairs, *networks, IMAGE, **options)
    close(meter.discrepancy(), want, atol=2e-6)
    close(meter.measure(IMAGE), want, atol=2e-6)


def test_pooled_maps_masks_and_float64(networks):
    networks = [n.double() for n in networks]
    x = IMAGE.double()
    pairs = pair_layers(*networks, [("layer1", "layer2"), ("layer3", "layer2")])
    mask = [torch.rand(2, 8, 8) > 0.5, None]
    meter = AttentionMeter(pairs)
    with meter:
        [n(x) for n in networks]
    want = [expected(pairs[:1], *networks, x, mask=mask[0]), expected(pairs[1:], *networks, x)]
    assert meter.discrepancy(mask).dtype == torch.float64
    close(meter.discrepancy(mask), torch.cat(want), rtol=1e-12)
    close(meter.measure(x, mask=mask), torch.cat(want), rtol=1e-12)
    close(meter.discrepancy(), expected(pairs, *networks, x), rtol=1e-12)


def test_it_equals_the_op_on_plain_tensors(networks):
    pairs = pair_layers(*networks, example_inputs=IMAGE)
    kept = [activations(n, pairs.names, IMAGE) for n in networks]
    plainly = layer_discrepancy(*([k[0] for k in side] for side in kept))
    close(AttentionMeter(pairs).measure(IMAGE), plainly.detach().double(), rtol=1e-6)


def test_equal_networks_are_at_exactly_zero(networks):
    twin = ResNet().eval()
    twin.load_state_dict(networks[0].state_dict())
    meter = AttentionMeter(pair_layers(networks[0], twin, example_inputs=IMAGE))
    assert torch.equal(meter.measure(IMAGE), torch.zeros(4))


def test_in_place_relu_after_the_layer(networks):
    """The map is taken on the spot, before the ReLU changes the activation."""
    student, teacher = net(inplace=True), net()
    x = IMAGE[:, :, :8, :8]
    pairs = pair_layers(student, teacher, ["0"])
    close(AttentionMeter(pairs).measure(x), expected(pairs, student, teacher, x))


def test_several_forwards_weigh_by_batch_size(networks):
    pairs = pair_layers(*networks, ["layer1", "layer3"])
    batches = IMAGE, IMAGE[:1], IMAGE[:, :, :32, :32].flip(3)
    meter = AttentionMeter(pairs)
    with meter:
        for x in batches:  # j-th to j-th, in any interleaving
            networks[0](x)
        for x in batches:
            networks[1](x)
    close(meter.discrepancy(), expected(pairs, *networks, *batches))
    masks = [torch.ones(5, 16, 16, dtype=torch.bool), None]
    with meter:
        for x in (IMAGE, IMAGE[:1], IMAGE):
            [n(x) for n in networks]
    masks[0][:, :8] = False
    want = expected(pairs, *networks, IMAGE, IMAGE[:1], IMAGE, mask=None)
    cut = expected(pairs[:1], *networks, IMAGE, IMAGE[:1], IMAGE, mask=masks[0][0])
    close(meter.discrepancy(masks), torch.cat([cut, want[1:]]))


def test_a_shared_module_counts_every_call():
    class Twice(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, 5, 3)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x))))

    nets = Twice(4), Twice(6)
    pairs = pair_layers(*nets, ["relu", "b"])
    close(AttentionMeter(pairs).measure(IMAGE), expected(pairs, *nets, IMAGE))


def test_layers_of_different_batch_sizes():
    class Split(nn.Module):  # as in windowed attention: 2N inside, N outside
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, 5, 3)

        def forward(self, x):
            y = self.a(torch.cat(x.chunk(2, 2)))
            return self.b(torch.cat(y.chunk(2), 2))

    nets = Split(4), Split(6)
    pairs = pair_layers(*nets, ["a", "b"])
    close(AttentionMeter(pairs).measure(IMAGE), expected(pairs, *nets, IMAGE))


def test_an_empty_batch_is_at_zero(networks):
    meter = AttentionMeter(pair_layers(*networks, ["layer1", "layer2"]))
    assert torch.equal(meter.measure(IMAGE[:0]), torch.zeros(2))
    with meter:
        for x in (IMAGE[:0], IMAGE):
            [n(x) for n in networks]
    close(meter.discrepancy(), expected(meter.pairs, *networks, IMAGE))


# --- tokens and channel dimensions -------------------------------------------------------------


def test_tokens_fold_a_vit_onto_a_cnn():
    cnn, vit = ResNet().eval(), ViT(4).eval()
    fold = (8, 8, 1)
    pairs = pair_layers(cnn, vit, [("layer2", "blocks.1"), ("layer3", "blocks.3")])
    got = AttentionMeter(pairs, tokens=(None, fold)).measure(IMAGE)
    close(got, expected(pairs, cnn, vit, IMAGE, folds=(None, fold)))
    pairs = pair_layers(vit, cnn, [("blocks.1", "layer2")])
    got = AttentionMeter(pairs, tokens=(fold, None), channel_dim=(-1, 1)).measure(IMAGE)
    close(got, expected(pairs, vit, cnn, IMAGE, folds=(fold, None)))


def test_token_maps_and_tuple_outputs():
    nets = ViT(2).eval(), ViT(2, 16).eval()
    pairs = pair_layers(*nets, ["blocks.0", "blocks.1.attn"])  # attn returns (output, weights)
    got = AttentionMeter(pairs, channel_dim=-1).measure(IMAGE)
    assert torch.equal(got, AttentionMeter(pairs, channel_dim=[2, (2, -1)]).measure(IMAGE))
    assert torch.equal(got, AttentionMeter(pairs, tokens=((1, 65, 0), (1, 65, 0))).measure(IMAGE))
    close(got, expected(pairs, *nets, IMAGE, folds=((1, 65, 0), (1, 65, 0))))


@pytest.mark.parametrize(
    ("layers", "options", "text"),
    [
        (("blocks.0", "blocks.0"), {}, r"student \(layer 'blocks.0'\): expected channel_dim"),
        (("head", "head"), {}, r"student \(layer 'head'\): expected an output with a space axis"),
        (("blocks.0", "blocks.1"), {"tokens": ((8, 8, 1), (8, 8, 2))},
         r"teacher \(layer 'blocks.1'\): expected tokens \[N, 2 \+ 8·8, D\], got \[2, 65, 8\]"),
        (("blocks.0", "patch_embed.0"), {"channel_dim": (-1, 1)},
         r"teacher \(layer 'patch_embed.0'\): expected 1 space dim.* got 2; tokens="),
        (("blocks.0", "blocks.0"), {"channel_dim": 0}, r"channel_dim.*student's layer 'blocks.0'"),
        (("blocks.0", "blocks.0"), {"channel_dim": 3}, r"channel_dim.*student's layer 'blocks.0'"),
    ],
)  # fmt: skip
def test_outputs_of_a_wrong_shape(layers, options, text):
    nets = ViT(2), ViT(2)
    meter = AttentionMeter(pair_layers(*nets, [layers]), **options)
    with pytest.raises(ValueError, match=text):
        meter.measure(IMAGE)
    assert hooks(*nets) == 0


# --- inside a training step --------------------------------------------------------------------


def test_the_training_step_is_untouched(networks):
    student, teacher = networks
    student.train()
    pairs = pair_layers(student, teacher, example_inputs=IMAGE)
    grads = []
    for measured in (False, True):
        twin = ResNet()
        twin.load_state_dict(student.state_dict())
        meter = AttentionMeter(pair_layers(twin, teacher, pairs.names))
        loss = None
        if measured:
            with meter:
                loss = twin(IMAGE).square().sum()
                with torch.inference_mode():
                    teacher(IMAGE)
            assert not meter.discrepancy().requires_grad
        else:
            loss = twin(IMAGE).square().sum()
        loss.backward()
        grads.append([p.grad for p in twin.parameters()] + list(twin.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    nets = plain(4), plain(8)
    pairs = pair_layers(*nets, example_inputs=IMAGE)
    meter = AttentionMeter(pairs)
    with torch.autocast("cpu", dtype):
        with meter:
            nets[0](IMAGE).sum().backward()
            nets[1](IMAGE)
        d = meter.discrepancy()
        want = expected(pairs, *nets, IMAGE)  # from the same half-precision activations
    assert d.dtype == torch.float32
    close(d, want, rtol=1e-4, atol=1e-6)
    close(AttentionMeter(pair_layers(nets[0].to(dtype), nets[1].to(dtype), ["0"])).measure(
        IMAGE.to(dtype)), expected(pairs[:1], *nets, IMAGE.to(dtype)), rtol=1e-4)  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    """Fault 19: a backward pass inside the block adds no calls; gradients are the same."""
    student, teacher = Checkpointed(reentrant), Checkpointed(reentrant)
    pairs = pair_layers(student, teacher, ["body.1", "body.2"])
    x = IMAGE[:, :, :8, :8].clone().requires_grad_()
    student(x).square().sum().backward()
    want = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    meter = AttentionMeter(pairs)
    with meter:
        student(x).square().sum().backward()
        teacher(x).sum().backward()
    close(meter.discrepancy(), expected(pairs, student, teacher, x))
    assert all(torch.equal(p.grad, w) for p, w in zip(student.parameters(), want, strict=True))


def test_ddp_wrapped_networks(networks, ddp):
    student, teacher = networks
    wrapped = ddp(student)
    meter = AttentionMeter(pair_layers(wrapped, teacher, ["module.layer1", "layer4"]))
    with meter:
        wrapped(IMAGE).sum().backward()
        teacher(IMAGE)
    close(meter.discrepancy(), expected(meter.pairs, student, teacher, IMAGE))
    close(meter.measure(IMAGE), expected(meter.pairs, student, teacher, IMAGE))
    assert hooks(wrapped, teacher) == 0


def test_no_value_is_read_on_the_host(networks):
    """Fault 26: everything up to the distances works on tensors that have no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        nets = plain(4), plain(8)
        meter = AttentionMeter(pair_layers(*nets, ["1", "4"]))
        x = torch.empty(2, 3, 16, 16)
        with meter:
            [n(x) for n in nets]
        assert meter.discrepancy().shape == (2,)


# --- when and what -----------------------------------------------------------------------------


def test_every_kth_block_is_due_and_the_others_install_nothing(networks):
    meter = AttentionMeter(pair_layers(*networks, ["layer1"]), every=3)
    due = []
    for _ in range(7):
        with meter:
            due.append(hooks(*networks) > 0)
            [n(IMAGE) for n in networks]
        assert (meter.discrepancy() is not None) == due[-1]
        assert hooks(*networks) == 0
    assert due == [True, False, False, True, False, False, True]
    assert meter.state_dict() == {"calls": 7}
    other = AttentionMeter(meter.pairs, every=3)
    other.load_state_dict({"calls": 5})
    for expects in (False, True):
        with other:
            assert (hooks(*networks) > 0) == expects


@pytest.mark.parametrize(
    "state", [{}, {"calls": -1}, {"calls": 1.0}, {"calls": True}, {"calls": 1, "more": 2}, 3, None]
)
def test_a_wrong_state_is_refused(networks, state):
    meter = AttentionMeter(pair_layers(*networks, ["layer1"]))
    with pytest.raises(
        ValueError, match=r"load_state_dict: state: expected \{\"calls\": int ≥ 0\}"
    ):
        meter.load_state_dict(state)
    assert meter.state_dict() == {"calls": 0}


def test_discrepancy_at_the_wrong_time(networks):
    meter = AttentionMeter(pair_layers(*networks, ["layer1"]))
    with pytest.raises(RuntimeError, match=r"AttentionMeter.discrepancy: .* got no such block"):
        meter.discrepancy()
    for _ in range(2):
        with meter:
            [n(IMAGE) for n in networks]
            with pytest.raises(RuntimeError, match="got one inside the block"):
                meter.discrepancy()
            with pytest.raises(RuntimeError, match="call outside the block"):
                meter.measure(IMAGE)
    first = meter.discrepancy()
    meter.measure(IMAGE.flip(3))  # is no block
    assert torch.equal(first, meter.discrepancy())  # twice is the same
    assert meter.state_dict() == {"calls": 2}


def test_an_exception_drops_the_block_and_is_not_counted(networks):
    meter = AttentionMeter(pair_layers(*networks, ["layer1"]), every=2)

    def raising():
        with meter:
            networks[0](IMAGE)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        raising()
    assert hooks(*networks) == 0
    assert meter.state_dict() == {"calls": 0}
    with pytest.raises(RuntimeError, match="no such block"):
        meter.discrepancy()
    with meter:  # the block that failed is still due
        [n(IMAGE) for n in networks]
    assert meter.discrepancy() is not None


def test_re_entry_is_refused(networks):
    meter = AttentionMeter(pair_layers(*networks, ["layer1"]), every=2)
    for _ in range(2):  # due and not due
        with pytest.raises(RuntimeError, match="one entry at a time, got a second"), meter:
            meter.__enter__()
        assert hooks(*networks) == 0
        with meter:
            [n(IMAGE) for n in networks]


def test_two_meters_at_once(networks):
    pairs = pair_layers(*networks, ["layer1", "layer2"])
    meters = AttentionMeter(pairs), AttentionMeter(pairs[1:], divergence="js")
    with meters[0], meters[1]:
        [n(IMAGE) for n in networks]
    close(meters[0].discrepancy(), expected(pairs, *networks, IMAGE))
    close(meters[1].discrepancy(), expected(pairs[1:], *networks, IMAGE, divergence="js"),
          atol=1e-6)  # fmt: skip
    assert hooks(*networks) == 0


def test_calls_that_do_not_match(networks):
    meter = AttentionMeter(pair_layers(*networks, [("layer1", "layer2")]))
    with meter:
        networks[0](IMAGE), networks[0](IMAGE), networks[1](IMAGE)
    with pytest.raises(RuntimeError, match=r"'layer2'\): expected 2 call\(s\), .*'layer1', got 1"):
        meter.discrepancy()
    with meter:
        networks[0](IMAGE)
    with pytest.raises(RuntimeError, match=r"AttentionMeter: teacher \(layer 'layer2'\): .*to run"):
        meter.discrepancy()
    with meter:
        networks[0](IMAGE), networks[1](IMAGE[:1])
    with pytest.raises(
        ValueError, match=r"teacher \(layer 'layer2'\): expected batch size 2, .* 1"
    ):
        meter.discrepancy()


def test_wrong_masks(networks):
    meter = AttentionMeter(pair_layers(*networks, ["layer1", "layer2"]))
    for mask, text in (
        ([None], "mask: expected a list of 2, one a layer, got 1"),
        (torch.ones(2, 8, 8) > 0, "mask: expected a list of 2, one a layer, got Tensor"),
        (3, "mask: expected a list of 2, one a layer, got int"),
        ([None, torch.ones(3, 8, 8) > 0], r"mask \(layer 'layer2'\): expected None or bool \[2, "),
        (
            [torch.ones(2, 8, 8) > 0, None],
            r"'layer1'\): expected None or bool \[2, 16, 16\]",
        ),
        ([torch.ones(2, 16, 16), None], r"mask \(layer 'layer1'\): .* got torch.float32"),
        ([None, 3], r"AttentionMeter: mask \(layer 'layer2'\): expected None or bool .* got int"),
    ):
        with pytest.raises(ValueError, match=text):
            meter.measure(IMAGE, mask=mask)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"p": 0.5}, "AttentionMeter: p: expected .*≥ 1, got 0.5"),
        ({"beta": 1.0}, "AttentionMeter: beta"),
        ({"divergence": "kl"}, "AttentionMeter: divergence: .*got 'kl'"),
        ({"every": 0}, "AttentionMeter: every: expected an int ≥ 1, got 0"),
        ({"every": 1.5}, "AttentionMeter: every"),
        ({"every": True}, "AttentionMeter: every: expected an int ≥ 1, got True"),
        ({"backend": "cuda"}, "AttentionMeter: backend: expected None or one of .* got 'cuda'"),
        (
            {"tokens": 5},
            r"AttentionMeter: tokens: expected None or a \(student, teacher\) pair, .* got 5",
        ),
        ({"tokens": ((8, 8, 1),)}, r"AttentionMeter: tokens: .* \(student, teacher\) pair, each"),
        ({"tokens": ((8, 8), None)}, "AttentionMeter: tokens"),
        ({"tokens": ((0, 8, 1), None)}, "AttentionMeter: tokens"),
        (
            {"channel_dim": [1, 1]},
            "AttentionMeter: channel_dim: expected a list of 1, one a layer, got 2",
        ),
        ({"channel_dim": (1, 1, 1)}, "AttentionMeter: channel_dim"),
        ({"channel_dim": "1"}, "AttentionMeter: channel_dim"),
    ],
)
def test_wrong_options(networks, options, text):
    kind = TypeError if options.get("channel_dim") == "1" else ValueError
    with pytest.raises(kind, match=text):
        AttentionMeter(pair_layers(*networks, ["layer1"]), **options)


def test_wrong_pairs_and_backends(networks):
    with pytest.raises(TypeError, match=r"AttentionMeter: pairs: expected LayerPairs, .*list"):
        AttentionMeter(["layer1"])  # type: ignore[arg-type]
    pairs = pair_layers(*networks, ["layer1"])
    reference = AttentionMeter(pairs, backend="reference").measure(IMAGE)
    close(reference, expected(pairs, *networks, IMAGE))


# --- measure, compiled networks, memory --------------------------------------------------------


@pytest.mark.parametrize("form", ["whole", "inner", "compile()", "forward"])
def test_compiled_networks_raise_in_a_block_and_can_be_measured(form):
    network, _ = compiled_forms()[form]
    original = network._orig_mod if form == "whole" else network
    teacher, x = net(), IMAGE[:, :, :8, :8]
    meter = AttentionMeter(pair_layers(network, teacher, ["1", "3"]))
    with pytest.raises(RuntimeError, match=r"AttentionMeter: student.*call \.measure\(\)"), meter:
        pytest.fail("entered")
    assert hooks(original, teacher) == 0
    assert meter.state_dict() == {"calls": 0}
    meter.load_state_dict({"calls": 1})  # nor in a block that is not due
    meter.every = 2
    with pytest.raises(RuntimeError, match=r"AttentionMeter: student.*call \.measure\(\)"), meter:
        pytest.fail("entered")
    network(x)
    own = original.__dict__.get("forward"), original[2].__dict__.get("_compiled_call_impl")
    got = meter.measure(x)
    assert own == (
        original.__dict__.get("forward"), original[2].__dict__.get("_compiled_call_impl"),
    )  # fmt: skip
    plainly = nn.Sequential(*(getattr(m, "_orig_mod", m) for m in original))
    with torch.compiler.set_stance("force_eager"):
        close(got, expected(meter.pairs, plainly, teacher, x))
    torch._dynamo.reset()


def test_measure_leaves_everything_as_it_was(networks):
    student, teacher = networks
    student.train()
    student.layer1.eval()
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    meter = AttentionMeter(pair_layers(student, teacher, ["layer1", "layer2"]))

    def state():
        values = [v.clone() for n in networks for v in n.state_dict().values()]
        return (
            [torch.get_rng_state(), *values],
            [m.training for n in networks for m in n.modules()],
            [id(p.grad) for n in networks for p in n.parameters()],
            hooks(*networks), torch.is_grad_enabled(),
        )  # fmt: skip

    before = state()
    for inputs, error in (
        (IMAGE, None), (IMAGE[:, :2], RuntimeError), (3, TypeError), ([IMAGE], TypeError)
    ):  # fmt: skip
        if error is None:
            assert not meter.measure(inputs, target=torch.zeros(2), loss_fn=None).requires_grad
        else:
            with pytest.raises(error):
                meter.measure(inputs)
        after = state()
        assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        assert before[1:] == after[1:]


def test_no_activation_stays_alive(networks):
    """Fault 18: of each activation there is one float a position left."""
    meter = AttentionMeter(pair_layers(*networks, ["layer1", "layer2"]))
    gc.collect()
    old = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    with meter:
        [n(IMAGE) for n in networks]
    new = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in old]
    assert sorted(tuple(t.shape) for t in new) == [(2, 8, 8)] * 2 + [(2, 16, 16)] * 2
    assert all(t.untyped_storage().nbytes() == t.numel() * 4 and t.grad_fn is None for t in new)


def test_nothing_accumulates_over_ten_thousand_steps():
    """Fault 18: with gradients, without, with a second-order graph, and after exceptions."""
    nets = [nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU()) for _ in range(2)]
    meter = AttentionMeter(pair_layers(*nets, ["1"]), channel_dim=1, every=2)
    x = torch.ones(1, 1, 2)

    def step(i):
        try:
            with meter, torch.set_grad_enabled(i % 3 > 0):
                loss = nets[0](x).square().sum()
                nets[1](x)
                if i % 7 == 0:
                    raise ArithmeticError
            if i % 3 > 0:
                torch.autograd.grad(loss, nets[0][0].weight, create_graph=i % 5 == 0)
            meter.discrepancy()
        except ArithmeticError:
            pass

    for i in range(99):
        step(i)
    before = live_tensors()
    for i in range(99, 10_000):
        step(i)
    assert live_tensors() <= before + 2  # the two maps of the last block
    assert hooks(*nets) == 0
