"""I3D has the port's tensors, TensorFlow's padding, and branches in order."""

import math
from itertools import product

import pytest
import torch

from tinyvgpt.i3d import I3D, Mixed, SamePool, Unit, same_pad


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return I3D()


def test_the_port_s_tensors(network):
    """Names and shapes by which the port's files are known; 57 norms count batches besides."""
    state = network.state_dict()
    shapes = {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
        "Conv3d_2b_1x1.bn.running_var": (64,),
        "Conv3d_2c_3x3.conv3d.weight": (192, 64, 3, 3, 3),
        "Mixed_3b.b1b.conv3d.weight": (128, 96, 3, 3, 3),
        "Mixed_4f.b2a.conv3d.weight": (32, 528, 1, 1, 1),
        "Mixed_5b.b2b.bn.bias": (128,),
        "Mixed_5c.b3b.conv3d.weight": (128, 832, 1, 1, 1),
        "logits.conv3d.weight": (400, 1024, 1, 1, 1),
        "logits.conv3d.bias": (400,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert len([n for n in state if n.endswith("num_batches_tracked")]) == 57
    assert len(state) == 57 * 6 + 2
    assert sum(p.numel() for p in network.parameters()) == 12_697_264
    assert {m.eps for m in network.modules() if isinstance(m, torch.nn.BatchNorm3d)} == {1e-3}


def test_logits_are_means_over_time(network):
    assert not network.training
    x = torch.zeros(1, 3, 32, 224, 224)
    x[:, :, 16:] = torch.rand(1, 3, 16, 224, 224) * 2 - 1
    seen = []
    hook = network.logits.register_forward_hook(lambda module, x, y: seen.append((x[0], y)))
    with torch.no_grad():
        made = network(x)
    hook.remove()
    ((pooled, logits),) = seen
    assert pooled.shape == (1, 1024, 3, 1, 1)  # 32 / 8 latent frames, in windows of two
    assert made.shape == (1, 400)
    over_time = logits[..., 0, 0]
    assert torch.allclose(made, over_time.mean(2), rtol=1e-5, atol=1e-9)
    assert not torch.allclose(made, over_time[..., 0], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (2, 2), (3, 1), (1, 1), (1, 2)])
def test_same_padding(kernel, stride):
    """As few zeros as ⌈size / stride⌉ outputs take, the odd one behind."""
    for size in range(1, 12):
        padded = same_pad(torch.ones(1, 1, 1, 1, size), (1, 1, kernel), (1, 1, stride)).flatten()
        front, behind = padded.argmax().item(), padded.flip(0).argmax().item()
        assert (len(padded) - kernel) // stride + 1 == math.ceil(size / stride)
        assert front <= behind <= front + 1
        assert front + size + behind == len(padded)
        assert not front + behind or front + behind < kernel


def test_padding_of_each_axis():
    x = same_pad(torch.ones(1, 1, 4, 5, 6), (3, 5, 2), (1, 1, 1))
    assert x.shape == (1, 1, 6, 9, 7)
    assert x[0, 0, 1:5, 2:7, :6].eq(1).all()
    assert x.sum() == 4 * 5 * 6


def test_a_unit_against_sums_by_hand():
    unit = Unit(1, 1, 3, 2).eval()
    torch.nn.init.ones_(unit.conv3d.weight)
    unit.bn.running_mean[:], unit.bn.bias.data[:] = 2.0, -1.0
    x = torch.randn(1, 1, 5, 4, 6)
    made = unit(x)
    assert made.shape == (1, 1, 3, 2, 3)
    for t, h, w in product(range(3), range(2), range(3)):
        # An odd size has a zero on both sides, an even one only behind.
        t0, h0, w0 = 2 * t - 1, 2 * h, 2 * w
        total = x[0, 0, max(t0, 0) : t0 + 3, h0 : h0 + 3, w0 : w0 + 3].sum().item()
        expected = max((total - 2) / math.sqrt(1 + 1e-3) - 1, 0)
        assert made[0, 0, t, h, w].item() == pytest.approx(expected, abs=1e-5)


def test_pooling_of_positive_numbers():
    x = torch.rand(1, 2, 3, 4, 5) + 0.1
    made = SamePool((3, 3, 3), (1, 1, 1))(x)
    assert made.shape == x.shape
    assert made[0, 1, 0, 0, 0] == x[0, 1, :2, :2, :2].max()
    assert made[0, 1, 2, 3, 4] == x[0, 1, 1:, 2:, 3:].max()


def test_branches_in_order():
    module = Mixed(4, (1, 2, 3, 4, 5, 6)).eval()
    for value, branch in enumerate((module.b0, module.b1b, module.b2b, module.b3b), 1):
        torch.nn.init.zeros_(branch.conv3d.weight)
        branch.bn.bias.data[:] = value
    made = module(torch.rand(1, 4, 2, 3, 3))
    assert made[0, :, 1, 1, 1].tolist() == [1] + [2] * 3 + [3] * 5 + [4] * 6
