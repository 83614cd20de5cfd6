"""The towers as ONNX graphs that take what a file or a tokenizer gives, and answer with unit rows.

Images go in as uint8 pixels and are normalised inside the graph, so that this cannot be got wrong outside of it. The
text tower packs its captions, which makes shapes out of data; here the same blocks run over the whole context.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.errors import UserError
from pretrain.models.image import ImageTower
from pretrain.models.text import TextTower
from pretrain.models.trunk import Trunk

ONE_FILE = 1 << 30
"""Bytes of weights up to which a graph is one file; protobuf ends at 2 GiB, and beside it lies `NAME.onnx.data`."""


class ImageGraph(nn.Module):
    """(B, 3, S, S) uint8 -> (B, D) unit rows."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.tower(pixels)["embedding"], dim=-1)


class TextGraph(nn.Module):
    """(B, context) int64 -> (B, D) unit rows, every place of the context computed."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tower.token_embedding(tokens) + self.tower.positional_embedding
        for block in self.tower.blocks:
            x = block(x, Unpacked)
        return F.normalize(self.tower.projection(self._pool(self.tower.norm(x), tokens)), dim=-1)

    def _pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.tower.pool == "last":
            return x[:, -1]
        end = tokens.argmax(dim=-1, keepdim=True)  # (B, 1)
        if self.tower.pool == "eot":
            return x.gather(1, end[..., None].expand(-1, -1, x.shape[-1])).squeeze(1)
        behind = torch.arange(tokens.shape[1], device=x.device) > end
        return x.masked_fill(behind[..., None], float("-inf")).amax(1)


class Unpacked:
    """In the place of a `Packing`: the captions lie side by side as they are."""

    @staticmethod
    def spread(x: Tensor) -> Tensor:
        return x

    gather = spread


def write_onnx(trunk: Trunk, image_size: int, folder: Path) -> None:
    """`image.onnx` and, where there is a text tower, `text.onnx`, of any batch size.

    Raises:
        UserError: onnx or onnxscript is not installed, or torch cannot trace a tower.
    """
    pixels = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    _write(ImageGraph(trunk.image), pixels, "pixels", folder / "image.onnx")
    if trunk.text is not None:
        tokens = torch.zeros(2, trunk.text.context, dtype=torch.int64)
        _write(TextGraph(trunk.text), tokens, "tokens", folder / "text.onnx")


def _write(graph: nn.Module, example: Tensor, name: str, path: Path) -> None:
    try:
        torch.onnx.export(
            copy.deepcopy(graph).cpu().eval(),
            (example,),
            path,
            input_names=[name],
            output_names=["features"],  # not "embedding": torch names a node so
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=sum(t.nbytes for t in graph.state_dict().values()) > ONE_FILE,
            verbose=False,
        )
    except ImportError as missing:
        raise UserError(f"{missing}; pip install 'polyview[export]'") from None
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch cannot write {path.name}: {str(error).splitlines()[0]}") from error
