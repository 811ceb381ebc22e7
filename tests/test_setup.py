"""What a newcomer relies on: light imports, one set of pins, a wheel that works anywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO


def python(*args, cwd=REPO, env=None):
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=True
    )


def best_of(n, *args):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        python(*args)
        times.append(time.perf_counter() - start)
    return min(times)


def test_importing_is_light():
    loaded = python("-X", "importtime", "-c", "import smartlab, sys; print(sorted(sys.modules))").stdout
    assert "'torch'" not in loaded and "'numpy'" not in loaded
    assert best_of(3, "-c", "import smartlab") < 0.3


def test_a_start_of_training_waits_for_nothing_it_does_not_use():
    code = "import sys, smartlab as sl; sl.pretrain, sl.evaluate; print(sorted(sys.modules))"
    loaded = python("-c", code).stdout
    for slow in ("torch.distributed.fsdp", "scipy.signal", "monai", "umap", "matplotlib.pyplot"):
        assert f"'{slow}'" not in loaded, slow


def test_help_is_quick_and_every_command_shows_an_example():
    assert best_of(3, "-m", "smartlab.cli.app", "--help") < 0.5
    for words in (
        ["doctor"],
        ["demo"],
        ["config"],
        *(["data", c] for c in ["list", "show", "fetch", "verify", "build", "phantom", "compose"]),
    ):
        assert "Example: smartlab" in python("-m", "smartlab.cli.app", *words, "--help").stdout


def test_every_public_name_exists():
    import smartlab as sl

    for name in sl.__all__:
        assert getattr(sl, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sl.no_such_name


def pins(lines):
    found = {}
    for line in lines:
        if match := re.match(r"\s*-?\s*([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==(\S+)", line):
            found[match[1].lower().replace("_", "-")] = match[2]
    return found


def test_conda_and_pip_users_get_the_same_versions():
    constraints = pins((REPO / "constraints.txt").read_text(encoding="utf-8").splitlines())
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[A-Za-z0-9_.-]+", dep)[0].lower().replace("_", "-") for dep in wanted}
    conda = yaml.safe_load((REPO / "environment.yml").read_text(encoding="utf-8"))["dependencies"][-1]["pip"]
    conda = pins(conda)
    assert set(conda) == names, "environment.yml lists exactly the packages of pyproject.toml"
    assert conda == {name: constraints[name] for name in names}
    assert constraints["torch"] == "2.13.0"


def test_ci_and_make_agree_on_the_test_command():
    lines = (REPO / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make check", "make test", "make test-slow"} <= set(lines), "together, every test and each once"
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert '-m "not slow"' in makefile and "-m slow" in makefile
    for target in ("setup", "demo", "test", "test-slow", "test-all", "lab", "bench"):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_make_setup_is_instant_when_done(tmp_path):
    if not (REPO / ".venv" / ".ready").exists():
        pytest.skip("not set up by make")
    start = time.perf_counter()
    subprocess.run(["make", "setup"], cwd=REPO, check=True, capture_output=True)
    assert time.perf_counter() - start < 2


def test_doctor_reports_every_point_and_what_to_do():
    result = subprocess.run(
        [sys.executable, "-m", "smartlab.cli.app", "doctor", "--json"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    report = json.loads(result.stdout)
    assert {c["name"] for c in report["checks"]} == {
        "Python",
        "packages",
        "torch",
        "GPU",
        "memory",
        "disk",
        "/dev/shm",
        "Chromium",
    }
    assert all(c["advice"] for c in report["checks"] if c["status"] != "ok")
    assert result.returncode == (0 if report["ready"] else 1)


def test_doctor_survives_a_broken_package(monkeypatch):
    from smartlab.cli import doctor

    monkeypatch.setattr(doctor, "REQUIRED", ["torch", "no_such_package"])
    monkeypatch.setattr(doctor, "_gpu", lambda: 1 / 0)
    checks = {c.name: c for c in doctor.examine()}
    assert checks["packages"].status == "fail" and "no_such_package" in checks["packages"].found
    assert any(c.status == "fail" and "ZeroDivisionError" in c.found for c in checks.values())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["config", "tiny", "mask.ration=1"], 2, "mask.ratio"),
        (["config", "nope"], 2, "no preset named 'nope'"),
        (["data", "show", "nope"], 2, "no such manifest"),
        (["data", "verify", "phantom-ct", "--root", "absent-folder"], 1, "no such folder"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_bad_use_gives_one_line_and_its_exit_code(words, code, says):
    result = subprocess.run(
        [sys.executable, "-m", "smartlab.cli.app", *words], cwd=REPO, capture_output=True, text=True
    )
    assert result.returncode == code
    assert says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path):
    python("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(REPO))
    wheel = next(tmp_path.glob("smartlab-*.whl"))
    site = tmp_path / "site"
    python("-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import smartlab as sl, smartlab.data.cohort.manifest as m\n"
        "from smartlab.cli.demo import notebook_folder\n"
        "from pathlib import Path\n"
        "site = Path(sys.argv[1]).resolve()\n"
        "assert Path(sl.__file__).is_relative_to(site), sl.__file__\n"
        "assert m.manifest_folder().is_relative_to(site) and notebook_folder().is_relative_to(site)\n"
        "print(len(m.shipped_manifests()), len(list(notebook_folder().glob('*.ipynb'))), sl.load_config('smart').data.view)\n"
        "[sl.load_manifest(name) for name in m.shipped_manifests()]\n"
    )
    shipped, notebooks, view = python("-c", code, str(site), cwd=tmp_path).stdout.split()
    assert int(shipped) == len([p for p in (REPO / "data_manifests").glob("*.json") if p.stem != "schema"])
    assert int(notebooks) == len(list((REPO / "notebooks").glob("*.ipynb"))) and view == "128"


def test_nothing_of_this_machine_is_in_the_repository():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    pattern = re.compile(r"(?<![\w.])/(work|home|root|farm)/\w")
    for name in filter(None, tracked):
        path = Path(REPO / name)
        if (
            path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".ipynb", ".txt"}
            and path.is_file()
        ):
            assert not pattern.search(path.read_text(encoding="utf-8")), name
