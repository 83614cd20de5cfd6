"""Model flops utilisation: what the model needs by its definition, over what the device can do at most.

As PaLM (Chowdhery et al. 2022, appendix B) counts it: nothing that is computed twice, by checkpointed blocks or by
cached features, counts twice.
"""

from __future__ import annotations

import torch

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "GB200": {"fp32": 80, "bf16": 2500, "fp16": 2500},
    "B200": {"fp32": 75, "bf16": 2250, "fp16": 2250},
    "H200 NVL": {"fp32": 60, "bf16": 835, "fp16": 835},
    "H200": {"fp32": 67, "bf16": 989, "fp16": 989},
    "GH200": {"fp32": 67, "bf16": 989, "fp16": 989},
    "H100 NVL": {"fp32": 60, "bf16": 835, "fp16": 835},
    "H100 PCIe": {"fp32": 51, "bf16": 756, "fp16": 756},
    "H100": {"fp32": 67, "bf16": 989, "fp16": 989},
    "A100": {"fp32": 19.5, "bf16": 312, "fp16": 312},
    "A40": {"fp32": 37.4, "bf16": 149.7, "fp16": 149.7},
    "A30": {"fp32": 10.3, "bf16": 165, "fp16": 165},
    "A10G": {"fp32": 35, "bf16": 70, "fp16": 70},
    "A10": {"fp32": 31.2, "bf16": 125, "fp16": 125},
    "RTX A6000": {"fp32": 38.7, "bf16": 154.8, "fp16": 154.8},
    "L40S": {"fp32": 91.6, "bf16": 362, "fp16": 362},
    "L40": {"fp32": 90.5, "bf16": 181, "fp16": 181},
    "L4": {"fp32": 30.3, "bf16": 121, "fp16": 121},
    "V100-PCIE": {"fp32": 14, "fp16": 112},
    "V100": {"fp32": 15.7, "fp16": 125},
    "T4": {"fp32": 8.1, "fp16": 65},
    "RTX 5090": {"fp32": 104.8, "bf16": 209.5, "fp16": 209.5},
    "RTX 4090": {"fp32": 82.6, "bf16": 165.2, "fp16": 165.2},
    "RTX 3090": {"fp32": 35.6, "bf16": 71, "fp16": 71},
    "MI300X": {"fp32": 163.4, "bf16": 1307, "fp16": 1307},
    "MI325X": {"fp32": 163.4, "bf16": 1307, "fp16": 1307},
}
"""Dense TFLOP/s with fp32 accumulation, by part of torch's device name: the vendors' data sheets, whose tensor core
figures are mostly with sparsity and twice this. fp32 without TF32, as torch computes it unless told otherwise."""


def peak_flops(device_name: str, precision: str) -> float | None:
    """Flops a second of a device at "fp32", "bf16" or "fp16"; None where it is not known or not of that precision.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    989000000000000.0
    """
    words = f" {device_name.replace('-', ' ')} "
    if " Laptop " in words:
        return None  # another chip under the same name
    for name, peaks in PEAK_TFLOPS.items():
        if f" {name.replace('-', ' ')} " in words:
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of the device that is there."""
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
