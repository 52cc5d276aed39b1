"""The network, its loss and the averaged weights."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lib

# ------------------------------------------------------------------------------ network


def published_parameters(in_channels, classes, width):
    """Count the paper's U-Net in closed form: weights and biases of every layer, from the published
    structure."""

    def block(i, o):
        return 9 * i * o + 9 * o * o + 2 * 2 * o  # two 3×3 convolutions; batch norm's scale and shift

    widths = [width, 2 * width, 4 * width, 8 * width]
    encoder = block(in_channels, width) + sum(block(w, 2 * w) for w in widths)  # the last is the bottleneck
    decoder = 0
    for w in widths:
        decoder += 4 * 2 * w * w + w  # transposed 2×2 up
        decoder += w + 1  # gate: 1×1 to one channel
        decoder += w * w + w  # 1×1 of the decoder's features
        decoder += block(2 * w, w)
        decoder += w * classes + classes  # head
    return encoder + decoder


def test_the_papers_network_has_its_size():
    """UNet(1, 5, 64) has the 31,391,320 parameters that the published structure gives (31.4 M in the
    paper)."""
    with torch.device("meta"):
        model = lib.UNet(1, 5, 64)
    assert sum(p.numel() for p in model.parameters()) == published_parameters(1, 5, 64) == 31_391_320


@pytest.mark.parametrize("channels,classes,width", [(2, 5, 16), (1, 4, 8), (6, 4, 3)])
def test_other_sizes_follow_the_same_formula(channels, classes, width):
    """--width scales every level alike; more input channels touch the first convolution only."""
    model = lib.UNet(channels, classes, width)
    assert sum(p.numel() for p in model.parameters()) == published_parameters(channels, classes, width)
    assert [block[0].out_channels for block in model.encoder] == [width * 2**i for i in range(5)]


@pytest.mark.parametrize("h,w", [(64, 128), (65, 127), (1, 1), (16, 17), (3, 200)])
def test_any_size_in_same_size_out(h, w):
    """Fault 19: the full-size logits have the input's height and width; in evaluation they are the only
    ones."""
    model = lib.UNet(2, 4, 2).eval()
    out = model(torch.randn(2, 2, h, w))
    assert [o.shape for o in out] == [(2, 4, h, w)] and out[0].isfinite().all()


@pytest.mark.parametrize("h,w", [(64, 128), (65, 127)])
def test_training_gives_the_inner_outputs(h, w):
    """In training three inner outputs follow, 1/2, 1/4 and 1/8 of the size padded to a multiple of 16."""
    shapes = [tuple(o.shape) for o in lib.UNet(1, 5, 2)(torch.randn(2, 1, h, w))]
    ph, pw = -(-h // 16) * 16, -(-w // 16) * 16
    assert shapes == [(2, 5, h, w), *((2, 5, ph // s, pw // s) for s in (2, 4, 8))]


def test_padding_does_not_shift():
    """The answer for a 60×120 image is the corner of the answer for that image continued by its border."""
    model = lib.UNet(1, 3, 2).eval()
    x = torch.randn(1, 1, 60, 120)
    torch.testing.assert_close(
        model(x)[0], model(F.pad(x, (0, 8, 0, 4), mode="replicate"))[0][..., :60, :120]
    )


def test_every_parameter_gets_a_gradient():
    """No layer hangs loose: after one loss over all outputs every parameter has a gradient other than
    zero."""
    torch.manual_seed(0)
    model = lib.UNet(1, 4, 4)
    sum(o.square().mean() for o in model(torch.randn(2, 1, 32, 64))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_gate_by_hand():
    """A gate of zeros halves every skip channel alike; an identity 1×1 passes the decoder's positive part."""
    join = lib.GatedSkip(2)
    for p in join.parameters():
        torch.nn.init.zeros_(p)
    join.mix.weight.data[:, :, 0, 0] = torch.eye(2)
    skip, x = torch.full((1, 2, 3, 5), 6.0), torch.tensor([-1.0, 7.0])[None, :, None, None].expand(1, 2, 3, 5)
    out = join(skip, x)
    assert out.shape == (1, 4, 3, 5)
    assert out[0, :, 1, 1].tolist() == [3, 3, 0, 7]


def test_gate_has_one_channel_and_looks_at_the_encoder():
    """The gate is one map from the skip itself: where it closes, every encoder channel is dark."""
    join = lib.GatedSkip(3)
    assert join.gate.weight.shape == (1, 3, 1, 1) and join.mix.weight.shape == (3, 3, 1, 1)
    torch.nn.init.constant_(join.gate.weight, -100.0)
    skip = torch.ones(1, 3, 2, 2)
    skip[..., 0, 0] = -1
    out = join(skip, torch.randn(1, 3, 2, 2))
    assert (out[0, :3, 0, 0] == -1).all() and (out[0, :3, 1, 1].abs() < 1e-30).all()


def test_a_network_starts_from_another():
    """With more input channels it first gives the other's logits, bit for bit, whatever the new ones hold;
    they are learnt all the same; the other stays as it is."""
    torch.manual_seed(0)
    other, model = lib.UNet(1, 4, 4).eval(), lib.UNet(6, 4, 4).eval()
    before = copy.deepcopy(other.state_dict())
    model.start_from(other)
    x = torch.randn(2, 6, 33, 50)
    torch.testing.assert_close(model(x)[0], other(x[:, :1])[0], atol=1e-5, rtol=1e-5)
    model.train()(x)[0].square().mean().backward()
    assert model.encoder[0][0].weight.grad[:, 1:].abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("stride", [1, 2])
def test_silenced_classes_are_never_answered(stride):
    """At every level and every pixel the others share the probability, in the proportions of before."""
    torch.manual_seed(0)
    model, x = lib.UNet(1, 4, 4, 2, stride).train(), torch.randn(2, 1, 16, 32)
    before = [out.softmax(1)[:, [0, 2, 3]] for out in model(x)]
    model.silence(torch.tensor([False, True, False, False]))
    for old, out in zip(before, model(x), strict=True):
        now = out.softmax(1)
        assert now[:, 1].max() < 1e-6
        torch.testing.assert_close(now[:, [0, 2, 3]], old / old.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------ focal loss


def test_focal_loss_by_hand():
    """p = 0.5 and p = 0.8, γ = 2, α = ¼: (¼·½²·ln 2 + ¼·⅕²·ln 1.25) / 2; a third pixel is ignored."""
    logits = torch.tensor([[0.0, math.log(4), 5.0], [0.0, 0.0, -3.0]])[None, :, None]  # (1, 2 classes, 1, 3)
    target = torch.tensor([[[1, 0, -1]]])
    want = (0.25 * 0.25 * math.log(2) + 0.25 * 0.04 * math.log(1.25)) / 2
    assert lib.focal_loss(logits, target, 2.0, 0.25).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("ignore_index", [-1, 255])
def test_gamma_0_is_cross_entropy(ignore_index):
    """γ = 0 and α = 1 is PyTorch's cross_entropy, value and gradient, ignored pixels included."""
    torch.manual_seed(0)
    target = torch.randint(0, 5, (3, 6, 7))
    target[torch.rand(3, 6, 7) < 0.3] = ignore_index
    ours, theirs = (
        torch.randn(3, 5, 6, 7, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab"
    )
    one = lib.focal_loss(ours, target, 0.0, ignore_index=ignore_index)
    two = F.cross_entropy(theirs, target, ignore_index=ignore_index)
    torch.testing.assert_close(one, two)
    one.backward()
    two.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.0])
def test_gradient_equals_the_formula_in_double(gamma):
    """Value and gradient are those of -(1 - p)^γ log p, written plainly in float64."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 4, 5, 5)).requires_grad_()
    plain = logits.detach().double().requires_grad_()
    target = torch.randint(0, 4, (2, 5, 5))
    p = plain.softmax(1).gather(1, target[:, None])[:, 0]
    want = (-((1 - p) ** gamma) * p.log()).mean()
    got = lib.focal_loss(logits, target, gamma)
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad, plain.grad.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_finite_at_logits_of_200(gamma, dtype):
    """Fault 31: at ±200, right and wrong, value and gradient are finite; right costs 0, wrong costs 400."""
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], dtype=dtype)[None, :, None].requires_grad_()
    right = lib.focal_loss(logits, torch.tensor([[[0, 1]]]), gamma)
    wrong = lib.focal_loss(logits, torch.tensor([[[1, 0]]]), gamma)
    assert right.item() == 0 and wrong.item() == 400
    (right + wrong).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0, 0, 0] > 0.4  # the wrong answer is still pushed away: half the mean's slope of 1


def test_no_counted_pixel_is_zero():
    """All pixels ignored: the loss is 0, its gradient 0, never NaN."""
    logits = torch.randn(2, 2, 3, 3, requires_grad=True)
    loss = lib.focal_loss(logits, torch.full((2, 3, 3), -1), 2.0)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_ignored_pixels_get_no_gradient():
    """The gradient is zero exactly where the target is ignored."""
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.randint(0, 3, (1, 4, 4))
    target[0, 1] = -1
    lib.focal_loss(logits, target, 1.0).backward()
    touched = logits.grad.abs().sum(1) > 0
    assert torch.equal(touched, target >= 0)


# ------------------------------------------------------------------------------ deep supervision


def test_level_weights_by_hand():
    """Logits of zero cost ln 2 on every level: the paper's weights give (1 + 0.2 + 0.3 + 0.5)·ln 2."""
    logits = [torch.zeros(1, 2, 16 // 2**i, 32 // 2**i) for i in range(4)]
    loss = lib.deep_supervision_loss(logits, torch.zeros(1, 16, 32).long(), (0.2, 0.3, 0.5), gamma=0.0)
    assert loss.item() == pytest.approx(2.0 * math.log(2), rel=1e-6)


def test_each_level_has_its_own_weight():
    """Only one inner output is wrong by 10, -log p = 10 + ln(1 + e^-10): the loss shows that level's
    weight."""
    for level, weight in zip((1, 2, 3), (0.2, 0.3, 0.5), strict=True):
        logits = [torch.zeros(1, 2, 8 // 2**i, 8 // 2**i) for i in range(4)]
        for out in logits:
            out[:, 0] = 1000  # right, costs 0
        logits[level][:, 0], logits[level][:, 1] = 0, 10
        loss = lib.deep_supervision_loss(logits, torch.zeros(1, 8, 8).long(), (0.2, 0.3, 0.5), gamma=0.0)
        assert loss.item() == pytest.approx(weight * (10 + math.log1p(math.exp(-10))), rel=1e-5)


def test_coarse_targets_are_every_second_pixel():
    """A lone labelled pixel at (1, 1) counts at full size and at half size, where it is pixel (0, 0),
    only."""
    target = torch.full((1, 8, 8), -1)
    target[0, 1, 1] = 0
    logits = [torch.zeros(1, 2, 8 // 2**i, 8 // 2**i) for i in range(4)]
    loss = lib.deep_supervision_loss(logits, target, (0.2, 0.3, 0.5), gamma=0.0)
    assert loss.item() == pytest.approx(1.2 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("h,w", [(65, 127), (1, 1), (17, 16)])
def test_odd_sizes_have_a_loss(h, w):
    """Fault 19: outputs of the padded size against targets of an odd one give a finite loss and gradients."""
    model = lib.UNet(1, 4, 2)
    loss = lib.deep_supervision_loss(
        model(torch.randn(2, 1, h, w)), torch.randint(0, 4, (2, h, w)), (0.1, 0.1, 0.1), gamma=2.0
    )
    loss.backward()
    assert loss.isfinite() and model.heads[0].weight.grad.isfinite().all()


# ------------------------------------------------------------------------------ averaged weights


def two_models():
    """Return a model of zeros and one of ones."""
    models = lib.UNet(1, 2, 1), lib.UNet(1, 2, 1)
    for value, model in enumerate(models):
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return models


@pytest.mark.parametrize(
    "steps,decay,moved",
    [(1, 0.99, 9 / 11), (8, 0.99, 0.5), (10**6, 0.99, 0.01), (8, 0.2, 0.8), (10**6, 0.0, 1.0)],
)
def test_the_average_by_hand(steps, decay, moved):
    """In step t it moves 1 - min(decay, (1 + t) / (10 + t)) of the way, running statistics included."""
    zeros, model = two_models()
    ema = lib.EMA(zeros, decay)
    ema.steps.fill_(steps - 1)
    ema.update(model)
    for name, tensor in ema.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.full_like(tensor, moved), msg=name)
    assert ema.steps == steps
    assert all((t == 0).all() for t in zeros.state_dict().values() if t.is_floating_point())
    assert all((t == 1).all() for t in model.state_dict().values() if t.is_floating_point())


def test_decay_0_copies():
    """decay 0 is no averaging: the copy answers as the model does, bit for bit."""
    torch.manual_seed(0)
    ema, model = lib.EMA(lib.UNet(1, 3, 2), 0.0), lib.UNet(1, 3, 2)
    model(torch.randn(2, 1, 32, 32))
    ema.update(model)
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(ema.model.eval()(x)[0], model.eval()(x)[0])


# ------------------------------------------------------------------------------ prediction


class Ramp(torch.nn.Module):
    """Logits that are a function of the pixel and of its column, so that mirroring matters."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))  # its device is the model's

    def forward(self, x):
        column = torch.linspace(-1, 1, x.shape[-1]).expand_as(x)
        return [torch.cat([x, 3 * column, -x], 1)]


@pytest.mark.parametrize("tta", [False, True])
def test_probabilities_by_hand(tta):
    """The softmax in steps of 1/255, mean with the mirrored copy's, in input order over batches of 2; class 0
    stays 0."""
    images = torch.randn(5, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    got = lib.predict_probs([Ramp()], lambda part: images[part], 5, torch.float32, 1, tta, batch_size=2)
    probs = Ramp()(images)[0].softmax(1)
    if tta:
        probs = (probs + Ramp()(images.flip(-1))[0].softmax(1).flip(-1)) / 2
    assert got.shape == (5, 4, 4, 6) and got.dtype == "uint8"
    assert (got[:, 0] == 0).all()
    assert (torch.from_numpy(got[:, 1:]) - probs * 255).abs().max() <= 0.501


def test_the_margin_is_cut_off():
    """Of images that are larger by a margin come the probabilities of what is inside it."""
    images = torch.randn(3, 1, 10, 14, generator=torch.Generator().manual_seed(0))
    rest = 3, torch.float32, 1, True
    whole, inside = (lib.predict_probs([Ramp()], lambda part: images[part], *rest, m) for m in (0, 3))
    assert inside.shape == (3, 4, 4, 8)
    np.testing.assert_array_equal(inside, whole[..., 3:-3, 3:-3])


class Small(Ramp):
    """A network whose memory holds two images; RuntimeError is what PyTorch raises, on a GPU a subclass."""

    def forward(self, x):
        if len(x) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes")
        return super().forward(x)


def test_prediction_halves_a_batch_that_does_not_fit(capsys):
    """Out of memory at 8 and at 4 images: 2 at a time give the same probabilities, and it is said."""
    images = torch.randn(5, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    plain, small = (
        lib.predict_probs([net], lambda part: images[part], 5, torch.float32, 1, True, batch_size=8)
        for net in (Ramp(), Small())
    )
    assert (plain == small).all()
    assert "out of memory at 4 images: going on with 2" in capsys.readouterr().out


def test_an_input_that_does_not_fit_is_halved_too():
    """Memory that runs out while the batch is made, already of the first one: smaller ones are made."""
    images = torch.randn(5, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    asked = []

    def make_input(part):
        asked.append(part.stop - part.start)
        assert len(asked) < 20, f"it goes on for ever: {asked}"
        if asked[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
        return images[part]

    got = lib.predict_probs([Ramp()], make_input, 5, torch.float32, 1, True)
    want = lib.predict_probs([Ramp()], lambda part: images[part], 5, torch.float32, 1, True)
    assert (got == want).all() and asked == [64, 32, 16, 8, 4, 2, 2, 2]


def test_an_image_too_large_for_the_memory_is_one_sentence():
    """At one image there is nothing left to halve; another error of PyTorch's stays what it is."""
    with pytest.raises(lib.UserError, match="--width"):
        lib.smaller_batch(1, RuntimeError("CUDA out of memory."))
    assert lib.smaller_batch(8, RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")) == 4
    for other in ("size mismatch", "CUDA error: an illegal memory access was encountered"):
        with pytest.raises(RuntimeError, match=other):
            lib.smaller_batch(8, RuntimeError(other))


def test_the_bottleneck_hears_of_the_whole_image():
    """The context says nothing at first; later a change at one end of a long image reaches the other end."""
    torch.manual_seed(0)
    model = lib.UNet(1, 4, 2, depth=1, context=True).eval()
    plain = lib.UNet(1, 4, 2, depth=1).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(1, 1, 8, 256)
    other = torch.cat([x[..., :128], torch.randn(1, 1, 8, 128)], -1)
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=0, atol=0)
    torch.nn.init.normal_(model.context.mix.weight)
    assert torch.equal(plain(x)[0][..., :64], plain(other)[0][..., :64])
    assert not torch.allclose(model(x)[0][..., :64], model(other)[0][..., :64])
