"""The configuration refuses what cannot work, and says why in numbers."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from smartlab import UseError, load_config
from smartlab.core.config import PRESET_FOLDER, known_keys, parse_overrides, presets
from smartlab.core.presets import ENCODERS, METHODS


@pytest.mark.parametrize("name", presets())
def test_every_preset_resolves_and_survives_a_round_trip(name, tmp_path):
    config = load_config(name)
    saved = config.save(tmp_path / "config.yaml")
    assert load_config(saved) == config


def test_presets_have_the_published_sizes():
    smit, smart, unetr = (load_config(name).encoder for name in ("smit", "smart", "swinunetr"))
    assert (smit.embed_dim, smit.depths, smit.num_heads, smit.window_size) == (
        48,
        (2, 2, 4, 2),
        (4, 4, 4, 4),
        4,
    )
    assert not smit.qkv_bias and smart.qkv_bias and smart.drop_path == 0.1
    assert (smart.depths, smart.num_heads) == ((2, 2, 8, 2), (4, 4, 8, 16))
    assert (unetr.depths, unetr.num_heads, unetr.window_size) == ((2, 2, 2, 2), (3, 6, 12, 24), 7)
    assert load_config("smit").data.view == 96 and load_config("smart").data.view == 128


@pytest.mark.parametrize("name", presets())
def test_preset_files_say_where_their_numbers_come_from(name):
    text = (PRESET_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    if "extends:" in text:
        text += (PRESET_FOLDER / f"{yaml.safe_load(text)['extends']}.yaml").read_text(encoding="utf-8")
    assert "[ours]" in text and (name == "tiny" or "[smit]" in text or "[mae]" in text)


def test_methods_are_settings_and_single_factors_can_be_switched_alone():
    simmim = load_config("tiny", {"method.preset": "simmim"})
    assert not simmim.teacher.enabled and simmim.loss.patch == simmim.loss.image == 0
    clean = load_config("tiny", {"teacher.patch_dropout": 0.0})
    noisy = load_config("tiny")
    assert clean.teacher.patch_dropout == 0.0 and noisy.teacher.patch_dropout == 0.7
    assert clean.model_copy(update={"teacher": noisy.teacher}) == noisy


def test_a_run_of_an_earlier_version_keeps_its_method():
    """It named the stage by its stride, and had other defaults where the paper was not at hand."""
    old = {
        "semantic": {"stride": 8},
        "mask": {"unit": 8, "informativeness": 0.04},
        "encoder": {"embed_dim": 12},
    }
    config = load_config(old)
    assert (config.semantic.stage, config.unit, config.mask.fill, config.teacher.guide) == (
        2,
        8,
        "token",
        "noisy",
    )
    assert (config.distill.patch_from, config.loss.global_image, config.mask.hint_from) == (
        "semantic",
        0,
        "any",
    )
    assert load_config({"encoder": {"embed_dim": 12}}).mask.fill == "zero"
    images = load_config("miram").model_dump(mode="json")
    images["semantic"] = {"enabled": False, "stride": 16}
    assert load_config(images).semantic.stage == 1


def test_a_preset_can_extend_another():
    dagman, smart = load_config("dagman"), load_config("smart")
    assert smart.model_copy(update={"method": dagman.method}) == dagman and smart.method.preset == "smart"


def test_later_layers_win():
    assert load_config("tiny", {"method.preset": "smit"}).mask.strategy == "random"
    assert load_config("tiny", {"method.preset": "smit", "mask.strategy": "block"}).mask.strategy == "block"
    assert load_config({"train": {"steps": 7}}, {"train.steps": 9}).train.steps == 9


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("mask.ration", "mask.ratio"),
        ("steps", "train.steps"),
        ("teacher.drop", "teacher."),
        ("encoder.depth", "encoder.depths"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(wrong, hint):
    with pytest.raises(UseError, match=hint):
        load_config("tiny", {wrong: 1})


@pytest.mark.parametrize(
    ("overrides", "arithmetic"),
    [
        ({"semantic.stage": 5}, "semantic.stage=5"),
        ({"mask.ratio_min": 0.8}, "mask.ratio_min=0.8"),
        ({"data.view": 70}, "70 = 2 × 32 + 6"),
        ({"encoder.embed_dim": 10, "encoder.num_heads": [3, 3, 3, 3]}, "10 × 1 = 10"),
        ({"data.view": 96}, "data.view=96 does not fit into data.region=80"),
        ({"data.window": [100, -100]}, "lower bound"),
        ({"semantic.enabled": False}, "semantic.enabled=false"),
        ({"semantic.heads": 5}, "48 channels"),
        ({"teacher.enabled": False, "mask.strategy": "random"}, "need a teacher"),
        ({"mask.ratio": 1.5}, "mask.ratio=1.5"),
        ({"train.precision": "bf32"}, "train.precision='bf32'"),
        ({"train.steps": "many"}, "train.steps='many'"),
        ({"encoder.preset": "huge"}, "huge"),
        ({"encoder": 3}, "section"),
        ({"encoder.patch": 4, "data.view": 65}, "65"),
    ],
)
def test_impossible_settings_are_refused_with_the_arithmetic(overrides, arithmetic):
    with pytest.raises(UseError) as caught:
        load_config("tiny", overrides)
    assert arithmetic in str(caught.value)


def test_an_unknown_preset_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(UseError, match=r"Did you mean .tiny."):
        load_config("tinny")
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [unclosed")
    with pytest.raises(UseError, match=r"broken\.yaml"):
        load_config(broken)


def test_every_documented_setting_exists():
    keys = known_keys()
    for settings in (*ENCODERS.values(), *METHODS.values()):
        assert set(settings) <= set(keys)


@given(st.dictionaries(st.sampled_from(["train.steps", "train.batch", "seed"]), st.integers(1, 10**6)))
def test_words_and_mappings_give_the_same_configuration(overrides):
    words = [f"{key}={value}" for key, value in overrides.items()]
    assert load_config("tiny", parse_overrides(words)) == load_config("tiny", overrides)


def test_override_values_are_yaml():
    assert parse_overrides(["data.window=[-1000, 400]", "train.compile=true"]) == {
        "data.window": [-1000, 400],
        "train.compile": True,
    }
    with pytest.raises(UseError, match="key=value"):
        parse_overrides(["steps"])


def test_presets_are_plain_yaml_mappings():
    for name in presets():
        assert isinstance(yaml.safe_load((PRESET_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize("word", ["train.lr=.inf", "data.window=[.nan, 250]", "data.spacing=.inf"])
def test_numbers_are_finite(word):
    with pytest.raises(UseError, match="finite number"):
        load_config("tiny", parse_overrides([word]))


def test_a_method_named_in_an_override_replaces_that_of_the_file(tmp_path):
    """What SimMIM stands for beats the file's values, and nothing of the file's own method stays behind."""
    file = tmp_path / "mine.yaml"
    file.write_text("method: {preset: dagman}\nloss: {patch: 0.7, coarse: 2.0}\ntrain: {lr: 0.003}\n")
    simmim = load_config(file, {"method.preset": "simmim"})
    assert simmim.loss.patch == 0 and simmim.loss.coarse == 0 and not simmim.teacher.enabled
    assert simmim.train.lr == 0.003  # the method says nothing about it
    smit = load_config(file, {"method.preset": "smit"})
    assert smit.teacher.patch_dropout == 0 and smit.loss.patch == 0.7
    assert load_config(file, {"method.preset": "smit", "loss.coarse": 1.0}).loss.coarse == 1.0
    assert load_config(file, {"method.preset": "dagman"}).loss.patch == 0.7
