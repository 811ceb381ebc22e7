"""A wrapped module sees what it was trained to see, and is judged as any encoder is."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import ViT
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import nn

import smartlab as sl
from smartlab.core.errors import UseError
from smartlab.data.images.readers import Volume
from smartlab.evaluation.features.encoders import identity, random_encoder
from smartlab.evaluation.finetune import segmenter
from smartlab.interop.wrap import redraw
from smartlab.viewers.subject import Model
from tests.conftest import REPO
from tests.shared import once, phantoms
from tests.training.conftest import cohort, places  # noqa: F401 - fixture

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"spacing": 4.0, "window": (-1000, 400), "size": 32}


class Spy(nn.Module):
    """Keeps what it sees, and gives its means over cells of four voxels."""

    def __init__(self, answer=lambda x: F.avg_pool3d(x, 4)):
        super().__init__()
        self.weight, self.answer, self.seen = nn.Parameter(torch.ones(())), answer, None

    def forward(self, x):
        self.seen = x
        return self.answer(x * self.weight)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 8, 3, 2, 1), nn.Conv3d(8, 16, 3, 2, 1)
        self.norm = nn.BatchNorm3d(16)

    def forward(self, x):
        fine = self.first(x).relu()
        return fine, self.norm(self.second(fine))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return sl.wrap(Tiny(), SMALL)


@pytest.fixture
def where(cohort):  # noqa: F811
    manifest, images, store = cohort
    return {"manifest": str(manifest), "root": str(images), "store": sl.open_store(store), "progress": False}


@pytest.fixture
def hu():
    return np.random.default_rng(0).integers(-1200, 600, (16, 16, 16)).astype(np.int16)


def test_a_module_sees_its_window_its_directions_and_its_channels(hu):
    sees = {"window": (-1000, 400), "output": (-1, 1), "orientation": "SPL", "channels": 3, "size": 16}
    enc = sl.wrap(Spy(), sees)
    enc.features(hu)
    seen = enc.network.seen[0].numpy()
    turned = np.clip(hu[::-1, ::-1].transpose(2, 1, 0), -1000, 400)  # up, to the back, to the left
    np.testing.assert_allclose(seen, np.stack([(turned + 1000) / 700 - 1] * 3), atol=1e-5)


def test_a_module_sees_voxels_of_its_size_whatever_the_scan_has():
    ramp = np.broadcast_to(np.arange(0, 480, 20, dtype=np.int16)[:, None, None], (24, 24, 24))
    scan = Volume(ramp.copy(), np.diag([2.0, 2, 2, 1]), (2.0,) * 3, "CT", "scan")  # 10 HU a mm to the right
    enc = sl.wrap(Spy(), {"window": (0, 1000), "orientation": "SRA", "spacing": (1, 3, 1), "size": 48})
    enc.features(scan)
    seen = 1000 * enc.network.seen[0, 0]
    assert seen.shape == (48, 16, 48), "its second axis is the one to the right, in voxels of 3 mm"
    torch.testing.assert_close(seen[20, :14, 20].diff(), torch.full((13,), 30.0), atol=0.1, rtol=0)


def test_what_is_standardised_is_so_without_the_air():
    crop = torch.zeros(1, 1, 16, 16, 16)
    crop[..., 4:12] = torch.rand(16, 16, 8)
    enc = sl.wrap(Spy(), {"standardise": True, "size": 16})
    enc(crop)
    inside = enc.network.seen[..., 4:12]
    assert abs(float(inside.mean())) < 1e-5 and float(inside.std(correction=0)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("orientation", ["RAS", "SPL", "ILA", "PRI"])
def test_tokens_lie_where_they_were_seen(orientation, hu):
    enc = sl.wrap(Spy(), {"orientation": orientation, "window": (-1200, 600), "size": 16})
    found = enc.features(np.pad(hu, ((0, 16), (0, 0), (0, 8)), constant_values=-1200))
    means = F.avg_pool3d(torch.from_numpy(hu).float()[None, None], 4)
    tokens = found["tokens"].unflatten(1, found["grid"])[0, :4, :, :4, 0]
    torch.testing.assert_close(1800 * tokens - 1200, means[0, 0], atol=0.01, rtol=0)
    assert found["grid"] == (8, 4, 6) and enc.stride == 4


ANSWERS = {
    "vectors": (lambda x: x.flatten(2).mean(2).repeat(1, 5), 5, [16], 1),
    "maps in a dictionary": (lambda x: {"a": F.avg_pool3d(x, 2), "b": F.avg_pool3d(x, 8)}, 1, [2, 8], 8),
    "a map and what is none": (lambda x: (F.avg_pool3d(x, 4), None, x.mean()), 1, [4], 64),
    "a grid that does not divide the crop": (lambda x: F.adaptive_avg_pool3d(x, 5), 1, [4], 64),
    "tokens": (lambda x: F.avg_pool3d(x, 8).flatten(2).transpose(1, 2).repeat(1, 1, 7), 7, [8], 8),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_whatever_a_module_gives_becomes_a_vector_tokens_and_stages(kind):
    answer, channels, strides, tokens = ANSWERS[kind]
    enc = sl.wrap(Spy(answer), {"size": 16})
    out = enc(torch.rand(2, 1, 16, 16, 16))
    assert (enc.channels, enc.stage_strides) == (channels, strides)
    assert out.cls.shape == (2, channels) and out.tokens.shape == (2, tokens, channels)
    assert len(out.stages) == len(strides) and out.attention is None


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_a_vision_transformer_of_monai_keeps_its_cls(pooling):
    torch.manual_seed(0)
    net = ViT(1, (16, 16, 16), (8, 8, 8), 24, 48, 2, 2, classification=True, post_activation=None)
    net.classification_head = nn.Identity()

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net.eval()

        def forward(self, x):
            return self.net.norm(self.net(x)[1][-1])

    x = torch.rand(2, 1, 16, 16, 16)
    enc = sl.wrap(Tokens(), {"size": 16, "pooling": pooling})
    out = enc(x)
    with torch.no_grad():
        tokens = Tokens()(x)
    wanted = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "max": tokens[:, 1:].amax(1)}
    torch.testing.assert_close(out.cls, wanted[pooling])
    torch.testing.assert_close(out.tokens, tokens[:, 1:])
    assert enc.features(np.zeros((5, 9, 5)))["grid"] == (2, 2, 2), "it can take no smaller crop"


@pytest.fixture(scope="module")
def contrasts(tmp_path_factory):
    """Where six phantom patients in two MR contrasts lie; shared with the tests of training."""
    make = phantoms("mr", n=6, shape=(80, 80, 80), spacing=4.0)
    manifest, images, store = places(once(tmp_path_factory, "mr", make))
    return {"manifest": str(manifest), "root": str(images), "store": sl.open_store(store), "progress": False}


def test_what_was_trained_on_several_mr_images_sees_each_as_a_channel(contrasts):
    sees = {"modality": "MR", "images": 2, "spacing": 4.0, "size": 32}
    spy = sl.wrap(Spy(), sees | {"orientation": "LPS"})
    stored = contrasts["store"].array(0)[:, :32, :32, :32]
    spy.features(stored)
    wanted = stored[:, ::-1, ::-1].clip(0, 4095) / 4095
    np.testing.assert_allclose(spy.network.seen[0].numpy(), wanted, atol=1e-5)
    apart = sl.wrap(Spy(), sees | {"standardise": True})
    apart.features(stored)
    for one in apart.network.seen[0]:
        inside = one[one > one.min() + 1e-6]
        assert abs(float(inside.mean())) < 0.01, "every image has a scale of its own"
    result = sl.evaluate(spy, "knn", label="malignancy", split="cross", folds=2, draws=100, **contrasts)
    assert {"random encoder", "size", "mean intensity"} <= {n.split("/")[0] for n in result.metrics}
    for other in ({"modality": "CT", "images": 2}, {"modality": "MR", "images": 1}):
        with pytest.raises(UseError, match="cannot take"):
            sl.evaluate(sl.wrap(Spy(), {"size": 32, "spacing": 4.0} | other), "knn", **contrasts)


def test_images_are_wrapped_as_scans_are():
    enc = sl.wrap(nn.Conv2d(3, 6, 8, 8), {"dims": 2, "channels": 3, "size": 32})
    found = enc.features(np.full((40, 32), 4095.0))
    assert found["grid"] == (5, 4) and found["cls"].shape == (1, 6)
    assert enc.config.flat


@pytest.mark.parametrize(
    ("module", "sees", "said"),
    [
        (Tiny, {"spacng": 2}, r"spacng.*expected some of modality, spacing"),
        (Tiny, {"orientation": "RAL"}, "one of R L, one of A P, one of S I"),
        (Tiny, {"window": (1, 0)}, "lower bound"),
        (Tiny, {"dims": 2, "spacing": (1, 1, 2)}, "images have one spacing"),
        (Tiny, {"dims": 2, "modality": "MR"}, "images have one spacing, .* modality"),
        (Tiny, {"modality": "MR", "window": (-175, 250)}, "one of HU; MR lies between 0 and 4095"),
        (Tiny, {"images": 2, "channels": 3}, "2 images are as many channels"),
        (Tiny, {"channels": 2}, r"Tiny cannot take \(1, 2, 96, 96, 96\)"),
        (Tiny, {"size": 32, "stage": 2}, "stage=2.*2 maps"),
        (lambda: Spy(lambda x: x[0, 0, 0]), {"size": 16}, r"cannot read what Spy gives \(found \(16, 16\)"),
        (lambda: Spy(lambda x: "x"), {"size": 16}, "cannot read what Spy gives.*str"),
        (nn.Identity, {}, "without weights"),
        (lambda: random_encoder(sl.load_config("tiny")), {}, "not a torch module to wrap"),
        (lambda: "runs/a", {}, "not a torch module to wrap"),
    ],
    ids=range(14),
)
def test_what_cannot_be_wrapped_is_told_at_once(module, sees, said):
    with pytest.raises(UseError, match=f"(?s){said}"):
        sl.wrap(module(), sees)


def test_the_module_stays_the_callers(tiny):
    module = Tiny().train()
    enc = sl.wrap(module, SMALL)
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert not enc.training and not any(p.requires_grad for p in enc.parameters())


def test_the_untrained_one_beside_it_has_other_weights_of_the_same_shapes():
    class Own(Tiny):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.arange(16.0))

    enc = sl.wrap(Own(), SMALL)
    enc.network.norm.running_mean.fill_(3.0)
    first, again, other = (random_encoder(enc, seed).state_dict() for seed in (0, 0, 1))
    mine = enc.state_dict()
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in mine.items()}
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    for key in ("network.first.weight", "network.second.bias", "network.scale"):
        assert not torch.equal(first[key], mine[key]) and not torch.equal(first[key], other[key]), key
    assert torch.equal(first["network.scale"].sort().values, mine["network.scale"])
    assert not first["network.norm.running_mean"].any(), "what was learned of the data is gone too"


def test_attention_of_torch_is_drawn_anew_too():
    net = nn.MultiheadAttention(8, 2)
    before = net.in_proj_weight.clone()
    redraw(net)
    assert not torch.equal(net.in_proj_weight.sort().values, before.sort().values)


def test_another_function_of_the_same_weights_is_another_encoder():
    one, same, other = (sl.wrap(Spy(lambda x, n=n: F.avg_pool3d(x, n)), {"size": 16}) for n in (4, 4, 8))
    third = sl.wrap(Spy(), {"size": 16, "window": (-160, 240)})
    assert identity(one) == identity(same) and len({identity(e) for e in (one, other, third)}) == 3


@pytest.mark.parametrize(
    ("task", "more", "metric"),
    [
        ("probe", {"split": "cross", "folds": 2, "draws": 100}, "accuracy"),
        ("knn", {"split": "cross", "folds": 2, "draws": 100, "neighbours": 3}, "accuracy"),
    ],
)
def test_a_wrapped_module_is_judged_beside_the_untrained_and_what_a_ruler_knows(
    task, more, metric, tiny, where
):
    result = sl.evaluate(tiny, task, label="malignancy", **where, **more)
    beside = {name.split("/")[0] for name in result.metrics if "/" in name}
    assert {"random encoder", "size", "mean HU"} <= beside
    found = result.metrics[metric]
    assert found.low <= found.value <= found.high and found.n == result.table.patient.nunique()
    assert result.facts["network"] == "Tiny" and result.facts["preprocessing"]["spacing"] == 4.0


@pytest.mark.parametrize(
    ("task", "more", "metric"),
    [
        ("clusters", {"embeddings": ("pca",), "draws": 50}, "features/ratio minus random"),
        pytest.param(
            "units",
            {"levels": ("tokens",), "folds": 2, "draws": 50},
            "tokens/balanced accuracy minus random",
            marks=pytest.mark.slow,
        ),
        pytest.param("unsupervised", {"folds": 2}, "dice minus random", marks=pytest.mark.slow),
        ("classify", {"label": "malignancy", "split": "cross", "folds": 2, "steps": 1, "size": 32}, "auc"),
    ],
)
def test_organs_tokens_and_fine_tuning_take_it_too(task, more, metric, tiny, where, tmp_path):
    result = sl.evaluate(tiny, task, out=tmp_path, **where, **more)
    assert metric in result.metrics, sorted(result.metrics)[:20]


@pytest.fixture
def swin():
    torch.manual_seed(0)
    return SwinTransformer(1, 12, (4,) * 3, (2,) * 3, (1, 1, 1, 1), (1, 1, 2, 2))


@pytest.mark.slow
def test_a_swin_of_monai_segments(swin, where, tmp_path):
    more = {"labels": ["liver"], "folds": 2, "split": "cross", "steps": 1, "overlap": 0.0}
    encoder = sl.wrap(swin, SMALL | {"size": 64})
    result = sl.evaluate(encoder, "segment", out=tmp_path, **where, **more)
    assert 0 <= result.metrics["dice"].value <= 1


def test_a_decoder_is_put_on_a_swin_of_monai(swin, where, tmp_path):
    encoder = sl.wrap(swin, SMALL)
    pretrained, scratch = (segmenter.build(encoder, 2, pretrained=yes, seed=0) for yes in (True, False))
    same = [torch.equal(v, swin.state_dict()[k]) for k, v in pretrained.swinViT.state_dict().items()]
    assert all(same) and all(p.requires_grad for p in pretrained.parameters())
    assert not torch.equal(scratch.swinViT.patch_embed.proj.weight, swin.patch_embed.proj.weight)
    assert torch.equal(scratch.out.conv.conv.weight, pretrained.out.conv.conv.weight)
    with pytest.raises(UseError, match="segment looks into"):
        sl.evaluate(sl.wrap(swin, SMALL | {"orientation": "LAS"}), "segment", out=tmp_path, **where)


@pytest.mark.parametrize("task", ["heads", "localize", "segment"])
def test_tasks_that_look_inside_refuse_it_before_any_work(task, tiny, where, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "smartlab.evaluation.task.prepare_store", lambda *a: pytest.fail("a store was prepared")
    )
    where.pop("store")
    with pytest.raises(UseError, match=f"{task} looks into smartlab's own networks.*Take probe"):
        sl.evaluate(tiny, task, out=tmp_path, **where)


def test_whatever_else_needs_our_own_network_says_so(tiny, tmp_path):
    with pytest.raises(UseError, match=r"no semantic attention.*A wrapped network shows none"):
        tiny.attention(np.zeros((32, 32, 32)))
    with pytest.raises(UseError, match="exported as it came"):
        sl.export(tiny, "safetensors", tmp_path / "e.safetensors")
    with pytest.raises(UseError, match="dagman-nodules looks into"):
        sl.plan_protocol(tiny, "dagman-nodules")
    with pytest.raises(UseError, match="mask explorer needs an encoder of smartlab"):
        Model(tiny)
    with pytest.raises(UseError, match=r"no encoder yet.*Wrap it"):
        sl.evaluate(Tiny(), "probe")
    with pytest.raises(UseError, match=r"stage=3.*0 to 1"):
        from smartlab.evaluation.features.tokens import stride_of

        stride_of(tiny, 3)


def test_the_example_of_the_page_runs(cohort, tmp_path, monkeypatch):  # noqa: F811
    page = (REPO / "docs" / "EVALUATION.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "sl.wrap(" in block]
    (tmp_path / "scans").symlink_to(cohort[1])
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert found["result"].metrics and found["encoder"].config.network
