"""Position embeddings of another grid or context."""

from __future__ import annotations

from math import isqrt

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from pretrain.errors import UserError
from pretrain.models.text import TextTower
from pretrain.models.trunk import Trunk

VIT, POOL, TEXT = "image.backbone.pos_embed", "image.backbone.head.pos_embed", "text.positional_embedding"


def fitted(trunk: Trunk, name: str, theirs: Tensor) -> Tensor:
    """`theirs`, in our layout, for the trunk's tensor `name`: position embeddings brought to its grid or context.

    Grids are resampled as timm and open_clip do it (bicubic, antialiased), the embedding of the class token kept.
    What is no position embedding, or of another width, comes back as it is.

    Raises:
        UserError: texts of another context whose positions cannot be cut.
    """
    own = trunk.state_dict()[name]
    if name not in (VIT, POOL, TEXT) or theirs.shape == own.shape or theirs.shape[-1] != own.shape[-1]:
        return theirs
    if name == TEXT:
        assert trunk.text is not None
        return _cut(trunk.text, theirs)
    vit, backbone = name == VIT, trunk.image.backbone
    classes = 1 if not vit else 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    if isqrt(theirs.shape[-2] - classes) ** 2 != theirs.shape[-2] - classes:
        return theirs
    grid = list(backbone.patch_embed.grid_size if vit else backbone.head.feat_size)
    resized = resample_abs_pos_embed(theirs if vit else theirs[None], grid, num_prefix_tokens=classes)
    return resized if vit else resized[0]


def _cut(tower: TextTower, theirs: Tensor) -> Tensor:
    theirs_context = len(theirs)
    why = f"these weights have {theirs_context} positions of text, model.text.context is {tower.context}"
    if tower.context > theirs_context:
        raise UserError(f"{why}: there is nothing for the places behind; set model.text.context to {theirs_context}")
    if tower.reads_padding:
        raise UserError(
            f"{why}: this tower reads every place of its context, so it cannot be cut; "
            f"set model.text.context to {theirs_context}"
        )
    return theirs[: tower.context]
