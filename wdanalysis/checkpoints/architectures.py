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
    # Experts of a layer: as on disk → as in memory since Transformers 5.
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.mlp\.router\.layer\.", ".mlp.router."),
    (r"\.mlp\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
    (r"\.mlp\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
    (r"\.mlp\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
    (r"\.mlp\.(?:experts\.fc1|input_linear)\.weight$", ".mlp.experts.gate_up_proj"),
    (r"\.mlp\.(?:experts\.fc2|output_linear)\.weight$", ".mlp.experts.down_proj"),
    (r"(^|\.)parametrizations\.weight\.original0$", r"\1weight_g"),
    (r"(^|\.)parametrizations\.weight\.original1$", r"\1weight_v"),
)
"""Spellings of one name and the canonical one; applied in order, after wrappers and roots are gone."""

TEXT_MODELS = r"^(?:language_model|text_model|thinker)\."
"""What the canonical names of a text model's tensors begin with inside a multimodal one."""

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
    r"|running_(mean|var)|weight_g|original0)$"
    # what quantised formats keep beside a weight's codes
    r"|(^|[._:])(scales?|scale_inv|weight_scale_2|(q|input_|weight_)?(zeros|zero_points?)|biases|g_idx"
    r"|(nested_)?(absmax|quant_map)|SCB)$"
)
"""Names of tensors that are no weight matrix whatever their shape: biases, buffers, scales, zeros."""

CONVOLUTION = r"(?i)conv|patch|upsampl|downsampl"
"""What the name of a convolution of one dimension says; any other tensor of three dimensions is no matrix."""

# --- stacks and roles ---------------------------------------------------------------------------------------

STACKS: Mapping[str, str] = MappingProxyType(
    {
        "global_transformer": "vision_global",
        "talker": "talker",
        **dict.fromkeys(("text_model", "language_model"), "text"),
        **dict.fromkeys(("vision_model", "vision_tower", "visual"), "vision"),
        **dict.fromkeys(("audio_tower", "audio_model"), "audio"),
        "encoder": "encoder",
        "decoder": "decoder",
        **dict.fromkeys(("down_blocks", "input_blocks"), "down"),
        **dict.fromkeys(("mid_block", "middle_block"), "mid"),
        **dict.fromkeys(("up_blocks", "output_blocks"), "up"),
        "double_blocks": "double",
        **dict.fromkeys(("single_transformer_blocks", "single_blocks"), "single"),
    }
)
"""Components that say in which stack of layers a tensor lies; of several in a name the first row counts."""

BRANCHES: tuple[tuple[str, str], ...] = (
    ("cross", r"encoder_attn|EncDecAttention|crossattention|cross_attn|attn2|multihead_attn"),
    ("shared", r"shared_experts?|shared_mlp"),
    ("linear", r"linear_attn"),
    ("context", r"add_[qkv]_proj|to_add_out|ff_context|txt_(?:attn|mlp)|context_block"),
)
"""Components inside a layer, and what goes before a role there in place of the stack: keys and values come from
another stack, an expert that all tokens share, attention of linear cost, the text's projections in an image model."""

NESTED_LISTS = frozenset(
    {"attentions", "blocks", "layers", "motion_modules", "resnets", "transformer_blocks"}
    | {"downsamplers", "upsamplers"}
)
"""Lists of layers within a list, where they directly follow its number: ``down_blocks.0.attentions.1``. What a stack
has of them is counted through, from 0."""

# --- experts ------------------------------------------------------------------------------------------------

EXPERT = re.compile(r"(?:^|\.)experts\.(?:expert_)?(\d+)\.")
"""The number of an expert whose matrices are stored each by itself."""

EXPERT_STACKS: tuple[tuple[str, str], ...] = (
    ("gate_up", r"experts\.gate_up_proj"),
    ("gate", r"experts\.(?:gate_proj|mlp\.w1)"),
    ("up", r"experts\.(?:up_proj|mlp\.v1)"),
    ("down", r"experts\.(?:down_proj|mlp\.w2)"),
)
"""Tensors of three dimensions that hold one matrix for each expert, and the matrix's role."""

FLAT_EXPERTS = r"experts\.mlp\.[wv]\d$"
"""Such tensors of which the experts' rows follow one another in two dimensions (DBRX)."""

FLAT_IN_BY_OUT = r"experts\.mlp\.w2$"
"""Those of them whose matrices are stored as in × out."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
"""Configuration keys of the number of experts."""

_ATTENTION = r"[^.]*(?i:attn|attention)[^.]*\.(?:self\.|\d+\.)?"

LAYER_ROLES: tuple[tuple[str, str], ...] = (
    ("kv", r"crossattention\.c_attn"),
    (
        "qkv",
        rf"{_ATTENTION}(?:c_attn|in_proj_qkv|in_proj_weight|qkv|qkv_proj|query_key_value|W_pack|Wqkv|wqkv)",
    ),
    ("qkvz", r"linear_attn\.in_proj_qkvz"),
    ("ba", r"linear_attn\.in_proj_ba"),
    ("q_a", rf"q_a_proj|{_ATTENTION}wq_a"),
    ("q_b", rf"q_b_proj|{_ATTENTION}wq_b"),
    ("kv_a", rf"kv_a_proj(?:_with_mqa)?|{_ATTENTION}wkv_a"),
    ("kv_b", rf"kv_b_proj|{_ATTENTION}wkv_b"),
    ("q", rf"(?:add_)?q_proj|{_ATTENTION}(?:q|q_attn|q_lin|query|query_proj|to_q|wq)"),
    ("k", rf"(?:add_)?k_proj|{_ATTENTION}(?:k|k_lin|key|key_proj|to_k|wk)"),
    ("v", rf"(?:add_)?v_proj|{_ATTENTION}(?:v|v_lin|value|value_proj|to_v|wv)"),
    (
        "o",
        rf"o_proj|{_ATTENTION}(?:c_proj|dense|o|out|out_lin|out_proj|output\.dense|proj|to_add_out|to_out\.0|[wW]o)",
    ),
    ("router", r"(?:feed_forward|ffn|mlp)\.(?:gate|router|router\.layer)"),
    ("gate_up", r"gate_up_proj|mlp\.(?:Wi|weights_in)|shared_mlp\.input_linear"),
    ("gate", r"gate_proj|wi_0|(?:experts\.\d+|feed_forward)\.w1|mlp\.w2"),
    (
        "up",
        r"up_proj|wi|wi_1|(?:experts\.\d+|feed_forward)\.w3|mlp\.w1|c_fc|dense_h_to_4h|fc1|fc_in|ffn|intermediate\.dense"
        r"|feed_forward\.intermediate_dense|lin1|linear1|(?:mlp|ff|ff_context)\.(?:net\.)?0(?:\.proj)?",
    ),
    (
        "down",
        r"down_proj|wo|(?:experts\.\d+|feed_forward)\.w2|mlp\.(?:c_proj|Wo|weights_out)|dense_4h_to_h|fc2|fc_out"
        r"|ffn_output|output\.dense|feed_forward\.output_dense|lin2|linear2|shared_mlp\.output_linear"
        r"|(?:mlp|ff|ff_context)\.(?:net\.)?2",
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

ATTENTION_ROLES = frozenset({"q", "k", "v", "o", "kv", "qkv", "qkvz", "ba"} | {"q_a", "q_b", "kv_a", "kv_b"})
"""Roles, without stack, of attention projections; ``qkv``, ``kv``, ``qkvz`` and ``ba`` are fused ones that are not
split, ``q_a`` to ``kv_b`` the factors of DeepSeek's latent attention."""

ATTENTION_MODULE = re.compile(r"(?i)attn|attention")
"""What the name of an attention block has in it."""

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
    alternating
        Whether single outputs take turns instead: gate, up, gate, up …
    """

    order: tuple[str, ...]
    groups: int | str = 1
    alternating: bool = False


CONTIGUOUS = Fused(("q", "k", "v"))
PER_HEAD = Fused(("q", "k", "v"), groups="heads")
PER_KV_HEAD = Fused(("q", "k", "v"), groups="kv_heads")

FUSED: Mapping[str, Fused | None] = MappingProxyType(
    {"qkv": None, "kv": Fused(("k", "v")), "gate_up": Fused(("gate", "up")), "up_gate": Fused(("up", "gate"))}
)
"""The layout of a fused role where a family has no other; None where a name alone does not tell it."""

GEGLU = re.compile(r"ff\.net\.0\.proj$"), "ff.net.2"
"""A matrix of diffusers that is up, or up and gate where it is twice as wide as what the second takes in."""

CONTIGUOUS_QKV = r"(?i:attn|attention)[^.]*\.(?:qkv|Wqkv|W_pack|in_proj_weight)$"
"""Names of fused attention projections that hold q, k and v one after the other in every model that has them."""


@dataclass(frozen=True)
class Family:
    """Models that name and lay out their matrices alike.

    A configuration chooses the first family with its model type whose `when` holds; otherwise the first counts whose
    `mark` is found in a stored name, but none of other model types than the configuration's.

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
    gate_up
        Layout of gate and up in experts that are stored as in × out; None where it is not known.
    renamed
        Roles that mean another in this family.
    """

    name: str
    types: frozenset[str] = frozenset()
    when: tuple[str, object] | None = None
    mark: str | None = None
    qkv: Fused | None = None
    kv_heads: int | None = None
    conv1d: str | None = None
    gate_up: Fused | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


_FALCON = frozenset({"falcon", "RefinedWeb", "RefinedWebModel"})
_GPT2 = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CHATGLM = frozenset({"chatglm"})
_BIGCODE = frozenset({"gpt_bigcode"})
_MINIMAX = frozenset({"minimax", "minimax_text_01", "minimax_m1"})
_LLAMA4 = frozenset({"llama4", "llama4_text"})
_QWEN3_VL_MOE = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})
_PHI3 = frozenset({"phi3", "phi3_v", "phi4_multimodal", "phi4mm"})

GPT2 = Family("gpt2", types=_GPT2, qkv=CONTIGUOUS, conv1d=r"\.(?:c_attn|c_fc|c_proj|q_attn)$")

CONV1D_EVIDENCE: tuple[tuple[str, int], ...] = (
    (r"attn\.c_attn\.weight$", 1),
    (r"mlp\.c_fc\.weight$", 1),
    (r"mlp\.c_proj\.weight$", 0),
)
"""Names that GPT-2 shares with models of linear layers, and the dimension that is longer in GPT-2."""

FAMILIES: tuple[Family, ...] = (
    GPT2,
    Family("gpt_bigcode", types=_BIGCODE, when=("multi_query", False), qkv=PER_HEAD),
    Family("gpt_bigcode", types=_BIGCODE, qkv=CONTIGUOUS, kv_heads=1),
    Family("falcon", types=_FALCON, when=("new_decoder_architecture", True), qkv=PER_KV_HEAD),
    Family("falcon", types=_FALCON, when=("multi_query", False), qkv=PER_HEAD),
    Family("falcon", types=_FALCON, qkv=CONTIGUOUS, kv_heads=1),
    Family(
        "chatglm",
        types=_CHATGLM,
        when=("multi_query_attention", True),
        qkv=CONTIGUOUS,
        renamed={"up": "gate_up"},
    ),
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
    Family("qwen", types=frozenset({"qwen"}), mark=r"h\.\d+\.mlp\.w2", qkv=CONTIGUOUS),
    Family("persimmon", types=frozenset({"persimmon"}), mark=r"self_attn\.query_key_value", qkv=PER_HEAD),
    Family("fuyu", types=frozenset({"fuyu"}), qkv=PER_HEAD),
    Family("minimax", types=_MINIMAX, mark=r"self_attn\.output_gate", qkv=PER_HEAD),
    Family(
        "gpt_oss",
        types=frozenset({"gpt_oss"}),
        mark=r"experts\.gate_up_proj_bias",
        gate_up=Fused(("gate", "up"), alternating=True),
    ),
    Family("llama4", types=_LLAMA4, mark=r"feed_forward\.experts\.gate_up_proj", gate_up=FUSED["gate_up"]),
    Family("aria", types=frozenset({"aria", "aria_text"}), gate_up=FUSED["gate_up"]),
    Family("qwen3_vl_moe", types=_QWEN3_VL_MOE, gate_up=FUSED["gate_up"]),
    Family("dbrx", types=frozenset({"dbrx"}), mark=r"experts\.mlp\.v1"),
    Family("bloom or falcon", mark=r"self_attention\.query_key_value"),
    Family("gpt_bigcode or a relative", mark=r"attn\.c_attn"),
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
    Family("phi3", types=_PHI3, mark=r"self_attn\.qkv_proj", qkv=CONTIGUOUS),
    Family("baichuan", mark=r"self_attn\.W_pack"),
    Family("phi", mark=r"self_attn\.dense\."),
    Family("mixtral", mark=r"block_sparse_moe\."),
    Family("transformer", mark=r"attn\.in_proj_weight"),
    Family("llama", mark=r"layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"),
)
"""Families in the order in which they are tried."""

UNKNOWN = Family("unknown")

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
        "": ("", "text_config", "decoder", "thinker_config", "ffn_config"),
    }
)
"""Where a configuration keeps a stack's settings (``""``: at the top); stacks not listed count as ``""``."""
