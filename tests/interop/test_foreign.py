"""Weights by their published names become MONAI's own network, which sees what it was trained to see."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import SwinUNETR, resnet10, resnet18
from monai.networks.nets.resnet import ResNet
from monai.networks.nets.segresnet_ds import SegResEncoder, SegResNetDS
from monai.networks.nets.swin_unetr import PatchMerging, SwinTransformer
from monai.transforms import Orientation
from safetensors.torch import save_file

import smartlab as sl
from smartlab.cli.app import app
from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.features.encoders import identity, random_encoder
from smartlab.interop.foreign import LAYOUTS
from tests.conftest import REPO
from tests.interop.test_hub import hub  # noqa: F401 - fixture
from tests.training.conftest import cohort  # noqa: F401 - fixture

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"ct-fm": 48, "fmcib": 50, "medicalnet": 48, "suprem": 32, "swinunetr": 32, "voco": 32}
OLD = [
    tuple(map(int, corner)) for corner in ["000", "100", "010", "001", "101", "010", "001", "111"]
]  # of MONAI before 1.5


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """The published crops, but smaller."""
    for name, size in SIZES.items():
        sees = LAYOUTS[name].sees.model_copy(update={"size": size})
        monkeypatch.setitem(LAYOUTS, name, dataclasses.replace(LAYOUTS[name], sees=sees))


def merged_as_before(self, x):
    d, h, w = (n % 2 for n in x.shape[1:4])
    x = torch.nn.functional.pad(x, (0, 0, 0, w, 0, h, 0, d))
    return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in OLD], -1)))


def trained(net):
    """As after training: nothing at its first value."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand_like(value) + 0.5)
            elif value.is_floating_point():
                value.add_(0.05 * torch.randn_like(value))
    return net.eval()


def prefixed(prefix, net):
    return {prefix + key: value for key, value in net.state_dict().items()}


def dilated(net):
    """MONAI's ResNet as MedicalNet has it: stride 1 and dilations of 2 and 4 at the end."""
    for layer, n in ((net.layer3, 2), (net.layer4, 4)):
        first = layer[0]
        for part in (first.conv1, first.conv2):
            part.stride = (1, 1, 1)
        if isinstance(first.downsample, torch.nn.Sequential):
            first.downsample[0].stride = (1, 1, 1)
        else:
            planes = first.conv2.out_channels
            first.downsample = lambda x, planes=planes: net._downsample_basic_block(x, planes, 1)
        for block in layer:
            for part in (block.conv1, block.conv2):
                if part.kernel_size == (3, 3, 3):
                    part.dilation = part.padding = (n, n, n)
    return net


def ct_fm(path):
    net = trained(SegResEncoder(init_filters=4, blocks_down=(1, 2, 2, 4, 4)))
    save_file(net.state_dict(), path)
    return net


def ct_fm_with_decoder(path):
    net = trained(SegResNetDS(init_filters=4, blocks_down=(1, 2, 2, 4, 4), out_channels=2))
    torch.save({"state_dict": prefixed("model.", net)}, path)
    return net.encoder


def fmcib(path):
    net = ResNet("bottleneck", [3, 4, 6, 3], [8, 16, 32, 64], 3, 1, conv1_t_stride=2, feed_forward=False)
    torch.save(
        {"trunk_state_dict": trained(net).state_dict(), "head_state_dict": {"0.weight": torch.ones(2)}}, path
    )
    return net


def medicalnet(make, **more):
    def publish(path):
        net = trained(make(spatial_dims=3, n_input_channels=1, conv1_t_stride=2, feed_forward=False, **more))
        head = {"module.conv_seg.0.weight": torch.ones(3)}
        torch.save({"state_dict": prefixed("module.", net) | head}, path)
        return dilated(net)

    return publish


def suprem(path):
    net = trained(SwinUNETR(in_channels=1, out_channels=2, feature_size=12, num_heads=(3, 6, 12, 24)))
    rest = {"module.organ_embedding": torch.ones(3, 4), "module.controller.weight": torch.ones(2)}
    torch.save(
        {"net": prefixed("module.backbone.", net) | rest, "optimizer": {"state": {}}, "epoch": 3}, path
    )
    return net.swinViT


def swinunetr(path):
    net = trained(SwinTransformer(1, 12, (7,) * 3, (2,) * 3, (2, 2, 2, 2), (3, 6, 12, 24)))
    named = {k.replace("mlp.linear", "mlp.fc"): v for k, v in prefixed("module.", net).items()}
    torch.save({"state_dict": named | {"module.rotation_head.weight": torch.ones(4, 3)}}, path)
    return net


def voco(path):
    net = trained(SwinUNETR(1, 2, feature_size=12, num_heads=(3, 6, 12, 24), use_v2=True))
    torch.save(net.state_dict(), path)
    return net.swinViT


PUBLISHED = [
    ("ct-fm", ct_fm, "model.safetensors"),
    ("ct-fm", ct_fm_with_decoder, "segresnet.pt"),
    ("fmcib", fmcib, "model_weights.torch"),
    ("medicalnet", medicalnet(resnet10, shortcut_type="B", bias_downsample=False), "resnet_10.pth"),
    ("medicalnet", medicalnet(resnet18, shortcut_type="A"), "resnet_18.pth"),
    ("suprem", suprem, "supervised_suprem_swinunetr_2100.pth"),
    ("swinunetr", swinunetr, "model_swinvit.pt"),
    ("voco", voco, "VoCo_B_SSL_head.pt"),
]
KINDS = pytest.mark.parametrize(
    ("name", "publish", "file"), PUBLISHED, ids=lambda v: v if isinstance(v, str) else ""
)


def as_monai_sees(volume, name):
    """HU at the finest spacing -> what the published pipeline gives the network, by MONAI's own orientation."""
    p = LAYOUTS[name].sees
    low, high = p.window
    x = np.clip((volume.astype(np.float32) - low) / (high - low), 0, 1)
    if p.standardise:
        inside = x[x > 0]
        x = (x - inside.mean()) / inside.std()
    x = torch.from_numpy(
        np.asarray(Orientation(p.orientation)(MetaTensor(x[None], affine=np.eye(4))))
    ).float()[None]
    if name == "ct-fm":
        x = x[:, :, 1::3]  # every third slice, of 3 mm
    if name == "swinunetr":
        x = torch.nn.functional.interpolate(
            x, scale_factor=(1, 1, 0.75), mode="trilinear", recompute_scale_factor=True
        )
    return x


@KINDS
def test_features_are_those_of_monais_own_network(name, publish, file, tmp_path, monkeypatch):
    monkeypatch.setattr(PatchMerging, "forward", merged_as_before)
    net = publish(tmp_path / file)
    encoder = sl.load_encoder(f"{name}:{tmp_path / file}")
    volume = np.random.default_rng(0).integers(-1100, 1200, (SIZES[name],) * 3).astype(np.int16)
    with torch.no_grad():
        wanted = net(as_monai_sees(volume, name))
        ours = encoder.network(encoder.seen(encoder._prepare(volume)))
    wanted = wanted if isinstance(wanted, list) else [wanted]
    pooled = wanted[-1].flatten(2).mean(2) if wanted[-1].dim() == 5 else wanted[-1]
    torch.testing.assert_close(encoder.features(volume)["cls"], pooled, atol=1e-4, rtol=1e-4)
    if len(wanted) > 1:
        for mine, theirs in zip(ours, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert encoder.config.network == name and encoder.config.data.view == SIZES[name]
    beside = random_encoder(encoder, 0)
    assert type(beside.network) is type(encoder.network) and identity(beside) != identity(encoder)


def test_merging_of_today_is_monais_network_of_today(tmp_path):
    net = suprem(tmp_path / "s.pth")
    encoder = sl.load_encoder(f"suprem:{tmp_path / 's.pth'}", merging="monai")
    before = sl.load_encoder(f"suprem:{tmp_path / 's.pth'}")
    x = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x).cls, net(x)[-1].flatten(2).mean(2), atol=1e-4, rtol=1e-4)
        assert (before(x).cls - encoder(x).cls).abs().max() > 0.01
    assert identity(before) != identity(encoder), "the same weights, another function"
    with pytest.raises(UseError, match="merges no patches"):
        ct_fm(tmp_path / "c.safetensors")
        sl.load_encoder(f"ct-fm:{tmp_path / 'c.safetensors'}", merging="monai")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_wrong_file_is_refused_with_its_table(name, tmp_path):
    torch.save({"stem.weight": torch.zeros(3), "stem.bias": torch.zeros(2)}, tmp_path / "w.pt")
    said = r"w\.pt: fits only in part: 0 of \d+ tensors match(.|\n)*missing +\w(.|\n)*unknown +stem\.weight \(3,\)"
    with pytest.raises(DataError, match=said):
        sl.load_encoder(f"{name}:{tmp_path / 'w.pt'}")


@KINDS
def test_a_file_that_lacks_a_tensor_or_has_it_in_another_shape_is_refused(name, publish, file, tmp_path):
    net = publish(tmp_path / "all.pt")
    weights = dict(net.state_dict())
    *_, lacking, odd = (key for key, value in weights.items() if value.dim() == 1)
    del weights[lacking]
    weights[odd] = torch.zeros(7)
    torch.save(weights, tmp_path / "part.pt")
    with pytest.raises(DataError, match=rf"missing +{lacking}(.|\n)*shape +{odd}: \(7,\) in the file"):
        sl.load_encoder(f"{name}:{tmp_path / 'part.pt'}")


def test_names_and_files_that_are_not_there_are_told(tmp_path):
    torch.save(torch.nn.Conv3d(1, 2, 3), tmp_path / "pickled.pt")
    for place, error, said in (
        ("ctfm:x.pt", UseError, "no kind of weights.*Did you mean 'ct-fm'"),
        ("voco:absent.pt", UseError, "no such file.*weights of voco, or hf:ORG/NAME/FILE"),
        ("fmcib:hf:org/name", UseError, "which file of that repository"),
        (f"voco:{tmp_path / 'pickled.pt'}", DataError, "cannot be read as weights"),
    ):
        with pytest.raises(error, match=said):
            sl.load_encoder(place)


def test_weights_come_from_the_hub_too(hub, tmp_path):  # noqa: F811
    ct_fm(tmp_path / "w.safetensors")
    hub.files["model.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    ct_fm_with_decoder(tmp_path / "w.pt")
    hub.files["other.pt"] = (tmp_path / "w.pt").read_bytes()
    here, there, named = (
        sl.load_encoder(f"ct-fm:{place}")
        for place in (tmp_path / "w.safetensors", "hf:lab/swin-chest", "hf:lab/swin-chest/other.pt@main")
    )
    assert identity(here) == identity(there) and named.channels == 64


def test_the_command_line_takes_the_same_names(cohort, tmp_path):  # noqa: F811
    from typer.testing import CliRunner

    ct_fm(tmp_path / "weights.safetensors")
    manifest, images, store = map(str, cohort)
    words = ["evaluate", f"ct-fm:{tmp_path / 'weights.safetensors'}", "--task", "probe", "--data", manifest]
    words += [
        "--root",
        images,
        "--store",
        store,
        "--label",
        "malignancy",
        "--json",
        "split=cross",
        "folds=2",
        "draws=100",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "random encoder/accuracy" in json.loads(done.stdout)["metrics"]
    written = json.loads(
        (tmp_path / "weights" / "evaluation" / "probe-malignancy" / "result.json").read_text()
    )
    assert written["network"] == "ct-fm" and written["preprocessing"]["window"] == [-1024, 2048]
    assert str(tmp_path) not in json.dumps(written)
    assert "ct-fm:" in CliRunner().invoke(app, ["evaluate", "--help"]).output


def test_the_page_has_every_layout_as_it_is():
    page = (REPO / "docs" / "EVALUATION.md").read_text(encoding="utf-8")
    for name, layout in LAYOUTS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
        p = layout.sees
        low, high = (f"{v:g}".replace("-", "−") for v in p.window)
        steps = " × ".join(f"{s:g}" for s in p.steps) if isinstance(p.spacing, tuple) else f"{p.spacing:g}"
        assert f"{steps} mm" in row and f"{low} to {high}" in row and f" {p.orientation} " in row, row
