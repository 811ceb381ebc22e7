"""One step does what the papers' notes say, and each published defect stays out."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import smartlab as sl
from smartlab.core.clock import Clock
from smartlab.core.settings import TeacherConfig, TrainConfig
from smartlab.masking import informativeness, upsample
from smartlab.methods.distillation import (
    Centre,
    Standardise,
    centred,
    feature_signs,
    prototype_loss,
    sinkhorn,
)
from smartlab.methods.masked_distillation import MaskedDistillation
from smartlab.models.encoder import dropped_patches
from smartlab.training.schedules import cosine, learning_rate, momentum
from smartlab.training.setup import parameter_groups
from tests.methods.overfit import overfit_one_batch

SMALL = {
    "encoder.preset": "custom",
    "encoder.embed_dim": 8,
    "encoder.num_heads": [1, 2, 2, 2],
    "semantic.heads": 2,
    "data.view": 32,
    "data.region": 48,
    "distill.hidden": 32,
    "distill.bottleneck": 16,
    "distill.prototypes": 32,
    # the method itself, without what the tiny preset adds for small batches
    "mask.warmup_epochs": 0,
    "semantic.similarity": "dot",
    "semantic.registers": 0,
    "distill.standardise": False,
    "loss.coarse": 0.0,
}
METHODS = ("simmim", "smit", "smart", "dagman", "ibot", "attmask", "mst")
START = Clock(0, 100, 10)


def make(method="dagman", **more):
    torch.manual_seed(0)
    return MaskedDistillation(sl.load_config("tiny", SMALL | {"method.preset": method} | more))


def views(n=2, side=32):
    return torch.rand(n, 2, 1, side, side, side, generator=torch.Generator().manual_seed(1))


def step(net, x=None, clock=None, seed=0):
    return net(views() if x is None else x, clock or Clock(0, 100, 10), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
def test_the_four_methods_are_settings_of_one_class(method):
    net = make(method)
    loss, metrics = step(net)
    loss.backward()
    assert torch.isfinite(loss) and type(net) is MaskedDistillation
    assert (net.teacher is None) == (method == "simmim")
    assert (net.student.encoder.semantic is None) == (method in ("simmim", "smit"))
    assert {"loss_ampd", "loss_itd"} <= metrics.keys() or method == "simmim"
    assert ("loss_gitd" in metrics) == (method in ("smart", "dagman"))


@pytest.mark.parametrize("preset", ["dagman", "smart", "swinunetr"])
def test_the_presets_are_the_papers(preset):
    """METHODS, section 1: what the paper states, in the presets that carry its name."""
    c = sl.load_config(preset)
    assert (c.mask.strategy, c.mask.ratio, c.mask.hint, c.mask.hint_from) == (
        "attention_hint",
        0.7,
        0.1,
        "top",
    )
    assert (c.mask.fill, c.mask.informativeness, c.mask.warmup_epochs) == ("zero", 0, 0)
    assert (c.teacher.guide, c.teacher.patch_dropout, c.teacher.dropout_unit) == ("clean", 0.7, "token")
    assert (c.semantic.stage, c.semantic.blocks, c.semantic.kind) == (3, 2, "full")
    assert c.distill.patch_from == "stage" and c.distill.cross_view
    assert (c.loss.amip, c.loss.patch, c.loss.image, c.loss.global_image) == (1, 0.1, 0.1, 0.1)
    assert (c.train.lr, c.train.lr_times, c.train.warmup, c.data.spacing) == (8e-4, "one", 0.1, 2.0)
    e = c.encoder
    assert e.drop_path == 0.1
    if preset != "swinunetr":
        assert (e.embed_dim, e.depths, e.num_heads) == (48, (2, 2, 8, 2), (4, 4, 8, 16))
        assert (e.window_size, e.patch, c.data.view) == (4, 2, 128)


def test_the_loss_is_the_weighted_sum_of_its_terms():
    net = make(**{"loss.patch": 0.3, "loss.image": 0.7, "loss.global_image": 0.2})
    loss, m = step(net)
    terms = m["loss_amip"] + 0.3 * m["loss_ampd"] + 0.7 * m["loss_itd"] + 0.2 * m["loss_gitd"]
    torch.testing.assert_close(loss.detach(), terms)


@pytest.mark.parametrize(
    "change",
    [
        {"semantic.kind": "class"},
        {"semantic.enabled": False, "mask.strategy": "random"},
        {"mask.strategy": "attention_low"},
        {"mask.importance": "received"},
        {"teacher.patch_dropout": 0.0},
        {"teacher.dropout_unit": "mask_unit"},
        {"teacher.guide": "noisy"},
        {"semantic.stage": 1},
        {"semantic.stage": 3},
        {"mask.fill": "token"},
        {"mask.hint_from": "any"},
        {"mask.hint_refill": False},
        {"mask.p_attention": 0.5, "mask.otherwise": "unmasked"},
        {"mask.ratio_min": 0.1},
        {"distill.patch_from": "semantic"},
        {"loss.global_image": 0.0},
        {"teacher.noise_std": 0.1},
        {"distill.kind": "prototype"},
        {"distill.kind": "prototype", "distill.assignment": "sinkhorn"},
        {"distill.kind": "prototype", "distill.share_heads": True},
        {"distill.cross_view": False},
        {"distill.standardise": True},
        {"semantic.similarity": "cosine"},
        {"semantic.position": False},
        {"semantic.registers": 2},
        {"loss.coarse": 1.0},
        {"loss.patch": 0.0},
        {"loss.image": 0.0, "loss.coarse": 1.0},
        {"loss.amip": 0.0},
    ],
    ids=str,
)
def test_every_factor_can_be_switched_alone(change):
    free = {"mask.informativeness": 0.0, "mask.hint": 0.2}
    reference, changed = make(**free), make(**free | change)
    (a, _), (b, _) = step(reference), step(changed)
    b.backward()
    assert torch.isfinite(b) and a.detach() != b.detach()


def test_the_teacher_starts_as_the_student_and_follows_it():
    net = make()
    for theirs, ours in zip(net.teacher.parameters(), net.student.parameters(), strict=True):
        assert torch.equal(theirs, ours) and not theirs.requires_grad and theirs is not ours
    before = [p.clone() for p in net.teacher.parameters()]
    with torch.no_grad():
        for p in net.student.parameters():
            p.add_(1.0)
    net.update_teacher(0.9)
    for old, new in zip(before, net.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


def test_momentum_is_one_cosine_over_all_steps():
    train, teacher = TrainConfig(steps=1000), TeacherConfig()
    values = [momentum(t, train, teacher) for t in range(1000)]
    assert values[0] == 0.996 and values[-1] == 1.0
    assert all(b >= a for a, b in pairwise(values)), "it never restarts"
    middle = 1 - (1 - 0.996) * (math.cos(math.pi * 500 / 999) + 1) / 2
    assert values[500] == pytest.approx(middle)
    assert cosine(0, 10, 3.0, 1.0) == 3.0 and cosine(9, 10, 3.0, 1.0) == 1.0


@pytest.mark.parametrize("guide", ["clean", "noisy"])
def test_one_call_of_the_teacher_gives_masks_and_targets(guide, monkeypatch):
    """Undamaged views, which guide, and noisy ones, which teach, share the call; only these go on behind SA."""
    net = make(**{"mask.informativeness": 0.0, "mask.strategy": "attention_high", "teacher.guide": guide})
    passes, hidden = [], []
    look, encode = net.teacher.encoder.forward, net.student.encoder.forward
    monkeypatch.setattr(
        net.teacher.encoder, "forward", lambda *a, **k: passes.append(look(*a, **k)) or passes[-1]
    )
    monkeypatch.setattr(
        net.student.encoder, "forward", lambda *a, **k: hidden.append(k["hidden"]) or encode(*a, **k)
    )
    step(net)
    assert len(passes) == 1 and len(hidden) == 1
    assert len(passes[0].attention) == (8 if guide == "clean" else 4)
    assert len(passes[0].stages[-1]) == 4
    importance, mask = passes[0].importance.mean(1)[:4], hidden[0]
    for row, chosen in zip(importance, mask, strict=True):
        assert row[chosen].min() >= row[~chosen].max(), "the student's mask is the teacher's top attention"


def test_what_guides_has_seen_undamaged_views_and_what_teaches_has_not():
    net, x = make(), views().flatten(0, 1)
    guide, taught = net.look(x, START, torch.Generator().manual_seed(0))
    clean = net.teacher.encoder(x)
    torch.testing.assert_close(guide.attention, clean.attention)
    assert not torch.allclose(taught.attention, clean.attention)
    dropped = net._noise(x, START, torch.Generator().manual_seed(0))[1]
    noisy = net.teacher.encoder(x, dropped=dropped)
    for name in ("attention", "units", "cls", "pooled"):
        torch.testing.assert_close(getattr(taught, name), getattr(noisy, name))
    for change in ({"teacher.patch_dropout": 0.0}, {"teacher.guide": "noisy"}):
        guide, taught = make(**change).look(x, START, torch.Generator().manual_seed(0))
        assert guide is taught, "one look serves both"


def test_patch_tokens_are_matched_before_semantic_attention():
    """AMPD trains nothing of the semantic block; by setting (the old behaviour) it does."""
    for where, trained in (("stage", False), ("semantic", True)):
        net, x = make(**{"distill.patch_from": where}), views().flatten(0, 1)
        hidden = torch.rand(4, 64).argsort(-1) < 45
        seen = net.student.encoder(x, hidden=hidden)
        net.match_tokens(seen, net.teacher.encoder(x), hidden, START)[0].backward()
        grads = [p.grad for p in net.student.encoder.semantic.parameters() if p.grad is not None]
        assert any(g.abs().sum() > 0 for g in grads) == trained


def test_hidden_tokens_are_nothing_and_have_no_parameter():
    net, x = make(), views().flatten(0, 1)
    assert not any("mask_token" in name for name, _ in net.named_parameters())
    hidden = torch.rand(4, 64) < 0.7
    voxels = upsample(hidden, (4, 4, 4), 8)[:, None]
    embed = net.student.encoder.swin.patch_embed.proj
    blank = embed.bias.detach()  # a voxel patch of zeros is embedded as the bias: take that away too
    seen = net.student.encoder(x, hidden=hidden).stages[0]
    assert (seen[upsample(hidden, (4, 4, 4), 4)] == 0).all()
    assert torch.equal(seen, net.student.encoder(x.masked_fill(voxels, 0.3), hidden=hidden).stages[0])
    assert blank.abs().sum() > 0


@pytest.mark.parametrize("unit", ["token", "mask_unit"])
def test_dropped_tokens_are_nothing_too(unit):
    net, x = make(**{"teacher.dropout_unit": unit}), views().flatten(0, 1)
    dropped = dropped_patches(net.teacher.encoder, x, 0.7, torch.Generator().manual_seed(0))
    seen = net.teacher.encoder(x, dropped=dropped)
    voxels = dropped.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
    other = net.teacher.encoder(x.masked_fill(voxels, 0.3), dropped=dropped)
    assert (seen.stages[0][dropped] == 0).all() and (seen.stages[0][~dropped] != 0).any()
    assert torch.equal(seen.cls, other.cls) and torch.equal(seen.stages[-1], other.stages[-1])


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_semantic_attention_is_a_side_branch_behind_any_stage(stage):
    net = make(**{"semantic.stage": stage, "data.view": 64, "data.region": 64}).eval()
    encoder, x = net.student.encoder, views(1, 64).flatten(0, 1)
    out = encoder(x)
    assert out.attention.shape[-1] == (64 // encoder.config.unit) ** 3 == (32 // 2**stage) ** 3
    with torch.no_grad():
        for p in encoder.semantic.parameters():
            p.add_(0.1)
    loss, told = step(net, views(1, 64))
    assert torch.isfinite(loss) and {"loss_itd", "loss_gitd", "loss_ampd"} <= told.keys()
    other = net.student.encoder.eval()(x)
    assert all(torch.equal(a, b) for a, b in zip(out.stages, other.stages, strict=True))
    assert not torch.equal(out.cls, other.cls)


def test_gitd_pools_the_last_stage_across_views(monkeypatch):
    net = make(**{"distill.kind": "regression"})
    seen = {}
    match = net.match_images
    monkeypatch.setattr(net, "match_images", lambda which, *a: seen.update({which: a}) or match(which, *a))
    _, metrics = step(net)
    said, taught, _ = seen["global"]
    assert said.shape[-1] == taught.shape[-1] == net.student.encoder.stage_channels[-1]
    head = net.student.global_head(said).detach()
    across = torch.stack([taught[1], taught[0], taught[3], taught[2]]).float()
    expected = (2 - 2 * torch.nn.functional.cosine_similarity(head, across)).mean()
    torch.testing.assert_close(metrics["loss_gitd"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["image", "global"])
def test_prototypes_of_image_tokens_are_those_of_the_other_view(which):
    """Cross-entropy with the teacher's softmax, centred and at its own temperature, written out."""
    net = make(**{"distill.kind": "prototype", "teacher.temperature_start": 0.03})
    width = net.student.encoder.channels if which == "image" else net.student.encoder.stage_channels[-1]
    said, taught = torch.randn(2, 4, width)
    centre = net.centres[which].value.copy_(0.02 * torch.randn(32))
    before = centre.clone()
    loss, _ = net.match_images(which, said, taught, START)
    student, teacher = (getattr(part, f"{which}_head") for part in (net.student, net.teacher))
    target = ((teacher(taught) - before) / 0.03).softmax(-1)
    log = (student(said) / net.config.distill.student_temperature).log_softmax(-1)
    across, same = (-(t * log).sum(-1).mean() for t in (target[[1, 0, 3, 2]], target))
    torch.testing.assert_close(loss, across, rtol=1e-4, atol=1e-5)
    assert abs(same - across) > 1e-3 and not torch.equal(centre, before)


def test_the_temperature_of_the_teacher_warms_up_by_epochs():
    net = make(
        **{"teacher.temperature_start": 0.04, "teacher.temperature": 0.08, "teacher.temperature_epochs": 4}
    )
    found = [net.teacher_temperature(Clock(step, 100, 10)) for step in (0, 20, 40, 90)]
    assert found == pytest.approx([0.04, 0.06, 0.08, 0.08])


def test_masks_follow_the_softmax_over_all_keys():
    """A head that looks at [CLS] itself tells little of the patches, and counts little."""
    net = make(**{"mask.strategy": "attention_high", "mask.informativeness": 0.0, "mask.ratio": 0.5})
    x = views().flatten(0, 1)
    guide, _ = net.look(x, START, torch.Generator().manual_seed(0))
    units = guide.attention.shape[-1]
    up = (torch.arange(units) / 8).softmax(0)
    guide = guide._replace(
        attention=torch.stack([up, up.flip(0)]).expand(len(x), 2, units),
        share=torch.tensor([0.4, 0.5]).log().expand(len(x), 2),
    )
    hidden = net.choose(guide, x, START, torch.Generator().manual_seed(0))
    weight = 0.4 * up + 0.5 * up.flip(0)
    torch.testing.assert_close(guide.importance.mean(1)[0], weight / weight.sum())
    assert torch.equal(hidden, (weight >= weight.median() + 1e-9).expand_as(hidden))


def test_the_rate_warms_up_and_counts_the_batch_only_where_asked():
    train = TrainConfig(steps=100, warmup=0.1, lr=0.5, lr_end=0.0, lr_times="one")
    rates = [learning_rate(step, train, 8) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert max(rates) == rates[9] and rates[-1] == 0 and all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(9, train.model_copy(update={"lr_times": "batch"}), 8) == 4.0


def test_the_guard_compares_with_an_untrained_network_for_a_while():
    """Not an absolute number, and not one lucky step."""
    net = make(**{"mask.informativeness": 1.5})
    seen, _ = net.look(views().flatten(0, 1), START, torch.Generator().manual_seed(0))
    for _ in range(12):
        net._inform(seen.attention)
    first = float(net.untrained)
    assert first == pytest.approx(float(informativeness(seen.attention).mean()), rel=1e-4)
    assert not net.guides(START)
    sharp = (1.6 * seen.attention.log()).softmax(-1)
    net._inform(sharp)
    assert not net.guides(START), "one step is not enough"
    for _ in range(150):
        net._inform(sharp)
    assert net.guides(START) and float(net.untrained) == pytest.approx(first)
    assert net.told(START, 0.9)["attention_gain"] > 1.5


def test_targets_of_regression_are_standardised_by_channel_and_their_constant_part_is_told():
    """Uncentred targets are mostly the same everywhere, and the number that says so is logged."""
    plain, scaled = (make(**{"distill.standardise": on}) for on in (False, True))
    for _ in range(30):
        told = [step(net)[1]["token_constant"] for net in (plain, scaled)]
    assert told[0] > 0.5 and told[1] < 0.2


def test_stochastic_depth_is_the_students_alone():
    """Two looks of a clean teacher at the same views are the same, whatever `encoder.drop_path`."""
    net = make(**{"encoder.drop_path": 0.5, "teacher.patch_dropout": 0.0}).train()
    x = views().flatten(0, 1)
    a, b = (net.look(x, START, torch.Generator().manual_seed(0))[0] for _ in range(2))
    assert torch.equal(a.cls, b.cls) and torch.equal(a.attention, b.attention)
    assert not torch.equal(net.student.encoder(x).cls, net.student.encoder(x).cls)


def test_the_guard_judges_the_map_that_guides():
    net = make(**{"mask.informativeness": 1.5, "mask.importance": "received"})
    seen, _ = net.look(views().flatten(0, 1), START, torch.Generator().manual_seed(0))
    for sharpness in (1, *[1000] * 60):  # of the [CLS] row, which guides nothing here
        sharp = seen._replace(attention=(sharpness * seen.attention.log()).softmax(-1))
        net.choose(sharp, views().flatten(0, 1), START, torch.Generator().manual_seed(0))
    assert not net.guides(START)


def test_no_gradient_reaches_the_teacher_and_the_student_learns_everywhere():
    net = make(**{"distill.kind": "prototype", "mask.informativeness": 0.0})
    loss, _ = step(net)
    loss.backward()
    assert all(p.grad is None for p in net.teacher.parameters())
    untouched = [n for n, p in net.student.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert untouched == []


def test_guided_masks_wait_until_attention_means_something():
    """The guard: attention like an untrained network's leaves the masks random; informative attention takes over."""
    net = make(**{"mask.informativeness": 1.5, "mask.strategy": "attention_high"})
    seen, _ = net.look(views().flatten(0, 1), START, torch.Generator().manual_seed(0))
    sharp = seen._replace(attention=(40 * seen.attention.log()).softmax(-1))

    def share_hidden(teacher, clock):
        mask = net.choose(teacher, views().flatten(0, 1), clock, torch.Generator().manual_seed(3))
        top = teacher.importance.mean(1).topk(int(mask[0].sum()), -1).indices
        return mask.gather(1, top).float().mean()

    for _ in range(10):
        assert share_hidden(seen, START) < 0.95 and not net.guides(START)
    for _ in range(60):
        found = share_hidden(sharp, START)
    assert found == 1.0 and net.guides(START)
    late = make(**{"mask.informativeness": 0.0, "mask.warmup_epochs": 2})
    assert not late.guides(Clock(19, 100, 10)) and late.guides(Clock(20, 100, 10))


@pytest.mark.parametrize("unit", ["token", "mask_unit"])
def test_the_noisy_teacher_drops_the_stated_share_of_patches(unit, monkeypatch):
    net = make(**{"teacher.patch_dropout": 0.3, "teacher.dropout_unit": unit})
    seen = []
    original = net.teacher.encoder.forward
    monkeypatch.setattr(
        net.teacher.encoder, "forward", lambda *a, **k: seen.append(k["dropped"]) or original(*a, **k)
    )
    for seed in range(6):
        net.look(views(8).flatten(0, 1), START, torch.Generator().manual_seed(seed))
    assert not torch.stack(seen)[:, :16].any(), "the views that guide stay whole"
    dropped = torch.stack(seen)[:, 16:]
    assert abs(dropped.float().mean() - 0.3) < 0.03
    blocks = dropped.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).float().mean((-3, -2, -1))
    assert ((blocks == 0) | (blocks == 1)).all() == (unit == "mask_unit")


def test_amip_counts_hidden_voxels_only():
    net = make("simmim")
    x = views().flatten(0, 1)
    hidden = torch.zeros(4, 64, dtype=torch.bool)
    hidden[:, :10] = True
    seen = net.student.encoder(x, hidden=hidden)
    changed = x.clone()
    changed[..., 16:, :, :] += 5.0  # units 0 to 9 lie in the first quarter along the first axis
    assert torch.equal(net.predict_voxels(seen, x, hidden), net.predict_voxels(seen, changed, hidden))


def test_heads_see_hidden_tokens_only(monkeypatch):
    net = make(**{"distill.kind": "prototype"})
    shapes = []
    forward = net.student.patch_head.forward
    monkeypatch.setattr(net.student.patch_head, "forward", lambda t: shapes.append(t.shape) or forward(t))
    step(net)
    assert shapes == [(4, math.ceil(0.7 * 64), net.student.encoder.channels)]


def test_softmax_centres_and_losses_stay_in_fp32_under_autocast():
    net = make(**{"distill.kind": "prototype", "mask.informativeness": 0.0})
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = step(net)
    exact, _ = step(make(**{"distill.kind": "prototype", "mask.informativeness": 0.0}))
    assert loss.dtype == torch.float32 and net.centres["image"].value.dtype == torch.float32
    assert all(v.dtype == torch.float32 for k, v in metrics.items() if k.startswith("loss"))
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    head = net.student.image_head
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(torch.randn(64, net.student.encoder.channels))
    assert logits.dtype == torch.float32 and len(logits.unique()) > 0.9 * logits.numel()


@pytest.mark.parametrize("method", ["simmim", "dagman"])
def test_every_method_tells_how_much_features_spread(method):
    metrics = step(make(method))[1]
    assert metrics["feature_std"] > 0 and metrics["effective_rank"] > 1
    alone = feature_signs(torch.randn(2, 8))
    assert alone["effective_rank"].isnan(), "two views always lie on one line"


def test_what_guides_masks_is_what_is_watched():
    """With importance=received the [CLS] row guides nothing."""
    net = make(**{"mask.importance": "received"})
    seen, _ = net.look(views().flatten(0, 1), Clock(0, 10, 5), torch.Generator().manual_seed(0))
    found = net.watch(seen, seen, torch.zeros(seen.received.shape, dtype=torch.bool), {})
    torch.testing.assert_close(
        found["attention_informativeness"], informativeness(seen.received[:, None]).mean()
    )


def test_sinkhorn_uses_every_prototype_equally_and_centring_sharpens():
    logits = torch.randn(64, 8) + torch.arange(8)  # one prototype dominates
    q = sinkhorn(logits, 0.5, rounds=20)
    torch.testing.assert_close(q.sum(-1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), rtol=0.05, atol=0)
    p = centred(logits, logits.mean(0), 0.5)
    assert (p.argmax(-1).bincount(minlength=8) > 0).sum() >= 6
    uniform = torch.full((3, 8), 1 / 8)
    assert prototype_loss(torch.zeros(3, 8), uniform, 0.1) == pytest.approx(math.log(8))


def test_centres_are_running_means():
    centre = Centre(4, 0.9)
    for _ in range(200):
        centre.update(torch.ones(5, 3, 4) * torch.tensor([1.0, 2, 3, 4]))
    torch.testing.assert_close(centre.value, torch.tensor([1.0, 2, 3, 4]))
    centre.update(torch.full((1, 4), float("nan")))
    assert torch.isfinite(centre.value).all()


def test_standardised_tokens_have_no_constant_and_unit_spread():
    scale = Standardise(6)
    torch.manual_seed(0)
    for _ in range(400):
        out = scale(5 + 0.05 * torch.randn(8, 6))
    assert out.mean().abs() < 0.5 and abs(scale.variance.sqrt().mean() - 0.05) < 0.01
    before = scale.mean.clone()
    scale(torch.full((8, 6), float("nan")))
    assert torch.equal(scale.mean, before)
    scale.eval()(torch.zeros(8, 6))
    assert torch.equal(scale.mean, before), "evaluation moves nothing"


def test_weight_decay_skips_norms_biases_and_single_tokens():
    net = make(**{"distill.kind": "prototype", "semantic.similarity": "cosine"})
    names = {id(p): n for n, p in net.named_parameters()}
    decayed, spared = ([names[id(p)] for p in group["params"]] for group in parameter_groups(net))
    assert not any(
        "norm" in n or n.endswith(("bias", "bias_table", "cls", "mask_token", "log_scale")) for n in decayed
    )
    assert all(n.endswith("weight") or n.endswith("last") for n in decayed) and len(spared) > 20
    assert not any(n.startswith("teacher") for n in decayed + spared)


@pytest.mark.slow
def test_one_batch_can_be_learnt_by_heart():
    """One batch of smooth views and one mask: the error falls below 0.04 of the window's width."""
    x = torch.rand(1, 2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(x.flatten(0, 1), size=(32, 32, 32), mode="trilinear").view(
        1, 2, 1, 32, 32, 32
    )
    history = overfit_one_batch(sl.load_config("tiny", SMALL | {"method.preset": "simmim"}), x, steps=300)
    assert history[-1] < 0.04 < history[0]


def test_a_sparse_student_learns_from_masked_units_without_looking_at_them():
    """`student.encode=sparse`: same losses and parameters, another function; voxels of masked units play no part."""
    more = {"semantic.stage": 3, "data.view": 64, "data.region": 80}
    dense, sparse = make(**more), make(**more, **{"student.encode": "sparse"})
    assert dense.state_dict().keys() == sparse.state_dict().keys()
    x = views(1, 64)
    losses = [step(net, x)[1] for net in (dense, sparse)]
    assert losses[0].keys() == losses[1].keys()
    assert float(losses[0]["loss_amip"]) != float(losses[1]["loss_amip"])
    loss, _ = step(sparse, x)
    loss.backward()
    for name, parameter in sparse.student.encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    encoder, hidden = sparse.student.encoder, torch.rand(2, 64) < 0.7
    voxels = hidden.view(2, 1, 4, 4, 4)
    for axis in (2, 3, 4):
        voxels = voxels.repeat_interleave(16, axis)
    first = encoder(x.flatten(0, 1), hidden=hidden).stages[-1]
    other = encoder(torch.where(voxels, 0.5, x.flatten(0, 1)), hidden=hidden).stages[-1]
    torch.testing.assert_close(first, other)


def test_a_sparse_student_overfits_one_batch():
    settings = SMALL | {"method.preset": "simmim", "student.encode": "sparse"}
    losses = overfit_one_batch(sl.load_config("tiny", settings), views(), steps=60)
    assert losses[-1] < 0.8 * losses[0]


def test_a_sparse_student_is_refused_where_it_means_nothing():
    with pytest.raises(sl.UseError, match=r"student.encode=sparse is for Swin"):
        sl.load_config("miram-tiny", {"student.encode": "sparse"})
    with pytest.raises(sl.UseError, match=r"student.encode=sparse of a ViT leaves hidden tokens out"):
        sl.load_config("primus-tiny", {"method.preset": "simmim", "student.encode": "sparse"})


PRIMUS = {
    "encoder.embed_dim": 24,
    "encoder.blocks": 2,
    "encoder.heads": 2,
    "data.view": 32,
    "data.region": 48,
}


def make_vit(method="dagman", **more):
    torch.manual_seed(0)
    settings = PRIMUS | {"method.preset": method, "distill.hidden": 32, "distill.bottleneck": 16} | more
    return MaskedDistillation(sl.load_config("primus-tiny", settings))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_vision_transformer(method):
    """One step teaches every weight of the student, and no semantic attention is needed for any mask."""
    net = make_vit(method)
    assert net.student.encoder.semantic is None and net.config.unit == 8
    loss, metrics = step(net)
    loss.backward()
    assert torch.isfinite(loss) and metrics["head_diversity"] > 0
    weights = net.student.encoder.named_parameters()
    assert [name for name, p in weights if p.grad is None or not p.grad.abs().sum()] == []


@pytest.mark.parametrize(
    "change",
    [
        {"semantic.enabled": True},
        {"encoder.registers": 2},
        {"encoder.cls_token": False, "mask.strategy": "random"},
        {"mask.importance": "received"},
        {"mask.fill": "token"},
        {"teacher.guide": "noisy"},
        {"encoder.layer_scale": None},
        {"encoder.inner_norm": False},
    ],
    ids=str,
)
def test_every_factor_of_a_vision_transformer_can_be_switched_alone(change):
    free = {"mask.strategy": "attention_high"}
    (a, _), (b, _) = (step(make_vit(**free | more)) for more in ({}, change))
    b.backward()
    assert torch.isfinite(b) and a.detach() != b.detach()


def test_the_masks_of_a_vision_transformer_follow_the_last_blocks_own_cls(monkeypatch):
    """The teacher's attention on undamaged views: what it attends to most is hidden."""
    net, hidden = make_vit(**{"mask.strategy": "attention_high"}), []
    encode = net.student.encoder.forward
    monkeypatch.setattr(
        net.student.encoder, "forward", lambda *a, **k: hidden.append(k["hidden"]) or encode(*a, **k)
    )
    step(net)
    importance = net.teacher.encoder(views().flatten(0, 1)).importance.mean(1)
    for row, chosen in zip(importance, hidden[0], strict=True):
        assert row[chosen].min() >= row[~chosen].max()
    taught = net.look(views().flatten(0, 1), START, torch.Generator().manual_seed(0))[1]
    assert not torch.allclose(taught.importance.mean(1), importance), "what teaches has missed most patches"
