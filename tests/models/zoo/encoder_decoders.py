"""Encoder-decoders: two lists of blocks, the decoder's with attention to what the encoder gives."""

from __future__ import annotations

import torch
import transformers as tf

from .family import COMMON, ROUTER, Family, Sample, words

STACKS = ("model.encoder.layers", "model.decoder.layers")
T5_STACKS = ("encoder.block", "decoder.block")
BART = dict(
    **COMMON,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=40,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    max_position_embeddings=64,
    decoder_start_token_id=1,
)
T5 = dict(**COMMON, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, relative_attention_num_buckets=8)
GEMMA = dict(
    **COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"],
)


def pairs() -> list[Sample]:
    """Samples of two texts of other lengths."""
    answers = words((7, 5, 8, 4), seed=2)
    return [{**question, "decoder_input_ids": answer["input_ids"]} for question, answer in zip(words(), answers, strict=True)]


def speech() -> list[Sample]:
    """Samples of sound, with texts of other lengths."""
    generator = torch.Generator().manual_seed(3)
    sound = [torch.randn((1, 8, 24), generator=generator) for _ in range(4)]
    texts = words((7, 5, 8, 4), seed=2)
    return [{"input_features": x, "decoder_input_ids": text["input_ids"]} for x, text in zip(sound, texts, strict=True)]


ENCODER_DECODERS = {
    "t5": Family("T5ForConditionalGeneration", lambda: tf.T5Config(**T5), T5_STACKS, samples=pairs),
    "mt5_gated": Family(
        "MT5ForConditionalGeneration",
        lambda: tf.MT5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        T5_STACKS,
        samples=pairs,
    ),
    "switch_transformers": Family(
        "SwitchTransformersForConditionalGeneration",
        lambda: tf.SwitchTransformersConfig(
            **T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64
        ),
        T5_STACKS,
        dense={"mlp.router.classifier": ROUTER},
        samples=pairs,
    ),
    "t5gemma": Family(
        "T5GemmaForConditionalGeneration",
        lambda: tf.T5GemmaConfig(encoder=GEMMA, decoder=GEMMA | {"cross_attention_hidden_size": 32}, **COMMON),
        STACKS,
        samples=pairs,
    ),
    "bart": Family("BartForConditionalGeneration", lambda: tf.BartConfig(**BART), STACKS, samples=pairs),
    "mbart": Family("MBartForConditionalGeneration", lambda: tf.MBartConfig(**BART), STACKS, samples=pairs),
    "marian": Family("MarianMTModel", lambda: tf.MarianConfig(**BART), STACKS, samples=pairs),
    "m2m_100": Family("M2M100ForConditionalGeneration", lambda: tf.M2M100Config(**BART), STACKS, samples=pairs),
    "nllb_moe": Family(
        "NllbMoeForConditionalGeneration",
        lambda: tf.NllbMoeConfig(**BART, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, expert_capacity=64),
        STACKS,
        dense={"ffn.router.classifier": ROUTER},
        samples=pairs,
    ),
    "pegasus": Family("PegasusForConditionalGeneration", lambda: tf.PegasusConfig(**BART), STACKS, samples=pairs),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        lambda: tf.WhisperConfig(
            **{name: value for name, value in BART.items() if name != "max_position_embeddings"},
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=64,
            begin_suppress_tokens=None,
        ),
        STACKS,
        samples=speech,
    ),
}
