"""The loop of fine-tuning: nothing is lost, the encoder is treated as asked, the best weights are kept."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.data.crops.loader import GivenUp
from smartlab.data.crops.views import CropDataset
from smartlab.evaluation.finetune.classifier import Classifier
from smartlab.evaluation.finetune.draws import rounds
from smartlab.evaluation.finetune.layers import layer_groups, place_of
from smartlab.evaluation.finetune.settings import make_settings
from smartlab.evaluation.finetune.trainer import Lesson, Stopped, fit, hold_out
from smartlab.models.build import make_encoder
from smartlab.models.encoder import Encoder
from smartlab.training import checkpoint
from smartlab.training.engine import Engine

TINY = {  # SwinUNETR needs a multiple of 12 channels
    "data.region": 32,
    "data.view": 32,
    "encoder.embed_dim": 12,
    "encoder.num_heads": [1, 2, 4, 4],
    "encoder.drop_path": 0.1,
    "semantic.heads": 2,
}
QUICK = {"steps": 8, "batch": 2, "validate_every": 2, "checkpoint_every": 3, "head_only": 0.25, "warmup": 0.2}


class Noise(CropDataset):
    """Bright and dark cubes; item i follows from i."""

    def __init__(self, items):
        self.items, self.fields = items, {"crop": ((32, 32, 32), np.int16)}

    def __len__(self):
        return self.items

    def read(self, epoch, index, out):
        out["crop"][:] = np.random.default_rng(index).normal(100 * (index % 2), 50, (32, 32, 32))
        return {"row": index % 2}


def make_model():
    torch.manual_seed(0)
    return Classifier(Encoder(sl.load_config("tiny", TINY)), 2)


def loss_for(model):
    def loss(batch, generator):
        x = batch["crop"].float()[:, None] / 200 + 0.05 * torch.randn(1, generator=generator)
        return torch.nn.functional.cross_entropy(model(x), torch.as_tensor(batch["row"]))

    return loss


def run(out, mode="full", model=None, validate=None, loss=None, facts=None, resume=False, **settings):
    model = model or make_model()
    chosen = make_settings(**(QUICK | settings))
    lesson = Lesson(
        model=model,
        data=Noise(chosen.steps * chosen.batch),
        loss=loss or loss_for(model),
        mode=mode,
        encoder="encoder.",
        facts=facts or {"data": "noise"},
        validate=validate,
    )
    return model, fit(lesson, out, chosen, seed=3, resume=resume, progress=False)


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("hung", [False, True], ids=["asked", "asked while the disk hangs"])
def test_stopping_in_the_middle_changes_nothing(tmp_path, monkeypatch, hung):
    def give_up(*given):
        raise GivenUp("a loader worker does not answer")

    scores = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.3}

    def one(out, stop, resume=False):
        if stop:
            original = Engine.one_step

            def step(self):
                if self.step == 4 and not hung:
                    self.requests.asked = "stop"
                metrics = original(self)
                if self.step == 4 and hung:
                    self.loader.indices = give_up
                return metrics

            monkeypatch.setattr(Engine, "one_step", step)
        model, looked = make_model(), iter([scores[s] for s in ((6, 8) if resume else (2, 4, 6, 8))])
        try:
            return run(out, model=model, validate=lambda: next(looked), resume=resume)
        finally:
            monkeypatch.undo()

    whole, fitted = one(tmp_path / "whole", False)
    with pytest.raises(Stopped) as stopped:
        one(tmp_path / "stopped", True)
    assert stopped.value.code == 0 and stopped.value.step == 5
    resumed, again = one(tmp_path / "stopped", False, resume=True)
    pd.testing.assert_frame_equal(fitted.history, again.history, check_exact=True)
    assert same(whole, resumed) and fitted.step == again.step == 4 and fitted.score == 0.5
    read = pd.read_csv(tmp_path / "stopped" / "history.csv", float_precision="round_trip")
    pd.testing.assert_frame_equal(read, fitted.history, check_exact=True)


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    first, fitted = run(tmp_path)
    monkeypatch.setattr(Engine, "one_step", lambda *_: pytest.fail("trained again"))
    second, again = run(tmp_path, resume=True)
    assert same(first, second) and again.step == fitted.step == 8
    pd.testing.assert_frame_equal(fitted.history, again.history, check_exact=True)


def test_a_run_that_did_not_note_where_the_loader_was_goes_on(tmp_path):
    """As those of 0.1."""
    whole, fitted = run(tmp_path)
    shutil.rmtree(checkpoint.folder(tmp_path, 8))
    path = checkpoint.folder(tmp_path, 6) / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["loader"]
    torch.save(state, path)
    resumed, again = run(tmp_path, resume=True)
    assert same(whole, resumed)
    pd.testing.assert_frame_equal(fitted.history, again.history, check_exact=True)


@pytest.mark.parametrize(("mode", "still"), [("full", 2), ("frozen", 8), ("scratch", 0)])
def test_the_encoder_stands_still_for_as_long_as_asked(tmp_path, mode, still):
    model = make_model()
    before = {k: v.clone() for k, v in model.named_parameters()}
    changed = []
    inner = loss_for(model)

    def loss(batch, generator):
        changed.append(
            any(not torch.equal(v, before[k]) for k, v in model.named_parameters() if k.startswith("enc"))
        )
        return inner(batch, generator)

    run(tmp_path, mode, model, loss=loss)
    moved = any(
        not torch.equal(v, before[k]) for k, v in model.named_parameters() if k.startswith("encoder.")
    )
    assert [*changed, moved] == [False] * (still + 1) + [True] * (8 - still)
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_layers_learn_more_slowly_the_deeper_they_lie():
    model = make_model()
    groups = layer_groups(model, "encoder.", 0.5)
    scale = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    by_name = {name: scale[id(p)] for name, p in model.named_parameters()}
    order = [
        "encoder.swin.patch_embed.proj.weight",
        "encoder.swin.layers1.0.blocks.0.mlp.linear1.weight",
        "encoder.swin.layers1.0.downsample.reduction.weight",
        "encoder.swin.layers3.0.blocks.0.norm1.weight",
        "encoder.swin.layers3.0.blocks.1.norm1.weight",
        "encoder.semantic.blocks.0.qkv.weight",
        "head.weight",
    ]
    values = [by_name[name] for name in order]
    assert values == sorted(values) and len(set(values)) == len(values) and values[-1] == 1.0
    assert by_name["encoder.semantic.cls"] == by_name["encoder.semantic.blocks.0.qkv.weight"]
    assert {group["scale"] for group in layer_groups(model, "encoder.", 1.0)} == {1.0}
    assert place_of("layers2.0.blocks.1.attn.qkv.bias") == (2, 1)  # SwinUNETR's names and ours alike
    decays = {id(p): group["decays"] for group in groups for p in group["params"]}
    assert not decays[id(model.head.bias)] and decays[id(model.head.weight)]


def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best(tmp_path):
    model, kept = make_model(), {}
    scores = iter([0.1, 0.7, 0.6, 0.7, 0.2])

    def validate():
        score = next(scores)
        kept.setdefault(score, {k: v.clone() for k, v in model.state_dict().items()})
        return score

    _, fitted = run(tmp_path, model=model, validate=validate, steps=40, patience=3)
    assert (fitted.step, fitted.score, len(fitted.history)) == (4, 0.7, 10)
    assert all(torch.equal(v, kept[0.7][k]) for k, v in model.state_dict().items())
    assert fitted.history.score.notna().sum() == 5


def test_without_validation_the_last_weights_count(tmp_path):
    _, fitted = run(tmp_path)
    assert fitted.step == 8 and math.isnan(fitted.score)


def test_another_encoder_or_setting_is_refused_and_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, facts={"data": "noise", "encoder": "a"})
    with pytest.raises(UseError, match="resume=True"):
        run(tmp_path)
    with pytest.raises(UseError, match=r"task\.encoder: a → b"):
        run(tmp_path, facts={"data": "noise", "encoder": "b"}, resume=True)
    with pytest.raises(UseError, match=r"train\.lr"):
        run(tmp_path, facts={"data": "noise", "encoder": "a"}, resume=True, lr=0.5)
    with pytest.raises(UseError, match="fingerprint"):
        run(tmp_path, facts={"data": "other", "encoder": "a"}, resume=True)


def test_a_loss_that_is_no_number_names_the_step(tmp_path):
    with pytest.raises(DataError, match=r"step 1,.*Lower lr"):
        run(tmp_path, loss=lambda batch, generator: torch.tensor(float("nan"), requires_grad=True))
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"stepps": 3}, {"precision": "fp8"}, {"head_only": 1.0}])
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(UseError, match=next(iter(wrong))):
        make_settings(**wrong)


def test_held_out_patients_are_whole_and_official_where_there_are_any():
    patients = np.repeat([f"p{i}" for i in range(14)], 3)
    rows, nothing = np.arange(42), np.full(42, None)
    y = np.arange(42) % 2
    train, held = hold_out(patients, y, rows, nothing, 0)
    assert len(set(patients[held])) == 2 and not set(patients[train]) & set(patients[held])
    assert sorted([*train, *held]) == rows.tolist()
    official = np.where(patients == "p3", "val", "train")
    assert set(patients[hold_out(patients, y, rows, official, 0)[1]]) == {"p3"}
    few = rows[:18]  # six patients: none to spare
    assert len(hold_out(patients, y, few, nothing, 0)[1]) == 0


def test_every_case_comes_once_per_round():
    drawn = [rounds(1, 7, i) for i in range(21)]
    assert all(sorted(drawn[i : i + 7]) == list(range(7)) for i in (0, 7, 14)) and drawn[:7] != drawn[7:14]


def test_layers_of_a_vision_transformer_of_scans_lie_one_above_the_other():
    config = sl.load_config("primus-tiny", {"data.view": 16, "data.region": 16, "mae.input": 16})
    net = torch.nn.ModuleDict({"encoder": make_encoder(config), "head": torch.nn.Linear(2, 2)})
    scale = {id(p): g["scale"] for g in layer_groups(net, "encoder.", 0.5) for p in g["params"]}
    by_name = {name: scale[id(p)] for name, p in net.named_parameters()}
    depths = [{s for n, s in by_name.items() if f".blocks.{block}." in n} for block in range(4)]
    first = {s for n, s in by_name.items() if "down_projection" in n}
    assert all(len(scales) == 1 for scales in [first, *depths])
    values = [next(iter(scales)) for scales in [first, *depths]] + [by_name["head.weight"]]
    assert values == sorted(set(values)), "each layer learns faster than the one below"
