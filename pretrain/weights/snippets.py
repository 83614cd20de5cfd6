"""The code that embeds with an export, for each consumer, as text.

It has two readers: it is printed in the model card, and it is run to verify the export. It finds the export in `folder`
and defines `embed_images` (of PIL images) and `embed_texts`, each giving unit rows as numpy has them.
"""

from __future__ import annotations

from pretrain.recipe import ModelRecipe, TextRecipe

OPEN_CLIP_IMAGES = """\
import open_clip
import torch

model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model.eval()


@torch.inference_mode()
def embed_images(images):
    return model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True).numpy()
"""
OPEN_CLIP_TOKENIZE = """\
tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
"""
OPEN_CLIP_TEXTS = """\
@torch.inference_mode()
def embed_texts(texts):
    return model.encode_text(tokenize(texts), normalize=True).numpy()
"""

TIMM_IMAGES = """\
import timm
import torch

model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


@torch.inference_mode()
def embed_images(images):
    features = model(torch.stack([preprocess(image.convert("RGB")) for image in images]))
    return torch.nn.functional.normalize(features, dim=-1).numpy()
"""

HF_IMAGES = """\
import torch
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)


@torch.inference_mode()
def embed_images(images):
    found = model.get_image_features(**processor(images, return_tensors="pt"))
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()
"""
HF_TOKENIZE = """\
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)


def tokenize(texts):
    return tokenizer(texts, padding="max_length", max_length=CONTEXT, truncation=True)["input_ids"]
"""
HF_TEXTS = """\
@torch.inference_mode()
def embed_texts(texts):
    found = model.get_text_features(input_ids=torch.as_tensor(tokenize(texts)))
    return torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1).numpy()
"""

ONNX_IMAGES = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

image_graph = onnxruntime.InferenceSession(f"{folder}/image.onnx")


def embed_images(images):
    squares = [ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    pixels = np.stack([np.asarray(square).transpose(2, 0, 1) for square in squares])  # uint8 (B, 3, SIZE, SIZE)
    return image_graph.run(None, {"pixels": pixels})[0]
"""
ONNX_TEXTS = """\
text_graph = onnxruntime.InferenceSession(f"{folder}/text.onnx")


def embed_texts(texts):
    return text_graph.run(None, {"tokens": np.array(tokenize(texts), dtype=np.int64)})[0]  # (B, CONTEXT)
"""

OWN_IMAGES = """\
import polyview

encoder = polyview.load(folder)
embed_images = encoder.encode_image
"""
OWN_TEXTS = "embed_texts = encoder.encode_text\n"

TOKENIZERS = """\
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")  # pads and cuts to the context


def tokenize(texts):
    return [found.ids for found in tokenizer.encode_batch(texts)]
"""
PIECES = """\
from pathlib import Path

from pretrain.views.pieces import PieceTokenizer  # polyview's

tokenize = PieceTokenizer(Path(folder) / FILE, CONTEXT)
"""


def open_clip(model: ModelRecipe) -> list[str]:
    return [OPEN_CLIP_IMAGES, _tokenize(model, OPEN_CLIP_TOKENIZE), OPEN_CLIP_TEXTS]


def timm(model: ModelRecipe) -> list[str]:
    return [TIMM_IMAGES]


def hf(model: ModelRecipe) -> list[str]:
    # transformers' tokenizer pads in its own way, which a tower that looks at its padding must not get
    clip = HF_TOKENIZE if model.text and model.text.causal else TOKENIZERS
    return [HF_IMAGES, _tokenize(model, clip), HF_TEXTS]


def onnx(model: ModelRecipe) -> list[str]:
    return [ONNX_IMAGES, *([_tokenize(model, TOKENIZERS), ONNX_TEXTS] if model.text else [])]


def own(model: ModelRecipe) -> list[str]:
    return [OWN_IMAGES, *([OWN_TEXTS] if model.text else [])]


def whole(pieces: list[str], model: ModelRecipe) -> str:
    """The pieces as one program, with this model's numbers in it."""
    text = model.text or TextRecipe()
    names = {"SIZE": model.image_size, "CONTEXT": text.context, "FILE": repr(text.tokenizer and text.tokenizer.name)}
    program = "\n\n".join(pieces)
    for name, value in names.items():
        program = program.replace(name, str(value))
    return program


def _tokenize(model: ModelRecipe, clip: str) -> str:
    """Code of `tokenize`, of texts to (B, context) ids: `clip` for CLIP's byte pairs, ours for a file of pieces."""
    return PIECES if model.text and model.text.tokenizer else clip
