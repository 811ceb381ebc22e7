"""The encoder behind an evaluation: from a run, an exported file, random weights, or as it is.

Every evaluation of a trained encoder is read beside the same architecture with random weights
(`random_encoder`): what that reaches, pretraining did not bring.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smartlab.core.config import Config
from smartlab.core.errors import UseError
from smartlab.models.build import make_encoder
from smartlab.models.encoder import AnyEncoder
from smartlab.training.run import Run

EncoderSource = AnyEncoder | Run | str | Path


def as_encoder(source: EncoderSource, role: str = "teacher") -> tuple[Any, dict[str, Any]]:
    """An encoder from a run, its folder, an exported file or an encoder -> (encoder, facts for results).

    facts: "encoder" (what it came from), "role", "weights" (hash of weights and configuration); for a
    run also "step".
    """
    facts: dict[str, Any]
    encoder: Any
    if isinstance(source, nn.Module):
        if not isinstance(source, AnyEncoder):
            raise UseError(
                "a torch module is no encoder yet",
                found=type(source).__name__,
                fix="wrap it: sl.wrap(module, …)",
            )
        encoder, facts = source, {"encoder": "given"}
    elif isinstance(source, Run) or Path(source).is_dir():
        run = source if isinstance(source, Run) else Run(source)
        role = role if run.config.teacher.enabled else "student"
        encoder = run.encoder(role)
        facts = {"encoder": run.path.name, "role": role, "step": run.step}
    else:
        from smartlab.interop.weights import load_encoder

        encoder, facts = load_encoder(source), {"encoder": Path(source).name}
    return encoder, facts | encoder.about() | {"weights": identity(encoder)[:16]}


def run_of(source: EncoderSource) -> Run | None:
    """The run behind an encoder, where there is one."""
    if isinstance(source, (str, Path)) and (Path(source) / "config.yaml").is_file():
        return Run(source)
    return source if isinstance(source, Run) else None


def random_encoder(like: Config | AnyEncoder, seed: int = 0) -> Any:
    """The same architecture with random weights; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = like.fresh() if isinstance(like, AnyEncoder) else make_encoder(like)
    return encoder.eval().requires_grad_(False)


def network_input(crops: Tensor) -> Tensor:
    """Windowed crops (B, D, H, W) with a channel; the unit axis of images (B, 1, H, W) is one already, and crops of
    several have them (B, C, D, H, W)."""
    return crops if crops.shape[1] == 1 or crops.dim() == 5 else crops[:, None]


def identity(encoder: nn.Module) -> str:
    """Hash of all weights and the whole configuration, wherever the encoder lies and came from.

    What CT has no use for does not count: hashes of before there was MR hold.
    """
    about = encoder.config.model_dump(mode="json")  # type: ignore[union-attr, operator]
    for name, usual in {"modality": "CT", "channels": []}.items():
        if about["data"].get(name) == usual:
            del about["data"][name]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, value in sorted(encoder.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def ready(encoder: Any, device: str | torch.device | None) -> Any:
    """In evaluation mode and on `device` (None: where it is); the caller's own is left as it was."""
    here = next(encoder.parameters()).device
    there = here if device is None else torch.device(device)
    if not encoder.training and here == there:
        return encoder
    return copy.deepcopy(encoder).to(there).eval()
