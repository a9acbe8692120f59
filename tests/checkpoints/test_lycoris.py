"""Files that LyCORIS wrote give the weights with which LyCORIS computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from measured import assert_measured
from safetensors.torch import save_file
from torch import nn

pytestmark = pytest.mark.formats


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.square = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.point = nn.Conv2d(8, 16, 1)
        self.norm = nn.LayerNorm(8)


def weights_of(net: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weight with which each module computes, from its outputs: of unit inputs, of unit images."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            inputs = torch.eye(8, dtype=dtype)
            found[f"{name}.weight"] = (module(inputs) - module(torch.zeros_like(inputs))).T
        elif isinstance(module, nn.Conv2d):
            size = module.kernel_size[0]
            images = torch.zeros(8, 8, 2 * size - 1, 2 * size - 1, dtype=dtype)
            images[range(8), range(8), size - 1, size - 1] = 1
            outputs = module(images) - module(torch.zeros_like(images))
            middle = slice(size // 2, size // 2 + size)
            kernel = outputs[:, :, middle, middle].flip(2, 3) if size > 1 else outputs
            found[f"{name}.weight"] = kernel.transpose(0, 1)
    return found


def lycoris_pair(folder: Path, algo: str, **options: Any) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base file, an adapter file that LyCORIS wrote, and the weights that LyCORIS computes with.

    In float64, but for OFT, which LyCORIS inverts in float32.
    """
    dtype = torch.float32 if "oft" in algo else torch.float64
    lycoris = pytest.importorskip("lycoris")
    torch.manual_seed(0)
    net = Net().to(dtype)
    base = folder / "base.safetensors"
    save_file(net.state_dict(), base)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "target_name": []})
    settings = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0} | options
    network = lycoris.create_lycoris(net, 1.0, algo=algo, **settings)
    network.apply_to()
    network.to(dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif not name.endswith("alpha"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    network.eval()
    adapter = folder / f"{algo}.safetensors"
    network.save_weights(str(adapter), dtype, {})
    with torch.no_grad():
        return base, adapter, weights_of(net, dtype)


@pytest.mark.parametrize(
    ("algo", "options"),
    [
        ("lora", {}),
        ("lora", {"use_tucker": True}),
        ("lora", {"dora_wd": True}),
        ("lora", {"dora_wd": True, "wd_on_output": False}),
        ("lora", {"dora_wd": True, "use_tucker": True}),
        ("lora", {"rs_lora": True}),
        ("loha", {}),
        ("loha", {"use_tucker": True, "dora_wd": True}),
        ("loha", {"dora_wd": True, "wd_on_output": False}),
        ("lokr", {"factor": 2}),
        ("lokr", {"factor": 2, "decompose_both": True, "linear_dim": 1, "conv_dim": 1}),
        ("lokr", {"factor": 2, "full_matrix": True}),
        ("lokr", {"factor": 2, "use_tucker": True, "linear_dim": 2, "conv_dim": 2, "dora_wd": True}),
        ("glora", {}),
        ("full", {}),
        ("ia3", {}),
        ("diag-oft", {"constraint": 0.01}),
        ("diag-oft", {"rescaled": True}),
        ("boft", {"rescaled": True}),
    ],
)
def test_an_algorithm_gives_the_weights_that_lycoris_computes_with(
    tmp_path: Path, algo: str, options: dict[str, Any]
) -> None:
    assert_measured(*lycoris_pair(tmp_path, algo, **options))


def test_dylora_is_saved_as_the_lora_that_every_loader_takes_it_for(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base, adapter, _ = lycoris_pair(tmp_path, "dylora", block_size=2)
    before, parts = load_file(base), load_file(adapter)
    oracle = {}
    for module in ("first", "square", "conv", "point"):
        up, down, alpha = (
            parts[f"lycoris_{module}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha")
        )
        weight = before[f"{module}.weight"]
        oracle[f"{module}.weight"] = weight + (up @ down.flatten(1)).reshape(weight.shape) * alpha / len(down)
    assert_measured(base, adapter, oracle)
