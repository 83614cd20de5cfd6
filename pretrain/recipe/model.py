"""The recipe's `model`: towers, preprocessing, what is trained of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pretrain.recipe.base import Part

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class TextRecipe(Part):
    """The text tower; defaults are CLIP's base size."""

    width: int = Field(default=512, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=8, ge=1)
    context: int = Field(default=77, ge=3)
    """Longest caption in tokens, start and end included; longer ones are cut."""
    vocab: int = 49408
    dropout: float = Field(default=0.0, ge=0, lt=1)
    causal: bool = True
    """Every token sees those before it, as in CLIP; false: all see all, padding too, as in SigLIP."""
    pool: Literal["eot", "last", "max"] = "eot"
    """Which token is the caption: end-of-text as CLIP, the last place of the context as SigLIP, or the maximum over
    the caption's tokens, dimension by dimension, as PyramidCLIP."""
    projection_bias: bool = False
    """A bias in the projection into the shared space: SigLIP has one."""
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] | None = None
    """null: model.activation."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """SigLIP has 1e-6."""
    tokenizer: Path | None = None
    """A SentencePiece model (`spiece.model`) or a `tokenizer.json`, as SigLIP's weights come with; null: CLIP's own
    byte pairs."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TextRecipe:
        if self.width % self.heads:
            raise ValueError(f"text.width {self.width} must be a multiple of text.heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _end_is_known(self) -> TextRecipe:
        if self.tokenizer is not None and self.pool != "last":
            raise ValueError(
                f"text.pool {self.pool} looks for CLIP's end-of-text, the highest id; text.tokenizer needs pool: last"
            )
        return self


class RegionRecipe(Part):
    """Regions of an image through the last layers of its tower (PyramidCLIP, Gao et al. 2022, §3.2)."""

    blocks: int = Field(default=3, ge=1)
    """Last blocks of a ViT that regions run through; CLIP's ResNets have their attention pool instead."""
    most: int = Field(default=10, ge=1)
    """Regions an image, the best scored first."""
    stored_dim: int | None = Field(default=None, ge=1)
    """Width of a detector's features in the samples' `roi.npy`, which has four numbers of the box behind them
    (PyramidCLIP: 2048). null: regions are cut (RoIAlign) from the tower's own map of the whole image."""


class LockRecipe(Part):
    """Towers that keep their weights (LiT, Zhai et al. 2022): not trained, their BatchNorm standing still."""

    image: bool = False
    """The image backbone; its projection goes on learning."""
    image_unlocked: int = Field(default=0, ge=0)
    """Last blocks of a ViT, or stages of a convolutional tower, that are trained all the same, final norm and pooling
    with them."""
    projection: bool = False
    """The image projection too, where the weights come with one."""
    patches: bool = False
    """The patch embedding of a ViT alone, as it was drawn or brought along: steadier at the start (MoCo v3, Chen et al.
    2021, §4; PyramidCLIP)."""
    text: bool = False
    """The text tower."""
    text_unlocked: int = Field(default=0, ge=0)
    """Last blocks of the text tower that are trained all the same, final norm and projection with them."""


class ModelRecipe(Part):
    """The trunk: towers, preprocessing, initialisation. All of it is part of the fingerprint."""

    image: str = "vit_base_patch32_clip_224"
    """Any timm model name."""
    image_size: int = Field(default=224, ge=8)
    """Side of the square crop, pixels."""
    eval_resize: int | None = Field(default=None, ge=8)
    """Shortest side in pixels before the centre crop of image_size at evaluation; null: image_size itself, as CLIP.
    SwAV, DINO and tables of kNN have 256 for 224."""
    image_kwargs: dict[str, Any] = {}
    """Passed to timm (depth, dropout, …)."""
    text: TextRecipe | None = TextRecipe()
    """null for an image-only trunk."""
    embed_dim: int | None = Field(default=512, ge=1)
    """Width of the shared space. null: no projection of images, the embedding is the image tower's pooled features
    (and a text tower projects to their width, as in SigLIP)."""
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    """quick_gelu is what OpenAI's weights were trained with."""
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    sync_batchnorm: bool = True
    """BatchNorm over the global batch; without effect on towers that have none."""
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a ViT's patches left out in training, drawn anew each step, as FLIP and open_clip."""
    leff: int = Field(default=0, ge=0)
    """First blocks of a ViT whose MLP mixes neighbouring patches (LeFF), as PyramidCLIP's: 9 of 12."""
    regions: RegionRecipe | None = None
    """A branch that reads regions of an image, for pyramid_clip; null: none."""
    lock: LockRecipe = LockRecipe()
    """What of the towers is not trained."""

    @model_validator(mode="after")
    def _fits_together(self) -> ModelRecipe:
        if self.eval_resize is not None and self.eval_resize < self.image_size:
            raise ValueError(f"model.eval_resize {self.eval_resize} is less than model.image_size {self.image_size}")
        return self
