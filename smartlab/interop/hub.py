"""Encoders on the Hugging Face hub: one safetensors file and a card that says what it is.

What goes there tells of the data their name and fingerprint only, nothing of the folders they lie in.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smartlab.core.errors import UseError
from smartlab.training.checkpoint import header_of

PREFIX, FILE = "hf:", "encoder.safetensors"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def download(name: str, usual: str = FILE) -> Path:
    """The file of `hf:ORG/NAME`, `hf:ORG/NAME/FILE` or `hf:ORG/NAME@REVISION`, kept in the hub's own cache.

    usual: the file where none is named.
    """
    from huggingface_hub import hf_hub_download

    place, _, revision = name.removeprefix(PREFIX).partition("@")
    *repo, file = place.split("/", 2) if place.count("/") > 1 else [place, usual]
    _check("/".join(repo))
    if not file:
        raise UseError("which file of that repository?", found=name, expected=f"{name}/FILE")
    with _said(name):
        return Path(hf_hub_download("/".join(repo), file, revision=revision or None))


def publish(write: Callable[[Path], None], repo: str, private: bool = True) -> str:
    """Put on the hub what `write` makes at a path, with its card; the address of the commit.

    private: so a new repository is made; one that is there stays as it is.
    """
    from huggingface_hub import HfApi

    _check(repo)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, FILE)
        write(file)
        write_card(file, repo)
        with _said(repo):
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            return str(
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message="An encoder").commit_url
            )


def nameless(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the places on the machine it was made on."""
    data = config["data"]
    places: dict[str, Any] = {name: None for name in ("root", "store") if name in data}
    return config | {"data": data | places | {"manifest": Path(str(data["manifest"])).name}}


def write_card(file: Path, repo: str) -> Path:
    """README.md beside the file, made of what the file says of itself."""
    about = header_of(file)
    config = json.loads(about["config"])
    encoder, data = config["encoder"], config["data"]
    measured = json.loads(about.get("metrics", "{}"))
    depth = f"depths {encoder['depths']}"
    if encoder["kind"] == "vit":
        depth = f"{encoder['blocks']} blocks of {encoder['heads']} heads, patches of {encoder['patch']}"
    rows = {
        "architecture": f"{encoder['kind']}, embedding {encoder['embed_dim']}, {depth}",
        "method": f"{config['method']['preset']}, {about.get('role', 'encoder')}, {about.get('step', '?')} steps",
        "data": f"{data['manifest']} (fingerprint {about.get('data', '?')[:16]}), {data['spacing']} mm, window {data['window']}",
        "loss at that step": f"{measured['loss']:.4f}" if "loss" in measured else "not recorded",
    }
    text = [
        "---",
        "library_name: smartlab",
        "tags: [medical-imaging, self-supervised, masked-image-modelling]",
        "---",
        f"# {repo.rsplit('/', 1)[-1]}",
        "An encoder pretrained with smartlab by masked image modelling. Not a medical device.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]),
        f'```python\nimport smartlab as sl\n\nencoder = sl.load_encoder("hf:{repo}")\nencoder.features(volume)\n```',
        "Licence: that of the data it was trained on may bind you; its owner says here which.",
    ]
    card = file.with_name("README.md")
    card.write_text("\n\n".join(["\n".join(text[:4]), *text[4:]]) + "\n", encoding="utf-8")
    return card


def _check(repo: str) -> None:
    if not _NAME.fullmatch(repo):
        raise UseError("not a name on the hub", found=repo, expected="ORG/NAME, such as lab/swin-chest")


@contextmanager
def _said(name: str) -> Iterator[None]:
    """What the hub or the network answers, in one line; its library raises many kinds of errors."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        what = " ".join(str(error).split())[:300]
        raise UseError(
            f"the hub refuses {name}: {what}", fix="check the name, and `hf auth login`"
        ) from error
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UseError(f"{name}: the hub cannot be reached ({what})", fix="check the network") from error
