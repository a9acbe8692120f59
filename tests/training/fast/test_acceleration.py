"""What accelerated layers are ready for: every change of what they were made from is seen."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equations import random, tuned_weight
from torch import Tensor, nn

from wdanalysis.training.fast import accelerate, restore
from wdanalysis.training.fast.acceleration import AcceleratedDecomposed, AcceleratedLinear
from wdanalysis.training.fast.functional import squared_norms
from wdanalysis.training.fast.numerics import root
from wdanalysis.training.injection import AdapterConfig, inject
from wdanalysis.training.layers import Adapted, AdaptedEmbedding, Decomposed, adapted_modules, lengths

OUT, IN, RANK = 6, 10, 3


def exact(layer: Adapted, x: Tensor) -> Tensor:
    return nn.functional.linear(x, tuned_weight(layer), layer.bias)


def two_layers(method: str = "dora", **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN)).double()
    inject(model, AdapterConfig(method, RANK, targets=r"^\d$", **options))
    return model


def exact_output(model: nn.Sequential, x: Tensor) -> Tensor:
    for layer in model:
        x = exact(layer, x) if isinstance(layer, Adapted) else layer(x)
    return x


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused, which counts no versions": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("training", [True, False])
def test_every_forward_pass_sees_the_last_step_of_the_optimizer(
    make: Callable[[Any], torch.optim.Optimizer], training: bool
) -> None:
    model, x = two_layers().train(training), random(4, IN)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        y = model(x)
        torch.testing.assert_close(y, exact_output(model, x))
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    torch.testing.assert_close(model(x), exact_output(model, x))


def test_a_training_step_sees_what_was_written_behind_autograds_back() -> None:
    model, x = two_layers().train(), random(4, IN)
    model(x)
    for layer in adapted_modules(model).values():
        for parameter in layer.trained():
            parameter.data.add_(0.3)
    torch.testing.assert_close(model(x), exact_output(model, x))


def test_so_does_an_evaluation_after_a_change_of_mode() -> None:
    model, x = two_layers().train(), random(4, IN)
    model(x)
    for layer in adapted_modules(model).values():
        layer.trained()[-1].data.add_(0.3)
    torch.testing.assert_close(model.eval()(x), exact_output(model, x))


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_seen(assign: bool) -> None:
    model, x = two_layers().eval(), random(4, IN)
    model(x)
    state = {name: 1.1 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    torch.testing.assert_close(model(x), exact_output(model, x))


def test_a_change_of_dtype_is_seen() -> None:
    model, x = two_layers().eval(), random(4, IN)
    model(x)
    torch.testing.assert_close(model.float()(x.float()), exact_output(model, x.float()))


def test_a_copy_of_the_model_is_its_own() -> None:
    model, x = two_layers().eval(), random(4, IN)
    before = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in adapted_modules(twin).values():
            layer.trained()[-1].mul_(2)
    torch.testing.assert_close(twin(x), exact_output(twin, x))
    assert torch.equal(model(x), before)


def test_norms_are_made_once_while_gradients_accumulate() -> None:
    model, x = two_layers().train(), random(4, IN)
    layer = adapted_modules(model)["0"]
    ready = []
    for _ in range(3):
        model(x).square().sum().backward()
        ready.append(layer.ready)
    assert ready[0] is ready[1] is ready[2]
    model.zero_grad()
    model(x)
    assert layer.ready is not ready[0]


def test_layers_of_two_dtypes_do_not_undo_each_others_preparation() -> None:
    model, x = two_layers().train(), random(4, IN)
    first, second = adapted_modules(model).values()
    second.float()
    for _ in range(2):
        first(x), second(random(4, OUT).float())
    ready = first.ready, second.ready
    first(x), second(random(4, OUT).float())
    assert (first.ready, second.ready) == ready


def test_it_exchanges_classes_and_restores_them() -> None:
    model, x = two_layers(), random(4, IN)
    assert {type(layer) for layer in adapted_modules(model).values()} == {AcceleratedDecomposed}
    accelerated, written = model(x), vars(Decomposed(nn.Linear(2, 2), None))
    restore(model)
    for layer in adapted_modules(model).values():
        assert type(layer) is Decomposed
        assert vars(layer).keys() <= written.keys()
    torch.testing.assert_close(model(x), accelerated)
    assert not model._forward_pre_hooks
    accelerate(model)
    assert torch.equal(model(x), accelerated)


def test_what_gains_nothing_stays_as_it_is_written() -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "embed": nn.Embedding(5, 4)})
    inject(model, AdapterConfig("lora", 2, targets="q|embed"))
    kinds = {name: type(layer) for name, layer in adapted_modules(model).items()}
    assert kinds == {"q": AcceleratedLinear, "embed": AdaptedEmbedding}
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    inject(model, AdapterConfig("vera", 2, targets="q"))
    assert type(model["q"]) is Adapted
    assert not model._forward_pre_hooks


def test_a_pickled_model_goes_on() -> None:
    model, x = two_layers().train(), random(4, IN)
    before = model(x)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), before)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.1, fused=True)
    again(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(again(x), exact_output(again, x))


def test_importing_installs_nothing_and_the_last_model_that_goes_takes_the_hook_along() -> None:
    """In a process of its own: the hooks of optimizers are the process's."""
    script = """
import torch
from torch.optim import optimizer
import wdanalysis.training.fast.preparation
from wdanalysis.training import fast
from wdanalysis.training.injection import AdapterConfig, inject

def hooks():
    return len(optimizer._global_optimizer_post_hooks)

models = [torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2)]
for model in models:
    inject(model, AdapterConfig("dora", 2, targets="0"))
seen = [hooks()]
for model in models:
    model(torch.ones(1, 4))
    seen.append(hooks())
for model in models:
    fast.restore(model)
    seen.append(hooks())
print(seen)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[0, 1, 1, 1, 0]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_root_of_a_squared_norm_is_the_norm_to_the_last_bit(dtype: torch.dtype) -> None:
    vectors = random(200_000, 3).to(dtype)
    roots, norms = root(squared_norms(vectors)), lengths(vectors, "out")
    if dtype == torch.float64:  # there is no wider type to round from: some processors' roots are an ulp off
        torch.testing.assert_close(roots, norms, rtol=4e-16, atol=0)
    else:
        assert torch.equal(roots, norms)
