"""The paper's U-Net: its size, its shapes, and what is ours in it."""
from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import lib


def published_parameters(in_channels: int, classes: int, width: int) -> int:
    """Count the paper's U-Net in closed form, weights and biases of every layer."""
    def block(i: int, o: int) -> int:
        return 9 * i * o + 9 * o * o + 2 * 2 * o  # two convolutions; batch norm's scale and shift

    widths = [width, 2 * width, 4 * width, 8 * width]
    total = block(in_channels, width) + sum(block(w, 2 * w) for w in widths)  # with the bottleneck
    for w in widths:
        total += 4 * 2 * w * w + w  # transposed 2×2 up
        total += w + 1  # gate: 1×1 to one channel
        total += w * w + w  # 1×1 of the decoder's features
        total += block(2 * w, w)
        total += w * classes + classes  # head
    return total


def test_the_papers_network_has_its_size():
    """UNet(1, 5, 64) has the 31,391,320 parameters of the published structure (paper: 31.4 M)."""
    with torch.device("meta"):
        model = lib.UNet(1, 5, 64)
    assert sum(p.numel() for p in model.parameters()) == 31_391_320


@pytest.mark.parametrize("channels,classes,width", [(2, 5, 16), (6, 4, 3)])
def test_other_sizes_follow_the_same_formula(channels, classes, width):
    """The width scales each level alike; more inputs touch the first convolution only."""
    model = lib.UNet(channels, classes, width)
    count = sum(p.numel() for p in model.parameters())
    assert count == published_parameters(channels, classes, width)
    assert published_parameters(1, 5, 64) == 31_391_320


@pytest.mark.fault(19)
@pytest.mark.parametrize("shuffle", [1, 2])
@pytest.mark.parametrize("h,w", [(64, 128), (65, 127), (1, 1)])
def test_any_size_in_same_size_out(h, w, shuffle):
    """The first logits have the input's size, the only ones in evaluation; in training follow 1/2,
    1/4 and 1/8 of the size padded to a multiple of shuffle · 16."""
    model, step = lib.UNet(2, 4, 2, shuffle=shuffle), 16 * shuffle
    x, full = torch.randn(2, 2, h, w), (2, 4, h, w)
    height, width = -(-h // step) * step, -(-w // step) * step
    shapes = [tuple(out.shape) for out in model(x)]
    assert shapes == [full, *((2, 4, height // s, width // s) for s in (2, 4, 8))]
    out = model.eval()(x)
    assert [tuple(o.shape) for o in out] == [full] and out[0].isfinite().all()


def test_padding_does_not_shift():
    """The answer of a 60×120 image is the corner of that of the image continued by its border."""
    model, x = lib.UNet(1, 3, 2).eval(), torch.randn(1, 1, 60, 120)
    padded = F.pad(x, (0, 8, 0, 4), mode="replicate")
    torch.testing.assert_close(model(x)[0], model(padded)[0][..., :60, :120])


def test_every_parameter_gets_a_gradient():
    """No layer hangs loose: after a loss of all outputs no parameter's gradient is zero."""
    torch.manual_seed(0)
    model = lib.UNet(1, 4, 4, shuffle=2, global_context=True)
    torch.nn.init.normal_(model.context.mix.weight)
    sum(out.square().mean() for out in model(torch.randn(2, 1, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_gate_counted_by_hand():
    """A gate of zeros halves the skip; an identity 1×1 passes the decoder's positive part; where
    the gate of the skip itself closes, every channel of it is dark."""
    join = lib.GatedSkip(2)
    for p in join.parameters():
        torch.nn.init.zeros_(p)
    join.mix.weight.data[:, :, 0, 0] = torch.eye(2)
    skip = torch.tensor([[6.0, 6.0], [-6.0, -6.0]]).view(2, 2, 1, 1)
    x = torch.tensor([-1.0, 7.0]).view(1, 2, 1, 1).expand(2, 2, 1, 1)
    assert join(skip, x)[:, :, 0, 0].tolist() == [[3, 3, 0, 7], [-3, -3, 0, 7]]
    torch.nn.init.constant_(join.gate.weight, -100.0)
    dimmed = join(skip, x)[:, :2, 0, 0]
    assert dimmed[0].abs().max() < 1e-30 and dimmed[1].tolist() == [-6, -6]


def test_the_bottleneck_sees_the_whole_image():
    """Global context adds nothing at first; then a change at one end of a long image reaches the
    other, which it does not without."""
    torch.manual_seed(0)
    model = lib.UNet(1, 4, 2, depth=1, global_context=True).eval()
    plain = lib.UNet(1, 4, 2, depth=1).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 1, 8, 256)
    other = torch.cat([x[..., :128], torch.randn(1, 1, 8, 128)], -1)
    assert torch.equal(model(x)[0], plain(x)[0])
    torch.nn.init.normal_(model.context.mix.weight)
    assert torch.equal(plain(x)[0][..., :64], plain(other)[0][..., :64])
    assert not torch.allclose(model(x)[0][..., :64], model(other)[0][..., :64])


@pytest.mark.parametrize("shuffle", [1, 2])
def test_a_network_is_initialised_from_another(shuffle):
    """With more input channels it first gives the other's logits, whatever the new ones hold; they
    are learnt all the same; the other stays as it is."""
    torch.manual_seed(0)
    other, model = (lib.UNet(c, 4, 4, shuffle=shuffle).eval() for c in (1, 6))
    before = copy.deepcopy(other.state_dict())
    model.initialise_from(other)
    x = torch.randn(2, 6, 33, 50)
    torch.testing.assert_close(model(x)[0], other(x[:, :1])[0], atol=1e-5, rtol=1e-5)
    model.train()(x)[0].square().mean().backward()
    assert model.encoder[0][0].weight.grad[:, shuffle**2:].abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("shuffle", [1, 2])
def test_masked_classes_are_never_predicted(shuffle):
    """At every level the others share the probability, in the proportions of before."""
    torch.manual_seed(0)
    model, x = lib.UNet(1, 4, 4, 2, shuffle).train(), torch.randn(2, 1, 16, 32)
    before = [out.softmax(1)[:, [0, 2, 3]] for out in model(x)]
    model.mask_classes(torch.tensor([False, True, False, False]))
    for old, out in zip(before, model(x), strict=True):
        now = out.softmax(1)
        assert now[:, 1].max() < 1e-6
        rest = old / old.sum(1, keepdim=True)
        torch.testing.assert_close(now[:, [0, 2, 3]], rest, rtol=1e-3, atol=1e-5)
