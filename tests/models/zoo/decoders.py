"""Dense decoders: one list of blocks of one class."""

from __future__ import annotations

import transformers as tf

from .family import COMMON, LLAMA, SIZES, Family

SLIDING = ["sliding_attention", "full_attention"]

DECODERS = {
    "llama": Family("LlamaForCausalLM", lambda: tf.LlamaConfig(**LLAMA)),
    "smollm3": Family("SmolLM3ForCausalLM", lambda: tf.SmolLM3Config(**LLAMA, no_rope_layers=[1, 0])),
    "olmo2": Family("Olmo2ForCausalLM", lambda: tf.Olmo2Config(**LLAMA)),
    "olmo3": Family("Olmo3ForCausalLM", lambda: tf.Olmo3Config(**LLAMA, sliding_window=4, layer_types=SLIDING)),
    "cohere": Family("CohereForCausalLM", lambda: tf.CohereConfig(**LLAMA)),
    "cohere2": Family("Cohere2ForCausalLM", lambda: tf.Cohere2Config(**LLAMA, sliding_window=4, layer_types=SLIDING)),
    "stablelm": Family("StableLmForCausalLM", lambda: tf.StableLmConfig(**LLAMA, use_qkv_bias=True)),
    "starcoder2": Family("Starcoder2ForCausalLM", lambda: tf.Starcoder2Config(**LLAMA, sliding_window=4)),
    "granite": Family("GraniteForCausalLM", lambda: tf.GraniteConfig(**LLAMA, residual_multiplier=0.5)),
    "glm4": Family("Glm4ForCausalLM", lambda: tf.Glm4Config(**LLAMA)),
    "exaone4": Family("Exaone4ForCausalLM", lambda: tf.Exaone4Config(**LLAMA, sliding_window=4, layer_types=SLIDING)),
    "ernie4_5": Family("Ernie4_5ForCausalLM", lambda: tf.Ernie4_5Config(**LLAMA)),
    "nemotron": Family("NemotronForCausalLM", lambda: tf.NemotronConfig(**LLAMA)),
    "gptj": Family(
        "GPTJForCausalLM",
        lambda: tf.GPTJConfig(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, tie_word_embeddings=False),
        ("transformer.h",),
    ),
    "mpt": Family(
        "MptForCausalLM", lambda: tf.MptConfig(**COMMON, d_model=32, n_layers=2, n_heads=4, max_seq_len=64), ("transformer.blocks",)
    ),
    "gpt_bigcode": Family(
        "GPTBigCodeForCausalLM",
        lambda: tf.GPTBigCodeConfig(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        ("transformer.h",),
    ),
    "exaone": Family("LlamaForCausalLM", lambda: tf.ExaoneConfig(**LLAMA)),  # whose files name other tensors than Llama's
    "xlm": Family(  # with one block in each list, since the lists take turns
        "XLMWithLMHeadModel",
        lambda: tf.XLMConfig(**COMMON, emb_dim=32, n_layers=1, n_heads=4, max_position_embeddings=64),
        ("transformer.attentions", "transformer.ffns"),
    ),
    "persimmon": Family("PersimmonForCausalLM", lambda: tf.PersimmonConfig(**COMMON, **SIZES)),
}
