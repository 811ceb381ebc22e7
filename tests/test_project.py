"""What one expects of a project one joins: pins that hold, pages whose links lead somewhere, a site that builds."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tests.conftest import REPO

SITE_TOOLS = REPO / "docs" / "site"
PLACES = ("smartlab", "data_manifests", "notebooks", "tests", "benchmarks", "docs")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text(name):
    return (REPO / name).read_text(encoding="utf-8")


def project():
    return tomllib.loads(text("pyproject.toml"))["project"]


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def site_tool(name):
    """A module of docs/site, which is no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE_TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- versions


def test_constraints_pin_every_installed_package():
    lines = [line for line in text("constraints.txt").splitlines() if line and not line.startswith("#")]
    pinned = {plain(line.split("==")[0]): line.split("==")[1] for line in lines}
    installed = {plain(d.metadata["Name"]): d.version.partition("+")[0] for d in metadata.distributions()}
    if installed["torch"] != pinned["torch"]:
        pytest.skip(f"torch {installed['torch']} is installed: not an environment made from constraints.txt")
    ours = {"smartlab", "pip", "setuptools", "wheel", "uv"}
    other = {n: v for n, v in installed.items() if n not in ours and pinned.get(n) != v}
    assert not other, f"not in constraints.txt as installed: {other}"
    assert len(pinned) == len(lines), "a package is pinned twice"


def test_the_version_is_the_same_everywhere():
    import smartlab

    version = project()["version"]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert smartlab.__version__ == str(citation["version"]) == version
    assert re.search(rf"^## \[{re.escape(version)}\]", text("CHANGELOG.md"), re.M)
    assert re.search(r"^## \[Unreleased\]", text("CHANGELOG.md"), re.M)


def test_version_is_told_without_loading_torch():
    words = [sys.executable, "-X", "importtime", "-m", "smartlab.cli.app", "--version"]
    done = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"smartlab {project()['version']}"
    assert not re.search(r"\| +(torch|numpy|pandas)$", done.stderr, re.M)


def test_citation_has_what_the_format_requires():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] == project()["name"] and citation["license"] == "Apache-2.0"
    for work in (citation, *citation["references"]):
        assert work["title"] and work["authors"]
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    kinds = {work["type"] for work in citation["references"]}
    assert kinds <= {"article", "conference-paper"}
    named = " ".join(work["notes"] for work in citation["references"])
    for method in ("DAGMaN", "SMART", "SMIT", "MIRAM", "SimMIM", "MAE", "AttMask"):
        assert method in named


def test_type_checkers_find_our_types():
    assert (REPO / "smartlab" / "py.typed").is_file()
    assert (
        "smartlab"
        in tomllib.loads(text("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    )


# ---- habits


def test_ci_runs_what_a_clean_checkout_must_pass_and_every_python():
    jobs = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands and "make docs" in commands
    pythons = next(job["strategy"]["matrix"]["python"] for job in jobs.values() if "strategy" in job)
    low, high = (int(re.search(rf"{sign}3\.(\d+)", project()["requires-python"])[1]) for sign in (">=", "<"))
    assert pythons == [f"3.{minor}" for minor in range(low, high)]


def test_hooks_before_a_commit_download_nothing():
    repos = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert {repo["repo"] for repo in repos} == {"local"} and {h["language"] for h in hooks} == {"system"}
    entries = " ".join(hook["entry"] for hook in hooks)
    assert all(said in entries for said in ("ruff format", "ruff check", "notebook_files --check"))


def test_forms_for_issues_ask_for_something():
    forms = [p for p in (REPO / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"]
    assert {form.stem for form in forms} == {"bug", "feature"}
    for form in forms:
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert content["name"] and content["description"]
        assert any(part.get("validations", {}).get("required") for part in content["body"])


# ---- pages


def pages():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sorted(name for name in listed.split("\0") if name and (REPO / name).is_file())


@functools.cache
def made_by_the_site():
    return {f"docs/api/{page}" for page in ("cli.md", *site_tool("hooks").api_pages())}


def test_every_relative_link_of_every_page_leads_somewhere():
    lost = []
    for name in pages():
        unfenced = re.sub(r"^```.*?^```", "", text(name), flags=re.M | re.S)
        for link in LINK.findall(unfenced):
            target = os.path.normpath(REPO / Path(name).parent / link.partition("#")[0])
            if re.match(r"[a-z]+:|#", link) or os.path.exists(target):
                continue
            if os.path.relpath(target, REPO) not in made_by_the_site():
                lost.append(f"{name}: {link}")
    assert not lost


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/ARCHITECTURE.md"])
def test_every_file_that_a_page_names_exists(name):
    named = [n for n in re.findall(r"`([\w./-]+)`", text(name)) if n.split("/")[0] in PLACES and "/" in n]
    assert len(named) > 5
    assert not [n for n in named if not (REPO / n).exists()]


def test_every_function_that_contributing_names_exists():
    said = text("CONTRIBUTING.md")
    for place, names in {
        "smartlab/masking.py": ["STRATEGIES", "make_mask", "_top", "uniform"],
        "smartlab/core/settings.py": ["Strategy", "MaskConfig", "EncoderPreset", "EncoderConfig"],
        "smartlab/core/presets.py": ["ENCODERS"],
        "smartlab/models/build.py": ["make_encoder"],
        "smartlab/evaluation/task.py": ["Task", "PLACES"],
        "smartlab/data/cohort/compose.py": ["BUILDERS"],
        "smartlab/cli/judge.py": ["EVALUATE"],
    }.items():
        assert place in said
        for name in names:
            assert f"`{name}" in said
            assert re.search(rf"^(def |class )?{name}\b", text(place), re.M), f"{place} has no {name}"


def test_the_map_is_drawn_from_todays_imports():
    maker = site_tool("package_map")
    drawn = maker.drawing()
    assert maker.MAP.read_text(encoding="utf-8") == drawn, "run: python docs/site/package_map.py"
    assert 'url(#down)"' not in drawn, "a room imports one below it"
    for room in maker.arrows():
        assert f"`{room}`" in text("docs/ARCHITECTURE.md"), f"docs/ARCHITECTURE.md says nothing of {room}"


def test_rooms_import_one_way_and_in_no_circle():
    told = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=REPO,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert told.returncode == 0, told.stdout[-3000:]


def imported(path):
    """(module, name, name here) of all that a module, or the cells of a notebook, take by `from smartlab… import`."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = (cell for cell in json.loads(source)["cells"] if cell["cell_type"] == "code")
        source = "\n".join("".join(cell["source"]) for cell in cells)
    lines = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)]
    ours = [line for line in lines if (line.module or "").split(".")[0] == "smartlab"]
    return {(line.module, alias.name, alias.asname or alias.name) for line in ours for alias in line.names}


def test_each_name_is_imported_from_the_module_that_defines_it():
    """Only the front doors of packages (`__init__.py`) pass names on."""
    files = [
        path for place in PLACES for path in (REPO / place).rglob("*.*") if path.suffix in (".py", ".ipynb")
    ]
    assert len(files) > 300
    names = {path: imported(path) for path in files}
    passed_on = {
        (".".join(path.relative_to(REPO).with_suffix("").parts), here)
        for path, found in names.items()
        for _, _, here in found
        if path.name != "__init__.py"
    }
    wrong = [f"{path}: {one}" for path, found in names.items() for one in found if one[:2] in passed_on]
    assert not wrong


# ---- the site


def test_docstrings_become_lists_examples_and_code():
    made = site_tool("docstrings").as_markdown(
        "What it does.\nvalues: prose\n\na:   first\n     goes on\nbc:  second\n\n    as it stands\n\n>>> f(1)  # doctest: +SKIP\n2"
    )
    assert "- `a`: first\n    goes on\n- `bc`: second" in made
    assert "```python\nf(1)\n# 2\n```" in made
    assert "\n\n    as it stands" in made and "What it does.\nvalues: prose" in made


def test_a_notebook_page_shows_the_run_of_this_very_text_and_no_other(tmp_path):
    hooks = site_tool("hooks")
    shipped = hooks.notebooks()[0]
    ran = json.loads(shipped.read_text(encoding="utf-8"))
    first = next(i for i, cell in enumerate(ran["cells"]) if cell["cell_type"] == "code")
    given = {"cell_type": "code", "metadata": {"tags": ["injected-parameters"]}, "outputs": []}
    given |= {"source": f'# Parameters\nout = "{REPO}/runs/x"\n', "execution_count": 1, "id": "x"}
    ran["cells"].insert(first + 1, given)
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "aGVsbG8="}}
    live = {"output_type": "display_data", "metadata": {}}
    live |= {"data": {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Viewer()"}}
    said = {"output_type": "stream", "name": "stdout", "text": f"wrote {REPO}/runs/x\n"}
    bar = {"output_type": "stream", "name": "stderr", "text": "\rheads:   0%|   | 0/3\rheads: 100%|███| 3/3"}
    code = ran["cells"][first]

    def page():
        (tmp_path / shipped.stem).mkdir(exist_ok=True)
        (tmp_path / shipped.stem / "notebook.ipynb").write_text(json.dumps(ran), encoding="utf-8")
        made = hooks.page_of(shipped, [tmp_path])
        outputs = [output for cell in made["cells"] for output in cell.get("outputs", [])]
        return "".join(made["cells"][0]["source"]), outputs, len(made["cells"])

    assert "without outputs" in page()[0], "nothing was run"
    code["outputs"] = [picture, live, said, bar]
    note, outputs, cells = page()
    assert "with its defaults" in note and cells == len(ran["cells"]) - 1
    assert [o["output_type"] for o in outputs] == ["display_data", "stream"]
    assert outputs[1]["text"] == "wrote runs/x\n"
    given["source"] += "patients = 3\n"
    note, _, cells = page()
    assert "with the parameters" in note and cells == len(ran["cells"])
    code["outputs"].append({"output_type": "error", "ename": "E", "evalue": "", "traceback": []})
    assert "without outputs" in page()[0], "it failed"
    code["outputs"].pop()
    code["source"] = "something_else()"
    assert "without outputs" in page()[0], "another text"


class Page(HTMLParser):
    """What a page refers to, and the places in it that can be referred to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        wanted = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src"}.get(tag)
        if wanted and given.get(wanted):
            self.links.append((tag, given[wanted]))


@pytest.mark.slow
def test_the_site_builds_strictly_and_nothing_in_it_is_broken(tmp_path):
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(site)]
    done = subprocess.run(
        words, cwd=REPO, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    assert any("make_mask" in d["title"] and d["location"].startswith("api/masking") for d in index)
    assert {p.stem for p in (site / "notebooks").glob("*.html")} == {
        p.stem for p in (REPO / "notebooks").glob("*.ipynb")
    }
    made = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in made.items():
        assert str(REPO) not in path.read_text(encoding="utf-8"), path
        for tag, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if tag != "a" and parts.scheme != "data":
                    broken.append(f"{path.name} loads {link[:80]}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            lost = parts.fragment and target in made and unquote(parts.fragment) not in made[target].ids
            if not target.is_file() or lost:
                broken.append(f"{path.name}: {link}")
    assert not broken, broken[:20]
