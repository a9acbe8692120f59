"""What a training step costs: our LoRA and DoRA against PEFT's, on one GPU; `RESULTS.md` holds the last results.

`python -m benchmarks.training` in the root of the repository, with the extra `train` and PEFT. A LLaMA-shaped model of
random weights is adapted in turn by each case and takes steps: forward, backward and AdamW on the adapters.
`--quick` runs a tiny model, on the CPU where there is no GPU, and leaves RESULTS.md as it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks import page
from wdanalysis.training.injection import AdapterConfig, inject

HEADING = "training"
PACKAGES = ("torch", "transformers", "peft")
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
RANKS = (32, 384)
SHORT = 256
"""Tokens of a sequence where detaching is measured: the most that the paper's commonsense runs train on."""

WARM_UP, STEPS, ROUNDS, PASSES = 4, 10, 3, 2

LORA, DORA, FULL = "LoRA", "DoRA", "DoRA, full gradient (Eq. 6)"
PEFT_LORA, PEFT_DORA = "PEFT LoRA", "PEFT DoRA"
PEFT_LORA_16, PEFT_DORA_16 = "PEFT LoRA, adapters in bf16", "PEFT DoRA, adapters in bf16"
PLAIN, PLAIN_FULL = "authors' DoRA, detached", "authors' DoRA, full gradient"


@dataclass(frozen=True)
class Shape:
    """The model and the batch."""

    layers: int = 16
    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    batch: int = 4
    length: int = 1024


@dataclass(frozen=True)
class Cost:
    """Seconds a step, and the peak of allocated memory in bytes."""

    seconds: float
    peak: int


class AuthorsDoRA(nn.Module):
    """DoRA as the paper's authors published it: ‖W0 + BA‖ of the matrix itself, detached or not."""

    def __init__(self, base: nn.Linear, rank: int, *, detach: bool) -> None:
        super().__init__()
        self.base, self.detach, self.scale = base, detach, 2.0
        self.A = nn.Parameter(torch.randn(rank, base.in_features, device=base.weight.device) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        A, B, magnitude = (p.to(x.dtype) for p in (self.A, self.B, self.magnitude))
        norm = torch.linalg.norm(self.base.weight + self.scale * (B @ A), dim=1)
        scale = magnitude / (norm.detach() if self.detach else norm)
        y = self.base(x)
        return y + (scale - 1) * y + scale * linear(linear(x, A), B) * self.scale


def ours(method: str, *, full_gradient: bool = False) -> Callable[[nn.Module, int], nn.Module]:
    def adapt(model: nn.Module, rank: int) -> nn.Module:
        inject(model, AdapterConfig(method, rank, targets=TARGETS, full_gradient=full_gradient))
        return model

    return adapt


def peft(*, use_dora: bool, in_float32: bool) -> Callable[[nn.Module, int], nn.Module]:
    def adapt(model: nn.Module, rank: int) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), use_dora=use_dora)
        adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=in_float32)
        return adapted

    return adapt


def authors(*, detach: bool) -> Callable[[nn.Module, int], nn.Module]:
    def adapt(model: nn.Module, rank: int) -> nn.Module:
        model.requires_grad_(False)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in TARGETS:
                    setattr(parent, name, AuthorsDoRA(child, rank, detach=detach))
        return model

    return adapt


CASES: Mapping[str, Callable[[nn.Module, int], nn.Module]] = {
    LORA: ours("lora"),
    DORA: ours("dora"),
    FULL: ours("dora", full_gradient=True),
    PEFT_LORA: peft(use_dora=False, in_float32=True),
    PEFT_DORA: peft(use_dora=True, in_float32=True),
    PEFT_LORA_16: peft(use_dora=False, in_float32=False),
    PEFT_DORA_16: peft(use_dora=True, in_float32=False),
    PLAIN: authors(detach=True),
    PLAIN_FULL: authors(detach=False),
}


def new_model(shape: Shape, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.train()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, number: int) -> float:
    """Seconds that `number` steps take, from an idle device to an idle device."""
    _synchronize(tokens)
    started = time.perf_counter()
    for _ in range(number):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _synchronize(tokens)
    return time.perf_counter() - started


def measure(name: str, rank: int, shape: Shape, device: str, rounds: int, profile: Path | None) -> Cost:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CASES[name](new_model(shape, device), rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length), device=device)
    steps(model, optimizer, tokens, WARM_UP)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = min(steps(model, optimizer, tokens, STEPS) / STEPS for _ in range(rounds))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    if profile is not None:
        _profile(model, optimizer, tokens, profile / f"{name.replace(' ', '-')}-{rank}.txt")
    del model, optimizer, trained
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return Cost(seconds, peak)


def targets(costs: Mapping[str, Cost]) -> Iterator[list[str]]:
    """What was promised, what was measured, and whether it holds."""

    def row(promise: str, measured: str, *, holds: bool) -> list[str]:
        return [promise, measured, "yes" if holds else "**no**"]

    lora, dora = costs[LORA], costs[DORA]
    ratio = dora.seconds / lora.seconds
    yield row("DoRA's step ≤ 1.10 × LoRA's", f"{ratio:.3f} ×", holds=ratio <= 1.10)
    ratio = dora.peak / lora.peak
    yield row("DoRA's peak ≤ 1.03 × LoRA's", f"{ratio:.3f} ×", holds=ratio <= 1.03)
    for other in (PEFT_DORA, PEFT_DORA_16):
        ratio = costs[other].seconds / dora.seconds
        yield row(f"DoRA ≥ 1.5 × faster than {other}", f"{ratio:.2f} ×", holds=ratio >= 1.5)
        saved = 1 - dora.peak / costs[other].peak
        yield row(f"DoRA's peak ≥ 20 % under {other}'s", f"{100 * saved:.1f} %", holds=saved >= 0.2)


def detaching(costs: Mapping[str, Cost], short: Mapping[str, Cost]) -> Iterator[list[str]]:
    """What Eq. 11 saves over Eq. 6 (the paper's Table 7: 24.4 % of LLaMA-7B's memory)."""
    for detached, full in ((PLAIN, PLAIN_FULL), (DORA, PLAIN_FULL), (DORA, FULL)):
        saved = (f"{100 * (1 - of[detached].peak / of[full].peak):.1f} %" for of in (costs, short))
        yield [f"{detached} under {full}", *saved]


def report(
    shape: Shape, parameters: int, costs: Mapping[int, Mapping[str, Cost]], short: Mapping[str, Cost]
) -> str:
    sections = [
        f"`python -m benchmarks.training`, {page.machine(PACKAGES)} GPU: {torch.cuda.get_device_name()}.",
        f"LLaMA-shaped, {parameters / 1e9:.2f}B parameters of bf16, {shape.layers} layers, hidden {shape.hidden}, ffn "
        f"{shape.ffn}, {shape.heads} heads ({shape.kv_heads} for keys and values), vocabulary {shape.vocabulary}; "
        f"adapters on {', '.join(TARGETS)}; {shape.batch} × {shape.length} tokens; no gradient checkpointing, no "
        f"dropout. A step is forward, backward and fused AdamW on the adapters; the fastest of {PASSES} × {ROUNDS} "
        f"rounds of {STEPS} steps, each from an idle to an idle GPU, all cases in turn. Peak: "
        "`torch.cuda.max_memory_allocated`. Our adapters and PEFT's by default are float32 beside the bf16 base.",
    ]
    for rank, of_rank in costs.items():
        rows = (
            [name, f"{1000 * cost.seconds:.1f} ms", f"{cost.peak / 2**30:.2f} GiB"]
            for name, cost in of_rank.items()
        )
        sections += [
            page.table((f"r = {rank}", "step", "peak"), rows),
            page.table((f"target, r = {rank}", "measured", "holds"), targets(of_rank)),
        ]
    rank = min(costs)
    headings = (
        f"memory that detaching saves, r = {rank}",
        f"{shape.batch} × {shape.length}",
        f"{shape.batch} × {SHORT}",
    )
    sections.append(page.table(headings, detaching(costs[rank], short)))
    return "\n\n".join(sections)


def _synchronize(tokens: Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize()


def _profile(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, path: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        steps(model, optimizer, tokens, 3)
    table = profiler.key_averages()
    path.write_text(
        table.table(sort_by="self_cuda_time_total", row_limit=40)
        + table.table(sort_by="self_cpu_time_total", row_limit=40)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; no results are kept")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="ranks (default: 32 384)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="cases by name")
    parser.add_argument("--profile", type=Path, help="folder for torch.profiler's tables of each case")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(2, 64, 128, 4, 2, 100, 2, 16) if options.quick else Shape()
    rounds = 1 if options.quick else ROUNDS
    costs: dict[int, dict[str, Cost]] = {}
    for rank in (8,) if options.quick else options.ranks:
        costs[rank] = {}
        for name in options.cases * (1 if options.quick else PASSES):
            cost = measure(name, rank, shape, device, rounds, options.profile)
            before = costs[rank].get(name, cost)
            costs[rank][name] = Cost(min(cost.seconds, before.seconds), cost.peak)
            print(f"r={rank} {name}: {1000 * cost.seconds:.1f} ms, {cost.peak / 2**30:.2f} GiB", flush=True)
    if options.json is not None:
        numbers: dict[int, Any] = {r: {n: asdict(c) for n, c in of.items()} for r, of in costs.items()}
        options.json.write_text(json.dumps(numbers, indent=1))
    if not options.quick and set(options.cases) == set(CASES):
        shorter = replace(shape, length=SHORT)
        short = {
            name: measure(name, min(costs), shorter, device, 1, None)
            for name in (DORA, FULL, PLAIN, PLAIN_FULL)
        }
        parameters = sum(p.numel() for p in new_model(shape, "meta").parameters())
        section = report(shape, parameters, costs, short)
        print(section)
        page.replace_section(HEADING, section)


if __name__ == "__main__":
    main()
