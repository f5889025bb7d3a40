"""A tiny random model of every decoder family the pipeline must work on."""

import torch
import transformers as tf

VOCABULARY = 96
COMMON = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA_LIKE = dict(
    **COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**LLAMA_LIKE),
    "llama_tied": lambda: tf.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**LLAMA_LIKE, sliding_window=4),
    "qwen2": lambda: tf.Qwen2Config(**LLAMA_LIKE, use_sliding_window=True, sliding_window=4, layer_types=SLIDING),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA_LIKE),
    "gemma": lambda: tf.GemmaConfig(**LLAMA_LIKE),
    "gemma2": lambda: tf.Gemma2Config(**LLAMA_LIKE, sliding_window=4, layer_types=SLIDING),
    "gemma3": lambda: tf.Gemma3TextConfig(**LLAMA_LIKE, sliding_window=4, layer_types=SLIDING),
    "phi": lambda: tf.PhiConfig(**LLAMA_LIKE),
    "phi3": lambda: tf.Phi3Config(**LLAMA_LIKE),
    "opt": lambda: tf.OPTConfig(
        **COMMON,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    ),
    "gpt2": lambda: tf.GPT2Config(**COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64
    ),
    "bloom": lambda: tf.BloomConfig(**COMMON, hidden_size=32, n_layer=3, n_head=4),
    "falcon": lambda: tf.FalconConfig(**COMMON, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
}


def tiny_model(family: str, dtype: torch.dtype = torch.float32):
    """A model of the family with random weights (the same at each call), in evaluation mode."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval()
    for parameter in model.parameters():  # zero biases and norms of one would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def tiny_ids(samples: int = 8, length: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
