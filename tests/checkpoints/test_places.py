"""No two matrices of a model share a layer and a module, and each has the place that its name tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import transformers as hf
from torch import nn

from wdanalysis.checkpoints.names import ATTENTION_ROLES, ModuleSelection, recognise

Shapes = dict[str, tuple[int, ...]]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 32,
    "pad_token_id": 0,
}


def _square(names: Iterable[str]) -> Shapes:
    return {f"{name}.weight": (16, 16) for name in names}


def _unet() -> Shapes:
    """As diffusers' UNet2DConditionModel of SD 1.5 calls what its attention blocks hold."""
    blocks = [f"down_blocks.{block}.attentions.{at}" for block in range(3) for at in range(2)]
    blocks += ["mid_block.attentions.0"]
    blocks += [f"up_blocks.{block}.attentions.{at}" for block in range(1, 4) for at in range(3)]
    inner = [f"attn{n}.{role}" for n in (1, 2) for role in ("to_q", "to_k", "to_v", "to_out.0")]
    shapes = _square(f"{block}.transformer_blocks.0.{name}" for block in blocks for name in inner)
    for block in blocks:
        shapes[f"{block}.transformer_blocks.0.ff.net.0.proj.weight"] = (128, 16)
        shapes[f"{block}.transformer_blocks.0.ff.net.2.weight"] = (16, 64)
        shapes[f"{block}.proj_in.weight"] = (16, 16, 1, 1)
    return shapes


def _flux() -> Shapes:
    """As diffusers' FluxTransformer2DModel calls them."""
    own, text = ("to_q", "to_k", "to_v", "to_out.0"), ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    names = [f"transformer_blocks.{layer}.attn.{name}" for layer in range(2) for name in own + text]
    names += [f"transformer_blocks.{layer}.{ff}.net.2" for layer in range(2) for ff in ("ff", "ff_context")]
    names += [f"single_transformer_blocks.{layer}.attn.{name}" for layer in range(3) for name in own[:3]]
    return _square(names)


def _whisper() -> Shapes:
    """As OpenAI's own files call them."""
    of_one = ("query", "key", "value", "out")
    names = [
        f"{stack}.blocks.{layer}.attn.{x}"
        for stack in ("encoder", "decoder")
        for layer in range(2)
        for x in of_one
    ]
    names += [f"decoder.blocks.{layer}.cross_attn.{x}" for layer in range(2) for x in of_one]
    names += [
        f"{stack}.blocks.{layer}.mlp.{n}"
        for stack in ("encoder", "decoder")
        for layer in range(2)
        for n in (0, 2)
    ]
    return _square(names)


def _transformer() -> Shapes:
    return {name: tuple(w.shape) for name, w in nn.Transformer(16, 4, 2, 2, 24).state_dict().items()}


def _mllama() -> Shapes:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "attention_heads": 4,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 8,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    text = SIZES | {"num_key_value_heads": 2, "cross_attention_layers": [1]}
    model = hf.MllamaForConditionalGeneration(hf.MllamaConfig(vision_config=vision, text_config=text))
    return {name: tuple(w.shape) for name, w in model.state_dict().items()}


def _made_up() -> Shapes:
    """What no table knows."""
    return _square(
        f"{body}.{layer}.{arm}.attn.q_proj" for body in ("left", "right") for layer in (0, 1) for arm in "ab"
    )


ATTENTION = {"q", "k", "v", "o"}
MODULES: dict[str, tuple[Callable[[], Shapes], set[str]]] = {
    "unet": (
        _unet,
        {f"{stack}.{role}" for stack in ("down", "mid", "up") for role in (*ATTENTION, "gate", "up", "down")}
        | {f"cross_{stack}.{role}" for stack in ("down", "mid", "up") for role in ATTENTION}
        | {"down.proj_in", "mid.proj_in", "up.proj_in"},
    ),
    "flux": (
        _flux,
        {*ATTENTION, "down", "context.down"}
        | {f"context.{role}" for role in ATTENTION}
        | {"single.q", "single.k", "single.v"},
    ),
    "whisper": (
        _whisper,
        {f"{stack}.{role}" for stack in ("encoder", "decoder", "cross") for role in ATTENTION}
        | {f"{stack}.{role}" for stack in ("encoder", "decoder") for role in ("up", "down")},
    ),
    "nn.Transformer": (
        _transformer,
        {f"{stack}.{role}" for stack in ("encoder", "decoder", "cross") for role in ATTENTION}
        | {f"{stack}.{role}" for stack in ("encoder", "decoder") for role in ("up", "down")},
    ),
    "mllama": (
        _mllama,
        {f"{stack}.{role}" for stack in ("vision", "vision_global") for role in (*ATTENTION, "up", "down")}
        | {f"text.{role}" for role in (*ATTENTION, "gate", "up", "down")}
        | {f"cross.{role}" for role in ATTENTION},
    ),
    "made up": (_made_up, {f"{body}_{arm}.q" for body in ("left", "right") for arm in "ab"}),
}


@pytest.mark.parametrize("kind", MODULES)
def test_no_two_matrices_share_a_layer_and_a_module(kind: str) -> None:
    shapes = MODULES[kind][0]()
    architecture = recognise(shapes)
    parts = [
        (part.module, m.layer, m.name)
        for n, shape in shapes.items()
        for m in architecture.matrices(n, shape)
        for part in m.parts
    ]
    in_layers = Counter((module, layer) for module, layer, _ in parts if layer is not None)
    assert {place for place, count in in_layers.items() if count > 1} == set()
    assert {module for module, _ in in_layers} == MODULES[kind][1]
    attention = ModuleSelection.parse(sorted(ATTENTION_ROLES))
    chosen = {module for module, _, name in parts if attention.matches(module, name)}
    assert chosen == {module for module, _ in in_layers if module.rpartition(".")[2] in ATTENTION}


def test_blocks_within_blocks_are_counted_through() -> None:
    architecture = recognise(_unet())
    name = "up_blocks.{}.attentions.{}.transformer_blocks.0.attn1.to_q.weight"
    layers = [
        matrix.layer
        for block in (1, 2, 3)
        for at in range(3)
        if (matrix := architecture.matrix(name.format(block, at), (16, 16)))
    ]
    assert layers == list(range(9))


def test_deepseeks_latent_attention_and_linear_attention_have_roles() -> None:
    names = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    names = [f"model.layers.0.self_attn.{name}" for name in names]
    names += [f"model.layers.1.linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")]
    architecture = recognise(_square(names))
    roles = [architecture.matrix(f"{name}.weight", (16, 16)).parts[0].module for name in names]  # type: ignore[union-attr]
    assert roles == ["q_a", "q_b", "kv_a", "kv_b", "o", "linear.qkvz", "linear.ba", "linear.o"]
