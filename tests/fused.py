"""PyTorch's fused attention: what the package's kernels are compared with on a GPU."""

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def fused_attention(q, k, v, seen, scale=None):
    """SDPA with weights of 16 bits, as all fused kernels have them; unfused they are float32.

    seen: bool, broadcastable to (B, nh, Sq, Sk).
    """
    mask = None if seen.all() else seen.expand(*q.shape[:3], k.shape[2])
    padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    with sdpa_kernel(FUSED):
        return F.scaled_dot_product_attention(q, k, padded, mask, scale=scale)[..., : v.shape[-1]]
