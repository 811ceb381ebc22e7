"""Equal heads do not differ, disjoint heads differ fully, unrelated heads are not called aligned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from smartlab.core.clock import Clock
from smartlab.core.errors import UseError
from smartlab.data.crops.augment import window
from smartlab.data.crops.views import ViewDataset
from smartlab.evaluation.look.heads import alignment, heads, measure
from smartlab.methods.masked_distillation import MaskedDistillation
from smartlab.models.encoder import dropped_patches
from smartlab.models.reach import reach, spread
from smartlab.models.windows import WindowAttention
from tests.evaluation.attention_store import made_store, small_encoder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    scans = {f"p{i}": (rng.normal(40, 200, (32, 32, 32 if i else 40)), {}) for i in range(5)}
    return made_store(tmp_path_factory.mktemp("heads"), scans)


def maps(number: int, heads: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(number, heads, 64, generator=generator)
    return list(logits.softmax(-1).view(number, heads, 4, 4, 4))


PATIENTS = np.repeat([f"p{i}" for i in range(20)], 2)


def test_equal_heads():
    found = measure([a[:1].expand(3, 4, 4, 4) for a in maps(40, 1)], PATIENTS)
    assert found["cosine"].value == pytest.approx(0, abs=1e-6)
    assert found["jensen_shannon"].value == pytest.approx(0, abs=1e-6)
    assert found["cka"].value == pytest.approx(1)
    assert found["entropy:head 1"].value == found["entropy:head 3"].value


def test_disjoint_heads():
    a = torch.zeros(2, 64)
    a[0, :32], a[1, 32:] = 1 / 32, 1 / 32
    found = measure([a.view(2, 4, 4, 4)] * 4, np.array(list("abcd")))
    assert found["cosine"].value == pytest.approx(1, abs=1e-5)
    assert found["jensen_shannon"].value == pytest.approx(1, abs=1e-5)
    assert found["entropy"].value == pytest.approx(np.log(32) / np.log(64))
    assert found["informativeness"].value == pytest.approx(0, abs=1e-6)
    assert np.isnan(found["cka"].value)  # the same in every sample: nothing changes together


def test_alignment_is_of_changes_not_of_places():
    """A head that looks elsewhere but changes in the same way is aligned, an unrelated one is not."""
    one = torch.stack(maps(40, 1))[:, 0]
    elsewhere = torch.stack([one, one.flip(1, 2, 3)], 1)
    assert alignment(list(elsewhere), PATIENTS).value == pytest.approx(1)
    unrelated = alignment(maps(40, 4), PATIENTS)  # 64 units, 40 samples: the usual estimator gives about 0.4
    assert abs(unrelated.value) < 0.1
    assert unrelated.low < 0 < unrelated.high
    assert np.isnan(alignment(maps(3, 2), np.array(list("abc"))).value)


def test_alignment_agrees_with_the_sums_of_its_definition():
    """Song et al. 2012, equation 5, term by term."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n, ones = len(k), np.ones(len(k))
        middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return float((np.trace(k @ m) + middle - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3)))

    sample = maps(12, 2, seed=3)
    sample = [torch.stack([a[0], 0.7 * a[0] + 0.3 * a[1]]) for a in sample]
    k, m = (np.stack([a[h].flatten().double().numpy() for a in sample]) for h in (0, 1))
    k, m = k @ k.T, m @ m.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert alignment(sample, np.arange(12).astype(str)).value == pytest.approx(expected, rel=1e-4)


def test_over_a_cohort(store):
    result = heads(small_encoder(), store, views=1, draws=100, progress=False, noise=0.3)
    assert set(result.table.teacher) == {"clean", "noisy", "random"}
    assert result.metrics["cosine"].n == 5
    assert result.metrics["noisy cosine"].value != result.metrics["cosine"].value
    assert 0 < result.metrics["entropy:head 3"].value <= 1
    again = heads(small_encoder(), store, views=1, draws=100, progress=False, noise=0.3)
    assert again.metrics == result.metrics  # views, noise and draws follow from the seed
    plt.close(result.figure())


def test_stages_are_measured_as_the_paper_does_also_without_semantic_attention(store):
    """Entropy of attention distances for each of the four Swin stages, its variance over heads, the mean distance."""
    bare = small_encoder(semantic__enabled=False, mask__strategy="random")
    for encoder, semantic in ((small_encoder(), True), (bare, False)):
        result = heads(encoder, store, views=1, draws=50, progress=False)
        for stage in range(1, 5):
            entropy = result.metrics[f"reach entropy:stage {stage}"]
            assert 0 < entropy.value < np.log(30) and entropy.n == 5
            assert result.metrics[f"reach variance:stage {stage}"].value >= 0
        assert ("cosine" in result.metrics) == semantic
        plt.close(result.figure())


def test_a_heads_reach_by_hand():
    """Uniform attention over a line of three: distances 0, 1, 2 in 3, 4 and 2 of 9 cases; a head that looks at itself."""
    rows = torch.stack([torch.full((3, 3), 1 / 3), torch.eye(3)])
    entropy, distance = spread(rows, (3,), stride=4.0)
    p = np.array([3, 4, 2]) / 9
    assert entropy.numpy() == pytest.approx([-(p * np.log(p)).sum(), 0], abs=1e-6)
    assert distance.numpy() == pytest.approx([4 * 8 / 9, 0])


def test_reach_sees_what_the_encoder_attends_to(store):
    """Relative position biases that favour a token itself leave one distance."""
    encoder, x = small_encoder(), torch.rand(1, 1, 32, 32, 32)
    free, seen = reach(encoder, x)
    assert torch.equal(seen.cls, encoder(x).cls), "looking changes nothing"
    with torch.no_grad():
        for part in encoder.modules():
            if isinstance(part, WindowAttention):
                part.relative_position_bias_table[len(part.relative_position_bias_table) // 2] = 100.0
    held, _ = reach(encoder, x)
    for stage in free:
        assert held[stage].entropy.max() < 1e-3 < free[stage].entropy.min()
        assert held[stage].distance.max() < 1e-2


def test_whole_scans_of_different_sizes(store):
    result = heads(small_encoder(), store, sample="scans", draws=50, progress=False)
    assert "noisy cosine" not in result.metrics and np.isfinite(result.metrics["cka"].value)


def test_the_noisy_teacher_is_that_of_training(store):
    encoder = small_encoder(teacher__patch_dropout=0.4, method__preset="dagman")
    method = MaskedDistillation(encoder.config).eval()
    method.teacher.encoder.load_state_dict(encoder.state_dict())
    view = ViewDataset(store, region=32, view=32, views=1)[0]["views"]
    x = window(torch.from_numpy(view)[None], *encoder.config.data.window)
    _, seen = method.look(x, Clock(0, 1, 1), torch.Generator().manual_seed(7))
    dropped = dropped_patches(encoder, x, 0.4, torch.Generator().manual_seed(7))
    assert dropped.float().mean() == pytest.approx(0.4, abs=0.15)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, dropped=dropped).attention, seen.attention)


def test_a_run_gives_a_curve_over_its_checkpoints(store, tmp_path):
    """Two checkpoints of the same weights: the same numbers at both steps."""
    from smartlab import Run
    from smartlab.training import checkpoint

    encoder = small_encoder()
    encoder.config.save(tmp_path / "config.yaml")
    weights = {f"teacher.encoder.{k}": v for k, v in encoder.state_dict().items()}
    for step in (10, 20):
        checkpoint.save(tmp_path, step, weights, {}, {})
    result = heads(Run(tmp_path), store, views=1, draws=50, progress=False)
    clean = result.table[(result.table.teacher == "clean") & (result.table.measure == "cosine")]
    assert clean.step.tolist() == [10, 20]
    assert clean.value.nunique() == 1
    assert result.metrics["cosine"].value == clean.value.iloc[-1]
    plt.close(result.figure())


def test_bad_requests_say_what_is_wrong(store):
    with pytest.raises(UseError, match="no semantic attention"):
        heads(small_encoder(semantic__enabled=False, mask__strategy="random"), store, sample="scans")
    with pytest.raises(UseError, match="one head"):
        heads(small_encoder(semantic__heads=1), store)
    with pytest.raises(UseError, match="views or scans"):
        heads(small_encoder(), store, sample="crops")
