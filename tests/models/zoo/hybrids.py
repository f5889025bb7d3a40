"""State-space models, recurrences, and their hybrids with attention."""

from __future__ import annotations

import transformers as tf

from .family import COMMON, HEADWISE, LLAMA, NOT_CALLED, ROUTER, SIZES, Family

KINDS = ["linear_attention", "full_attention"]
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=8)
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, layer_types=KINDS)
MIXED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)

HYBRIDS = {
    "mamba": Family(
        "MambaForCausalLM",
        lambda: tf.MambaConfig(**COMMON, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=8),
        ("backbone.layers",),
        dense={"mixer.dt_proj": NOT_CALLED},
    ),
    "falcon_mamba": Family(
        "FalconMambaForCausalLM",
        lambda: tf.FalconMambaConfig(**COMMON, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=8),
        ("backbone.layers",),
        dense={"mixer.dt_proj": NOT_CALLED},
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        lambda: tf.Mamba2Config(
            **COMMON, hidden_size=32, num_heads=4, head_dim=16, state_size=8, num_hidden_layers=2, n_groups=2, chunk_size=8
        ),
        ("backbone.layers",),
    ),
    "bamba": Family("BambaForCausalLM", lambda: tf.BambaConfig(**LLAMA, **MAMBA2, attn_layer_indices=[1])),
    "falcon_h1": Family("FalconH1ForCausalLM", lambda: tf.FalconH1Config(**LLAMA, **MAMBA2, mamba_d_ssm=64)),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        lambda: tf.Lfm2Config(
            **COMMON, **SIZES, num_key_value_heads=2, block_multiple_of=8, layer_types=["conv", "full_attention"]
        ),
    ),
    "jamba": Family(
        "JambaForCausalLM",
        lambda: tf.JambaConfig(
            **COMMON,
            **SIZES,
            num_key_value_heads=2,
            num_experts=4,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        ),
        dense={"feed_forward.router": ROUTER, "mamba.dt_proj": NOT_CALLED},
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        lambda: tf.GraniteMoeHybridConfig(
            **COMMON,
            **SIZES,
            **MAMBA2,
            num_key_value_heads=2,
            num_local_experts=4,
            shared_intermediate_size=24,
            layer_types=KINDS,
            position_embedding_type="rope",
        ),
        dense={"block_sparse_moe.router": ROUTER},
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        lambda: tf.NemotronHConfig(
            **COMMON,
            hidden_size=32,
            intermediate_size=48,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            chunk_size=8,
            n_routed_experts=4,
            moe_intermediate_size=16,
            moe_shared_expert_intermediate_size=16,
            use_mamba_kernels=False,
        ),
        dense={"mixer.gate": ROUTER},
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        lambda: tf.Qwen3NextConfig(**LLAMA, **DELTA, **MIXED),
        dense={"mlp.gate": ROUTER, "mlp.shared_expert_gate": "one output"},
    ),
    "qwen3_5": Family("Qwen3_5ForCausalLM", lambda: tf.Qwen3_5TextConfig(**LLAMA, **DELTA)),
    "zamba2": Family(
        "Zamba2ForCausalLM",
        lambda: tf.Zamba2Config(
            **COMMON,
            **SIZES,
            layers_block_type=["linear_attention", "hybrid"],
            mamba_d_state=8,
            mamba_ngroups=2,
            n_mamba_heads=4,
            chunk_size=8,
            use_mamba_kernels=False,
        ),
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaForCausalLM",
        lambda: tf.RecurrentGemmaConfig(
            **COMMON,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            lru_width=32,
            attention_window_size=8,
            block_types=["recurrent", "attention"],
        ),
        dense={"rg_lru.input_gate_weight": HEADWISE, "rg_lru.recurrent_gate_weight": HEADWISE},
    ),
    "rwkv": Family(  # packed, it cannot rescale its weights in place, as rescale_every asks
        "RwkvForCausalLM",
        lambda: tf.RwkvConfig(
            **COMMON,
            context_length=64,
            rescale_every=0,
            hidden_size=32,
            attention_hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
        ),
        ("rwkv.blocks",),
    ),
    "xlstm": Family(
        "xLSTMForCausalLM",
        lambda: tf.xLSTMConfig(
            **COMMON, hidden_size=128, embedding_dim=128, num_hidden_layers=2, num_blocks=2, num_heads=4, chunk_size=16
        ),
        ("backbone.blocks",),
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        lambda: tf.KimiLinearConfig(
            **COMMON,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            model_max_length=64,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_token=2,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            head_dim=8,
            linear_head_dim=16,
            linear_num_heads=4,
            layer_types=KINDS,
            mlp_layer_types=["dense", "sparse"],
        ),
        dense={"mlp.gate": ROUTER},
    ),
    "hrm_text": Family(
        "HrmTextForCausalLM",
        lambda: tf.HrmTextConfig(**LLAMA),
        refused="more than once (6 times), which block-by-block pruning cannot follow",
    ),
}
