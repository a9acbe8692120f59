"""Diffusion models in the names of their authors and in those of diffusers, as tables.

Single-file checkpoints of Stable Diffusion, SDXL, SD3, Flux and Wan keep their authors' names, diffusers has its own,
and adapters come in both, often with the dots as underscores. Here names are *flat*: every dot an underscore, without
``.weight`` and without the component (`COMPONENTS`) that they begin with. Sources: diffusers' conversion scripts and
`loaders/single_file_utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

DENOISER = "denoiser"

COMPONENTS: tuple[tuple[str, str | None], ...] = (
    (r"(?:model\.)?diffusion_model\.", DENOISER),
    (r"(?:unet|prior)\.", DENOISER),
    (r"transformer\.(?=(?:single_)?transformer_blocks\.|blocks\.|[^.]*embed|proj_out|norm_out)", DENOISER),
    (r"transformer_2\.", "denoiser_2"),
    (r"text_encoders\.clip_l\.(?:transformer\.)?", "text_encoder"),
    (r"text_encoders\.clip_g\.(?:transformer\.)?", "text_encoder_2"),
    (r"conditioner\.embedders\.0\.transformer\.|cond_stage_model\.transformer\.", "text_encoder"),
    (r"conditioner\.embedders\.1\.model\.", "text_encoder_2"),
    (r"text_encoder_2\.", "text_encoder_2"),
    (r"text_encoder_3\.", "text_encoder_3"),
    (r"text_encoder\.", "text_encoder"),
    (r"lora_(?:prior_)?unet_|lora_transformer_", DENOISER),
    (r"lora_(?:prior_)?te1?_", "text_encoder"),
    (r"lora_te2_", "text_encoder_2"),
    (r"lora_te3_", "text_encoder_3"),
    (r"lycoris_", None),
)
"""How names begin, in checkpoints and adapters, and the component that this means; None where it is any."""

FOLDERS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("unet", "transformer", "prior"), DENOISER),
        "transformer_2": "denoiser_2",
        **{name: name for name in ("text_encoder", "text_encoder_2", "text_encoder_3")},
    }
)
"""The folders of a diffusers pipeline whose weights adapters change, and their components."""


@dataclass(frozen=True)
class Block:
    """One kind of block in both spellings.

    Attributes
    ----------
    original
        A pattern of how its names begin where the authors name it; empty for what is outside of blocks.
    diffusers
        How they begin in diffusers, with references to the pattern's groups.
    inside
        What follows, and what diffusers calls it: several names where it divides the outputs of one matrix. None where
        both call it the same.
    """

    original: str
    diffusers: str
    inside: Mapping[str, tuple[str, ...]] | None = field(default=None)


def _qkv(attention: str, names: str = "to_{}") -> tuple[str, ...]:
    return tuple(f"{attention}_{names.format(role)}" for role in "qkv")


_RESNET = {
    "in_layers_2": ("conv1",),
    "out_layers_3": ("conv2",),
    "emb_layers_1": ("time_emb_proj",),
    "skip_connection": ("conv_shortcut",),
    "in_layers_0": ("norm1",),
    "out_layers_0": ("norm2",),
}

_HALVES = (("input_blocks", "down_blocks", 1, 2), ("output_blocks", "up_blocks", 0, 3))

UNET: tuple[Block, ...] = (
    *(
        Block(rf"input_blocks_{3 * block + 3}_0", f"down_blocks_{block}_downsamplers_0", {"op": ("conv",)})
        for block in range(3)
    ),
    *(
        Block(rf"output_blocks_{3 * block + 2}_[12]", f"up_blocks_{block}_upsamplers_0", {"conv": ("conv",)})
        for block in range(3)
    ),
    *(
        Block(rf"{original}_{3 * block + layer + shift}_{place}", f"{ours}_{block}_{kind}_{layer}", inside)
        for original, ours, shift, layers in (
            ("input_blocks", "down_blocks", 1, 2),
            ("output_blocks", "up_blocks", 0, 3),
        )
        for block in range(4)
        for layer in range(layers)
        for place, kind, inside in ((0, "resnets", _RESNET), (1, "attentions", None))
    ),
    Block("middle_block_0", "mid_block_resnets_0", _RESNET),
    Block("middle_block_1", "mid_block_attentions_0"),
    Block("middle_block_2", "mid_block_resnets_1", _RESNET),
    Block(
        "",
        "",
        {
            "input_blocks_0_0": ("conv_in",),
            "out_0": ("conv_norm_out",),
            "out_2": ("conv_out",),
            "time_embed_0": ("time_embedding_linear_1",),
            "time_embed_2": ("time_embedding_linear_2",),
            "label_emb_0_0": ("add_embedding_linear_1",),
            "label_emb_0_2": ("add_embedding_linear_2",),
        },
    ),
)
"""SD 1.5, SD 2 and SDXL: two layers a block down, three up; of two blocks with one beginning the first counts."""

FLUX: tuple[Block, ...] = (
    Block(
        r"double_blocks_(\d+)",
        r"transformer_blocks_\1",
        {
            "img_attn_qkv": _qkv("attn"),
            "txt_attn_qkv": _qkv("attn", "add_{}_proj"),
            "img_attn_proj": ("attn_to_out_0",),
            "txt_attn_proj": ("attn_to_add_out",),
            "img_mlp_0": ("ff_net_0_proj",),
            "img_mlp_2": ("ff_net_2",),
            "txt_mlp_0": ("ff_context_net_0_proj",),
            "txt_mlp_2": ("ff_context_net_2",),
            "img_mod_lin": ("norm1_linear",),
            "txt_mod_lin": ("norm1_context_linear",),
        },
    ),
    Block(
        r"single_blocks_(\d+)",
        r"single_transformer_blocks_\1",
        {
            "linear1": (*_qkv("attn"), "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation_lin": ("norm_linear",),
        },
    ),
    Block(
        "",
        "",
        {
            "img_in": ("x_embedder",),
            "txt_in": ("context_embedder",),
            "final_layer_linear": ("proj_out",),
            **{
                f"{theirs}_{layer}": (f"time_text_embed_{ours}_linear_{number}",)
                for theirs, ours in (
                    ("time_in", "timestep_embedder"),
                    ("vector_in", "text_embedder"),
                    ("guidance_in", "guidance_embedder"),
                )
                for number, layer in ((1, "in_layer"), (2, "out_layer"))
            },
        },
    ),
)
"""Flux.1, in Black Forest Labs' names. (`final_layer.adaLN_modulation` changes its halves as well and is left out.)"""

SD3: tuple[Block, ...] = (
    Block(
        r"joint_blocks_(\d+)",
        r"transformer_blocks_\1",
        {
            "x_block_attn_qkv": _qkv("attn"),
            "x_block_attn_proj": ("attn_to_out_0",),
            "x_block_attn2_qkv": _qkv("attn2"),
            "x_block_attn2_proj": ("attn2_to_out_0",),
            "x_block_mlp_fc1": ("ff_net_0_proj",),
            "x_block_mlp_fc2": ("ff_net_2",),
            "x_block_adaLN_modulation_1": ("norm1_linear",),
            "context_block_attn_qkv": _qkv("attn", "add_{}_proj"),
            "context_block_attn_proj": ("attn_to_add_out",),
            "context_block_mlp_fc1": ("ff_context_net_0_proj",),
            "context_block_mlp_fc2": ("ff_context_net_2",),
            "context_block_adaLN_modulation_1": ("norm1_context_linear",),
        },
    ),
)
"""SD3 and SD3.5, in Stability's names."""

WAN: tuple[Block, ...] = (
    Block(
        r"blocks_(\d+)",
        r"blocks_\1",
        {
            **{
                f"{theirs}_{role}": (f"{ours}_to_{'out_0' if role == 'o' else role}",)
                for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for role in "qkvo"
            },
            "cross_attn_k_img": ("attn2_add_k_proj",),
            "cross_attn_v_img": ("attn2_add_v_proj",),
            "ffn_0": ("ffn_net_0_proj",),
            "ffn_2": ("ffn_net_2",),
        },
    ),
    Block(
        "",
        "",
        {
            "text_embedding_0": ("condition_embedder_text_embedder_linear_1",),
            "text_embedding_2": ("condition_embedder_text_embedder_linear_2",),
            "time_embedding_0": ("condition_embedder_time_embedder_linear_1",),
            "time_embedding_2": ("condition_embedder_time_embedder_linear_2",),
            "time_projection_1": ("condition_embedder_time_proj",),
            "head_head": ("proj_out",),
        },
    ),
)
"""Wan 2.1 and 2.2. (Qwen-Image has the names of diffusers everywhere.)"""

OPEN_CLIP: tuple[Block, ...] = (
    Block(
        r"transformer_resblocks_(\d+)",
        r"text_model_encoder_layers_\1",
        {
            "attn_in_proj_weight": _qkv("self_attn", "{}_proj"),
            "attn_out_proj": ("self_attn_out_proj",),
            "mlp_c_fc": ("mlp_fc1",),
            "mlp_c_proj": ("mlp_fc2",),
        },
    ),
)
"""The second text encoder of single-file SDXL checkpoints."""

BLOCKS = (*UNET, *FLUX, *SD3, *WAN, *OPEN_CLIP)


def component(name: str) -> tuple[str | None, str]:
    """Split a name into the component that it begins with, None where it tells none, and the rest.

    >>> component("model.diffusion_model.input_blocks.1.1.proj_in"), component("lora_te2_text_model_final")
    (('denoiser', 'input_blocks.1.1.proj_in'), ('text_encoder_2', 'text_model_final'))
    """
    for pattern, meant in COMPONENTS:
        if match := re.match(pattern, name):
            return meant, name[match.end() :]
    return None, name


@lru_cache(maxsize=65536)
def in_diffusers(flat: str) -> tuple[str, ...]:
    """Say what diffusers calls a matrix that its authors call so: several names where it divides it, none if unknown.

    >>> in_diffusers("input_blocks_4_1_transformer_blocks_0_attn1_to_q")
    ('down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q',)
    >>> in_diffusers("double_blocks_3_img_attn_qkv")
    ('transformer_blocks_3_attn_to_q', 'transformer_blocks_3_attn_to_k', 'transformer_blocks_3_attn_to_v')
    """
    for block in BLOCKS:
        match = re.fullmatch(f"{block.original}_(?P<rest>.+)" if block.original else "(?P<rest>.+)", flat)
        if match is None:
            continue
        rests = (match["rest"],) if block.inside is None else block.inside.get(match["rest"], ())
        if rests:
            begin = match.expand(block.diffusers)
            return tuple(f"{begin}_{rest}" if begin else rest for rest in rests)
    return ()
