"""One step of MAE and MIRAM does what the papers' notes say, and the finer scale is worth its cost."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.nn.functional as F

import smartlab as sl
from smartlab.core.clock import Clock
from smartlab.evaluation.look.spectrum import detail, enlarged
from smartlab.methods.multiscale_mae import MultiscaleMAE
from smartlab.models.decoder import finer, from_patches
from smartlab.models.patches import to_patches
from smartlab.training.setup import parameter_groups
from tests.methods.overfit import overfit_one_batch

SMALL = {
    "encoder.patch": 4,
    "encoder.embed_dim": 32,
    "encoder.blocks": 2,
    "data.view": 64,
    "mae.input": 32,
    "mae.width": 32,
    "mae.depth": 1,
    "mae.landmarks": 16,
    "mae.rank": 16,
    "mae.features": 32,
    "mae.kernel": 5,
}


def make(method="miram", **more):
    torch.manual_seed(0)
    return MultiscaleMAE(sl.load_config("miram-tiny", SMALL | {"method.preset": method} | more))


def views(n=4, side=64, seed=1):
    coarse = torch.rand(n, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, side, mode="bicubic").clamp(0, 1)


def step(net, x=None, seed=0):
    return net(views() if x is None else x, Clock(0, 100, 10), torch.Generator().manual_seed(seed))


def test_mae_is_one_scale_of_the_same_class():
    mae, miram = make("mae"), make("miram")
    assert type(mae) is type(miram) and list(mae.decoders) == ["1"] and list(miram.decoders) == ["1", "2"]
    (a, m), (b, n) = step(mae), step(miram)
    assert "loss_scale_2" not in m and torch.equal(a.detach(), m["loss_scale_1"])
    torch.testing.assert_close(b.detach(), n["loss_scale_1"] + n["loss_scale_2"])
    assert mae.student.encoder.smaller == 2, "both see the same part of the image, at the same resolution"


@pytest.mark.parametrize(
    "change",
    [
        {"mae.scales": [1, 2, 4], "mae.attention": ["softmax", "nystrom", "linformer"], "data.view": 128},
        {"mae.scales": [2], "mae.attention": "performer"},
        {"mae.attention": ["softmax", "linformer"]},
        {"mae.attention": ["softmax", "performer"]},
        {"mae.attention": "softmax"},
        {"mae.normalise": False},
        {"mae.weights": [1, 0.5]},
        {"mae.depth": [2, 1], "mae.width": [32, 16], "mae.heads": [4, 2]},
        {"mask.ratio": 0.5},
        {"mask.strategy": "block"},
    ],
    ids=str,
)
def test_every_setting_trains_every_parameter(change):
    net = make(**change)
    loss, _ = step(net, views(side=net.config.data.view))
    loss.backward()
    assert torch.isfinite(loss)
    weighted = {str(d.scale) for d in net.config.mae.decoders() if d.weight}
    for name, p in net.named_parameters():
        if not name.startswith("decoders.") or name.split(".")[1] in weighted:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
    if not change.get("mae.scales"):
        assert loss.detach() != step(make())[0].detach()


def test_the_loss_is_the_weighted_mean_squared_error_of_hidden_patches():
    """Computed again from whole reconstructions, without any of the method's own gathering."""
    for normalise in (True, False):
        net = make(**{"mae.weights": [1, 0.25], "mae.normalise": normalise}).eval()
        loss, metrics = step(net)
        found = net.reconstruct(views(), torch.Generator().manual_seed(0))
        for scale, parts in found.items():
            patches = {name: to_patches(x, 4) for name, x in parts.items()}
            hidden = patches["hidden"][..., 0] > 0
            apart = patches["guess"] - patches["target"]
            if normalise:
                apart = apart / (patches["target"].var(-1, keepdim=True) + 1e-6).sqrt()
            expected = apart.square()[hidden].mean()
            torch.testing.assert_close(metrics[f"loss_scale_{scale}"], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            loss.detach(), metrics["loss_scale_1"] + 0.25 * metrics["loss_scale_2"], rtol=1e-5, atol=1e-6
        )


def test_the_same_part_of_the_image_is_hidden_at_every_scale():
    net = make(**{"mae.scales": [1, 2, 4], "mae.attention": "nystrom", "data.view": 128})
    found = net.reconstruct(views(side=128), torch.Generator().manual_seed(3))
    coarse = found[1]["hidden"]
    assert (coarse.mean((1, 2, 3)) == math.ceil(0.75 * 64) / 64).all()
    for scale, parts in found.items():
        assert parts["target"].shape[-1] == 32 * scale
        assert torch.equal(parts["hidden"], coarse.repeat_interleave(scale, 2).repeat_interleave(scale, 3))


def test_targets_are_the_stored_pixels_averaged_down():
    net, x = make(**{"mae.normalise": False}), views()
    found = net.reconstruct(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found[2]["target"], x)
    torch.testing.assert_close(found[1]["target"], F.avg_pool2d(x, 2))


def test_a_mask_that_is_given_is_what_is_hidden():
    """The same reconstruction as of the same mask drawn."""
    net, x = make().eval(), views(2)
    _, hidden = net.choose(2, x.device, torch.Generator().manual_seed(5), Clock(0, 1, 1))
    mask = torch.zeros(2, net.side**2, dtype=torch.bool).scatter(1, hidden, True)
    drawn, given = net.reconstruct(x, torch.Generator().manual_seed(5)), net.reconstruct(x, mask=mask)
    for scale, parts in drawn.items():
        for name, image in parts.items():
            torch.testing.assert_close(given[scale][name], image)


def test_what_is_hidden_reaches_neither_encoder_nor_decoders():
    """Changing only hidden pixels changes no prediction."""
    net, x = make().eval(), views()
    before = net.reconstruct(x, torch.Generator().manual_seed(0))
    other = torch.where(before[2]["hidden"] > 0, 1 - x, x)
    net.config = net.config.model_copy(update={"mae": net.config.mae.model_copy(update={"normalise": False})})
    a, b = (net.reconstruct(y, torch.Generator().manual_seed(0)) for y in (x, other))
    for scale in a:
        assert torch.equal(a[scale]["guess"], b[scale]["guess"])


def test_tokens_are_interpolated_with_mask_tokens_in_place():
    """The fine grid is the bilinear enlargement of the filled coarse one, plus positions; [CLS] is kept."""
    net = make()
    decoder = net.decoders["2"]
    keep = torch.tensor([[0, 5, 17, 63], [1, 2, 3, 4]])
    x = torch.randn(2, 5, 32)
    grid = decoder.mask_token.expand(2, 64, -1).clone()
    for row in range(2):
        grid[row, keep[row]] = x[row, 1:]
    image = grid.transpose(1, 2).unflatten(2, (8, 8))
    fine = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
    spread = decoder.spread(x, keep)
    assert torch.equal(spread[:, 0], x[:, 0])
    torch.testing.assert_close(spread[:, 1:], fine.flatten(2).transpose(1, 2) + decoder.position)


def test_places_patches_and_images_fit_together():
    x = torch.rand(2, 1, 24, 24)
    assert torch.equal(from_patches(to_patches(x, 4), 6, 4), x)
    places = finer(torch.tensor([[0, 4]]), 3, 2)
    assert places.tolist() == [[0, 1, 6, 7, 14, 15, 20, 21]]


def test_processes_hide_what_one_process_would():
    net = make()
    whole = net.choose(4, torch.device("cpu"), torch.Generator().manual_seed(5), Clock(0, 1, 1))
    for rank in range(2):
        part = net.choose(2, torch.device("cpu"), torch.Generator().manual_seed(5), Clock(0, 1, 1, rank, 2))
        assert all(torch.equal(a[2 * rank : 2 * rank + 2], b) for a, b in zip(whole, part, strict=True))


def test_one_batch_can_be_learned_by_heart():
    losses = overfit_one_batch(
        sl.load_config("miram-tiny", SMALL | {"mae.normalise": False}), views(2), steps=150
    )
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])


def test_single_tokens_and_norms_do_not_decay():
    net = make()
    decays, spared = (group["params"] for group in parameter_groups(net))
    names = {id(p): n for n, p in net.named_parameters()}
    assert {"student.encoder.cls_token", "decoders.2.mask_token"} <= {names[id(p)] for p in spared}
    assert all(p.dim() > 1 for p in decays)


SCAN = {"encoder.embed_dim": 24, "encoder.blocks": 2, "encoder.heads": 2, "encoder.patch": 4, "mae.depth": 1}
SCAN |= {
    "data.view": 32,
    "data.region": 32,
    "mae.input": 16,
    "mae.width": 24,
    "mae.heads": 2,
    "mae.landmarks": 8,
}


def make_scan(method="miram", **more):
    torch.manual_seed(0)
    return MultiscaleMAE(sl.load_config("primus-tiny", SCAN | {"method.preset": method} | more))


def scans(n=2, side=32):
    coarse = torch.rand(2 * n, 1, 5, 5, 5, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, side, mode="trilinear").unflatten(0, (n, 2))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"method.preset": "mae"},
        {"method.preset": "mae", "data.view": 16, "data.region": 16},
        {"student.encode": "dense"},
        {"student.encode": "dense", "mask.fill": "token"},
        {"encoder.cls_token": False},
        {"encoder.registers": 2},
        {"mae.attention": "performer", "mae.weights": [1, 0.5], "mask.strategy": "block", "mask.ratio": 0.6},
    ],
    ids=str,
)
def test_scans_are_autoencoded_at_one_scale_or_several(change):
    """The loss again from whole reconstructions; every parameter learns."""
    net, x = make_scan(**change).eval(), scans(side=change.get("data.view", 32))
    loss, metrics = step(net, x)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert ("attention_entropy" in metrics) == net.config.encoder.cls_token, "of nobody else"
    found = net.reconstruct(x.flatten(0, 1), torch.Generator().manual_seed(0))
    assert list(found) == list(net.config.mae.scales)
    for scale, parts in found.items():
        hidden, target = parts["hidden"] > 0, parts["target"]
        assert target.shape == (4, 1, *[16 * scale] * 3)
        assert torch.equal(hidden.float(), F.interpolate(found[1]["hidden"], 16 * scale))
        spread = (to_patches(target, 4).var(-1, keepdim=True) + 1e-6).sqrt().expand(-1, -1, 64)
        apart = (parts["guess"] - target) / from_patches(spread, 4 * scale, 4, 3)
        torch.testing.assert_close(
            metrics[f"loss_scale_{scale}"], apart[hidden].square().mean(), rtol=1e-3, atol=1e-4
        )
    finest = F.adaptive_avg_pool3d(x.flatten(0, 1), 16 * max(found))
    torch.testing.assert_close(found[max(found)]["target"], finest, atol=1e-5, rtol=1e-5)


def test_of_scans_hidden_patches_are_not_encoded_by_default():
    """Exactly so: changing what is hidden changes no guess; nor for a dense student, which sees where nothing is."""
    assert make_scan().config.student.encode == "sparse" and make("mae").config.student.encode == "dense"
    for encode in ("sparse", "dense"):
        net, x, seen = make_scan("mae", **{"student.encode": encode}).eval(), scans().flatten(0, 1), []
        net.decoders["1"].register_forward_pre_hook(lambda _, given, to=seen: to.append(given[0].shape[1]))
        before = net.reconstruct(x, torch.Generator().manual_seed(0))[1]
        hidden = F.interpolate(before["hidden"], 32) > 0
        spoiled = torch.where(hidden, 1 - x, x)
        net.config = net.config.model_copy(deep=True)
        net.config.mae.normalise = False
        a, b = (net.reconstruct(y, torch.Generator().manual_seed(0))[1]["guess"] for y in (x, spoiled))
        assert torch.equal(a, b)
        assert set(seen) == {1 + (16 if encode == "sparse" else 64)}


def test_what_scans_are_hidden_of_is_watched_by_region():
    net, x = make_scan("mae"), scans()
    share = torch.zeros(4, 64)
    share[:, :8] = 1
    _, metrics = net(x, Clock(0, 10, 10), torch.Generator().manual_seed(0), {"lesion": share})
    _, hidden = net.choose(4, x.device, torch.Generator().manual_seed(0), Clock(0, 1, 1))
    assert metrics["hidden_lesion"] == (hidden < 8).float().sum() / 32


def test_places_and_tokens_of_scans_fit_together():
    x = torch.rand(2, 1, 24, 24, 24)
    assert torch.equal(from_patches(to_patches(x, 4), 6, 4, 3), x)
    numbers = torch.arange(64.0).view(1, 1, 4, 4, 4)
    coarse = F.interpolate(torch.arange(8.0).view(1, 1, 2, 2, 2), 4).flatten()
    for place in range(8):
        assert (
            finer(torch.tensor([[place]]), 2, 2, 3)[0].tolist() == numbers.flatten()[coarse == place].tolist()
        )
    net = make_scan()
    decoder, keep, tokens = net.decoders["2"], torch.tensor([[0, 5, 17, 63]]), torch.randn(1, 5, 24)
    grid = decoder.mask_token.expand(1, 64, -1).clone()
    grid[0, keep[0]] = tokens[0, 1:]
    fine = F.interpolate(grid.transpose(1, 2).unflatten(2, (4, 4, 4)), scale_factor=2, mode="trilinear")
    expected = fine.flatten(2).transpose(1, 2) + decoder.position
    torch.testing.assert_close(decoder.spread(tokens, keep)[:, 1:], expected)


def test_one_batch_of_scans_can_be_learned_by_heart():
    more = SCAN | {"method.preset": "mae", "mae.normalise": False, "data.view": 16, "data.region": 16}
    losses = overfit_one_batch(sl.load_config("primus-tiny", more), scans(1, 16), steps=120)
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize(
    ("preset", "size", "most"),
    [("miram-tiny", (1, 128, 128), 0.25), ("primus-tiny", (2, 1, 64, 64, 64), 0.3)],
)
def test_a_tiny_step_is_quick(preset, size, most):
    """Process time, so that what else the machine does is not counted."""
    config = sl.load_config(preset)
    net, x = MultiscaleMAE(config), torch.rand(config.train.batch, *size)
    spent = []
    for _ in range(4):
        start = time.process_time()
        step(net, x)[0].backward()
        spent.append(time.process_time() - start)
    assert min(spent) < most, spent


def stripes(n, seed):
    """Square waves of 8 pixels, upright or level, of four phases: their edges need more than half the resolution."""
    generator = torch.Generator().manual_seed(seed)
    phase = 1 + 2 * torch.randint(4, (n, 1), generator=generator)
    wave = ((torch.arange(64) + phase) % 8 < 4).float()[:, None, None, :].expand(n, 1, 64, 64)
    turned = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    return 0.2 + 0.6 * torch.where(turned, wave, wave.transpose(2, 3))


def train(net, steps, peak=3e-3):
    optimiser = torch.optim.AdamW(parameter_groups(net), lr=peak, weight_decay=0.0)
    for t in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1.0, (t + 1) / 20)
        loss, _ = step(net, stripes(8, seed=100 + t), seed=t)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


@pytest.mark.slow
def test_the_finer_scale_keeps_detail_that_an_enlarged_coarse_one_lacks():
    """After a short training: more high-frequency energy in hidden patches, and in the right places."""
    plain = {"mae.normalise": False, "encoder.patch": 8, "mae.landmarks": 8}
    mae, miram = train(make("mae", **plain), 200), train(make("miram", **plain), 200)
    x = stripes(8, seed=1)
    coarse = mae.reconstruct(x, torch.Generator().manual_seed(0))[1]
    fine = miram.reconstruct(x, torch.Generator().manual_seed(0))[2]
    target, hidden = fine["target"], fine["hidden"]
    blurred = detail(enlarged(coarse, 2), target, hidden, 16)
    sharp = detail(fine["guess"], target, hidden, 16)
    print(blurred, sharp)
    assert sharp["energy"] > 2 * blurred["energy"] and sharp["energy"] > 0.3
    assert sharp["agreement"] > 0.7


def test_the_spectral_measure_means_what_it_says():
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros_like(x)
    hidden[:, :, :, 32:] = 1
    same = detail(x, x, hidden, 16)
    assert abs(same["energy"] - 1) < 1e-6 and abs(same["agreement"] - 1) < 1e-6
    assert abs(detail(0.5 * x, x, hidden, 16)["energy"] - 0.25) < 1e-6
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bicubic")
    assert detail(blurred, x, hidden, 16)["energy"] < 0.1
    noise = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    found = detail(noise, x, hidden, 16)
    assert 0.7 < found["energy"] < 1.4 and abs(found["agreement"]) < 0.2
    elsewhere = torch.where(hidden > 0, x, noise)
    assert detail(elsewhere, x, hidden, 16) == same, "visible parts are not judged"
