"""Weights to and from the rest of the ecosystem, through one adapter.

Out: a `.pt` that MONAI's SwinUNETR loads (`{"state_dict": {"swinViT.…": …}}`, `weights_only=True`), a `.pth` that
nnU-Net fine-tunes (`nnunet.py`), or safetensors with a model card. In: our run folders and exports, MONAI SwinUNETR checkpoints, MONAI's
SwinUNETR self-supervised weights, SMIT-style checkpoints, and MAE's vision transformers (`vit.py`); other people's networks by name
(`ct-fm:FILE`, see `foreign.py`). Nothing is loaded by halves: what does not match is refused with a table of what
did and what did not.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from smartlab.core.config import Config, load_config
from smartlab.core.errors import DataError, UseError
from smartlab.core.files import written
from smartlab.interop import hub
from smartlab.interop.files import load_whole, read_weights
from smartlab.interop.nnunet import to_nnunet
from smartlab.interop.swin import MERGE_ORDERS, config_of, convert
from smartlab.interop.vit import config_of_vit, convert_vit, is_vit, to_monai
from smartlab.interop.wrap import Wrapped
from smartlab.models.build import make_encoder
from smartlab.models.encoder import AnyEncoder
from smartlab.models.vit import ViTEncoder
from smartlab.training.checkpoint import header_of, load_weights, save_weights
from smartlab.training.run import Run

_OLD = re.compile(r"\.fc[12]\.|^module\.|(^|\.)layers\.\d\.|rotation_head")  # SMIT, MONAI's SSL weights


def load_encoder(
    source: str | Path,
    role: Literal["teacher", "student"] = "teacher",
    *,
    merging: str | None = None,
    heads: int | None = None,
) -> AnyEncoder:
    """An encoder from a run folder, an exported file, any file described above, or the hub (hf:ORG/NAME); other
    people's as NAME:FILE or NAME:hf:ORG/NAME, with NAME one of ct-fm, fmcib, medicalnet, suprem, swinunetr, voco.

    role:    which encoder of a run folder.
    merging: the patch-merging order of a foreign file, one of `MERGE_ORDERS`; no file tells it. "monai" by
             default, with a warning for names that come from elsewhere or from before MONAI 1.5; of NAME:… the one
             that it was trained with.
    heads:   of a foreign vision transformer of unusual size; no file tells them either.

    >>> enc = sl.load_encoder("runs/a", role="teacher")
    """
    name, _, place = str(source).partition(":")
    if len(name) > 1 and place and f"{name}:" != hub.PREFIX and not Path(source).exists():
        from smartlab.interop import foreign  # MONAI's networks take a second to import

        return foreign.load(name, place, merging)
    path = hub.download(str(source)) if f"{name}:" == hub.PREFIX else Path(source)
    if path.is_dir():
        return Run(path).encoder(role)
    if not path.is_file():
        raise UseError("no such file or run folder", path=path)
    if path.suffix == ".safetensors" and "config" in header_of(path):
        weights, about = load_weights(path)
        encoder = _fresh(_config_in(about, path))
        load_whole(encoder, weights, path)
        return encoder.eval().requires_grad_(False)
    found = read_weights(path)
    if is_vit(found):
        found = convert_vit(found, path)
        image_encoder = _fresh(config_of_vit(found, path, heads))
        load_whole(image_encoder, found, path)
        return image_encoder.eval().requires_grad_(False)
    if merging is None and any(_OLD.search(key) for key in found):
        warnings.warn(
            f"{path}: the order of its patch merging is not in the file; taken as 'monai'. If it was trained with "
            f"another, say merging=… (one of {', '.join(MERGE_ORDERS)}): the features are wrong otherwise",
            stacklevel=2,
        )
    weights = convert(found, path, merging or "monai")
    encoder = _fresh(config_of(weights, path))
    load_whole(encoder.swin, weights, path)  # type: ignore[arg-type]
    return encoder.eval().requires_grad_(False)


def export(
    source: str | Path | AnyEncoder,
    to: Literal["monai", "safetensors", "nnunet", "hub"],
    out: str | Path,
    role: str = "teacher",
) -> Path | str:
    """Write an encoder for others: "monai" (.pt for its SwinUNETR or ViT), "nnunet" (.pth of a Primus, for its
    fine-tuning), "safetensors" with a model card, or both of these last on the Hugging Face hub, private at first:
    `out` is ORG/NAME there, and so is what returns.

    >>> export("runs/a", "monai", "encoder.pt")
    >>> weights = torch.load("encoder.pt", weights_only=True)["state_dict"]
    >>> net.load_state_dict(weights, strict=False)  # net: MONAI's SwinUNETR of the same sizes
    """
    if to not in ("monai", "safetensors", "nnunet", "hub"):
        raise UseError(f"cannot export to {to!r}", expected="monai, safetensors, nnunet or hub")
    given = isinstance(source, torch.nn.Module)
    run = Run(source) if not given and Path(source).is_dir() else None  # type: ignore[arg-type]
    encoder: Any = source if given else load_encoder(source, role)  # type: ignore[arg-type]
    if isinstance(encoder, Wrapped):
        raise UseError("another's network is exported as it came", found=encoder.config.network)
    card = _card(encoder, run, source, role)
    if to == "hub":
        card["config"] = json.dumps(hub.nameless(json.loads(card["config"])))
        return hub.publish(lambda file: save_weights(file, encoder.state_dict(), card), str(out))
    out = Path(out)
    with written(out, "the export") as temporary:
        if to == "safetensors":
            save_weights(temporary, encoder.state_dict(), card)
        elif to == "nnunet":
            torch.save(to_nnunet(encoder), temporary)
        elif isinstance(encoder, ViTEncoder):
            torch.save({"state_dict": to_monai(encoder)}, temporary)
        else:
            weights = {f"swinViT.{k}": v.detach().cpu().clone() for k, v in encoder.swin.state_dict().items()}
            torch.save({"state_dict": weights}, temporary)
    return out


def _config_in(about: Mapping[str, str], path: Path) -> Config:
    try:
        return load_config(json.loads(about["config"]))
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(
            "carries no readable configuration", path=path, found=error, fix="export it again"
        ) from None


def _fresh(config: Config) -> AnyEncoder:
    with torch.random.fork_rng():
        return make_encoder(config)


def _card(encoder: AnyEncoder, run: Run | None, source: Any, role: str) -> dict[str, str]:
    """What the safetensors file says about itself."""
    card = {
        "format": "smartlab encoder",
        "role": role,
        "config": json.dumps(encoder.config.model_dump(mode="json")),
    }
    if run is not None:
        card["role"] = role if run.config.teacher.enabled else "student"
        card["step"] = str(run.step)
        card["data"] = str(run.facts.get("data", ""))
        history = run.history[run.history.step <= run.step]
        if len(history):  # the numbers of the exported step, not of a run that went on
            last = {k: v for k, v in history.iloc[-1].to_dict().items() if v == v}
            card["metrics"] = json.dumps(last)
    elif not isinstance(source, torch.nn.Module) and Path(source).suffix == ".safetensors":
        card = header_of(Path(source)) | {"format": card["format"], "config": card["config"]}
    return card
