"""How much of the fine detail of an image a reconstruction keeps, frequency by frequency.

Only hidden parts are judged: each hidden patch (the same part of the image at every scale) is faded out
towards its border (Hann) and Fourier transformed. "High" are frequencies above `cutoff` cycles per pixel;
0.25 is the most that an image of half the resolution can hold, so an enlarged one has next to none.

    energy      high-frequency energy of the reconstruction over that of the original, 1 is as sharp
    agreement   correlation of their high frequencies, between −1 and 1: detail in the right place, not noise
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def detail(
    guess: Tensor, target: Tensor, hidden: Tensor, patch: int, cutoff: float = 0.25
) -> dict[str, float]:
    """{"energy", "agreement"} of reconstructions against originals, over all hidden patches.

    guess, target, hidden: (B, 1, H, W); hidden is 1 where a patch of `patch` × `patch` pixels was hidden.

    >>> parts = method.reconstruct(views, generator)[2]
    >>> detail(parts["guess"], parts["target"], parts["hidden"], 2 * 8)
    """
    chosen = _blocks(hidden, patch).amin(1) > 0
    fade = torch.hann_window(patch + 2, periodic=False, dtype=torch.float64)[1:-1].to(guess.device)
    waves = []
    for image in (guess, target):
        block = _blocks(image.double(), patch).transpose(1, 2)[chosen].unflatten(1, (patch, patch))
        block = (block - block.mean((1, 2), keepdim=True)) * fade * fade[:, None]
        waves.append(torch.fft.fft2(block)[:, frequencies(patch).to(guess.device) > cutoff])
    own, other = (float(w.abs().square().sum()) for w in waves)
    product = float((waves[0] * waves[1].conj()).real.sum())
    return {
        "energy": own / other if other else float("nan"),
        "agreement": product / (own * other) ** 0.5 if own * other else 0.0,
    }


def enlarged(parts: dict[str, Tensor], factor: int) -> Tensor:
    """The guess of a coarser scale at `factor` times its resolution, bicubic."""
    return F.interpolate(parts["guess"], scale_factor=factor, mode="bicubic", align_corners=False)


def frequencies(side: int) -> Tensor:
    """(side, side) cycles per pixel of every Fourier coefficient: the larger of both axes."""
    f = torch.fft.fftfreq(side).abs()
    return torch.maximum(f[:, None], f[None, :])


def _blocks(image: Tensor, patch: int) -> Tensor:
    return F.unfold(image, patch, stride=patch)  # (B, patch², N)
