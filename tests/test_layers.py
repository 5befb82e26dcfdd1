"""Pairing: what "auto" chooses on the usual architectures, explicit pairs, names, errors."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lwkd
from lwkd.layers import LayerPair, LayerPairs, pair_layers
from lwkd.names import named_layers, plain_name

# --- networks ----------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of two convolutions, or of three (a bottleneck, expansion 2)."""

    def __init__(self, c_in, width, stride, bottleneck=False):
        super().__init__()
        out = 2 * width if bottleneck else width
        kernels = [(c_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        if not bottleneck:
            kernels = [(c_in, width, 3, stride), (width, out, 3, 1)]
        for i, (a, b, k, s) in enumerate(kernels, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        self.convs = len(kernels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or c_in != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        for i in range(1, self.convs + 1):
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
            x = self.relu(x) if i < self.convs else x
        x += skip
        return self.relu(x)


class ResNet(nn.Module):
    """Laid out and named like torchvision's."""

    def __init__(self, blocks=(1, 1, 1, 1), width=4, bottleneck=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c = width
        for i, n in enumerate(blocks):
            layer = []
            for j in range(n):
                layer.append(Block(c, width << i, 2 if i and not j else 1, bottleneck))
                c = (width << i) * (2 if bottleneck else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def conv(a, b, stride=1):
    return [nn.Conv2d(a, b, 3, stride, 1), nn.ReLU(inplace=True)]


def plain(width=4, stages=3, per_stage=1):
    """An nn.Sequential of convolutions and pooling, its head included."""
    layers, c = [], 3
    for i in range(stages):
        for _ in range(per_stage):
            layers += conv(c, width << i)
            c = width << i
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


class TransformerBlock(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """With a class token; ``container`` holds the blocks: nn.Sequential runs, ModuleList not."""

    def __init__(self, depth=4, d=8, patch=8, container=nn.Sequential):
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, d, patch, patch), nn.Flatten(2))
        self.cls = nn.Parameter(torch.zeros(1, 1, d))
        blocks = [TransformerBlock(d) for _ in range(depth)]
        self.blocks = container(*blocks) if container is nn.Sequential else container(blocks)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 10)

    def forward(self, x):
        x = self.patch_embed(x).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def chosen(student, teacher, inputs=IMAGE):
    return [(p.student, p.teacher) for p in pair_layers(student, teacher, example_inputs=inputs)]


# --- auto --------------------------------------------------------------------------------------

STAGES = [(f"layer{i}",) * 2 for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("student", [{}, {"blocks": (2, 2, 2, 2)}])
@pytest.mark.parametrize(
    "teacher", [{"width": 6}, {"blocks": (2, 3, 4, 2), "bottleneck": True}], ids=["basic", "bottle"]
)
def test_auto_pairs_the_four_layers_of_resnets(student, teacher):
    assert chosen(ResNet(**student), ResNet(**teacher)) == STAGES


def test_auto_on_a_plain_cnn_takes_the_last_weights_before_each_change():
    assert chosen(plain(4), plain(8, per_stage=2)) == [("0", "2"), ("3", "7"), ("6", "12")]


def test_what_auto_pairs_can_be_given_rates():
    pairs = pair_layers(plain(4), plain(8), example_inputs=IMAGE)
    groups = lwkd.param_groups_layerwise(pairs.student, pairs, lr=0.1)
    lwkd.LayerwiseLR(torch.optim.SGD(groups, lr=0.1), pairs)


def test_auto_finds_a_change_of_channels_alone():
    nets = [nn.Sequential(*conv(3, c), *conv(c, c), *conv(c, 2 * c)) for c in (4, 6)]
    assert chosen(*nets) == [("2", "2"), ("4", "4")]


def test_auto_looks_into_a_backbone():
    class Net(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.backbone = nn.Module()  # never runs itself
            self.backbone.features = features
            self.head = nn.Linear(10, 2)

        def forward(self, x):
            return self.head(self.backbone.features(x))

    assert chosen(Net(ResNet()), Net(plain(stages=4))) == [
        (f"backbone.features.layer{i}", f"backbone.features.{3 * i - 3}") for i in (1, 2, 3, 4)
    ]


def test_auto_goes_into_a_trunk_and_not_into_inverted_residuals():
    class Inverted(nn.Module):  # two resolutions inside, one at its end
        def __init__(self, a, b, stride):
            super().__init__()
            self.up, self.mid = nn.Conv2d(a, 4 * a, 1), nn.Conv2d(4 * a, 4 * a, 3, stride, 1)
            self.down = nn.Conv2d(4 * a, b, 1)

        def forward(self, x):
            return self.down(self.mid(self.up(x)))

    def mobile(w, repeat):
        steps = [(w, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1)]
        trunk = nn.Sequential(
            *(Inverted(*s) for s in (steps if repeat else steps[:2] + steps[3:4]))
        )
        stem = nn.Sequential(*conv(3, w, 2))
        return nn.Sequential(stem, trunk, nn.Flatten(), nn.Linear(256 * w, 2))

    ends = {True: ("1.0", "1.2", "1.4"), False: ("1.0", "1.1", "1.2")}
    for a, b in ((True, True), (True, False), (False, False)):
        want = list(zip(ends[a], ends[b], strict=True))
        assert chosen(mobile(2, a), mobile(3, b)) == want


def test_auto_takes_a_module_whose_inside_shows_no_space():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 64 * 64, 64)

        def forward(self, x):
            return self.linear(x).view(-1, 4, 4, 4)

    nets = [nn.Sequential(nn.Flatten(), Body(), nn.Flatten()) for _ in range(2)]
    assert chosen(*nets) == [("1", "1")]


def test_auto_passes_over_modules_that_change_the_batch():
    class Split(nn.Module):  # as in windowed attention: 2N inside, N outside
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x):
            return self.b(torch.cat(self.a(torch.cat(x.chunk(2, 2))).chunk(2), 2))

    assert chosen(Split(), Split()) == [("b", "b")]


def test_auto_passes_over_layers_of_one_position():
    assert chosen(ResNet(), ResNet(), IMAGE[..., :32, :32]) == STAGES[:3]


def test_auto_does_not_take_a_minority_of_equal_blocks_for_the_network():
    def net(w):
        blocks = Block(w, w, 1), Block(w, w, 1)
        return nn.Sequential(*conv(3, w), *blocks, *conv(w, 8 * w, 2), *conv(8 * w, 8 * w))

    assert chosen(net(2), net(3)) == [("3", "3"), ("6", "6")]


def test_auto_takes_the_outermost_of_nested_blocks():
    class Nested(TransformerBlock):
        def __init__(self, d, inner=None):
            super().__init__(d)
            self.inner = inner

        def forward(self, x):
            return super().forward(x if self.inner is None else self.inner(x))

    nets = [nn.Sequential(*(Nested(8, Nested(8)) for _ in range(n))) for n in (2, 4)]
    assert chosen(*nets, torch.ones(2, 5, 8)) == [("0", "1"), ("1", "3")]


def test_auto_skips_modules_that_run_several_times_and_dropout():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
            self.relu, self.pool, self.drop = nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.relu(self.conv2(self.pool(self.relu(self.conv1(x))))))

    assert chosen(Net(), Net()) == [("conv1", "conv1"), ("conv2", "conv2")]


def test_auto_matches_unequal_counts_in_order_by_relative_depth():
    # Depths: thirds against sixths would be 1/3, 2/3, 1.
    assert chosen(plain(stages=3), plain(stages=6)) == [("0", "3"), ("3", "9"), ("6", "15")]
    assert chosen(plain(stages=6), plain(stages=3)) == [("3", "0"), ("9", "3"), ("15", "6")]
    # A tie in depth (1/2 against 1/3 and 2/3) goes to the nearer resolution.
    assert chosen(plain(stages=2), plain(stages=3)) == [("0", "0"), ("3", "6")]
    smaller = nn.Sequential(nn.MaxPool2d(2), *plain(stages=2))
    assert chosen(smaller, plain(stages=3)) == [("1", "3"), ("4", "6")]


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize(
    ("depth", "partners"), [(4, (0, 1, 2, 3)), (8, (1, 3, 5, 7)), (12, (2, 5, 8, 11))]
)
def test_auto_pairs_transformer_blocks_evenly(depth, partners, container):
    pairs = chosen(ViT(4, container=container), ViT(depth, 16, container=container))
    assert pairs == [(f"blocks.{i}", f"blocks.{j}") for i, j in enumerate(partners)]


def test_auto_pairs_a_cnn_with_a_vit_by_depth_and_says_how_to_fold_the_tokens():
    pairs = pair_layers(ResNet(), ViT(8, patch=8), example_inputs=IMAGE)
    assert [p.student for p in pairs] == [s for s, _ in STAGES]
    depths = [int(p.teacher.split(".")[1]) for p in pairs]
    assert depths == sorted(set(depths))
    assert depths[-1] == 7
    assert all("pass tokens=(None, (8, 8, 1))" in p.note for p in pairs)


def test_auto_on_one_dimensional_signals():
    def net(w):
        return nn.Sequential(
            nn.Conv1d(2, w, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(w, 2 * w, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
            nn.Conv1d(2 * w, 3, 1), nn.Flatten(),
        )  # fmt: skip

    pairs = pair_layers(net(4), net(6), example_inputs=torch.ones(3, 2, 16))
    assert [(p.student, p.teacher) for p in pairs] == [("0", "0"), ("3", "3")]
    assert all("pass channel_dim" in p.note for p in pairs)


def test_auto_takes_tuples_and_dicts_of_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain()

        def forward(self, scale, image):
            return self.net(image * scale)

    for inputs in ((2.0, IMAGE), {"image": IMAGE, "scale": torch.tensor(2.0)}):
        assert chosen(Two(), Two(), inputs) == [(f"net.{i}",) * 2 for i in (0, 3, 6)]
    expected = r"pair_layers: example_inputs: expected a tensor, .*, got <class '{}'>"
    for inputs, pairs in ((3, ["net"]), ([2.0, IMAGE], ["net"]), ([2.0, IMAGE], "auto")):
        with pytest.raises(TypeError, match=expected.format(type(inputs).__name__)):
            pair_layers(Two(), Two(), pairs, example_inputs=inputs)


def test_auto_that_cannot_pair_says_what_to_pass():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4), nn.ReLU(), nn.Linear(4, 2))
    expected = r"in the teacher, got none in Sequential.*pass pairs=\[\('student layer', 'teacher"
    with pytest.raises(ValueError, match=expected):
        pair_layers(plain(), mlp, example_inputs=IMAGE)
    with pytest.raises(ValueError, match=r"example_inputs: expected inputs to run.*, got None"):
        pair_layers(plain(), plain())


# --- the run leaves nothing behind -------------------------------------------------------------


class Noisy(nn.Module):
    """Draws random numbers, counts its calls in a buffer, replaces another, and may fail."""

    def __init__(self, fail=False):
        super().__init__()
        self.body, self.bn, self.fail = nn.Sequential(*conv(3, 4)), nn.BatchNorm2d(4), fail
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        self.last = x.mean()[None]
        x = self.bn(self.body(x + torch.rand_like(x)))
        if self.fail:
            raise ArithmeticError("as planned")
        return x


def snapshot(net):
    return (
        {k: v.clone() for k, v in net.state_dict().items()},
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()],
        [p.grad for p in net.parameters()],
        [id(b) for b in net.buffers()],
    )


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("pairs", ["auto", ["bn"]])
def test_the_run_leaves_networks_and_generators_as_they_were(fail, pairs):
    nets = Noisy(), Noisy(fail)
    nets[0].train()
    nets[1].eval()
    nets[1].body.train()
    for p in nets[0].parameters():
        p.grad = torch.ones_like(p)
    before = [snapshot(n) for n in nets]
    state = torch.get_rng_state()
    if fail:
        with pytest.raises(ArithmeticError):
            pair_layers(*nets, pairs, example_inputs=IMAGE)
    else:
        pair_layers(*nets, pairs, example_inputs=IMAGE)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()
    for net, old in zip(nets, before, strict=True):
        new = snapshot(net)
        assert all(torch.equal(old[0][k], new[0][k]) for k in old[0])
        assert old[1] == new[1]
        assert all(a is b for a, b in zip(old[2], new[2], strict=True))
        assert old[3] == new[3]


# --- explicit pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["layer1", "layer3"], [("layer1", "layer1"), ("layer3", "layer3")]),
        ([("layer1", "layer2"), "layer4"], [("layer1", "layer2"), ("layer4", "layer4")]),
        ({"layer1": "layer2", "fc": "layer2"}, [("layer1", "layer2"), ("fc", "layer2")]),
        ([(r"layer\d", r"layer[1-4]")], STAGES),
        ([(r"layer\d\.0\.conv1", r"layer\d\.0\.bn2"), "fc"],
         [(f"layer{i}.0.conv1", f"layer{i}.0.bn2") for i in (1, 2, 3, 4)] + [("fc", "fc")]),
        # A name is a regex too, of itself; "layer2.0" as a regex would also match "layer2x0".
        ([("layer2.0", "layer2.0")], [("layer2.0", "layer2.0")]),
        ([(r"layer[12]", r"layer[34]")], [("layer1", "layer3"), ("layer2", "layer4")]),
    ],
)  # fmt: skip
def test_names_dicts_and_regexes(pairs, expected):
    got = pair_layers(ResNet(), ResNet(), pairs)
    assert [(p.student, p.teacher) for p in got] == expected
    assert got.names == [s for s, _ in expected]
    assert {(p.student_shape, p.teacher_shape, p.note) for p in got} == {(None, None, "")}


@pytest.mark.parametrize(
    ("pairs", "error", "text"),
    [
        (
            ["layr1"],
            ValueError,
            "name of a module of the student, got 'layr1'; did you mean 'layer1'",
        ),
        ({"layer1": "leyer2"}, ValueError, "of the teacher, got 'leyer2'; did you mean .*'layer2'"),
        (
            [("layer1", "layr1")],
            ValueError,
            "teacher, or a regex .* 'layr1', which matches none; did",
        ),
        ([(r"stage\d", r"layer\d")], ValueError, r"student, or a regex .* which matches none"),
        (
            [(r"layer[12]", r"layer\d")],
            ValueError,
            r"equally many .* \['layer1', 'layer2'\] and \[",
        ),
        ([("layer(", "layer1")], ValueError, "unterminated subpattern"),
        (["layer1", "layer1"], ValueError, r"\(layer 'layer1'\): expected each student layer once"),
        ([], ValueError, "at least one pair, got none"),
        ({}, ValueError, "at least one pair, got none"),
        ("layer1", ValueError, "or a list of module names or pairs, got 'layer1'"),
        ([3], TypeError, "a module name or a .* tuple .*, got 3"),
        ([(ResNet(), ResNet())], TypeError, r"a module name or a .*, got \(ResNet\(.{70,80}…$"),
        ([("a", "b", "c")], TypeError, "a module name or a .* tuple"),
        (7, TypeError, "expected a list of names .*, got <class 'int'>"),
    ],
)
def test_bad_pairs(pairs, error, text):
    with pytest.raises(error, match=re.compile(r"lwkd\.pair_layers: pairs.*" + text)):
        pair_layers(ResNet(), ResNet(), pairs)


def test_containers_that_never_run():
    nets = ViT(3, container=nn.ModuleList), ViT(3)
    text = (
        r"'blocks'\): expected .* got a ModuleList, which never does; pair its children \['blocks"
    )
    with pytest.raises(ValueError, match=text):
        pair_layers(*nets, ["blocks"])
    # A Sequential iterated by hand shows only when it runs.
    with pytest.raises(RuntimeError, match=r"'blocks'\): .* got no call.*pair 'blocks.2'"):
        pair_layers(nets[1], ViT(3), ["blocks"], example_inputs=IMAGE)


@pytest.mark.parametrize("wrong", [None, lambda x: x, nn.ReLU])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_networks_that_are_none(side, wrong):
    nets = {"student": ResNet(), "teacher": ResNet()} | {side: wrong}
    with pytest.raises(TypeError, match=rf"pair_layers: {side}: expected an nn.Module, got "):
        pair_layers(**nets, pairs=["layer1"])


def test_lazy_networks_are_named_or_work():
    nets = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), nn.Sequential(*conv(3, 5))
    for pairs in (["0"], "auto"):
        with pytest.raises(ValueError, match=r"student \(layer '0'\): .* without uninitialised"):
            pair_layers(*nets, pairs, example_inputs=IMAGE)
    assert pair_layers(*nets, ["0"]).names == ["0"]
    nets[0](IMAGE)
    assert chosen(*nets) == [("0", "0")]


def test_a_layer_that_does_not_run_is_named_with_its_network():
    nets = nn.Sequential(*conv(3, 4)), nn.Sequential(*conv(3, 4))
    nets[1][0].unused = nn.ReLU()
    with pytest.raises(RuntimeError, match=r"pair_layers: teacher \(layer '0.unused'\): .* no"):
        pair_layers(*nets, [("0", "0.unused")], example_inputs=IMAGE)


def test_modules_shared_or_aliased():
    student, teacher = plain(), plain()
    student.alias = student[0]
    with pytest.raises(ValueError, match=r"'alias'.*once, got it also as '0'"):
        pair_layers(student, teacher, [("0", "0"), ("alias", "0")])
    teacher[3] = student[3]
    with pytest.raises(ValueError, match=r"different modules .* got one that they share"):
        pair_layers(student, teacher, ["3"])
    with pytest.raises(ValueError, match="another network, got the student itself"):
        pair_layers(student, student, ["0"])


def test_outputs_without_a_tensor():
    class Dictionary(nn.Module):
        def forward(self, x):
            return {"x": x}

    nets = [nn.Sequential(*conv(3, 4), Dictionary()) for _ in range(2)]
    with pytest.raises(TypeError, match=r"'2'\): expected a module that returns a tensor.*dict"):
        pair_layers(*nets, ["2"], example_inputs=IMAGE)
    assert chosen(*nets) == [("0", "0")]


# --- wrappers ----------------------------------------------------------------------------------


def test_wrappers_are_looked_through(ddp):
    student, teacher = ResNet(), ResNet()
    teacher.layer2 = torch.compile(teacher.layer2, backend="eager")
    wrapped = torch.compile(ddp(student), backend="eager"), ddp(teacher)
    pairs = pair_layers(*wrapped, ["module.layer1", "_orig_mod.module.layer2", "layer3.0"])
    assert pairs.names == ["layer1", "layer2", "layer3.0"]
    assert pairs.student is student
    assert pairs.teacher is teacher
    assert pairs.teacher_layers[1][1] is teacher.layer2._orig_mod
    assert pair_layers(*wrapped, [("module.layer2._orig_mod.0", r"module\.layer1\.0")]).names == [
        "layer2.0"
    ]
    assert [(p.student, p.teacher) for p in pair_layers(*wrapped, example_inputs=IMAGE)] == STAGES
    inside_out = ddp(torch.compile(student, backend="eager"))
    with pytest.raises(RuntimeError, match=r"capture: student: expected an uncompiled network"):
        pair_layers(inside_out, ResNet(), ["fc"]).capture()
    average = torch.optim.swa_utils.AveragedModel(teacher)
    assert pair_layers(student, average, ["fc"]).teacher is average.module


def test_a_layer_that_is_really_called_module():
    net = nn.Sequential()
    net.module = nn.Sequential(nn.Conv2d(3, 4, 3))
    assert list(named_layers(net)) == ["module", "module.0"]
    assert plain_name("module.0", named_layers(net)) == "module.0"
    assert plain_name("_orig_mod.module.module.0", named_layers(net)) == "module.0"


# --- the result --------------------------------------------------------------------------------


def test_pairs_are_an_immutable_sequence():
    pairs = pair_layers(ResNet(), ResNet(), ["layer1", "layer2", "fc"])
    assert len(pairs) == 3
    assert pairs[0] == LayerPair("layer1", "layer1", None, None, "")
    assert isinstance(pairs[1:], LayerPairs)
    assert pairs[1:].names == ["layer2", "fc"]
    assert pairs[-1].student == "fc"
    with pytest.raises(AttributeError):
        pairs[0].student = "layer2"  # type: ignore[misc]
    with pytest.raises(TypeError):
        pairs[0] = pairs[1]  # type: ignore[index]
    with pytest.raises(AttributeError):
        pairs.student = None  # type: ignore[misc]


NO_SPACE = "no space axis: maps cannot compare them"


def test_the_table():
    pairs = [("4", "1"), ("1", "7")]
    table = str(pair_layers(plain(4, 2), plain(8, 2), pairs, example_inputs=IMAGE))
    assert table.splitlines() == [
        "student layer  shape      teacher layer  shape      note",
        f"-------------  ---------  -------------  ---------  {'-' * 39}",
        "4              2x8x32x32  1              2x8x64x64  maps pooled 64x64 -> 32x32",
        f"1              2x4x64x64  7              2x10       {NO_SPACE}",
    ]
    auto = str(pair_layers(plain(4, 2), plain(8, 2), example_inputs=IMAGE[..., :32, :32]))
    assert "channels differ: fine, maps compare; auto: last at 4x32x32 | last at 8x32x32" in auto
    assert str(pair_layers(plain(), plain(), ["1"])).splitlines()[2].split() == list("1?1?-")


@pytest.mark.parametrize(
    ("student", "teacher", "note"),
    [
        ((2, 4, 8, 8), (2, 4, 8, 8), ""),
        ((2, 4, 8, 8), (2, 4, 4, 4), "maps pooled 8x8 -> 4x4"),
        ((2, 4, 8, 2), (2, 5, 4, 4),
         "student maps pooled 8x2 -> 4x2; teacher maps pooled 4x4 -> 4x2; channels differ: fine, "
         "maps compare"),
        ((2, 4, 8, 8, 8), (2, 4, 8, 8),
         "different numbers of dimensions: maps cannot compare them"),
        ((2, 17, 6), (2, 4, 8, 8), "pass tokens=((4, 4, 1), None)"),
        ((2, 4, 8, 8), (2, 30, 6), "pass tokens=(None, (5, 5, 5))"),
        ((2, 4, 8, 8), (2, 33, 6), "pass tokens=(None, (h, w, prefix))"),
        ((2, 17, 6), (2, 17, 8), "pass channel_dim (-1 for tokens, 1 for signals)"),
        ((2, 17, 6), (2, 5, 6),
         "pass channel_dim (-1 for tokens, 1 for signals); as tokens, maps pooled 17 -> 5"),
    ],
)  # fmt: skip
def test_what_happens_to_a_mismatch(student, teacher, note):
    class Fixed(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.layer, self.shape = nn.Identity(), shape

        def forward(self, x):
            return self.layer(x.new_zeros(self.shape))

    pairs = pair_layers(Fixed(student), Fixed(teacher), ["layer"], example_inputs=torch.ones(2, 1))
    assert pairs[0] == LayerPair("layer", "layer", student, teacher, note)


# --- layers that end in a norm -----------------------------------------------------------------


class Ends(nn.Module):
    """A linear layer and what stands behind it."""

    def __init__(self, *rest):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), *rest)

    def forward(self, x):
        return self.net(x)


class LlamaRMSNorm(nn.Module):
    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt()


class ChannelsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(x).mT


NORMED = "ends in a norm over channels: map nearly constant, see docs/maths.md"


@pytest.mark.parametrize(
    ("rest", "normed"),
    [
        ((nn.LayerNorm(6),), True),
        ((nn.RMSNorm(6),), True),
        ((LlamaRMSNorm(),), True),
        ((nn.LayerNorm(6), nn.Dropout(0.1)), True),
        ((ChannelsFirst(),), True),
        ((nn.LayerNorm(6), nn.Linear(6, 6)), False),
        ((nn.LayerNorm((9, 6)),), False),
        ((nn.Identity(),), False),
    ],
)
def test_a_layer_that_ends_in_a_norm_is_noted(rest, normed):
    x = torch.randn(2, 9, 6)
    pairs = pair_layers(Ends(*rest), Ends(), ["net"], example_inputs=x)
    assert (f"student {NORMED}" in pairs[0].note) == normed
    assert "teacher" not in pairs[0].note
    with torch.inference_mode():
        assert pair_layers(Ends(*rest), Ends(), ["net"], example_inputs=x)[0] == pairs[0]


def test_a_norm_itself_and_post_norm_blocks_are_noted():
    def encoder(depth, first):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first)
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    x = torch.randn(2, 9, 8)
    for first in (False, True):
        pairs = pair_layers(encoder(2, first), encoder(4, first), example_inputs=x)
        assert [p.teacher for p in pairs] == ["layers.1", "layers.3"]
        assert [p.note.endswith(f"; {NORMED}") for p in pairs] == [not first] * 2
    pairs = pair_layers(ViT(2), ViT(4), ["norm"], example_inputs=IMAGE)
    assert pairs[0].note.endswith(f"; {NORMED}")
    d = lwkd.AttentionMeter(pairs, channel_dim=-1).measure(IMAGE)
    assert d < 1e-6  # what the note warns of
