"""Mixtures of experts."""

from __future__ import annotations

import transformers as tf

from .family import COMMON, LLAMA, MIXING, ROUTER, SIZES, Family

GATE = {"mlp.gate": ROUTER}
DENSE_FIRST = ["dense", "sparse"]
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4)
GROUPED = dict(
    n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1
)

MIXTURES = {
    "mixtral": Family("MixtralForCausalLM", lambda: tf.MixtralConfig(**LLAMA, num_local_experts=4), dense=GATE),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        lambda: tf.Qwen2MoeConfig(
            **COMMON,
            **SIZES,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
        ),
        dense={**GATE, "mlp.shared_expert_gate": "one output"},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        lambda: tf.Qwen3MoeConfig(
            **LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0], norm_topk_prob=True
        ),
        dense=GATE,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        lambda: tf.GptOssConfig(
            **LLAMA,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        dense={"mlp.router": ROUTER},
        interleaved=True,
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        lambda: tf.Llama4TextConfig(
            **LLAMA, intermediate_size_mlp=48, num_local_experts=4, interleave_moe_layer_step=2, no_rope_layers=[1, 0]
        ),
        dense={"feed_forward.router": ROUTER},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        lambda: tf.DeepseekV2Config(**COMMON, **SIZES, **LATENT, **GROUPED, n_shared_experts=1, topk_method="group_limited_greedy"),
        dense=GATE,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM", lambda: tf.DeepseekV3Config(**COMMON, **SIZES, **LATENT, **GROUPED, n_shared_experts=1), dense=GATE
    ),
    "glm4_moe": Family("Glm4MoeForCausalLM", lambda: tf.Glm4MoeConfig(**LLAMA, **GROUPED, n_shared_experts=1), dense=GATE),
    "glm_moe_dsa": Family(
        "GlmMoeDsaForCausalLM",
        lambda: tf.GlmMoeDsaConfig(
            **COMMON,
            **SIZES,
            **LATENT,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_shared_experts=1,
            mlp_layer_types=DENSE_FIRST,
            index_topk=4,
            index_head_dim=16,
            index_n_heads=2,
            indexer_types=["full", "full"],
        ),
        dense=GATE,
        padded=False,  # the index counts padding among the tokens to choose from
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        lambda: tf.OlmoeConfig(**COMMON, **SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
        dense=GATE,
    ),
    "phimoe": Family(
        "PhimoeForCausalLM",
        lambda: tf.PhimoeConfig(
            **COMMON, **SIZES, num_key_value_heads=2, num_local_experts=4, attention_bias=True, lm_head_bias=True
        ),
        dense={"mlp.router": ROUTER},
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        lambda: tf.Ernie4_5_MoeConfig(
            **COMMON, **SIZES, num_key_value_heads=2, moe_intermediate_size=16, moe_k=2, moe_num_experts=4, moe_num_shared_experts=1
        ),
        dense=GATE,
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1ForCausalLM", lambda: tf.HunYuanMoEV1Config(**LLAMA, num_experts=4, moe_topk=2), dense={"mlp.gate.wg": ROUTER}
    ),
    "minimax": Family(
        "MiniMaxForCausalLM",
        lambda: tf.MiniMaxConfig(
            **LLAMA, num_local_experts=4, num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"], block_size=8
        ),
        dense=GATE,
    ),
    "minimax_m2": Family(
        "MiniMaxM2ForCausalLM", lambda: tf.MiniMaxM2Config(**LLAMA, num_local_experts=4, num_experts_per_tok=2), dense=GATE
    ),
    "dbrx": Family(
        "DbrxForCausalLM",
        lambda: tf.DbrxConfig(
            **COMMON,
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        ),
        ("transformer.blocks",),
        dense={"ffn.router.layer": ROUTER},
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        lambda: tf.GraniteMoeConfig(**COMMON, **SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
        dense={"block_sparse_moe.router": ROUTER},
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        lambda: tf.Lfm2MoeConfig(
            **COMMON,
            **SIZES,
            num_key_value_heads=2,
            moe_intermediate_size=16,
            num_dense_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            layer_types=["conv", "full_attention"],
        ),
        dense={"feed_forward.gate": ROUTER},
    ),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM",
        lambda: tf.DeepseekV32Config(
            **COMMON, **SIZES, **LATENT, **GROUPED, n_shared_experts=1, index_topk=4, index_head_dim=16, index_n_heads=2
        ),
        dense=GATE,
        padded=False,  # the index counts padding among the tokens to choose from
    ),
    "flex_olmo": Family(
        "FlexOlmoForCausalLM",
        lambda: tf.FlexOlmoConfig(**COMMON, **SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
        dense=GATE,
    ),
    "longcat_flash": Family(
        "LongcatFlashForCausalLM",
        lambda: tf.LongcatFlashConfig(
            **COMMON,
            **LATENT,
            hidden_size=32,
            ffn_hidden_size=48,
            num_layers=2,
            num_attention_heads=4,
            head_dim=8,
            max_position_embeddings=64,
            n_routed_experts=4,
            zero_expert_num=2,
            expert_ffn_hidden_size=16,
            moe_topk=2,
        ),
        dense={"mlp.router.classifier": ROUTER},
    ),
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM",
        lambda: tf.DeepseekV4Config(
            **LLAMA,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            mlp_layer_types=["hash_moe", "moe"],
            layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
            sliding_window=4,
            q_lora_rank=16,
            o_groups=2,
            o_lora_rank=8,
            index_n_heads=2,
            index_head_dim=16,
            index_topk=4,
            partial_rotary_factor=1.0,
        ),
        dense={**GATE, "attn_hc.fn": MIXING, "ffn_hc.fn": MIXING, "self_attn.o_a_proj": "multiplies by groups"},
    ),
    "sarvam_moe": Family(
        "Glm4MoeForCausalLM",
        lambda: tf.SarvamMoEConfig(**LLAMA, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2),
        dense=GATE,
        unpacked=dict.fromkeys(("q_proj", "k_proj", "v_proj"), "joined with others in files"),
    ),
    "jetmoe": Family(
        "JetMoeForCausalLM",
        lambda: tf.JetMoeConfig(
            **COMMON,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=8,
            num_local_experts=4,
            max_position_embeddings=64,
        ),
        refused="(JetMoeParallelExperts) holds experts in a layout that sparsekern does not know",
    ),
}
