"""Packed float32 products: the same layer in another order of the weights, and nothing of it is seen from outside."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sae import packed
from sae.packed import PackedLinear, pack_linears

needs_packing = pytest.mark.skipif(not packed.available(), reason="this torch has no oneDNN with float32 products")


def linear(bias: bool = True, inputs: int = 320, outputs: int = 256) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 320), (7, 320), (3, 50, 320), (2, 1_030, 320)])
def test_equal_to_float64(bias: bool, shape: tuple[int, ...]) -> None:
    layer = linear(bias)
    x = torch.randn(shape)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert pack_linears(layer) == 1
    found = layer(x)
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 1e-5


@needs_packing
def test_a_row_has_the_same_bits_in_any_batch() -> None:
    layer, x = linear(), torch.randn(512, 320)
    pack_linears(layer)
    whole = layer(x)
    assert torch.equal(whole[100:164], layer(x[100:164])) and torch.equal(whole[:128], layer(x[:128]))


@needs_packing
def test_gpt2_layers() -> None:
    torch.manual_seed(0)
    layer = Conv1D(256, 320)
    x = torch.randn(5, 9, 320)
    expected = layer(x)
    assert pack_linears(layer) == 1 and isinstance(layer, Conv1D)
    with torch.no_grad():
        assert float((layer(x) - expected).abs().max()) < 1e-5


@needs_packing
def test_weights_written_or_moved_are_packed_anew() -> None:
    layer, x = linear(bias=False), torch.randn(4, 320)
    pack_linears(layer)
    before = layer(x)
    layer.weight.mul_(2)
    assert torch.allclose(layer(x), 2 * before, atol=1e-5)
    layer.weight.data = layer.weight.data.clone() * 2
    assert torch.allclose(layer(x), 4 * before, atol=1e-5)


@needs_packing
def test_from_outside_the_layer_is_what_it_was() -> None:
    model = nn.Sequential(linear(), nn.Linear(256, 8))
    names, seen = list(model.state_dict()), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    assert pack_linears(model) == 1  # the second is too small to gain
    assert isinstance(model[0], nn.Linear) and type(model[1]) is nn.Linear
    with torch.no_grad():
        model(torch.randn(2, 320))
    assert list(model.state_dict()) == names and seen == [1]
    twin = copy.deepcopy(model)
    twin[0].weight.data.zero_()
    with torch.no_grad():
        assert float(twin[0](torch.randn(2, 320)).abs().max()) <= float(twin[0].bias.abs().max())
        assert float(model[0](torch.ones(2, 320)).abs().max()) > float(model[0].bias.abs().max())


def test_gradients_and_other_types_go_the_usual_way() -> None:
    layer = nn.Linear(320, 256)
    pack_linears(layer)
    x = torch.randn(3, 320, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    half = linear().bfloat16()
    pack_linears(half)
    assert half(torch.randn(3, 320).bfloat16()).dtype == torch.bfloat16
    packed_then_cast = linear()
    pack_linears(packed_then_cast)
    assert packed_then_cast.bfloat16()(torch.randn(3, 320).bfloat16()).dtype == torch.bfloat16


@needs_packing
def test_no_more_copies_than_there_is_room_for() -> None:
    model = nn.Sequential(linear(), linear(inputs=256), linear(inputs=256))
    assert pack_linears(model, largest_total=4 * (320 * 256 + 256 * 256)) == 2
    assert [isinstance(m, PackedLinear) for m in model] == [True, True, False]


def test_a_torch_without_the_operators_stays_with_its_own(monkeypatch) -> None:
    def missing(self, W_OI) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(packed.PackedWeight, "__init__", missing)
    packed.available.cache_clear()
    try:
        layer = linear()
        assert not packed.available() and pack_linears(layer) == 0 and type(layer) is nn.Linear
    finally:
        packed.available.cache_clear()


def test_products_that_are_not_float32_are_refused(monkeypatch) -> None:
    """A processor that rounds the operands to bfloat16 fails the probe."""
    real = packed.PackedWeight.__call__
    monkeypatch.setattr(packed.PackedWeight, "__call__", lambda self, x, b=None: real(self, x.bfloat16().float(), b))
    packed.available.cache_clear()
    try:
        assert not packed.available()
    finally:
        packed.available.cache_clear()
