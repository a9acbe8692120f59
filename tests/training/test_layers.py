"""Adapted layers against PEFT's and Eq. 5, with the same weights and inputs, as they are written and accelerated."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import eq_5, random, relative_error, tuned_weight
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from wdanalysis.decomposition import Axis
from wdanalysis.training.fast import accelerate, restore
from wdanalysis.training.injection import AdapterConfig, inject, make_lora
from wdanalysis.training.layers import Adapted, Decomposed, LoRAUpdate, adapted_modules
from wdanalysis.training.methods import ADAPTER_METHODS

OUT, IN, RANK, ALPHA = 6, 10, 3, 4.5
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.fixture(name="fast", params=[False, True], ids=["as written", "accelerated"])
def _fast(request: pytest.FixtureRequest) -> bool:
    return request.param  # type: ignore[no-any-return]


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self, kind: str, *, bias: bool = True) -> None:
        super().__init__()
        layers: dict[str, Callable[[], nn.Module]] = {
            "Linear": lambda: nn.Linear(IN, OUT, bias=bias),
            "Conv1D": lambda: Conv1D(OUT, IN),
            "Embedding": lambda: nn.Embedding(IN, OUT, padding_idx=0),
        }
        self.layer = layers[kind]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def net(kind: str = "Linear", *, bias: bool = True) -> Net:
    torch.manual_seed(0)
    made = Net(kind, bias=bias).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(random(*parameter.shape))
    return made


def ours(model: Net, method: str, *, fast: bool, **options: Any) -> Adapted:
    """Adapt the layer, with numbers everywhere."""
    inject(model, AdapterConfig(method, RANK, ALPHA, targets="layer", **options))
    if not fast:
        restore(model)
    layer = adapted_modules(model)["layer"]
    with torch.no_grad():
        for i, parameter in enumerate(layer.trained()):
            parameter.copy_(random(*parameter.shape, seed=10 + i))
        if layer.magnitude is not None:
            layer.magnitude.abs_()
    return layer


def decomposed(base: nn.Module, rank: int, alpha: float, *, fast: bool, **options: Any) -> Decomposed:
    layer = Decomposed(base, make_lora(base, rank, alpha), **options)
    if fast:
        accelerate(layer)
    return layer


def peft(model: Net, method: str, layer: Adapted, dropout: float = 0.0) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's model with the numbers of `layer`, and its parameters in the order of `layer.trained()`."""
    from peft import LoraConfig, VeraConfig, get_peft_model

    config: Any
    if method == "vera":
        config = VeraConfig(r=RANK, target_modules=["layer"], vera_dropout=dropout)
    else:
        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=["layer"],
            use_dora=method == "dora",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = get_peft_model(model, config).double()  # type: ignore[arg-type]
    theirs: Any = other.base_model.model.layer
    if method == "vera":
        parameters = [theirs.vera_lambda_d["default"], theirs.vera_lambda_b["default"]]
    elif theirs.lora_embedding_A:
        parameters = [theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]]
    else:
        parameters = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    if method == "dora":
        parameters.append(theirs.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        for target, source in zip(parameters, layer.trained(), strict=True):
            target.copy_(source)
    return other, parameters


def an_input(kind: str) -> Tensor:
    if kind == "Embedding":
        return torch.tensor([[1, 4, 0, 1], [9, 2, 2, 3]])
    return random(2, 4, IN, requires_grad=True)


CASES = [
    (k, m)
    for k in ("Linear", "Conv1D", "Embedding")
    for m in ("lora", "dora", "vera")
    if (k, m) != ("Embedding", "vera")
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_outputs_gradients_and_merged_weights_are_pefts(kind: str, method: str, fast: bool) -> None:
    model, base = net(kind), net(kind)
    layer = ours(model, method, fast=fast)
    other, theirs = peft(base, method, layer)
    x = an_input(kind)
    y, expected = model(x), other(x)
    torch.testing.assert_close(y, expected)
    g = random(*y.shape)
    wanted = [x] if x.requires_grad else []
    ours_gradients = torch.autograd.grad(y, [*wanted, *layer.trained()], g)
    torch.testing.assert_close(ours_gradients, torch.autograd.grad(expected, [*wanted, *theirs], g))
    merged: Any = other.merge_and_unload()  # type: ignore[operator]
    W = tuned_weight(layer)
    torch.testing.assert_close(W.mT if layer.stores_in_by_out else W, merged.layer.weight.detach())


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_with_one_mask_dropout_is_pefts(kind: str, method: str, fast: bool) -> None:
    model, base = net(kind), net(kind)
    layer = ours(model, method, fast=fast, dropout=0.4)
    other, theirs = peft(base, method, layer, dropout=0.4)
    x = random(2, 4, IN)
    torch.manual_seed(1)
    y = model.train()(x)
    torch.manual_seed(1)
    expected = other.train()(x)
    torch.testing.assert_close(y, expected)
    g = random(*y.shape)
    torch.testing.assert_close(
        torch.autograd.grad(y, layer.trained(), g), torch.autograd.grad(expected, theirs, g)
    )
    torch.testing.assert_close(model.eval()(x), other.eval()(x))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("full_gradient", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
def test_dora_is_eq_5_along_either_axis(kind: str, axis: Axis, full_gradient: bool, fast: bool) -> None:
    model = net(kind)
    layer = ours(model, "dora", fast=fast, axis=axis, full_gradient=full_gradient)
    assert isinstance(layer.update, LoRAUpdate)
    assert layer.magnitude is not None
    W0 = layer.base_weight()
    W = eq_5(
        W0,
        layer.update.A,
        layer.update.B,
        layer.update.scale,
        layer.magnitude,
        axis,
        detach=not full_gradient,
    )
    x = an_input(kind)
    one_hot = nn.functional.one_hot(x, IN).double() if kind == "Embedding" else x
    bias = 0 if layer.bias is None else layer.bias
    expected = one_hot @ W.T + bias
    y = model(x)
    torch.testing.assert_close(y, expected)
    g = random(*y.shape)
    if kind == "Embedding":
        g[x == 0] = 0  # the padding token trains no factor
    torch.testing.assert_close(
        torch.autograd.grad(y, layer.trained(), g), torch.autograd.grad(expected, layer.trained(), g)
    )
    torch.testing.assert_close(tuned_weight(layer), W.detach())


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dvora_is_eq_5_with_veras_update(axis: Axis, fast: bool) -> None:
    model = net()
    layer = ours(model, "dvora", fast=fast, axis=axis, full_gradient=True)
    assert layer.update is not None
    assert layer.magnitude is not None
    A, B = layer.update.factors()
    W = eq_5(layer.base_weight(), A, B, 1.0, layer.magnitude, axis, detach=False)
    x = random(4, IN)
    expected = x @ W.T + layer.bias
    y = model(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), layer.trained()), torch.autograd.grad(expected.sum(), layer.trained())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ADAPTER_METHODS)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Embedding"])
def test_at_step_0_the_output_is_the_bases_to_the_last_bit(
    kind: str, method: str, dtype: torch.dtype, fast: bool
) -> None:
    if kind == "Embedding" and ADAPTER_METHODS[method].update != "lora":
        pytest.skip("VeRA adapts no embeddings")
    model = net(kind).to(dtype)
    x = an_input(kind)
    x = x if kind == "Embedding" else x.detach().to(dtype)
    before = model(x)
    inject(model, AdapterConfig(method, RANK, targets="layer"))
    if not fast:
        restore(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(40, 64), (64, 40)], ids=["rebuilt", "kept"])
def test_a_bfloat16_layer_is_that_of_float64_to_rounding(
    shape: tuple[int, int], device: str, fast: bool
) -> None:
    out_features, in_features = shape
    base = nn.Linear(in_features, out_features, dtype=torch.bfloat16, device=device)
    layer = decomposed(base, 4, 8.0, fast=fast)
    assert isinstance(layer.update, LoRAUpdate)
    with torch.no_grad():
        layer.update.B.copy_(random(out_features, 4) / 8)
        layer.magnitude.mul_(random(out_features).to(device).abs() + 0.5)
    x = random(16, in_features).to(device, torch.bfloat16).requires_grad_()
    g = random(16, out_features).to(device, torch.bfloat16)
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, *layer.trained()), g)
    exact = [t.detach().double().requires_grad_() for t in (x, *layer.trained())]
    xd, A, B, m = exact
    W = eq_5(base.weight.double(), A, B, layer.update.scale, m, "out", detach=True)
    yd = xd @ W.T + base.bias.double()
    assert relative_error(y, yd) < 0.01
    for gradient, expected in zip(gradients, torch.autograd.grad(yd, exact, g.double()), strict=True):
        assert relative_error(gradient, expected) < 0.01


def test_norms_and_factors_of_a_16_bit_base_are_float32() -> None:
    base = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    layer = Decomposed(base, make_lora(base, RANK, 1.0))
    assert {p.dtype for p in layer.trained()} == {torch.float32}
    assert relative_error(layer.magnitude, base.weight.double().norm(dim=1)) < 1e-6


@pytest.mark.parametrize("full_gradient", [False, True])
def test_a_zero_row_of_the_base_stays_zero_while_the_rest_learns(full_gradient: bool, fast: bool) -> None:
    base = nn.Linear(IN, OUT, bias=False)
    with torch.no_grad():
        base.weight[1] = 0
    layer = decomposed(base, RANK, 2.0, fast=fast, full_gradient=full_gradient)
    optimizer = torch.optim.AdamW(layer.trained(), lr=0.1)
    for _ in range(3):
        layer(random(4, IN).float()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    y = layer(random(4, IN).float())
    assert y.isfinite().all()
    assert (y[:, 1] == 0).all()
    assert all(parameter.isfinite().all() for parameter in layer.trained())


def two_layers(fast: bool, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)).double()
    inject(model, AdapterConfig("dora", RANK, targets=r"^\d$", **options))
    if not fast:
        restore(model)
    return model


def test_two_forward_passes_may_share_one_backward_pass(fast: bool) -> None:
    model, x = two_layers(fast).train(), random(4, IN)
    trained = [p for p in model.parameters() if p.requires_grad]
    together = torch.autograd.grad(model(x).sum() + model(2 * x).sum(), trained)
    apart = [torch.autograd.grad(model(f * x).sum(), trained) for f in (1, 2)]
    for total, first, second in zip(together, *apart, strict=True):
        torch.testing.assert_close(total, first + second)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, dropout: float, fast: bool) -> None:
    model, x = two_layers(fast, dropout=dropout).train(), random(4, IN, requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(run: Callable[[Tensor], Any]) -> list[Tensor | None]:
        model.zero_grad()
        torch.manual_seed(3)
        run(x).square().sum().backward()
        return [p.grad for p in trained]

    plain = gradients(model)
    again = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close(plain, again)


def test_autocast_computes_products_in_16_bits_and_norms_in_32(fast: bool) -> None:
    model, x = two_layers(fast).float().train(), random(4, IN).float()
    layer = adapted_modules(model)["0"]
    assert isinstance(layer, Decomposed)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert torch.equal(layer.scale(), torch.ones(OUT))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    exact = tuned_weight(adapted_modules(model)["2"])
    h = nn.functional.linear(x, tuned_weight(layer), layer.bias).tanh()
    assert relative_error(y, nn.functional.linear(h, exact, adapted_modules(model)["2"].bias)) < 0.02


@pytest.mark.parametrize("method", ADAPTER_METHODS)
@pytest.mark.parametrize("axis", ["out", "in"])
def test_compiled_in_one_graph_it_computes_the_same(method: str, axis: Axis, fast: bool) -> None:
    model, x = net(), random(4, IN)
    layer = ours(model, method, fast=fast, axis=axis)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), layer.trained()), torch.autograd.grad(expected.sum(), layer.trained())
    )


def test_a_frozen_input_gets_no_gradient_and_a_trained_bias_does(fast: bool) -> None:
    model = net()
    layer = ours(model, "dora", fast=fast)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    model(random(4, IN)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 4.0).double())


def test_a_base_that_is_trained_as_well_gets_its_gradient(fast: bool) -> None:
    model = net()
    layer = ours(model, "lora", fast=fast)
    layer.weight.requires_grad_(True)
    x = random(4, IN)
    model(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.ones(OUT, 4).double() @ x)


# --- quantised bases ----------------------------------------------------------------------------------------


def quantised(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if bits == 4:
        layer: nn.Module = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    return layer.to("cpu")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_a_quantised_base_is_called_as_it_is(bits: int, method: str, fast: bool) -> None:
    model = nn.Sequential(quantised(bits))
    x = random(4, 64).float()
    before = model(x)
    inject(model, AdapterConfig(method, 4, targets="^0$"))
    if not fast:
        restore(model)
    torch.testing.assert_close(model(x), before)
    layer = adapted_modules(model)["0"]
    assert layer.weight.dtype in (torch.uint8, torch.int8)
    with torch.no_grad():
        for parameter in layer.trained():
            parameter.add_(0.1)
    tolerance = {4: 1e-5, 8: 0.02}[bits]  # int8 quantises its input as well
    y = model(x)
    assert relative_error(y, nn.functional.linear(x, tuned_weight(layer), layer.bias)) < tolerance
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.trained())
