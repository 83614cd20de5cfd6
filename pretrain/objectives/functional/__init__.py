"""The losses as plain functions of tensors: no model, no trainer, no configuration.

What all of them share. `group` says who takes part (pretrain.distributed.groups): None, LOCAL or a process
group. The value is the mean over the global batch, on every rank. The gradient is W × this rank's share for
every input, the temperature included, so that the mean over ranks that DDP takes is the gradient of the
global mean. Inside is at least float32, autocast or not; float64 stays float64; gradients come back in the
inputs' dtypes. Every rank of the group must make the call, forward and backward, one whose batch is empty
too. On a GPU, `torch.backends.cuda.matmul` decides whether float32 products use TF32, as everywhere in torch.
"""

from pretrain.objectives.functional.assignment import sinkhorn
from pretrain.objectives.functional.clip import captions_loss, clip_loss, contrastive_grads, contrastive_ranks
from pretrain.objectives.functional.hydra import hydra_loss, hydra_partners
from pretrain.objectives.functional.pyramid import pyramid_clip_loss
from pretrain.objectives.functional.siglip import siglip_loss
from pretrain.objectives.functional.swav import swav_loss

__all__ = [
    "captions_loss",
    "clip_loss",
    "contrastive_grads",
    "contrastive_ranks",
    "hydra_loss",
    "hydra_partners",
    "pyramid_clip_loss",
    "siglip_loss",
    "sinkhorn",
    "swav_loss",
]
