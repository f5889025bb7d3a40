"""Encoders of text, images and sound."""

from __future__ import annotations

import torch
import transformers as tf

from .family import COMMON, SIZES, Family, Sample, words

LAYERS = ("encoder.layer",)
IMAGE = dict(image_size=16, patch_size=8, num_channels=3)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **IMAGE)
TEXT = dict(**COMMON, **SIZES)


def images(size: int = 16, count: int = 6) -> list[Sample]:
    """Samples of pixels."""
    generator = torch.Generator().manual_seed(4)
    return [{"pixel_values": torch.randn((1, 3, size, size), generator=generator)} for _ in range(count)]


def captioned() -> list[Sample]:
    """Samples of an image and a text."""
    return [{**image, **text} for image, text in zip(images(count=4), words(), strict=True)]


def sound() -> list[Sample]:
    """Samples of a wave."""
    generator = torch.Generator().manual_seed(5)
    return [{"input_values": torch.randn((1, 400), generator=generator)} for _ in range(4)]


SPEECH = dict(
    **COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    conv_dim=[16, 16],
    conv_stride=[5, 4],
    conv_kernel=[10, 4],
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    layerdrop=0.0,
    apply_spec_augment=False,
)
CLIP = dict(text_config=TEXT | {"projection_dim": 16}, vision_config=VISION | {"projection_dim": 16})
TOWERS = ("text_model.encoder.layers", "vision_model.encoder.layers")

ENCODERS = {
    "bert": Family("BertForMaskedLM", lambda: tf.BertConfig(**TEXT), ("bert.encoder.layer",)),
    "roberta": Family("RobertaForMaskedLM", lambda: tf.RobertaConfig(**TEXT), ("roberta.encoder.layer",)),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        lambda: tf.DistilBertConfig(**COMMON, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64),
        ("distilbert.transformer.layer",),
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        lambda: tf.ModernBertConfig(
            **TEXT, local_attention=4, layer_types=["full_attention", "sliding_attention"], cls_token_id=1, sep_token_id=2
        ),
        ("model.layers",),
    ),
    "deberta_v2": Family(
        "DebertaV2ForTokenClassification",
        lambda: tf.DebertaV2Config(
            **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, share_att_key=True
        ),
        ("deberta.encoder.layer",),
        padded=False,
    ),
    "mpnet": Family("MPNetModel", lambda: tf.MPNetConfig(**TEXT), LAYERS),
    "albert": Family(
        "AlbertForMaskedLM",
        lambda: tf.AlbertConfig(**TEXT, embedding_size=16),
        refused="more than once (2 times), which block-by-block pruning cannot follow",
    ),
    "vit": Family("ViTForImageClassification", lambda: tf.ViTConfig(**VISION), ("vit.layers",), samples=images),
    "dinov2": Family(
        "Dinov2Model",
        lambda: tf.Dinov2Config(hidden_size=32, mlp_ratio=2, num_hidden_layers=2, num_attention_heads=4, **IMAGE),
        LAYERS,
        samples=images,
    ),
    "clip_vision": Family("CLIPVisionModel", lambda: tf.CLIPVisionConfig(**VISION), ("encoder.layers",), samples=images),
    "clip": Family("CLIPModel", lambda: tf.CLIPConfig(**CLIP, projection_dim=16), TOWERS, samples=captioned),
    "siglip": Family("SiglipModel", lambda: tf.SiglipConfig(text_config=TEXT, vision_config=VISION), TOWERS, samples=captioned),
    "wav2vec2": Family("Wav2Vec2ForCTC", lambda: tf.Wav2Vec2Config(**SPEECH), ("wav2vec2.encoder.layers",), samples=sound),
    "hubert": Family("HubertForCTC", lambda: tf.HubertConfig(**SPEECH), ("hubert.encoder.layers",), samples=sound),
    "deit": Family("DeiTForImageClassification", lambda: tf.DeiTConfig(**VISION), ("deit.layers",), samples=images),
    "swin": Family(
        "SwinForImageClassification",
        lambda: tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4),
        ("swin.encoder.layers",),
        samples=lambda: images(32),
    ),
}
