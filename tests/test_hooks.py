"""Hooks live as long as their with-block, on every path; kept activations are right or raise."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lwkd.hooks import COMPILED, Capture, compiled_module, first_tensor, run, untouched
from lwkd.layers import pair_layers
from tests.growth import live_tensors
from tests.test_layers import one_thread

__all__ = ["one_thread"]  # a fixture

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(inplace=False):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()
    )  # fmt: skip


def hooks(*networks):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        + len(m._forward_hooks_with_kwargs) + len(m._forward_hooks_always_called)
        for n in networks for m in n.modules()
    )  # fmt: skip


def shapes(op, *modules):
    return Capture(op, [(str(i), m) for i, m in enumerate(modules)], lambda i, x: tuple(x.shape))


def fail(*_):
    raise ArithmeticError


class Checkpointed(nn.Module):
    """Body under activation checkpointing."""

    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.body, self.reentrant = nn.Conv2d(3, 3, 1), net(), reentrant

    def forward(self, x):
        return checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant)


# --- Capture -----------------------------------------------------------------------------------


def test_every_call_is_recorded_in_order_and_hooks_go():
    n = net()
    with shapes("op", n[1], n[3]) as capture:
        assert hooks(n) == 2
        n(X)
        n(X[:1])
    assert hooks(n) == 0
    n(X)
    assert capture.calls(0) == [(4, 4, 8, 8), (1, 4, 8, 8)]
    assert capture.calls(1) == [(4, 5, 8, 8), (1, 5, 8, 8)]


def test_a_shared_module_has_one_record_a_call():
    relu = nn.ReLU()
    n = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 5, 3), relu)
    with shapes("op", relu) as capture:
        n(X)
    assert capture.calls(0) == [(4, 4, 6, 6), (4, 5, 4, 4)]


def test_the_hooks_of_others_stay():
    n, seen = net(), []
    handle = n[1].register_forward_hook(lambda *_: seen.append(1))
    with shapes("op", n[1]):
        n(X)
    assert list(n[1]._forward_hooks) == [handle.id]
    assert seen == [1]


def test_an_exception_removes_hooks_and_records():
    n = net()
    capture = shapes("op", n[1])
    with pytest.raises(ArithmeticError), capture:
        fail(n(X))
    assert hooks(n) == 0
    with pytest.raises(RuntimeError, match=r"op: with-block: expected .* got none"):
        capture.calls(0)
    with capture:  # and it can be used again
        n(X)
    assert len(capture.calls(0)) == 1


def test_an_exception_in_the_transform_removes_hooks():
    n = net()
    with pytest.raises(ZeroDivisionError), Capture("op", [("a", n[1])], lambda i, x: 1 // i):
        n(X)
    assert hooks(n) == 0


def test_hooks_installed_before_a_failure_on_entering_go():
    n = net()
    with pytest.raises(AttributeError), Capture("op", [("a", n[1]), ("b", None)], lambda i, x: x):  # type: ignore[list-item]
        pytest.fail("entered")
    assert hooks(n) == 0


def test_re_entry_is_refused_and_leaves_nothing():
    n = net()
    capture = shapes("op", n[1])
    with pytest.raises(RuntimeError, match="expected one entry at a time, got a second"), capture:
        capture.__enter__()
    assert hooks(n) == 0


def test_a_layer_that_never_ran_is_named():
    n = net()
    with Capture("op", [("net.3", n[3])], lambda i, x: x) as capture:
        n[0](X)
    with pytest.raises(RuntimeError, match=r"op: pairs \(layer 'net.3'\): .* got no call"):
        capture.calls(0)


def test_outputs():
    class Odd(nn.Module):
        def forward(self, x):
            return {"x": x}

    assert first_tensor([X, 1]) is X
    assert first_tensor(()) is None
    assert first_tensor((1, X)) is None
    n = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 5, batch_first=True))
    with shapes("op", n[1]) as capture:
        n(X)
    assert capture.calls(0) == [(4, 3, 5)]
    odd = Odd()
    expected = (
        r"op: pairs \(layer '0'\): expected a module that returns a tensor.*got <class 'dict'>"
    )
    with pytest.raises(TypeError, match=expected), shapes("op", odd):
        odd(X)
    assert hooks(odd) == 0
    with Capture("op", [("0", odd)], lambda i, x: x, lenient=True):
        odd(X)


class Padded(nn.Module):
    """A transformer whose layers put out nested tensors in eval mode, given a padding mask."""

    def __init__(self, d=8, nested=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, 2, 2 * d, batch_first=True)
        self.embed = nn.Linear(3, d)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(d, 3)

    def forward(self, x, pad=None):
        return self.head(self.enc(self.embed(x), src_key_padding_mask=pad))


TOKENS = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(1))
PAD = torch.arange(9).expand(2, 9) >= torch.tensor([[9], [6]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layer", ["enc.layers.0", "enc.layers.1.linear1"])
def test_nested_outputs_are_named(layer):
    nets = Padded().eval(), Padded(16).eval()
    expected = rf"student \(layer '{layer}'\): .* dense tensor, got a nested .*_tensor=False"
    with pytest.raises(TypeError, match=expected):
        pair_layers(*nets, [layer], example_inputs=(TOKENS, PAD))
    with (
        pytest.raises(TypeError, match="capture: " + expected),
        pair_layers(*nets, [layer]).capture(),
        torch.no_grad(),
    ):
        nets[0](TOKENS, PAD)
    dense = [Padded(d, nested=False).eval() for d in (8, 16)]
    with pair_layers(*dense, [layer]).capture() as features:
        dense[0](TOKENS, PAD)
    assert len(features.student) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("pairs", ["auto", ["enc", "head"]])
def test_nested_outputs_of_other_layers_do_no_harm(pairs):
    nets = Padded(), Padded(16)
    found = pair_layers(*nets, pairs, example_inputs=(TOKENS, PAD))
    assert found.names == ["enc", "head"]
    assert found[0].student_shape == (2, 9, 8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    """Fault 19: the recomputation in backward is not another call, in both modes."""
    n = Checkpointed(reentrant)
    modules = [m for m in n.modules() if m is not n]
    with shapes("op", *modules) as capture:
        n(X).sum().backward()
        n(X).sum().backward()
    assert [len(capture.calls(i)) for i in range(len(modules))] == [2] * len(modules)


# --- kept activations --------------------------------------------------------------------------


def test_features_have_the_graph_and_the_values():
    student, teacher = net(), net()
    pairs = pair_layers(student, teacher, ["1", ("2", "3")])
    with pairs.capture() as features:
        student(X)
        with torch.no_grad():
            teacher(X)
        assert [f.requires_grad for f in features.student] == [True, True]
    assert hooks(student, teacher) == 0
    assert torch.equal(features.student[0], student[:2](X))
    assert torch.equal(features.teacher[1], teacher(X))
    assert not features.teacher[0].requires_grad
    features.student[0].sum().backward()
    want = torch.autograd.grad(student[:2](X).sum(), student[0].weight)[0]
    assert torch.equal(student[0].weight.grad, want)


def test_an_in_place_relu_after_the_layer_is_named():
    student, teacher = net(inplace=True), net()
    with pair_layers(student, teacher, ["2", "0"]).capture() as features:
        student(X), teacher(X)
    expected = (
        r"student \(layer '0'\): expected an activation that is left as it was, .*"
        r"pass example_inputs to pair_layers, .* or inplace=False"
    )
    with pytest.raises(RuntimeError, match=expected):
        _ = features.student
    assert len(features.teacher) == 2
    with pair_layers(student, teacher, ["1"]).capture() as features:
        student(X)
    assert torch.equal(features.student[0], student[:2](X))


@pytest.mark.parametrize("pairs", ["auto", ["0", "2"]])
def test_what_the_example_showed_to_change_in_place_is_copied(pairs):
    student, teacher = net(inplace=True), net()
    teacher[3].inplace = True
    found = pair_layers(student, teacher, pairs, example_inputs=X)
    assert [p.changed for p in found] == [("student",), ("teacher",)]
    assert [p.note.split("; ")[-1] for p in found] == [
        f"{side} changed in place later: a copy is kept" for side in ("student", "teacher")
    ]
    for some in (found, found[:1], found[1:]):
        with some.capture() as features:
            student(X), teacher(X)
        for n, side in ((student, features.student), (teacher, features.teacher)):
            got = dict(zip(some.names, side, strict=True))
            want = {"0": n[0](X), "2": n[2](n[:2](X))}
            assert all(torch.equal(x, want[name]) for name, x in got.items())
    loss = features.student[0].square().sum()
    want = torch.autograd.grad(student[:3](X).square().sum(), student[0].weight)[0]
    assert torch.equal(torch.autograd.grad(loss, student[0].weight)[0], want)


def test_what_is_left_as_it_was_is_not_copied():
    student, teacher = net(inplace=True), net()
    seen = []
    student[1].register_forward_hook(lambda m, args, out: seen.append(out))
    with pair_layers(student, teacher, ["1"], example_inputs=X).capture() as features:
        student(X)
    assert features.student[0] is seen[-1]


def test_pairing_in_inference_mode_sees_changes_in_place_too():
    with torch.inference_mode():
        pairs = pair_layers(net(inplace=True), net(), ["0", "2"], example_inputs=X)
    assert [p.changed for p in pairs] == [("student",), ()]


def test_a_change_in_place_that_only_training_makes_is_named():
    student, teacher = net(), net()
    student[1] = nn.Dropout(0.5, inplace=True)
    pairs = pair_layers(student, teacher, ["0"], example_inputs=X)
    with pairs.capture() as features:
        student(X)
    with pytest.raises(RuntimeError, match=r"not in eval mode on example_inputs: use inplace=Fa"):
        _ = features.student


def test_several_calls_in_a_block_raise():
    student, teacher = net(), net()
    with pair_layers(student, teacher, ["1"]).capture() as features:
        student(X), student(X)
    with pytest.raises(RuntimeError, match=r"student \(layer '1'\): expected one call .* got 2"):
        _ = features.student
    with pytest.raises(RuntimeError, match=r"teacher \(layer '1'\): expected the layer to .* no"):
        _ = features.teacher


def test_a_layer_that_was_replaced_is_called_so():
    student, teacher = net(), net()
    pairs = pair_layers(student, teacher, ["1", "2"])
    teacher[2] = nn.Conv2d(4, 5, 1)
    with pairs.capture() as features:
        student(X), teacher(X)
    assert len(features.student) == 2
    expected = r"capture: teacher \(layer '2'\): .* got no call: .* replaced since pair_layers"
    with pytest.raises(RuntimeError, match=expected):
        _ = features.teacher


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_features_under_checkpointing_train_or_raise(reentrant):
    """Fault 19: no gradient is lost silently where reentrant checkpointing cuts the graph."""
    student, teacher = Checkpointed(reentrant), Checkpointed(reentrant)
    pairs = pair_layers(student, teacher, ["body.1"])
    with pairs.capture() as features:
        student(X)
        with torch.no_grad():
            teacher(X)
    assert not features.teacher[0].requires_grad
    if reentrant:
        with pytest.raises(RuntimeError, match=r"'body.1'\): .* use_reentrant=False"):
            _ = features.student
    else:
        loss = features.student[0].square().sum()
        loss.backward()
        want = torch.autograd.grad(
            student.body[:2](student.stem(X)).square().sum(), student.body[0].weight
        )[0]
        torch.testing.assert_close(student.body[0].weight.grad, want)
    with torch.no_grad(), pairs.capture() as features:  # evaluation needs no graph
        student(X)
    assert len(features.student) == 1


def test_a_teacher_in_inference_mode_can_be_part_of_a_loss():
    student, teacher = net(), net(inplace=True)
    with pair_layers(student, teacher, ["0"]).capture() as features:
        student(X)
        with torch.inference_mode():
            teacher(X)
    assert torch.equal(features.teacher[0], teacher[0](X))  # before the in-place ReLU
    (features.student[0] - features.teacher[0]).square().sum().backward()
    assert student[0].weight.grad is not None


def test_features_after_an_exception_and_on_re_entry():
    student, teacher = net(), net()
    features = pair_layers(student, teacher, ["1"]).capture()
    with pytest.raises(ArithmeticError), features:
        fail(student(X))
    with pytest.raises(RuntimeError, match="has not raised, got none"):
        _ = features.student
    with pytest.raises(RuntimeError, match="one entry at a time"), features:
        features.__enter__()
    assert hooks(student, teacher) == 0


# --- compiled networks -------------------------------------------------------------------------


def compiled_forms():
    inner, own, forward, plain = net(), net(), net(), net()
    inner[2] = torch.compile(inner[2], backend="eager")
    own[2].compile(backend="eager")
    forward.forward = torch.compile(forward.forward, backend="eager")
    return {
        "whole": (torch.compile(net(), backend="eager"), ""),
        "inner": (inner, "2"),
        "compile()": (own, "2"),
        "forward": (forward, ""),
        "plain": (plain, None),
    }


@pytest.mark.parametrize("form", ["whole", "inner", "compile()", "forward"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_capturing_from_a_compiled_network_raises(form, side):
    network, where = compiled_forms()[form]
    assert compiled_module(network) == where
    pair = (network, net()) if side == "student" else (net(), network)
    pairs = pair_layers(*pair, ["1"])
    expected = rf"LayerPairs.capture: {side}.*\.measure\(\).*plain tensors to lwkd.ops.layer_disc"
    with pytest.raises(RuntimeError, match=expected):
        pairs.capture()
    assert hooks(*pair) == 0


def test_plain_networks_are_not_taken_for_compiled():
    assert compiled_module(compiled_forms()["plain"][0]) is None
    assert compiled_module(nn.TransformerEncoderLayer(4, 2)) is None


def test_a_compiled_lazy_module_is_recognised():
    assert compiled_module(torch.compile(nn.LazyConv2d(3, 1), backend="eager")) == ""


def test_a_network_compiled_after_pairing_is_never_measured_silently():
    student = net()
    pairs = pair_layers(student, net(), ["1"])
    compiled = torch.compile(student, backend="eager")
    compiled(X)
    with pairs.capture() as features:
        compiled(X)
    with pytest.raises(RuntimeError, match="got no call; layers of a compiled or scripted"):
        _ = features.student


@pytest.mark.parametrize("fullgraph", [False, True])
def test_tracing_a_hook_raises(fullgraph):
    torch._dynamo.reset()
    n = net()
    compiled = torch.compile(n, backend="eager", fullgraph=fullgraph)
    expected = "graph_break" if fullgraph else COMPILED[0]
    with shapes("op", n[1]), pytest.raises(RuntimeError, match=expected):
        compiled(X)
    assert hooks(n) == 0
    assert torch.equal(compiled(X), n(X))
    torch._dynamo.reset()


# --- running without a trace -------------------------------------------------------------------


def test_untouched_restores_on_success_and_failure():
    n = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    n[2].eval()
    before, state = n[1].running_mean.clone(), torch.get_rng_state()

    def meddle():
        assert [m.training for m in n.modules()] == [False] * 4
        assert not torch.is_grad_enabled()
        n[1].running_mean.add_(torch.rand(4))
        n[1].running_var = torch.zeros(4)
        fail()

    with pytest.raises(ArithmeticError), untouched(n):
        meddle()
    assert [m.training for m in n.modules()] == [True, True, True, False]
    assert torch.equal(n[1].running_mean, before)
    assert torch.equal(n[1].running_var, torch.ones(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.inference_mode])
def test_untouched_restores_buffers_of_inference_mode(outer):
    with torch.inference_mode():
        n = nn.BatchNorm2d(3)
    with outer(), untouched(n), torch.inference_mode():
        n.running_mean.add_(1)
    assert torch.equal(n.running_mean, torch.zeros(3))


def test_untouched_runs_the_original_modules_without_recompiling():
    for network, where in compiled_forms().values():
        plain = network._orig_mod if "_orig_mod" in network._modules else network
        network(X)  # compiles
        frames = sum(torch._dynamo.utils.counters["frames"].values())
        with shapes("op", plain[1]) as capture, untouched(plain):
            run("op", plain, X)
        assert len(capture.calls(0)) == 1
        network(X)
        assert sum(torch._dynamo.utils.counters["frames"].values()) == frames
        assert compiled_module(network) == where
    torch._dynamo.reset()


def test_run_moves_nested_inputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), device="meta"))

        def forward(self, a, b):
            assert {t.device.type for t in (a[0], a[1]["x"], b)} == {"meta"}
            assert a[1]["y"] == "text"

    run("op", Nested(), ([X, {"x": X, "y": "text"}], X))
    run("op", Nested(), {"a": (X, {"x": X, "y": "text"}), "b": X})
    run("op", nn.Identity(), X)
    with pytest.raises(TypeError, match=r"op: inputs: expected a tensor, .* got <class 'str'>"):
        run("op", net(), "text")


class Registers(nn.Module):
    """Registers a buffer as it runs, of either sort, and fills one that was None."""

    def __init__(self, fail):
        super().__init__()
        self.fail = fail
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.cache = x.mean(0)
        self.register_buffer("mask", x > 0, persistent=False)
        self.register_buffer("count", self.count + 1, persistent=False)
        if self.fail:
            fail()
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_untouched_restores_which_buffers_there_are(fails):
    n = nn.Sequential(Registers(fails))
    count = n[0].count
    with pytest.raises(ArithmeticError) if fails else nullcontext(), untouched(n):
        n(X)
    assert list(n[0]._buffers) == ["cache", "count"]
    assert n[0].cache is None
    assert n[0].count is count
    assert n[0]._non_persistent_buffers_set == {"cache"}
    assert list(n.state_dict()) == ["0.count"]


@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_can_be_run():
    n = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), X, check_trace=False)
    before = {k: v.clone() for k, v in n.state_dict().items()}
    with untouched(n):
        run("op", n, X)
    assert all(torch.equal(v, before[k]) for k, v in n.state_dict().items())


@pytest.mark.parametrize("lazy", [lambda: nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d])
def test_lazy_modules_are_named(lazy):
    n = nn.Sequential(nn.Identity(), lazy())
    expected = r"op: teacher \(layer '1'\): expected a network without uninit.* got Lazy"
    with pytest.raises(ValueError, match=expected), untouched(n):
        run("op", n, X, "teacher")
    n(X)
    with untouched(n):
        run("op", n, X, "teacher")


def test_untouched_restores_what_batch_norm_writes_without_a_version():
    mean = torch.zeros(3)
    n = nn.Module()
    n.register_buffer("mean", mean)
    with untouched(n):
        nn.functional.batch_norm(X, n.mean, torch.ones(3), training=True)
        assert n.mean.count_nonzero() == 3
        assert n.mean._version == 0
    assert torch.equal(mean, torch.zeros(3))
    assert mean._version == 1


def test_untouched_leaves_alone_what_a_graph_holds():
    n = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    loss = n(X).sum()
    with untouched(n):
        n(X)
    loss.backward()


# --- memory ------------------------------------------------------------------------------------


def test_nothing_accumulates_over_ten_thousand_blocks():
    """Fault 18: hooks keep nothing alive, with gradients, without, and after exceptions."""
    student = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    teacher = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    pairs = pair_layers(student, teacher, ["1"])
    x = torch.ones(1, 2)

    def step(i):
        try:
            with pairs.capture() as features, torch.set_grad_enabled(i % 3 > 0):
                student(x), teacher(x)
                if i % 7 == 0:
                    fail()
        except ArithmeticError:
            return
        if i % 3 > 0:
            loss = (features.student[0] - features.teacher[0]).square().sum()
            torch.autograd.grad(loss, student[0].weight, create_graph=i % 5 == 0)

    for i in range(100):
        step(i)
    before = live_tensors()
    for i in range(10_000):
        step(i)
    assert live_tensors() <= before
    assert hooks(student, teacher) == 0
