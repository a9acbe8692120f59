"""Random checkpoints of TinyLlama's shape (1.1B parameters at 22 layers), written without a model in memory."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]

HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 32000
HEADS, KV_HEADS = 32, 4
KV = HIDDEN // HEADS * KV_HEADS
PROJECTIONS: Shapes = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS: Shapes = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
OUTSIDE_LAYERS: Shapes = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}
ADAPTED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")

WEIGHT_STD = 0.02
UPDATE_STD = 0.01 * WEIGHT_STD
"""Turns every vector by 0.01 rad: ΔD = 5e-5."""


@dataclass(frozen=True)
class Shard:
    """One file of a model: what it is called and what it holds."""

    file: str
    shapes: Shapes


@dataclass(frozen=True)
class Pair:
    """A base and a tuned model folder."""

    base: Path
    tuned: Path
    parameters: int
    matrices: int

    @property
    def files(self) -> list[Path]:
        return [file for folder in (self.base, self.tuned) for file in sorted(folder.glob("*.safetensors"))]

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def shards_of(layers: int) -> list[Shard]:
    """What lies outside the layers, and then the layers in two halves."""
    halves = (range(layers // 2), range(layers // 2, layers))
    return [
        Shard("embeddings.safetensors", OUTSIDE_LAYERS),
        *(Shard(f"layers-{half.start}-{half.stop - 1}.safetensors", layer_shapes(half)) for half in halves),
    ]


def layer_shapes(layers: range) -> Shapes:
    return {
        f"model.layers.{layer}.{module}.weight": shape
        for layer in layers
        for module, shape in {**PROJECTIONS, **NORMS}.items()
    }


def build_pairs(root: Path, layers: int) -> tuple[Pair, Pair]:
    """Write a bf16 pair, and a pair of twice the layers that shares its files (by links, as the hub's cache does)."""
    shards = shards_of(layers)
    upper = [
        Shard(f"layers-{half.start}-{half.stop - 1}.safetensors", layer_shapes(half))
        for half in (range(layers, layers + layers // 2), range(layers + layers // 2, 2 * layers))
    ]
    stores = root / "base-files", root / "tuned-files"
    for store in stores:
        store.mkdir()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for written in [pool.submit(_write_shard, *stores, shard) for shard in [*shards, *upper]]:
            written.result()
    return _pair(root, stores, layers, shards), _pair(root, stores, 2 * layers, [*shards, *upper])


def build_adapters(folder: Path, layers: int, steps: Sequence[int], rank: int = 32) -> Path:
    """Write a LoRA adapter in PEFT's format for each step."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_write_adapters, folder, layers, steps, rank).result()
    return folder


def _write_shard(base_store: Path, tuned_store: Path, shard: Shard) -> None:
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(zlib.crc32(shard.file.encode()))
    with (
        (base_store / shard.file).open("wb") as base_file,
        (tuned_store / shard.file).open("wb") as tuned_file,
    ):
        for file in (base_file, tuned_file):
            file.write(_header(shard.shapes))
        for shape in shard.shapes.values():
            base = (WEIGHT_STD * torch.randn(shape, generator=generator)).bfloat16()
            tuned = (base.float() + UPDATE_STD * torch.randn(shape, generator=generator)).bfloat16()
            base_file.write(_bits(base))
            tuned_file.write(_bits(tuned))


def _header(shapes: Shapes) -> bytes:
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bits(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.view(torch.int16).numpy().data.cast("B")


def _pair(root: Path, stores: tuple[Path, Path], layers: int, shards: Sequence[Shard]) -> Pair:
    shapes = {name: shape for shard in shards for name, shape in shard.shapes.items()}
    folders = root / f"base-{layers}", root / f"tuned-{layers}"
    for folder, store in zip(folders, stores, strict=True):
        folder.mkdir()
        for shard in shards:
            (folder / shard.file).symlink_to(store / shard.file)
        weight_map = {name: shard.file for shard in shards for name in shard.shapes}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        _write_json(folder / "config.json", _config(layers))
    matrices = sum(len(shape) == 2 for shape in shapes.values())
    return Pair(*folders, parameters=sum(map(math.prod, shapes.values())), matrices=matrices)


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }


def _write_adapters(folder: Path, layers: int, steps: Sequence[int], rank: int) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    for place, step in enumerate(steps, start=1):
        factors = {}
        for layer in range(layers):
            for module in ADAPTED:
                outputs, inputs = PROJECTIONS[module]
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                factors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs) * inputs**-0.5
                factors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank) * place * 1e-4
        target = folder / f"checkpoint-{step}"
        target.mkdir(parents=True)
        save_file(factors, target / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": f"base-{layers}",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(module.rsplit(".", 1)[-1] for module in ADAPTED),
        }
        _write_json(target / "adapter_config.json", config)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2))
