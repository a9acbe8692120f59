"""The norm without V', and Eq. 5 with the gradients of Eq. 6, 7 and 11, against autograd and written formulas."""

from __future__ import annotations

import pytest
import torch
from equations import eq_5, random, relative_error
from torch import Tensor

from wdanalysis.decomposition import Axis
from wdanalysis.training.fast import functional
from wdanalysis.training.fast.functional import (
    Prepared,
    factored_norm,
    low_rank_linear,
    rescale,
    scale_by_magnitude,
    squared_norms,
)

OUT, IN, RANK, S = 5, 7, 3, 1.5


@pytest.fixture(name="W0")
def _w0() -> Tensor:
    return random(OUT, IN)


@pytest.fixture(name="A")
def _a() -> Tensor:
    return random(RANK, IN, requires_grad=True)


@pytest.fixture(name="B")
def _b() -> Tensor:
    return random(OUT, RANK, requires_grad=True)


@pytest.fixture
def m() -> Tensor:
    return random(OUT, seed=3).abs().requires_grad_()


def dora(
    x: Tensor, W0: Tensor, b: Tensor | None, A: Tensor, B: Tensor, m: Tensor, *, full: bool = False
) -> Tensor:
    norm = factored_norm(W0, squared_norms(W0), B, S * A.mT)
    ready = Prepared(S * A.detach(), B.detach(), S, *scale_by_magnitude(m.detach(), norm.detach()))
    return low_rank_linear(x, W0, b, A, B, m, norm if full else None, ready)


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full gradient"])
def test_the_gradients_are_those_of_the_equation(
    W0: Tensor, A: Tensor, B: Tensor, m: Tensor, full: bool
) -> None:
    x, b, g = random(4, IN, requires_grad=True), random(OUT, seed=9, requires_grad=True), random(4, OUT)
    W = eq_5(W0, A, B, S, m, "out", detach=not full)
    exact = torch.autograd.grad(x @ W.T + b, (x, b, A, B, m), g)
    ours = torch.autograd.grad(dora(x, W0, b, A, B, m, full=full), (x, b, A, B, m), g)
    for gradient, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_eq_6_is_the_gradient_to_the_direction(W0: Tensor, A: Tensor, B: Tensor, m: Tensor) -> None:
    x, g = random(4, IN), random(4, OUT)
    dW = g.T @ x
    V = (W0 + S * B @ A).detach()
    norm = V.norm(dim=1, keepdim=True)
    projected = dW - V * (V * dW).sum(dim=1, keepdim=True) / norm**2
    dV = m.detach()[:, None] / norm * projected
    dA, dB = torch.autograd.grad(dora(x, W0, None, A, B, m, full=True), (A, B), g)
    torch.testing.assert_close(dA, S * B.detach().T @ dV)
    torch.testing.assert_close(dB, S * dV @ A.detach().T)


def test_eq_7_is_the_gradient_to_the_magnitude(W0: Tensor, A: Tensor, B: Tensor, m: Tensor) -> None:
    x, g = random(4, IN), random(4, OUT)
    V = (W0 + S * B @ A).detach()
    (dm,) = torch.autograd.grad(dora(x, W0, None, A, B, m), m, g)
    torch.testing.assert_close(dm, ((g.T @ x) * V).sum(dim=1) / V.norm(dim=1))


def test_eq_11_takes_the_norm_as_a_constant(W0: Tensor, A: Tensor, B: Tensor, m: Tensor) -> None:
    x, g = random(4, IN), random(4, OUT)
    C = (W0 + S * B @ A).detach().norm(dim=1)
    dV = (m.detach() / C)[:, None] * (g.T @ x)
    (dB,) = torch.autograd.grad(dora(x, W0, None, A, B, m), B, g)
    torch.testing.assert_close(dB, S * dV @ A.detach().T)


def test_of_two_updates_of_one_length_the_one_that_turns_less_moves_m_more() -> None:
    """Eq. 8 to 10: |∇m| is ‖∇w‖ times the cosine between ∇w and w0."""
    w0 = random(1, IN)
    along = w0 / w0.norm()
    across = random(1, IN, seed=5)
    across = across - (across @ along.T) * along
    across = across / across.norm()
    turns, moves = [], []
    for angle in (0.2, 0.7, 1.3):
        gradient = torch.cos(torch.tensor(angle)) * along + torch.sin(torch.tensor(angle)) * across
        A, B = torch.zeros(RANK, IN).double().requires_grad_(), torch.zeros(1, RANK).double().requires_grad_()
        m = w0.norm(dim=1).requires_grad_()
        (dm,) = torch.autograd.grad(dora(gradient, w0, None, A, B, m), m, torch.ones(1, 1).double())
        torch.testing.assert_close(dm.abs(), (gradient @ along.T).abs()[0])
        w = w0 - 0.01 * gradient
        turns.append(float(1 - torch.cosine_similarity(w, w0)))
        moves.append(float(dm.abs()))
    assert turns == sorted(turns)
    assert moves == sorted(moves, reverse=True)


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full gradient"])
def test_gradcheck_agrees(W0: Tensor, A: Tensor, B: Tensor, m: Tensor, full: bool) -> None:
    x = random(3, IN, requires_grad=True)
    differentiated = (x, A, B, m) if full else (x, m)  # Eq. 11 is no derivative with regard to A and B

    def y(*values: Tensor) -> Tensor:
        x, a, b, m = values if full else (values[0], A, B, values[1])
        return dora(x, W0, None, a, b, m, full=full)

    assert torch.autograd.gradcheck(y, differentiated)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_the_factored_norm_is_the_norm(W0: Tensor, A: Tensor, B: Tensor, axis: Axis) -> None:
    V = W0 + S * B @ A
    vectors, G, F = (W0, B, S * A.mT) if axis == "out" else (W0.mT, S * A.mT, B)
    norm = factored_norm(vectors, squared_norms(vectors), G, F)
    exact = V.norm(dim=1 if axis == "out" else 0)
    torch.testing.assert_close(norm, exact)
    g = random(*norm.shape)
    ours, expected = (torch.autograd.grad(n, (A, B), g) for n in (norm, exact))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_the_factored_norm_of_a_bfloat16_base_is_exact_to_float32(size: float) -> None:
    W0 = (0.02 * random(64, 256)).bfloat16()
    A = (random(8, 256) / 16).bfloat16()
    B = (size * random(64, 8) / 16).bfloat16()
    exact = (W0.double() + B.double() @ A.double()).norm(dim=1)
    assert relative_error(factored_norm(W0, squared_norms(W0), B.float(), A.float().mT), exact) < 1e-6


def test_an_update_that_cancels_the_base_has_norm_zero_and_finite_gradients() -> None:
    W0 = random(OUT, IN).float()
    B = torch.eye(OUT).requires_grad_()
    A = (-W0).requires_grad_()
    norm = factored_norm(W0, squared_norms(W0), B, A.mT)
    assert norm.max() < 2e-3 * W0.norm()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(norm.sum(), (A, B)))


@pytest.mark.parametrize("longest", [0, 10_000], ids=["kept", "rebuilt"])
def test_a_magnitude_of_zero_gives_nothing_but_has_its_gradient(
    W0: Tensor, A: Tensor, B: Tensor, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "LONGEST_REBUILT", longest)
    m = torch.zeros(OUT, dtype=torch.float64, requires_grad=True)
    x, g = random(4, IN), random(4, OUT)
    y = dora(x, W0, None, A, B, m)
    assert y.abs().max() < 1e-15
    V = (W0 + S * B @ A).detach()
    torch.testing.assert_close(torch.autograd.grad(y, m, g)[0], ((g.T @ x) * V).sum(dim=1) / V.norm(dim=1))


@pytest.mark.parametrize("longest", [0, 10_000], ids=["kept", "rebuilt"])
def test_a_zero_vector_stays_zero_with_finite_gradients(
    W0: Tensor, A: Tensor, B: Tensor, m: Tensor, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "LONGEST_REBUILT", longest)
    with torch.no_grad():
        W0[2], B[2] = 0, 0
    for full in (False, True):
        y = dora(random(4, IN), W0, None, A, B, m, full=full)
        assert (y[:, 2] == 0).all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (A, B, m)))


@pytest.mark.parametrize("longest", [0, 10_000], ids=["kept", "rebuilt"])
def test_keeping_the_output_or_rebuilding_it_gives_the_same_gradient(
    W0: Tensor, A: Tensor, B: Tensor, m: Tensor, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "LONGEST_REBUILT", longest)
    kept: list[Tensor] = []
    x, b = random(4, IN), random(OUT, seed=9)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = dora(x, W0, b, A, B, m)
    assert any(t.data_ptr() == y.data_ptr() for t in kept) == (longest == 0)
    (dm,) = torch.autograd.grad(y.sum(), m)
    W = eq_5(W0, A, B, S, m, "out", detach=True)
    torch.testing.assert_close(dm, torch.autograd.grad((x @ W.T).sum(), m)[0])


def test_rescale_is_the_magnitudes_part_of_eq_5(W0: Tensor, A: Tensor, B: Tensor, m: Tensor) -> None:
    x, g = random(2, 3, IN), random(2, 3, OUT)
    V = W0 + S * B @ A
    norm = factored_norm(W0, squared_norms(W0), B, S * A.mT)
    c, stand_in, _ = scale_by_magnitude(m.detach(), norm.detach())
    y = rescale(x @ V.T, m, norm, Prepared(scale=c, magnitude=stand_in))
    exact = x @ eq_5(W0, A, B, S, m, "out", detach=False).T
    torch.testing.assert_close(y, exact)
    for gradient, expected in zip(
        torch.autograd.grad(y, (A, B, m), g), torch.autograd.grad(exact, (A, B, m), g), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def test_second_derivatives_are_refused(W0: Tensor, A: Tensor, B: Tensor, m: Tensor) -> None:
    y = dora(random(4, IN, requires_grad=True), W0, None, A, B, m)
    (dA,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dA.sum().backward()
