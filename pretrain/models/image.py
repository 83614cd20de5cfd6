"""Image towers: any timm model behind one interface, bytes in, pooled features and embedding out.

timm has the architectures, tested and fast; this adds what a trainer needs around them: uint8 pixels
normalised where the tower is, a projection into the shared space, tokens of inner blocks, CLIP's
initialisation for CLIP's own architectures, and errors that name the recipe's key. It loads no weights (see
`pretrain.weights`).
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

import timm
import torch
from timm.layers import AttentionPool2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.leff import use_leff
from pretrain.models.regions import RegionBranch
from pretrain.recipe import ModelRecipe
from pretrain.views.regions import Regions


class ImageTower(nn.Module):
    """A timm backbone and its projection to `embed_dim`.

    CLIP's ResNets project inside their attention pool; others get a linear projection without bias. With
    `model.embed_dim: null` nothing projects: the embedding is the pooled features (of CLIP's ResNets too, whose
    attention pool then has no projection).
    """

    def __init__(self, recipe: ModelRecipe) -> None:
        super().__init__()
        self.name, self.image_size = recipe.image, recipe.image_size
        self.mean, self.std = recipe.mean, recipe.std
        self.backbone: Any = _backbone(recipe)  # timm's models share methods, not a type
        self.projection: nn.Linear | None = None
        self.pooled_dim: int = self.backbone.head_hidden_size
        self.embed_dim: int = recipe.embed_dim or self.pooled_dim
        if recipe.leff:
            use_leff(self.backbone, recipe.leff, self.name)
        self.regions = RegionBranch(recipe.regions, self.backbone, self.name) if recipe.regions else None
        if recipe.embed_dim and not _projects_itself(self.backbone):
            self.projection = nn.Linear(self.pooled_dim, recipe.embed_dim, bias=False)
        init(self)
        # convolutions run a seventh faster so on a CPU, and as tensor cores want it on a GPU
        self.lay_out(torch.contiguous_format if isinstance(self.backbone, VisionTransformer) else torch.channels_last)

    def lay_out(self, layout: torch.memory_format) -> None:
        """Keep kernels and images in this memory layout."""
        self._layout = layout
        self.backbone.to(memory_format=layout)

    def forward(self, images: Tensor, outputs: Collection[str | int] = ("embedding",)) -> dict[str | int, Tensor]:
        """(B, 3, S, S) uint8 -> the named outputs.

        `embedding` (B, embed_dim), not of unit length; `pooled` (B, C) before the projection; a number n:
        the tokens (B, L, width) of block n, class token first where there is one, before the final norm;
        `map` (B, C, g, g): what regions are cut from, detached.

        Raises:
            UserError: images of a size the tower does not take, or a block it does not have.
        """
        x = self._normalise(images)
        map_layer = self.regions.map_layer(self.backbone) if self.regions and "map" in outputs else None
        layers = sorted({o for o in (*outputs, map_layer) if isinstance(o, int)})
        if layers:
            x, found = self._with_tokens(x, layers)
        else:
            x, found = self._features(x), {}
        if "map" in outputs:
            found["map"] = x.detach() if map_layer is None else self._grid(found[map_layer].detach())
        if {"embedding", "pooled"} & set(outputs):
            found["pooled"] = self.backbone.forward_head(x, pre_logits=True)
        if "embedding" in outputs:
            found["embedding"] = self.project(found["pooled"])
        return found

    def embed_regions(self, regions: Regions, image_map: Tensor | None) -> Tensor:
        """(b, embed_dim) embedding of each row's regions; see `RegionBranch`."""
        if self.regions is None:
            raise UserError("regions were requested, but the recipe has model.regions: null; give it model.regions: {}")
        return self.regions(self.backbone, self.project, regions, image_map)

    def _grid(self, tokens: Tensor) -> Tensor:
        """(B, L, C) tokens of a block -> (B, C, g, g), prefix tokens left out."""
        patches = tokens[:, self.backbone.num_prefix_tokens :].transpose(1, 2)
        return patches.unflatten(2, self.backbone.patch_embed.grid_size)

    @property
    def projector(self) -> nn.Module | None:
        """What makes the embedding of the pooled features; CLIP's ResNets have it in their attention pool."""
        return self.backbone.head.proj if _projects_itself(self.backbone) else self.projection

    def project(self, pooled: Tensor) -> Tensor:
        """(B, C) pooled features -> (B, embed_dim) their embedding."""
        return pooled if self.projector is None else self.projector(pooled)

    def _normalise(self, images: Tensor) -> Tensor:
        """uint8 -> (x / 255 - mean) / std, computed in fp32, in the tower's dtype.

        mean and std are no buffers: a backend that casts the module to bf16 would cast them too.
        """
        scale = torch.tensor([1 / (255 * s) for s in self.std]).view(3, 1, 1)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std)]).view(3, 1, 1)
        images = images.to(torch.float32, memory_format=self._layout)
        x = torch.addcmul(shift.to(images.device), images, scale.to(images.device))
        return x.to(next(self.backbone.parameters()).dtype)

    def _features(self, x: Tensor) -> Tensor:
        try:
            return self.backbone.forward_features(x)
        except AssertionError as error:  # how timm's fixed-size towers refuse
            raise UserError(
                f"{self.name} does not take images of {x.shape[-2]}x{x.shape[-1]} pixels ({error}); set "
                "model.image_size, or model.image_kwargs: {dynamic_img_size: true} for towers that can"
            ) from None

    def _with_tokens(self, x: Tensor, layers: list[int]) -> tuple[Tensor, dict[str | int, Tensor]]:
        if not hasattr(self.backbone, "forward_intermediates"):
            raise UserError(f"{self.name} cannot give the tokens of inner blocks (timm has no forward_intermediates)")
        backbone: Any = self.backbone
        try:
            if isinstance(self.backbone, VisionTransformer):
                kind: dict[str, Any] = {"output_fmt": "NLC", "return_prefix_tokens": True}
                end, found = backbone.forward_intermediates(x, indices=layers, **kind)
                tokens = [torch.cat((prefix, patches), dim=1) for patches, prefix in found]
            else:
                end, found = backbone.forward_intermediates(x, indices=layers)
                tokens = [m.flatten(2).transpose(1, 2) for m in found]
        except (AssertionError, IndexError) as error:
            raise UserError(f"{self.name} cannot give the tokens of blocks {layers}: {error}") from None
        return end, dict(zip(layers, tokens))


def init(tower: ImageTower) -> None:
    """CLIP's initialisation for CLIP's own towers, as open_clip has it (blocks at torch's default), timm's
    for all others, and a projection of N(0, width^-1/2).
    """
    if tower.projection is not None:
        nn.init.normal_(tower.projection.weight, std=tower.projection.in_features**-0.5)
    if "_clip" not in tower.name:
        return
    if isinstance(tower.backbone, VisionTransformer):
        _init_vit(tower.backbone)
    elif _projects_itself(tower.backbone):
        _init_resnet(tower.backbone)


@torch.no_grad()
def _init_vit(vit: Any) -> None:
    _reset(vit)
    nn.init.normal_(vit.cls_token, std=vit.embed_dim**-0.5)
    nn.init.normal_(vit.pos_embed, std=vit.embed_dim**-0.5)
    for block in vit.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)


@torch.no_grad()
def _init_resnet(resnet: Any) -> None:
    _reset(resnet)
    pool = resnet.head
    for layer in (pool.q, pool.k, pool.v, pool.proj):
        if isinstance(layer, nn.Linear):  # no projection with model.embed_dim null
            nn.init.normal_(layer.weight, std=pool.in_features**-0.5)
    nn.init.normal_(pool.pos_embed, std=pool.in_features**-0.5)
    for name, parameter in resnet.named_parameters():
        if name.endswith("conv3_1x1.bn.weight"):  # every residual branch starts as zero
            nn.init.zeros_(parameter)


def _reset(model: nn.Module) -> None:
    """torch's default for every layer, in the order of the modules."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()


def _projects_itself(backbone: nn.Module) -> bool:
    return isinstance(getattr(backbone, "head", None), AttentionPool2d)


def _backbone(recipe: ModelRecipe) -> Any:
    if not timm.is_model(recipe.image):
        near = difflib.get_close_matches(recipe.image, timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else "; timm.list_models() has the names"
        raise UserError(f"model.image: timm {timm.__version__} has no model {recipe.image!r}{hint}")
    kwargs = {"num_classes": 0, **_patch_dropout(recipe), **timm_kwargs(recipe)}
    try:
        backbone: Any = timm.create_model(recipe.image, pretrained=False, **kwargs)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        if recipe.patch_dropout and "patch_drop_rate" in str(error):
            raise UserError(f"model.patch_dropout: {recipe.image} has no patches to leave out; set it to 0") from None
        raise UserError(f"model.image_kwargs: timm cannot build {recipe.image} with {kwargs}: {error}") from None
    if _projects_itself(backbone):
        backbone.reset_classifier(recipe.embed_dim or 0)  # its projection, with a bias as CLIP's has
    return backbone


def timm_kwargs(recipe: ModelRecipe) -> dict[str, Any]:
    """What `timm.create_model` is called with for this tower, beside `num_classes`."""
    return {**_size(recipe), **_activation(recipe), **recipe.image_kwargs}


def _size(recipe: ModelRecipe) -> dict[str, Any]:
    known = timm.get_pretrained_cfg(recipe.image)
    return {"img_size": recipe.image_size} if known is not None and known.fixed_input_size else {}


def _activation(recipe: ModelRecipe) -> dict[str, Any]:
    """ViTs follow `activation`, as in CLIP; convolutional towers have their own."""
    if not recipe.image.startswith("vit_"):
        return {}
    if "quickgelu" in recipe.image and recipe.activation != "quick_gelu":
        raise UserError(f"model.activation is {recipe.activation}, but {recipe.image} has quick_gelu: set it so")
    return {"act_layer": recipe.activation} if recipe.activation == "quick_gelu" else {}


def _patch_dropout(recipe: ModelRecipe) -> dict[str, Any]:
    """timm's: in training alone, and never the class token (FLIP, Li et al. 2023)."""
    if not recipe.patch_dropout:
        return {}
    for name, needs_all in (
        ("leff", recipe.leff),
        ("regions with stored_dim: null", recipe.regions and recipe.regions.stored_dim is None),
    ):
        if needs_all:
            raise UserError(f"model.{name} needs all patches of the image; set model.patch_dropout: 0")
    return {"patch_drop_rate": recipe.patch_dropout}
