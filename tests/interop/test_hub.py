"""The hub gets a file and a card, and gives the same encoder back; here a server of a few lines stands in for it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

import smartlab as sl
from smartlab.core.errors import UseError
from smartlab.models.build import make_encoder
from smartlab.models.encoder import Encoder

REPO, COMMIT = "lab/swin-chest", "0123456789abcdef0123456789abcdef01234567"
SETTINGS = {"encoder.preset": "custom", "encoder.embed_dim": 12, "encoder.depths": [1, 1, 1, 1]}
SETTINGS |= {"encoder.num_heads": [1, 1, 1, 1], "data.manifest": "/elsewhere/somebody/scans/manifest.json"}


class Hub(BaseHTTPRequestHandler):
    """Creates a repository, takes one commit of plain files, hands them out."""

    files: dict[str, bytes]
    private: list[bool]

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.private.append(json.loads(given).get("visibility", json.loads(given).get("private")))
            self.answer({"url": f"{constants.ENDPOINT}/{REPO}", "name": REPO})
        elif "/preupload/" in self.path:
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(given)["files"]
            ]
            self.answer({"files": told})
        elif "/commit/" in self.path:
            for line in map(json.loads, given.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"{constants.ENDPOINT}/{REPO}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": address})
        else:  # /api/validate-yaml
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        if f"/{REPO}/resolve/" not in self.path or name not in self.files:
            return self.answer(b"", 404, X_Error_Code="RepoNotFound")
        content = self.files[name]
        self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


def point_at(monkeypatch, address):
    """What HF_ENDPOINT sets when a process starts."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    handler = type("OneHub", (Hub,), {"files": {}, "private": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    point_at(monkeypatch, address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield handler
    server.shutdown()


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(sl.load_config("tiny", SETTINGS)).eval()


def test_what_is_put_on_the_hub_comes_back(hub, encoder):
    address = sl.export(encoder, "hub", REPO)
    assert address.endswith(COMMIT) and set(hub.files) == {"encoder.safetensors", "README.md"}
    assert hub.private[0] in (True, "private")
    back = sl.load_encoder(f"hf:{REPO}")
    x = torch.randn(1, 1, 64, 64, 64)
    with torch.no_grad():
        for mine, theirs in zip(encoder.swin(x), back.swin(x), strict=True):
            torch.testing.assert_close(mine, theirs)
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: smartlab\n") and f'sl.load_encoder("hf:{REPO}")' in card


@pytest.mark.parametrize("key", ["data.manifest", "data.root", "data.store"])
def test_no_folder_of_this_machine_goes_there(hub, key):
    encoder = Encoder(sl.load_config("tiny", SETTINGS | {key: "/elsewhere/somebody/scans/manifest.json"}))
    sl.export(encoder, "hub", REPO)
    assert all(b"/elsewhere/somebody" not in content for content in hub.files.values())
    assert b"manifest.json" in hub.files["encoder.safetensors"]


def test_a_card_tells_what_the_network_is(hub):
    settings = {"data.view": 16, "data.region": 16, "mae.input": 16}
    sl.export(make_encoder(sl.load_config("primus-tiny", settings)), "hub", REPO)
    card = hub.files["README.md"].decode()
    assert "4 blocks of 4 heads, patches of 8" in card and "depths" not in card


def test_wrong_names_and_absent_networks_are_told(hub, encoder, monkeypatch):
    with pytest.raises(UseError, match="ORG/NAME"):
        sl.export(encoder, "hub", "only-a-name")
    with pytest.raises(UseError, match="refuses hf:lab/other"):
        sl.load_encoder("hf:lab/other")
    point_at(monkeypatch, "http://127.0.0.1:9")
    for use in (lambda: sl.export(encoder, "hub", REPO), lambda: sl.load_encoder(f"hf:{REPO}")):
        with pytest.raises(UseError, match="cannot be reached"):
            use()
