"""lightly's SwAV on a recipe of ours: same tower and first weights, images, batch, crops, optimizer and schedule.

    python -m benchmarks.learning.lightly_swav RECIPE.yaml

All else is lightly's, in the way of its own example: its transform on Pillow images, a forward of the network for
every crop, its projection head, its prototypes (with a bias), normalised before every step, and its loss.
Snapshots of the tower go to the recipe's folder, each with the CPU seconds of this process until then.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from downstream.samples import Samples
from pretrain.models.trunk import build_trunk
from pretrain.optim.build import build_optimizer, set_rates
from pretrain.optim.schedule import rates_at
from pretrain.recipe import Recipe, load_recipe


class Photographs(Dataset):
    """JPEG bytes in memory; decoded by Pillow each time, as an image folder is."""

    def __init__(self, shards: list[str], transform: Any) -> None:
        self.files, self.transform = [], transform
        for shard in shards:
            samples = Samples(shard)
            self.files += [samples.image(i) for i in range(len(samples))]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.transform(Image.open(io.BytesIO(self.files[i])).convert("RGB"))


class Network(nn.Module):
    """As in lightly's example."""

    def __init__(self, recipe: Recipe) -> None:
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

        super().__init__()
        tower = build_trunk(recipe.model, seed=recipe.seed).image
        options = _options(recipe)
        self.backbone = tower.backbone
        self.projection_head = SwaVProjectionHead(tower.pooled_dim, options["hidden"], options["dim"])
        self.prototypes = SwaVPrototypes(options["dim"], options["prototypes"], options["freeze_steps"])

    def forward(self, crop: Tensor, step: int) -> Tensor:
        crop = crop.contiguous(memory_format=torch.channels_last)
        pooled = self.backbone.forward_head(self.backbone.forward_features(crop), pre_logits=True)
        return self.prototypes(F.normalize(self.projection_head(pooled), dim=1, p=2), step)


def transform(recipe: Recipe) -> Any:
    from lightly.transforms.swav_transform import SwaVTransform

    options = _options(recipe)
    counts, sizes, scales = zip(*options["crops"])
    brightness, contrast, saturation, hue = options["jitter"]
    return SwaVTransform(
        crop_sizes=sizes,
        crop_counts=counts,
        crop_min_scales=tuple(low for low, _ in scales),
        crop_max_scales=tuple(high for _, high in scales),
        cj_bright=brightness,
        cj_contrast=contrast,
        cj_sat=saturation,
        cj_hue=hue,
        gaussian_blur=options["blur"],
        normalize={"mean": list(recipe.model.mean), "std": list(recipe.model.std)},
    )


def train(recipe: Recipe) -> None:
    from lightly.loss import SwaVLoss

    torch.manual_seed(recipe.seed)
    data = Photographs(list(recipe.data.sources[0].shards), transform(recipe))
    loader = DataLoader(data, batch_size=recipe.global_batch, shuffle=True, drop_last=True)
    network, criterion = Network(recipe), SwaVLoss(sinkhorn_epsilon=_options(recipe)["epsilon"])
    optimizer = build_optimizer(dict(network.named_parameters()), recipe.optimizer)
    step, total = 0, recipe.total_steps(len(data))
    high = _options(recipe)["crops"][0][0]
    while step < total:
        for crops in loader:
            network.prototypes.normalize()
            scores = [network(crop, step) for crop in crops]
            loss = criterion(scores[:high], scores[high:])
            optimizer.zero_grad()
            loss.backward()
            set_rates(optimizer, rates_at(step, total, recipe))
            optimizer.step()
            step += 1
            _note(step, total, network, loss, recipe)
            if step == total:
                break


def _note(step: int, total: int, network: Network, loss: Tensor, recipe: Recipe) -> None:
    if step % recipe.checkpoint.every == 0 or step == total:
        kept = {"backbone": network.backbone.state_dict(), "cpu_s": time.process_time(), "loss": loss.item()}
        torch.save(kept, recipe.output / f"{step:06d}.pt")
        print(f"step {step} loss {kept['loss']:.3f} cpu {kept['cpu_s']:.0f} s", file=sys.stderr)


def _options(recipe: Recipe) -> dict[str, Any]:
    options = recipe.objectives["swav"]
    assert isinstance(options, dict)
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(load_recipe(Path(sys.argv[1])))
