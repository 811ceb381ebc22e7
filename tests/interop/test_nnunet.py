"""nnU-Net builds from our plan the network that our weights are of, sees what our encoder saw, and its Dice comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.data.crops.augment import window
from smartlab.evaluation.judge.nnunet import dice_table
from smartlab.interop.nnunet import fit_plans
from smartlab.interop.weights import export
from smartlab.models.build import make_encoder
from tests.conftest import REPO

SMALL = {"data.view": 24, "data.region": 24, "mae.input": 24}
ALONE = SMALL | {"encoder.cls_token": False}
NNUNET = os.environ.get("SMARTLAB_NNUNET")


def moved(preset="primus-tiny", **settings):
    """An encoder whose weights are all off their start."""
    torch.manual_seed(0)
    net = make_encoder(sl.load_config(preset, ALONE | settings)).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return net


def exported(net, folder):
    return torch.load(export(net, "nnunet", folder / "e.pth"), weights_only=True)


def built_by(primus, plan, classes=3):
    """As PretrainedTrainer_Primusx does: from what the plan says, whatever else is left at what it always takes."""
    a = plan["architecture_plans"]["arch_kwargs"]
    return primus.Primus(
        plan["pretrain_num_input_channels"],
        a["embed_dim"],
        a["patch_embed_size"],
        classes,
        a["encoder_eva_depth"],
        a["encoder_eva_numheads"],
        plan["recommended_downstream_patchsize"],
        drop_path_rate=0.2,
        scale_attn_inner=a["scale_attn_inner"],
        init_values=a["init_values"],
    ).eval()


@pytest.mark.parametrize(
    ("preset", "name", "settings"),
    [
        ("primus-tiny", "PrimusX", {}),
        ("primus-tiny", "PrimusX", {"encoder.layer_scale": None, "encoder.inner_norm": False}),
        ("primus-s", "PrimusS", {}),
    ],
)
def test_the_network_of_the_plan_takes_all_weights_and_computes_what_the_encoder_does(
    preset, name, settings, primus, tmp_path
):
    net = moved("primus-tiny", **{"encoder.preset": preset} | settings)
    file = exported(net, tmp_path)
    plan, weights = file["nnssl_adaptation_plan"], file["network_weights"]
    assert plan["architecture_plans"]["arch_class_name"] == name
    theirs = built_by(primus, plan)
    assert plan["key_to_encoder"] == theirs.key_to_encoder and plan["key_to_stem"] == theirs.key_to_stem
    assert (
        tuple(plan["keys_to_in_proj"]) == theirs.keys_to_in_proj and plan["key_to_lpe"] == theirs.key_to_lpe
    )
    taken = set()
    for part in (theirs.key_to_encoder, theirs.key_to_stem):  # strictly, as nnU-Net loads them
        mine = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
        theirs.get_submodule(part).load_state_dict(mine)
        taken |= {f"{part}.{key}" for key in mine}
    assert taken == set(weights)
    seen = []
    theirs.up_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 1, 24, 24, 24)
    with torch.inference_mode():
        theirs(x)
        tokens = net(x).tokens
    torch.testing.assert_close(tokens, seen[0].flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_the_plan_says_at_what_size_of_voxels_and_view_the_encoder_learned(tmp_path):
    half = {
        "method.preset": "miram",
        "data.view": 48,
        "data.region": 48,
        "mae.input": 24,
        "data.spacing": 1.5,
    }
    plan = exported(moved(**half | {"data.manifest": "/of/somebody/scans.json"}), tmp_path)[
        "nnssl_adaptation_plan"
    ]
    (learned,) = plan["pretrain_plan"]["configurations"].values()
    assert learned["spacing"] == [3.0] * 3 and learned["patch_size"] == [24] * 3, (
        "it sees views at half resolution"
    )
    assert plan["recommended_downstream_patchsize"] == [24] * 3
    assert "/of/somebody" not in json.dumps(plan)


def test_tokens_that_nnunet_has_no_place_for_are_left_behind_with_a_word(tmp_path):
    with pytest.warns(UserWarning, match="no cls_token and no register_tokens"):
        file = exported(moved(**{"encoder.cls_token": True, "encoder.registers": 2}), tmp_path)
    assert all(key.startswith(("eva.", "down_projection.")) for key in file["network_weights"])


@pytest.mark.parametrize(
    ("preset", "settings", "words"),
    [
        ("tiny", {}, "Swin transformer.*--to monai, or pretrain a Primus: encoder.preset=primus-s"),
        ("miram-tiny", {}, "vision transformer of images.*--to monai"),
        ("primus-tiny", {"encoder.mlp_ratio": 4.0}, "mlp_ratio=8/3 only .found 4.0"),
        ("primus-tiny", {"data.modality": "MR", "data.window": [0, 4095]}, "an encoder of MR"),
        ("primus-tiny", {"data.spacing": [1.0, 1.0, 3.0]}, "one voxel size .found 1×1×3 mm"),
    ],
)
def test_what_nnunet_cannot_build_is_refused(preset, settings, words, tmp_path):
    with pytest.raises(UseError, match=words):
        export(make_encoder(sl.load_config(preset, settings)), "nnunet", tmp_path / "e.pth")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def planned(tmp_path):
    """What nnUNetv2_preprocess_like_nnssl writes, as far as it matters; its axes are (y, z, x) here."""
    one = {"spacing": [3.0, 5.0, 2.0], "normalization_schemes": ["ZScoreNormalization"]}
    plans = {
        "plans_name": "ptPlans__a____Spacing__4___Norm__Z",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
        "configurations": {
            "3d_fullres": one | {"data_identifier": "Spacing__4___Norm__Z", "patch_size": [24] * 3}
        },
        "pretrain_info": {"checkpoint_path": "e.pth"},
    }
    file = tmp_path / f"{plans['plans_name']}.json"
    file.write_text(json.dumps(plans))
    return file


def test_fitted_plans_give_nnunet_what_the_encoder_saw(planned, tmp_path):
    """The same numbers on the same axes, reckoned as nnU-Net's reader and preprocessor do."""
    weights = export(moved(**{"data.window": (-150.0, 250.0)}), "nnunet", tmp_path / "e.pth")
    before = planned.read_bytes()
    out = fit_plans(planned, weights)
    assert planned.read_bytes() == before and out != planned
    plans = json.loads(out.read_text())
    (one,) = plans["configurations"].values()
    assert out.stem == plans["plans_name"] and one["data_identifier"] != "Spacing__4___Norm__Z"
    assert plans["pretrain_info"] and one["patch_size"] == [24] * 3
    scan = np.random.default_rng(0).integers(-1000, 1000, (3, 4, 5)).astype(np.float32)  # (X, Y, Z), RAS+
    assert plans["image_reader_writer"] == "NibabelIOWithReorient"  # gives RAS+, but as (Z, Y, X)
    theirs = scan.transpose(2, 1, 0).transpose(plans["transpose_forward"])
    assert one["normalization_schemes"] == ["CTNormalization"]
    p = plans["foreground_intensity_properties_per_channel"]["0"]
    theirs = (np.clip(theirs, p["percentile_00_5"], p["percentile_99_5"]) - p["mean"]) / p["std"]
    torch.testing.assert_close(torch.tensor(theirs), window(torch.tensor(scan), -150.0, 250.0))
    back = np.argsort(plans["transpose_forward"]).tolist()
    assert plans["transpose_backward"] == back
    assert one["spacing"] == [2.0, 3.0, 5.0], "of x, y and z"


def test_other_plans_and_other_weights_are_refused(planned, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"other\.pth: is not an export for nnU-Net"):
        fit_plans(planned, tmp_path / "other.pth")
    weights = export(moved(), "nnunet", tmp_path / "e.pth")
    planned.write_text(json.dumps({"configurations": {}}))
    with pytest.raises(DataError, match="was not planned from a checkpoint"):
        fit_plans(planned, weights)


def write_summary(file, dice):
    """{case: {label: Dice}} as nnU-Net writes it, NaN where nothing is and nothing was found."""
    cases = [
        {
            "reference_file": f"/x/labelsTr/{case}.nii.gz",
            "metrics": {k: {"Dice": d, "TP": 1} for k, d in found.items()},
        }
        for case, found in dice.items()
    ]
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"metric_per_case": cases, "mean": {}, "foreground_mean": {}}))
    return file


@pytest.fixture
def summaries(tmp_path):
    r = np.random.default_rng(0)
    base = {f"1.2.{n}": {"1": r.uniform(0.4, 0.6), "(1, 2)": r.uniform(0.4, 0.6)} for n in range(6)}
    base["1.2.3"]["1"] = float("nan")
    gain = {case: {k: d + 0.1 + 0.01 * r.normal() for k, d in found.items()} for case, found in base.items()}
    labels = {"background": 0, "liver": 1, "both": [1, 2]}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    pair = {"pretrained": gain, "scratch": base}
    return (
        {n: write_summary(tmp_path / n / "fold_0" / "summary.json", dice) for n, dice in pair.items()},
        gain,
        base,
    )


def test_nnunets_dice_is_compared_by_patient(summaries, tmp_path, monkeypatch, capsys):
    files, gain, base = summaries
    table = dice_table(files["scratch"])
    assert set(table.structure) == {"liver", "both"} and set(table.case) == set(base)
    found = sl.compare(files).iloc[0]
    mean = [np.nanmean([np.nanmean([*one[case].values()]) for case in base]) for one in (gain, base)]
    assert found.difference == pytest.approx(mean[0] - mean[1]) and found.patients == 6
    assert found.low < found.difference < found.high and found.p < 0.01
    two = {case: f"p{n // 2}" for n, case in enumerate(base)}
    by_patient = sl.compare({n: dice_table(f, two) for n, f in files.items()}, "segment").iloc[0]
    assert by_patient.patients == 3 and by_patient.difference == pytest.approx(found.difference)
    from smartlab.cli.app import main

    monkeypatch.setattr(
        "sys.argv", ["smartlab", "compare", *map(str, files.values()), "--task", "segment", "--json"]
    )
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert json.loads(capsys.readouterr().out)[0]["difference"] == pytest.approx(found.difference)


def test_a_file_that_is_no_summary_is_one_error(tmp_path):
    (tmp_path / "summary.json").write_text('{"mean": {}}')
    with pytest.raises(DataError, match=r"summary\.json: is no summary of nnU-Net .found KeyError"):
        dice_table(tmp_path / "summary.json")


@pytest.mark.slow
@pytest.mark.skipif(not NNUNET, reason="SMARTLAB_NNUNET names no Python that has nnU-Net (docs/NNUNET.md)")
def test_nnunet_itself_plans_loads_trains_predicts_and_its_dice_comes_back(tmp_path):
    words = ["--python", NNUNET, "--work", tmp_path / "w", "--out", tmp_path / "r.json", "--steps", 2]
    words += ["--epochs", 1, "--iterations", 2, "--scans", 6, 2]
    line = [sys.executable, "-m", "benchmarks.nnunet", *map(str, words)]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    for plan in json.loads((tmp_path / "r.json").read_text())["plans"].values():
        counted = plan["pretrained"]["counted"]
        assert counted["equal_in_the_network"] == counted["tensors_of_the_file"] > 50
        assert set(counted["left_as_initialised"]) == {"up_projection", "mask_token"}
        assert plan["scratch"]["counted"] is None and plan["compared on test"][0]["patients"] == 2
    assert plan["input"]["largest_difference"] < 1e-5
