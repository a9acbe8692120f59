"""What is known of architectures, as tables: spellings of names, roles, stacks, fused projections, ties.

Everything here is data; `names` holds the mechanism that reads it. The source of every row is the model's
code in Hugging Face Transformers, or the authors' own where Transformers has none (Qwen-1, InternLM2,
ChatGLM, Baichuan, timm). Patterns of roles match the end of a canonical name without ``.weight``, from the
beginning of a component on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# --- names --------------------------------------------------------------------------------------------------

WRAPPERS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)
"""Components that torch.compile, DDP, FSDP, activation checkpointing and PEFT put in a name, at any depth."""

ROOTS = (
    "base_model.model",
    "0.auto_model",
    *("model", "transformer", "backbone"),
    *("albert", "bert", "deberta", "distilbert", "electra", "esm", "mpnet", "roberta"),
    *("beit", "deit", "dinov2", "gpt_neox", "hubert", "swin", "vit", "wav2vec2"),
)
"""Prefixes that a model has or has not, depending on the head it was saved with."""

SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"^language_model\.model\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^embed_out\.", "lm_head."),
    # ViT and its kin: as on disk → as in memory since Transformers 5.
    (r"^encoder\.layer\.", "layers."),
    (r"^(layers\.\d+\.attention)\.attention\.(q)uery\.", r"\1.\2_proj."),
    (r"^(layers\.\d+\.attention)\.attention\.(k)ey\.", r"\1.\2_proj."),
    (r"^(layers\.\d+\.attention)\.attention\.(v)alue\.", r"\1.\2_proj."),
    (r"^(layers\.\d+\.attention)\.output\.dense\.", r"\1.o_proj."),
    (r"^(layers\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"(^|\.)parametrizations\.weight\.original0$", r"\1weight_g"),
    (r"(^|\.)parametrizations\.weight\.original1$", r"\1weight_v"),
)
"""Spellings of one name and the canonical one; applied in order, after wrappers and roots are gone."""

_INPUT_EMBEDDINGS = (
    *("shared.weight", "decoder.embed_tokens.weight", "embed_tokens.weight"),
    *("language_model.embed_tokens.weight", "wte.weight", "tokens_embed.weight", "embed_in.weight"),
    *("embeddings.word_embeddings.weight", "word_embeddings.weight", "embeddings.weight"),
)
_BERT_HEADS = ("cls.predictions", "predictions", "lm_head")

STAND_INS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "lm_head.weight": _INPUT_EMBEDDINGS,
        "proj_out.weight": _INPUT_EMBEDDINGS,
        "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
        "encoder.embed_tokens.weight": ("shared.weight", "decoder.embed_tokens.weight"),
        "decoder.embed_tokens.weight": ("shared.weight", "encoder.embed_tokens.weight"),
        "decoder.weight": ("embeddings.tok_embeddings.weight",),
        "vocab_projector.weight": ("embeddings.word_embeddings.weight",),
        "generator_lm_head.weight": ("embeddings.word_embeddings.weight",),
        **{f"{head}.decoder.weight": ("embeddings.word_embeddings.weight",) for head in _BERT_HEADS},
        **{f"{head}.decoder.bias": (f"{head}.bias",) for head in _BERT_HEADS},
    }
)
"""The canonical names under which a tensor can be kept that is tied to another and therefore dropped."""

NOT_MATRICES = (
    r"(^|\.)lora_[^.]*(\.|$)"
    r"|(^|[._])bias$"
    r"|(^|\.)([^.]*_token|position_ids|token_type_ids|inv_freq|freqs_cis|(cos|sin)_cached|num_batches_tracked"
    r"|running_(mean|var)|weight_g|original0"
    r"|scales|qzeros|g_idx|absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_scale(_inv|_2)?)$"
)
"""Names of tensors that are no weight matrix whatever their shape: biases, buffers, scales."""

# --- stacks and roles ---------------------------------------------------------------------------------------

STACKS: Mapping[str, str] = MappingProxyType(
    {
        "text_model": "text",
        "language_model": "text",
        "vision_model": "vision",
        "vision_tower": "vision",
        "visual": "vision",
        "audio_tower": "audio",
        "encoder": "encoder",
        "decoder": "decoder",
    }
)
"""Components that say in which stack of layers a tensor lies; the leftmost in a name counts."""

EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
"""The number of an expert whose matrices are stored each by itself."""

CROSS_ATTENTION = frozenset({"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "attn2"})
"""Components that say that keys and values come from another stack; such modules are called ``cross.q`` …"""

_ATTENTION = r"[^.]*(?i:attn|attention)[^.]*\.(?:self\.)?"

LAYER_ROLES: tuple[tuple[str, str], ...] = (
    ("kv", r"crossattention\.c_attn"),
    ("qkv", rf"{_ATTENTION}(?:c_attn|in_proj_weight|qkv|qkv_proj|query_key_value|W_pack|Wqkv|wqkv)"),
    ("q", rf"q_proj|{_ATTENTION}(?:q|q_attn|q_lin|query|query_proj|to_q|wq)"),
    ("k", rf"k_proj|{_ATTENTION}(?:k|k_lin|key|key_proj|to_k|wk)"),
    ("v", rf"v_proj|{_ATTENTION}(?:v|v_lin|value|value_proj|to_v|wv)"),
    (
        "o",
        rf"o_proj|{_ATTENTION}(?:c_proj|dense|o|out_lin|out_proj|output\.dense|proj|to_out\.0|[wW]o)",
    ),
    ("router", r"(?:block_sparse_moe|feed_forward|ffn|mlp)\.(?:gate|router)"),
    ("gate_up", r"gate_up_proj|mlp\.(?:Wi|weights_in)"),
    ("gate", r"gate_proj|wi_0|(?:experts\.\d+|feed_forward)\.w1|mlp\.w2"),
    (
        "up",
        r"up_proj|wi|wi_1|(?:experts\.\d+|feed_forward)\.w3|mlp\.w1|c_fc|dense_h_to_4h|fc1|fc_in|ffn|intermediate\.dense"
        r"|feed_forward\.intermediate_dense|lin1|linear1",
    ),
    (
        "down",
        r"down_proj|wo|(?:experts\.\d+|feed_forward)\.w2|mlp\.(?:c_proj|Wo|weights_out)|dense_4h_to_h|fc2|fc_out"
        r"|ffn_output|output\.dense|feed_forward\.output_dense|lin2|linear2",
    ),
)
"""Roles of the matrices in a layer; the first row that matches counts. A two-layer MLP is up, then down."""

MODEL_ROLES: tuple[tuple[str, str], ...] = (
    (
        "embed",
        r"embed_tokens|shared|tok_embeddings|token_embedding|tokens_embed|wte|word_embeddings?|embed_in|^embeddings",
    ),
    ("pos_embed", r"embed_positions|position_embeddings?|positional_embedding|positions_embed|wpe"),
    ("type_embed", r"token_type_embeddings"),
    ("rel_bias", r"relative_attention_bias|relative_position_bias_table"),
    ("patch_embed", r"patch_embed(?:ding|dings)?(?:\.proj|\.projection)?"),
    (
        "lm_head",
        r"lm_head|lm_head\.decoder|(?:cls\.)?predictions\.decoder|generator_lm_head|vocab_projector"
        r"|^proj_out|^output",
    ),
)
"""Roles of matrices that a model has once."""

EMBEDDINGS = frozenset({"embed", "pos_embed", "type_embed", "rel_bias"})
"""Roles stored as number of embeddings × dimension; the output is the dimension, as in PEFT."""

ATTENTION_ROLES = frozenset({"q", "k", "v", "o", "kv", "qkv"})
"""Roles, without stack, of attention projections; ``qkv`` and ``kv`` are fused ones that cannot be split."""

# --- fused projections --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fused:
    """How several projections share the output dimension of one stored matrix.

    The output dimension is `groups` equal groups, one after the other; each holds the projections of `order`,
    every projection with its number of heads over the number of groups.

    Attributes
    ----------
    order
        Roles in a group, first to last.
    groups
        A number, or ``"heads"`` or ``"kv_heads"`` of the model.
    """

    order: tuple[str, ...]
    groups: int | str = 1


CONTIGUOUS = Fused(("q", "k", "v"))
PER_HEAD = Fused(("q", "k", "v"), groups="heads")
PER_KV_HEAD = Fused(("q", "k", "v"), groups="kv_heads")

FUSED: Mapping[str, Fused] = MappingProxyType(
    {"qkv": CONTIGUOUS, "kv": Fused(("k", "v")), "gate_up": Fused(("gate", "up"))}
)
"""The layout of a fused role where a family has no other."""


@dataclass(frozen=True)
class Family:
    """Models that name and lay out their matrices alike.

    A configuration chooses the first family with its model type whose `when` holds; without one, the first
    whose `mark` is found in a stored name.

    Attributes
    ----------
    name
        What it is called.
    types
        `model_type` of the configuration.
    when
        A key of the configuration and the value it must have.
    mark
        A pattern found in the names of such a model, and in those of no family further up.
    qkv
        Layout of its fused attention projection; None where a name alone does not tell it.
    kv_heads
        The number of key and value heads where the configuration does not tell it or tells another.
    conv1d
        Pattern of the matrices that are stored as in × out.
    renamed
        Roles that mean another in this family.
    """

    name: str
    types: frozenset[str] = frozenset()
    when: tuple[str, object] | None = None
    mark: str | None = None
    qkv: Fused | None = CONTIGUOUS
    kv_heads: int | None = None
    conv1d: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


_FALCON = frozenset({"falcon", "RefinedWeb", "RefinedWebModel"})
_GPT2 = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CHATGLM = frozenset({"chatglm"})
_BIGCODE = frozenset({"gpt_bigcode"})

GPT2 = Family("gpt2", types=_GPT2, conv1d=r"\.(?:c_attn|c_fc|c_proj|q_attn)$")

CONV1D_EVIDENCE: tuple[tuple[str, int], ...] = (
    (r"attn\.c_attn\.weight$", 1),
    (r"mlp\.c_fc\.weight$", 1),
    (r"mlp\.c_proj\.weight$", 0),
)
"""Names that GPT-2 shares with models of linear layers, and the dimension that is longer in GPT-2."""

FAMILIES: tuple[Family, ...] = (
    GPT2,
    Family("gpt_bigcode", types=_BIGCODE, when=("multi_query", False), qkv=PER_HEAD),
    Family("gpt_bigcode", types=_BIGCODE, kv_heads=1),
    Family("falcon", types=_FALCON, when=("new_decoder_architecture", True), qkv=PER_KV_HEAD),
    Family("falcon", types=_FALCON, when=("multi_query", False), qkv=PER_HEAD),
    Family("falcon", types=_FALCON, kv_heads=1),
    Family("chatglm", types=_CHATGLM, when=("multi_query_attention", True), renamed={"up": "gate_up"}),
    Family("chatglm", types=_CHATGLM, qkv=PER_HEAD),
    Family("bloom", types=frozenset({"bloom"}), mark=r"word_embeddings_layernorm", qkv=PER_HEAD),
    Family(
        "gpt_neox",
        types=frozenset({"gpt_neox", "gpt_neox_japanese"}),
        mark=r"layers\.\d+\.attention\.query_key_value",
        qkv=PER_HEAD,
    ),
    Family("internlm2", types=frozenset({"internlm2"}), mark=r"attention\.wqkv", qkv=PER_KV_HEAD),
    Family(
        "codegen",
        types=frozenset({"codegen"}),
        mark=r"h\.\d+\.attn\.qkv_proj",
        qkv=Fused(("q", "v", "k"), groups=4),
    ),
    Family("qwen", types=frozenset({"qwen"}), mark=r"h\.\d+\.mlp\.w2"),
    Family("bloom or falcon", mark=r"self_attention\.query_key_value", qkv=None),
    Family("gpt_bigcode or a relative", mark=r"attn\.c_attn", qkv=None),
    Family("t5", mark=r"SelfAttention|EncDecAttention"),
    Family("bart", mark=r"encoder_attn"),
    Family("clip", mark=r"(?:text|vision)_model\.encoder\.layers"),
    Family("llava", mark=r"language_model\.|vision_tower\.|visual\."),
    Family("opt", mark=r"decoder\.layers\.\d+\.self_attn"),
    Family("albert", mark=r"albert_layers"),
    Family("mpnet", mark=r"attention\.attn\.[qkvo]\."),
    Family("swin", mark=r"layers\.\d+\.blocks\.\d+\."),
    Family("wav2vec2", mark=r"feature_extractor\.conv_layers"),
    Family("distilbert", mark=r"attention\.q_lin|ffn\.lin1"),
    Family("bert", mark=r"attention\.self\.(?:query|key|value)"),
    Family("vit", mark=r"attention\.attention\.(?:query|key|value)|layers\.\d+\.attention\.[qkvo]_proj"),
    Family("timm", mark=r"blocks\.\d+\.attn\.qkv"),
    Family("modernbert", mark=r"layers\.\d+\.attn\.Wqkv"),
    Family("mpt", mark=r"blocks\.\d+\.(?:norm_attn_norm\.)?attn\.Wqkv"),
    Family("gpt_neo", mark=r"attn\.attention\.[qkv]_proj"),
    Family("gptj", mark=r"h\.\d+\.attn\.[qkv]_proj"),
    Family("phi3", mark=r"self_attn\.qkv_proj"),
    Family("baichuan", mark=r"self_attn\.W_pack"),
    Family("phi", mark=r"self_attn\.dense\."),
    Family("mixtral", mark=r"block_sparse_moe\."),
    Family("transformer", mark=r"attn\.in_proj_weight"),
    Family("llama", mark=r"layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"),
)
"""Families in the order in which they are tried."""

UNKNOWN = Family("unknown", qkv=None)

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "kv_n_heads"),
    "multi_query_group_num",
)
"""Configuration keys of the number of attention heads, and of key and value heads where there are fewer."""

SECTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vision": ("vision_config", "encoder"),
        "audio": ("audio_config", "encoder"),
        "encoder": ("", "encoder"),
        "": ("", "text_config", "decoder"),
    }
)
"""Where a configuration keeps a stack's settings (``""``: at the top); stacks not listed count as ``""``."""
