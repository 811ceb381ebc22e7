"""GPU code, tested without a GPU: torch's meta device refuses tensors of other devices and every wait for a value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import smartlab as sl
from smartlab.core.clock import Clock
from smartlab.data.crops.augment import augment, window
from smartlab.evaluation.features.encoders import network_input
from smartlab.evaluation.finetune import classifier, segmenter
from smartlab.evaluation.finetune.layers import layer_groups
from smartlab.models.build import make_encoder
from smartlab.models.reach import reach
from smartlab.training.families import family_of
from smartlab.training.setup import parameter_groups
from tests.evaluation.finetune.test_trainer import TINY

SCANS = {
    "encoder.preset": "custom",
    "encoder.embed_dim": 8,
    "encoder.num_heads": [1, 2, 2, 2],
    "semantic.heads": 2,
    "semantic.stage": 2,
    "data.view": 64,
    "data.region": 64,
    "distill.hidden": 16,
    "distill.bottleneck": 8,
    "distill.prototypes": 16,
}
CHANGES = [
    *({"method.preset": name} for name in ("simmim", "smit", "smart", "ibot", "attmask", "mst")),
    *(
        {"mask.strategy": name}
        for name in ("random", "block", "attention_high", "attention_low", "attention_sample")
    ),
    {"mask.fill": "token"},
    {"mask.hint_from": "any", "mask.hint_refill": False},
    {"mask.importance": "received"},
    {"mask.informativeness": 1.5},
    {"teacher.guide": "noisy"},
    {"teacher.dropout_unit": "mask_unit", "teacher.noise_std": 0.1},
    {"semantic.stage": 3},
    {"semantic.stage": 4},
    {"semantic.kind": "class", "semantic.similarity": "cosine", "semantic.registers": 2},
    {"distill.kind": "regression", "distill.standardise": True, "loss.coarse": 1.0},
    {"distill.assignment": "sinkhorn", "distill.share_heads": True},
    {"distill.patch_from": "semantic"},
    {"encoder.checkpointing": True, "encoder.drop_path": 0.2},
    {"encoder.window_size": 7, "encoder.depths": [2, 2, 2, 2]},
    {"student.encode": "sparse"},
]
PRIMUS = {"data.view": 32, "data.region": 32, "mae.input": 32}
VITS = [
    *({"method.preset": name} for name in ("mae", "simmim", "smit", "dagman", "ibot", "attmask", "mst")),
    {"method.preset": "miram", "mae.input": 16, "mae.landmarks": 8},
    {"student.encode": "dense", "mask.fill": "token", "mask.strategy": "block"},
    {"mae.scales": [1, 2], "mae.input": 16, "mae.attention": ["softmax", "performer"]},
    {"encoder.cls_token": False},
    {"encoder.registers": 2, "encoder.drop_path": 0.2, "encoder.checkpointing": True},
    {"encoder.layer_scale": None, "encoder.inner_norm": False},
    {"method.preset": "dagman", "mask.importance": "received", "teacher.guide": "noisy"},
    {
        "method.preset": "dagman",
        "semantic.enabled": True,
        "encoder.registers": 1,
        "distill.kind": "prototype",
    },
    {"method.preset": "smit", "encoder.cls_token": False},
]
IMAGES = [
    {"method.preset": "mae"},
    *({"mae.attention": kind} for kind in ("nystrom", "linformer", "performer")),
]


@pytest.fixture
def meta(monkeypatch):
    """`torch.autocast("meta")` does not exist; that of the CPU stands in."""
    real = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: real("cpu" if kind == "meta" else kind, *a, **k)
    )
    return torch.device("meta")


@pytest.mark.parametrize(
    ("change", "precision"),
    [({}, torch.bfloat16), ({"method.preset": "smit"}, torch.bfloat16), *((c, None) for c in ({}, *CHANGES))],
    ids=str,
)
def test_a_whole_step_on_scans(change, precision, meta):
    whole_step(sl.load_config("dagman", SCANS | change), (2, 2, 1, 64, 64, 64), meta, precision)


@pytest.mark.parametrize("change", [{}, {"method.preset": "simmim"}, {"loss.coarse": 1.0}], ids=str)
def test_a_whole_step_on_two_channels(change, meta):
    two = {"encoder.in_channels": 2}
    whole_step(sl.load_config("dagman", SCANS | two | change), (2, 2, 2, 64, 64, 64), meta)
    config = sl.load_config(
        "primus-tiny", PRIMUS | two | {"method.preset": change.get("method.preset", "mae")}
    )
    whole_step(config, (2, 2, 2, 32, 32, 32), meta)


@pytest.mark.parametrize(
    ("change", "precision"),
    [({}, torch.bfloat16), (VITS[3], torch.bfloat16), *((c, None) for c in VITS)],
    ids=str,
)
def test_a_whole_step_of_a_vision_transformer_on_scans(change, precision, meta):
    config = sl.load_config("primus-tiny", PRIMUS | change)
    whole_step(config, (2, 2, 1, 32, 32, 32), meta, precision)


@pytest.mark.parametrize("change", [{}, *IMAGES], ids=str)
def test_a_whole_step_on_images(change, meta):
    config = sl.load_config("miram-tiny", change)
    whole_step(config, (2, 1, config.data.view, config.data.view), meta)


def whole_step(config, shape, device, precision=None):
    method = family_of(config).method(config).to(device)
    optimiser = torch.optim.AdamW(parameter_groups(method), lr=1e-4)
    x, generator = torch.rand(shape, device=device), torch.Generator().manual_seed(0)
    with torch.autocast("meta", precision or torch.bfloat16, enabled=precision is not None):
        loss, metrics = method.train()(x, Clock(1, 10, 10), generator)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(method.parameters(), 3.0)
    optimiser.step()
    method.update_teacher(0.9)
    told = method.told(Clock(1, 10, 10), 0.9)
    reach((method.teacher or method.student).encoder, x[0] if x.dim() == 6 else x)
    values = [v for v in (metrics | told).values() if isinstance(v, torch.Tensor)]
    assert all(v.device == device for v in (loss, *values))


@pytest.mark.parametrize("channels", [(), (2,)], ids=str)
@pytest.mark.parametrize("task", ["classify", "segment"])
def test_a_whole_step_of_fine_tuning(task, channels, meta):
    encoder = make_encoder(sl.load_config("tiny", TINY | {"encoder.in_channels": len(channels) + 1}))
    size, classes = (64, 64, 64), torch.zeros(2, 3, device=meta)
    crop = torch.zeros(2, *channels, *size, dtype=torch.int16, device=meta)
    truth = torch.zeros(2, *size, dtype=torch.uint8, device=meta)
    if task == "classify":
        net, prefix = classifier.build(encoder, 3, pretrained=True, seed=0).to(meta), classifier.ENCODER
        measure = classifier.measure_of("multiclass", torch.tensor([0.2, 0.3, 0.5]).to(meta))
        x = augment(network_input(window(crop, -175, 250)), torch.Generator().manual_seed(0), channels=True)
        loss = measure(net(x), classes)
    else:
        net, prefix = segmenter.build(encoder, 3, pretrained=True, seed=0).to(meta), segmenter.ENCODER
        loss = segmenter.loss_of(net, (-175, 250), weights=np.ones(3), flip=True)
        loss = loss({"view": crop, "labels": truth}, torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(layer_groups(net, prefix, 0.75), lr=1e-4)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimiser.step()
    assert loss.device == meta


def test_a_wrapped_module_waits_for_nothing(meta):
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3, 2, 1), torch.nn.Conv3d(4, 8, 3, 2, 1))
    sees = {"standardise": True, "orientation": "SPL", "spacing": (2, 1, 1), "channels": 2, "size": 16}
    out = sl.wrap(net, sees).to(meta)(torch.zeros(2, 1, 16, 16, 16, device=meta))
    assert all(v.device == meta for v in (out.cls, out.tokens, *out.stages)) and out.grid == (4, 4, 4)


def test_a_wait_for_the_device_is_noticed(meta):
    with pytest.raises(RuntimeError):
        float(torch.zeros((), device=meta) + 1)
    with pytest.raises(RuntimeError):
        torch.zeros(3, device=meta) + torch.zeros(3)
