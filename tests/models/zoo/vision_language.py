"""Language models that also read images. The language model is pruned; a tower is where it is named."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers as tf

from .encoders import IMAGE, VISION, images
from .family import LLAMA, MIXING, ROUTER, Family, Sample, words

STACK = ("model.language_model.layers",)
PICTURE = 90  # the id that stands for a part of an image


LENGTHS = (8, 5, 7, 6)


def pictured(tokens: int = 4, lengths: tuple[int, ...] = LENGTHS, pixels=None):
    """Return a maker of samples: `tokens` ids of an image, then a text."""

    def samples() -> list[Sample]:
        texts = words(lengths)
        shown = images(count=4) if pixels is None else pixels()
        ahead = torch.full((1, tokens), PICTURE)
        found = []
        for text, image in zip(texts, shown, strict=True):
            ids = text["input_ids"].clamp(max=PICTURE - 2)
            found.append({"input_ids": torch.cat([ahead, ids], 1), **image})
        return found

    return samples


def patches() -> list[Sample]:
    """Images of Qwen-VL: 16 patches of 8 x 8 pixels, merged to 4 tokens; the kinds of tokens go with each text."""
    generator = torch.Generator().manual_seed(6)
    return [
        {
            "pixel_values": torch.randn((16, 3 * 2 * 8 * 8), generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": torch.tensor([[1] * 4 + [0] * (length - 4)]),
        }
        for length in (12, 9, 11, 10)
    ]


def tiles() -> list[Sample]:
    """Images of Mllama: one tile, seen by all tokens."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for text in words((12, 12, 12, 12)):
        found.append(
            {
                "input_ids": text["input_ids"],
                "pixel_values": torch.randn((1, 1, 1, 3, 16, 16), generator=generator),
                "aspect_ratio_ids": torch.ones((1, 1), dtype=torch.long),
                "aspect_ratio_mask": torch.ones((1, 1, 1), dtype=torch.long),
                "cross_attention_mask": torch.ones((1, 12, 1, 1), dtype=torch.long),
            }
        )
    return found


QWEN = dict(image_token_id=PICTURE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
QWEN3_VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    patch_size=8,
    out_hidden_size=32,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
)
TEXT = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
GEMMA3 = dict(**LLAMA, sliding_window=4, layer_types=["sliding_attention", "full_attention"])

VISION_LANGUAGE = {
    "llava": Family(
        "LlavaForConditionalGeneration",
        lambda: tf.LlavaConfig(
            text_config=tf.LlamaConfig(**LLAMA),
            vision_config=tf.CLIPVisionConfig(**VISION),
            image_token_index=PICTURE,
            image_seq_length=4,
        ),
        STACK,
        samples=pictured(),
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        lambda: tf.PaliGemmaConfig(
            text_config=LLAMA | {"model_type": "gemma"},
            vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
            image_token_index=PICTURE,
            projection_dim=32,
            hidden_size=32,
        ),
        STACK,
        samples=pictured(lengths=(8, 8, 8, 8)),  # with padding the model itself computes something else
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        lambda: tf.Gemma3Config(
            text_config=GEMMA3,
            vision_config=VISION | {"vision_use_head": False},
            mm_tokens_per_image=4,
            boi_token_index=91,
            eoi_token_index=92,
            image_token_index=PICTURE,
        ),
        STACK,
        samples=pictured(),
    ),
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        lambda: tf.Gemma3nTextConfig(
            **LLAMA | {"intermediate_size": [48] * 4, "num_hidden_layers": 4},
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=96,
            num_kv_shared_layers=2,
            laurel_rank=16,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        dense={f"altup.{name}": MIXING for name in ("correction_coefs", "prediction_coefs", "modality_router")},
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        lambda: tf.Gemma4TextConfig(
            **LLAMA | {"num_hidden_layers": 4},
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=96,
            num_kv_shared_layers=2,
            global_head_dim=16,
        ),
    ),
    "gemma4_moe": Family(
        "Gemma4ForCausalLM",
        lambda: tf.Gemma4TextConfig(
            **LLAMA,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=0,
            global_head_dim=16,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
        ),
        dense={"router.proj": "routes tokens to experts"},
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        lambda: tf.Qwen2VLConfig(
            text_config={k: v for k, v in TEXT.items() if k != "head_dim"},
            vision_config=dict(depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2, num_heads=4, patch_size=8),
            **QWEN,
        ),
        STACK,
        samples=pictured(pixels=patches),
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        lambda: tf.Qwen2_5_VLConfig(
            text_config={k: v for k, v in TEXT.items() if k != "head_dim"},
            vision_config=dict(
                depth=2,
                hidden_size=32,
                intermediate_size=48,
                num_heads=4,
                patch_size=8,
                window_size=32,
                out_hidden_size=32,
                fullatt_block_indexes=[1],
            ),
            **QWEN,
        ),
        STACK,
        samples=pictured(pixels=patches),
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        lambda: tf.Qwen3VLConfig(
            text_config=TEXT,
            vision_config=QWEN3_VISION,
            **QWEN,
        ),
        STACK,
        samples=pictured(pixels=patches),
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        lambda: tf.Idefics3Config(
            text_config=LLAMA | {"model_type": "llama"},
            vision_config=VISION,
            image_token_id=PICTURE,
            scale_factor=2,
            **{"pad_token_id": 0},
        ),
        ("model.text_model.layers",),
        samples=pictured(1, pixels=lambda: [{"pixel_values": x["pixel_values"][None]} for x in images(count=4)]),
    ),
    "mllama": Family(
        "MllamaForConditionalGeneration",
        lambda: tf.MllamaConfig(
            vision_config=tf.MllamaVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_global_layers=1,
                attention_heads=4,
                intermediate_layers_indices=[0],
                vision_output_dim=64,
                max_num_tiles=1,
                supported_aspect_ratios=[[1, 1]],
                **IMAGE,
            ),
            text_config=tf.MllamaTextConfig(
                **{k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_hidden_layers")},
                num_hidden_layers=3,
                cross_attention_layers=[1],
            ),
            image_token_index=PICTURE,
        ),
        STACK,
        samples=tiles,
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        lambda: tf.Mistral3Config(
            text_config=LLAMA | {"model_type": "mistral"},
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 8, "image_size": 32},
            image_token_index=PICTURE,
            spatial_merge_size=2,
        ),
        STACK,
        samples=pictured(pixels=lambda: [each | {"image_sizes": torch.tensor([[32, 32]])} for each in images(32, 4)]),
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        lambda: tf.InternVLConfig(
            text_config=LLAMA | {"model_type": "qwen2"},
            vision_config=VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
            image_token_id=PICTURE,
            downsample_ratio=0.5,
        ),
        STACK,
        samples=pictured(),
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        lambda: tf.Qwen3VLMoeConfig(
            text_config=TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            vision_config=QWEN3_VISION,
            **QWEN,
        ),
        STACK,
        dense={"mlp.gate": ROUTER},
        samples=pictured(pixels=patches),
    ),
    "aria": Family(
        "AriaForConditionalGeneration",
        lambda: tf.AriaConfig(
            text_config=LLAMA | {"model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
            vision_config=VISION | {"model_type": "idefics3_vision"},
            image_token_index=PICTURE,
            projector_patch_to_query_dict={4: 4},
        ),
        STACK,
        dense={"mlp.router": ROUTER},
        samples=pictured(),
    ),
    "blip_2": Family(
        "Blip2ForConditionalGeneration",
        lambda: tf.Blip2Config(
            vision_config=VISION,
            qformer_config=LLAMA | {"encoder_hidden_size": 32},
            text_config=LLAMA | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
            num_query_tokens=4,
            image_token_index=PICTURE,
        ),
        ("language_model.model.decoder.layers",),
        samples=pictured(),
    ),
}

TOWERS = {
    "llava_tower": replace(
        VISION_LANGUAGE["llava"], stacks=("model.vision_tower.encoder.layers",), options={"include": "*.vision_tower.encoder.*"}
    ),
    "qwen2_5_vl_all": replace(
        VISION_LANGUAGE["qwen2_5_vl"],
        stacks=("model.visual.blocks", "model.language_model.layers"),
        options={"include": ["model.visual.blocks.*", "*.layers.*"]},
    ),
    "mllama_all": replace(
        VISION_LANGUAGE["mllama"],
        stacks=(
            "model.vision_model.transformer.layers",
            "model.vision_model.global_transformer.layers",
            "model.language_model.layers",
        ),
        options={"include": "*.layers.*"},
    ),
}
VISION_LANGUAGE |= TOWERS
