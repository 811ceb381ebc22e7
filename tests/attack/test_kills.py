"""Killed again and again, at any moment: what comes out in the end is what would have come without."""

from __future__ import annotations

import random
import signal
import time
from itertools import count

import pytest

import smartlab as sl
from tests.attack.harness import note, tries
from tests.data.store_cohort import make_cohort, snapshot
from tests.processes import Child
from tests.training.conftest import cohort, settings  # noqa: F401  fixtures
from tests.training.test_resume import assert_same_run, train


def killed_until_done(function, *given, seed, least, most):
    """Run it again after every kill; how often it was killed."""
    rng, kills = random.Random(seed), 0
    while True:
        child = Child(function, *given)
        end = time.monotonic() + rng.uniform(least, most)
        while child.running and time.monotonic() < end:
            time.sleep(0.005)
        if child.running:
            child.send(signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:  # it has ended, perhaps just before the signal
            assert child.wait() == 0, child.said
            note("kill", function.__name__, {"kills": kills})
            return kills
        kills += 1
        least, most = least * 1.1, most * 1.1  # so that it ends


@pytest.mark.slow
@pytest.mark.parametrize("number", range(tries(2)))
def test_a_pretraining_killed_at_any_moment_equals_one_that_was_not(settings, tmp_path, number):  # noqa: F811
    settings = settings | {"train.checkpoint_every": 1, "data.workers": number % 3}
    whole = Child(train, settings, tmp_path / "whole")
    assert whole.wait() == 0, whole.said
    for turn in count():  # a fast machine may be done before the first kill: then again, with less patience
        killed, patience = tmp_path / f"killed-{turn}", 0.5**turn
        given = (train, settings, killed)
        if killed_until_done(*given, seed=number, least=0.3 * patience, most=2.5 * patience):
            break
    assert_same_run(tmp_path / "whole", killed, 8)


def build(man, root, out):
    sl.build_store(man, root, out, workers=1, progress=False)


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, tries(6)))]
)
def test_a_store_whose_build_is_killed_at_any_moment_is_the_same_bytes(tmp_path, number):
    man = make_cohort(tmp_path / "raw", 6)
    build(man, tmp_path / "raw", tmp_path / "whole")
    given = (build, man, tmp_path / "raw", tmp_path / "killed")
    killed_until_done(*given, seed=number, least=0.05, most=0.5)
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
