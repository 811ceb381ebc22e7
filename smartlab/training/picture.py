"""A picture of what the student makes of its view: input, what it sees, its reconstruction, the error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from smartlab.core.files import whole
from smartlab.masking import make_mask, upsample
from smartlab.methods.masked_distillation import MaskedDistillation
from smartlab.methods.multiscale_mae import MultiscaleMAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def reconstruction_picture(
    method: MaskedDistillation, view: Tensor, path: Path, title: str = "", guided: bool = False
) -> Path:
    """Write a PNG for one windowed view (C, D, H, W) in [0, 1], its first channel, hidden as the training hides it now.

    That is by the strategy, or at random while the guard holds attention back.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    encoder, was_training = method.student.encoder, method.training
    method.eval()
    x = view[None].float()
    grid = encoder.grid(x.shape)
    generator = torch.Generator().manual_seed(0)
    looker = method.teacher.encoder if method.teacher is not None else encoder
    settings = method.config.mask
    by_received = settings.importance == "received"
    looked = looker(x, received=by_received)
    attention = looked.received if by_received else looked.importance
    strategy = settings.strategy
    if strategy.startswith("attention") and (attention is None or not guided):
        strategy = "random"
    mask = make_mask(
        strategy,
        attention if strategy.startswith("attention") else None,
        settings.ratio,
        grid,
        generator=generator,
        batch=1,
        device=x.device,
        **settings.drawing() | {"p_attention": 1.0, "ratio_min": None},
    )
    seen = encoder(x, hidden=mask)
    guess = method.reconstruct(seen.stages[-1]).float()
    voxels = upsample(mask, grid, encoder.stride)[:, None]
    panels = {
        "view": x,
        "what the student sees": x.masked_fill(voxels, 0.5),
        "reconstruction": torch.where(voxels, guess, x),
        "absolute error": (guess - x).abs() * voxels,
    }
    if attention is not None:
        importance = (attention.mean(1) if attention.dim() == 3 else attention).view(1, 1, *grid)
        spread = importance.repeat_interleave(encoder.stride, 2).repeat_interleave(encoder.stride, 3)
        panels["teacher's attention"] = spread.repeat_interleave(encoder.stride, 4) / importance.amax()
    method.train(was_training)

    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 3), layout="constrained")
    for ax, (name, panel) in zip(axes, panels.items(), strict=True):
        hot = "magma" if "error" in name else "inferno" if "attention" in name else "gray"
        ax.imshow(_slice(panel[0, 0]), cmap=hot, vmin=0, vmax=1 if hot == "gray" or "att" in name else 0.5)
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    figure.suptitle(f"{title}, {strategy.replace('_', ' ')} mask", fontsize=10)
    return _write(figure, path)


@torch.no_grad()
def scales_picture(
    method: MultiscaleMAE, view: Tensor, path: Path, title: str = "", guided: bool = False
) -> Path:
    """Write a PNG for one windowed view (1, H, W) or (C, D, H, W) in [0, 1], of scans the middle slice of the first
    channel: a row per scale, with a fixed random mask."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    was_training = method.training
    method.eval()
    found = method.reconstruct(view[None].float(), torch.Generator().manual_seed(0))
    method.train(was_training)
    figure, axes = plt.subplots(
        len(found), 4, figsize=(9, 2.4 * len(found) + 0.4), layout="constrained", squeeze=False
    )
    for row, (scale, parts) in zip(axes, found.items(), strict=True):
        target, guess, hidden = (_slice(parts[name][0, 0]) for name in ("target", "guess", "hidden"))
        low, high = target.min(), max(target.max(), target.min() + 1e-3)
        filled = np.where(hidden > 0, guess, target)
        panels = {
            f"target, {' × '.join(map(str, reversed(parts['target'].shape[2:])))} pixels": target,
            "what the encoder sees" if scale == 1 else "what is hidden": np.where(
                hidden > 0, (low + high) / 2, target
            ),
            "hidden part reconstructed": filled,
            "absolute error": np.abs(filled - target),
        }
        for ax, (name, panel) in zip(row, panels.items(), strict=True):
            error = name.endswith("error")
            ax.imshow(
                panel,
                cmap="magma" if error else "gray",
                vmin=0 if error else low,
                vmax=(high - low) / 2 if error else high,
            )
            ax.set_title(name, fontsize=9)
            ax.axis("off")
    note = ", brightness and contrast of each patch given" if method.config.mae.normalise else ""
    figure.suptitle(f"{title}, {method.config.mask.strategy} mask{note}", fontsize=10)
    return _write(figure, path)


def _slice(x: Tensor) -> np.ndarray:
    """An image as it is, of a scan the middle axial slice, upright."""
    return x.cpu().numpy() if x.dim() == 2 else x[..., x.shape[-1] // 2].cpu().numpy().T[::-1, ::-1]


def _write(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    with whole(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)
    return path
