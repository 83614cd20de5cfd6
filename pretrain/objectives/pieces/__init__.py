"""What objectives are put together from: queues, a memory bank, pseudo-labels, multi-crop views.

A momentum copy of a head is `pretrain.models.momentum.MomentumCopy`, the trunk's teacher a
`FeatureRequest(…, teacher=True)`; stop-gradient is `.detach()`: features arrive as leaves.
"""
