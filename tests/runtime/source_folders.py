"""Folders with more than the weights of a class, to load models from."""

import json

import torch
from safetensors.torch import load_file, save_file

PREDICTION = {
    "model.mtp.proj.weight": torch.randn(8, 8).bfloat16(),
    "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.randn(4, 8),
    "visual.scale": torch.tensor(3.5, dtype=torch.float64),
    "visual.codes": torch.arange(7, dtype=torch.uint8),
    "visual.fp8": torch.randn(5, 3).to(torch.float8_e4m3fn),
    "visual.none": torch.zeros(0, 4),
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]
KEPT = {
    "modules.json": json.dumps(MODULES),
    "sentence_bert_config.json": "{}",
    "1_Pooling/config.json": "{}",
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "weights of a module behind the model",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "vocab.txt": "a",
    "generation_config.json": "{}",
    "LICENSE": "free",
    "spk_dict.pt": "voices",
    "a name with spaces.txt": "é",
}
LEFT = {
    "README.md": "the old card",
    "report.json": "old",
    "report.html": "old",
    "pytorch_model.bin": "weights",
    "model-00001-of-00002.safetensors": "weights",
    "pytorch_model.bin.index.json": "{}",
    "onnx/model.onnx": "weights",
    "optimizer.pt": "state",
    "own.py": "code",
    ".git/config": "hidden",
    ".gitattributes": "hidden",
    ".cache/huggingface/x.json": "hidden",
    "__pycache__/own.pyc": "cache",
    "checkpoint/state.json": "an unfinished run",
    "checkpoint/block-00000.safetensors": "weights",
    "pruned/config.json": "{}",
    "pruned/model.safetensors": "another model",
}


def with_tensors(folder, tensors):
    """Add tensors to the single weight file of a folder."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})
    return folder


def with_files(folder):
    """Add the files of `KEPT` and `LEFT` to a folder."""
    for name, text in (KEPT | LEFT).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder
