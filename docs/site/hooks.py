"""What the site takes from outside docs/: the notebooks, CONTRIBUTING and CHANGELOG, a page of API per room.

mkdocs calls the functions named `on_…` (`hooks:` in mkdocs.yml). Nothing is written into docs/: pages are
made in memory, notebooks are copied to a temporary folder.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

REPO = Path(__file__).resolve().parents[2]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # of the root, with the same names on the site
EXECUTED = ("runs/demo-all", "runs/demo")  # where `smartlab demo` leaves executed notebooks
ORDER = [
    "config",
    "settings",
    "data",
    "masking",
    "models",
    "methods",
    "training",
    "interop",
    "evaluation",
    "viewers",
    "batch",
]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
PICTURES = {".png", ".svg", ".jpg"}
PROGRESS = re.compile(r"\d+%\|.*\|")  # a line of tqdm

_temporary: list[Path] = []


# ---- notebooks


def notebooks() -> list[Path]:
    return sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def code_of(notebook: dict[str, Any]) -> list[str]:
    """The cells as they are written, without those that running adds."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if not injected(cell)]


def injected(cell: dict[str, Any]) -> bool:
    """Whether papermill put the cell there."""
    return "injected-parameters" in cell["metadata"].get("tags", [])


def run_of(shipped: dict[str, Any], stem: str, folders: list[Path]) -> dict[str, Any] | None:
    """The executed copy of this very text that ended well, if there is one."""
    for folder in folders:
        path = folder / stem / "notebook.ipynb"
        if path.is_file():
            copy: dict[str, Any] = json.loads(neutral(path.read_text(encoding="utf-8")))
            kinds = {output["output_type"] for cell in copy["cells"] for output in cell.get("outputs", [])}
            if code_of(copy) == code_of(shipped) and kinds - {"error"} == kinds and kinds:
                return copy
    return None


def page_of(path: Path, folders: list[Path]) -> dict[str, Any]:
    """The notebook with its pictures where it has been run, and a line that says which it is."""
    shipped = json.loads(path.read_text(encoding="utf-8"))
    notebook = run_of(shipped, path.stem, folders)
    note = "Shown without outputs: `make demo-all` runs it, `make docs` then shows its pictures here."
    if notebook is not None:
        given = [c for c in notebook["cells"] if injected(c)]
        own = all(re.match(r"#|out = |$", line) for c in given for line in "".join(c["source"]).split("\n"))
        notebook["cells"] = [c for c in notebook["cells"] if not (injected(c) and own)]
        how = "with its defaults" if own else "with the parameters of its second cell of code"
        note = f"Run by `smartlab demo` {how}, on the built-in phantom."
    notebook = notebook or shipped
    for cell in notebook["cells"]:
        cell["metadata"].pop("tags", None)
        if cell["cell_type"] == "markdown":  # mkdocs does not look into notebooks for links
            written = "".join(cell["source"])
            written = re.sub(r"\]\(\.\./docs/([\w/-]+)\.md", r"](../\1.html", written)
            cell["source"] = re.sub(r"\]\(([\w-]+)\.ipynb", r"](\1.html", written)
        if "outputs" in cell:
            cell["outputs"] = [kept for output in cell["outputs"] if (kept := shown(output))]
    notebook["cells"][0]["source"] = "".join(notebook["cells"][0]["source"]) + f"\n\n*{note}*"
    kept = {k: v for k, v in notebook["metadata"].items() if k in ("kernelspec", "language_info")}
    return notebook | {"metadata": kept}


def shown(output: dict[str, Any]) -> dict[str, Any] | None:
    """An output as a page without a kernel can show it: no live widgets, and of progress bars the last state."""
    if output["output_type"] == "stream":
        text = "\n".join(line.rpartition("\r")[2] for line in "".join(output["text"]).split("\n"))
        return output | {"text": text} if text.strip() and not PROGRESS.search(text) else None
    data = {kind: value for kind, value in output.get("data", {}).items() if "widget" not in kind}
    if "image/png" in data:
        data = {"image/png": data["image/png"]}
    return (
        output | {"data": data}
        if set(data) - {"text/plain"} or output["output_type"] != "display_data"
        else None
    )


def neutral(text: str) -> str:
    """Without the folders of the machine that ran it."""
    return text.replace(f"{REPO}/", "").replace(str(REPO), ".").replace(str(Path.home()), "~")


# ---- the API, from the files of the package


def rooms() -> dict[str, list[str]]:
    """Room -> its modules, in the order in which data flow. Command line and private modules are left out."""
    found: dict[str, list[str]] = defaultdict(list)
    package = REPO / "smartlab"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not any(part.startswith("_") for part in parts):
            found[parts[0].split("_")[0]].append(".".join(("smartlab", *parts)))
    found.pop("cli", None)
    return {
        name: found[name] for name in sorted(found, key=lambda n: (ORDER.index(n) if n in ORDER else 99, n))
    }


def public_names() -> dict[str, str]:
    """The names of `smartlab/__init__.py` and the modules that define them."""
    tree = ast.parse((REPO / "smartlab" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC":
            return dict(ast.literal_eval(node.value))
    raise ValueError("smartlab/__init__.py has no _PUBLIC")


def has_something(module: str) -> bool:
    """Whether a module defines a public name that is documented."""
    path = REPO / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(n, kinds) and n.name[0] != "_" and ast.get_docstring(n) for n in body)


def api_pages() -> dict[str, str]:
    """File name -> Markdown with the directives of mkdocstrings."""
    public = "\n".join(
        f"::: {module}.{name}\n    options:\n      heading: smartlab.{name}\n      toc_label: {name}\n"
        for name, module in public_names().items()
    )
    pages = {
        "index.md": "# The public names\n\n`import smartlab as sl` gives these; each loads its module on first use.\n"
        f"The other pages follow the rooms of the package: [Architecture](../ARCHITECTURE.md).\n\n{public}"
    }
    for room, modules in rooms().items():
        shown = [module for module in modules if has_something(module)]
        if shown == [f"smartlab.{room}"]:
            pages[f"{room}.md"] = directive(shown[0], heading_level="1")
            continue
        text = [f"# smartlab.{room}\n"]
        if modules[0] not in shown:  # a folder that only says what it is for
            text.append(directive(modules[0], members="false", show_root_heading="false"))
        pages[f"{room}.md"] = "\n".join([*text, *map(directive, shown)])
    return pages


def directive(module: str, **options: str) -> str:
    """What mkdocstrings replaces by the docstrings of a module."""
    if module.endswith("settings"):  # each knob with its default, also where nothing is said of it
        options["show_if_no_docstring"] = "true"
    lines = [f"      {name}: {value}\n" for name, value in options.items()]
    return f"::: {module}\n" + ("    options:\n" + "".join(lines) if lines else "")


def commands_page() -> str:
    """The help of every command, as the command line prints it."""
    import typer.main

    from smartlab.cli.app import app

    def walk(command: Any, parent: Any, name: str) -> list[str]:
        context = (
            type(parent)(command, parent=parent, info_name=name)
            if parent
            else command.make_context(name, [], resilient_parsing=True)
        )
        if hasattr(command, "commands"):
            return [part for n, c in command.commands.items() for part in walk(c, context, n)]
        return [f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"]

    return "\n".join(
        [
            "# The command line\n",
            "Exit codes: 0 done, 1 the work failed, 2 bad use.\n",
            *walk(typer.main.get_command(app), None, "smartlab"),
        ]
    )


# ---- what mkdocs calls


@event_priority(100)
def on_config(config: Any) -> Any:
    """Fill in the parts of the menu that follow from files."""
    for entry in config.nav:
        if entry.get("Notebooks") == []:
            entry["Notebooks"] = [f"notebooks/{path.name}" for path in notebooks()]
        if entry.get("API reference") == []:
            entry["API reference"] = [
                {"Public names": "api/index.md"},
                {"Command line": "api/cli.md"},
                *({name: f"api/{name}.md"} for name in rooms()),
            ]
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Any, config: Any) -> Any:
    folder = Path(tempfile.mkdtemp(prefix="smartlab-docs-"))
    _temporary.append(folder)
    for path in notebooks():
        copy = folder / "notebooks" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(json.dumps(page_of(path, [REPO / f for f in EXECUTED])), encoding="utf-8")
        files.append(File(f"notebooks/{path.name}", str(folder), config.site_dir, config.use_directory_urls))
    for name in PAGES:
        files.append(File.generated(config, name, content=(REPO / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "index.md", content=(REPO / "README.md").read_text(encoding="utf-8")))
    for name, text in api_pages().items():
        files.append(File.generated(config, f"api/{name}", content=text))
    files.append(File.generated(config, "api/cli.md", content=commands_page()))
    wanted = {picture for page in files.documentation_pages() for picture in pictures_outside(page)}
    for picture in sorted(wanted):
        files.append(File.generated(config, f"files/{picture}", abs_src_path=str(REPO / picture)))
    return files


def home_of(uri: str) -> str:
    """The file in the repository that a page of the site is made from."""
    return "README.md" if uri == "index.md" else uri if uri in PAGES else f"docs/{uri}"


def target_of(uri: str, link: str) -> str:
    """The file in the repository that a relative link on a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(home_of(uri)), link.partition("#")[0]))


def pictures_outside(page: Any) -> list[str]:
    if not page.src_uri.endswith(".md") or page.src_uri.startswith("api/"):
        return []
    targets = (target_of(page.src_uri, link) for _, _, link in LINK.findall(page.content_string))
    return [t for t in targets if posixpath.splitext(t)[1] in PICTURES and not t.startswith(("docs/", ".."))]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they hold in the repository become links as they hold on the site."""
    uri = page.file.src_uri
    if uri.startswith(("api/", "notebooks/")):
        return markdown

    def moved(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match[0]
        target, anchor = target_of(uri, link), link.partition("#")[2]
        there = "index.md" if target == "README.md" else target.removeprefix("docs/")
        if files.get_file_from_path(there) is None:
            there = f"files/{target}"
        if (
            files.get_file_from_path(there) is None
        ):  # a file of the repository that has no page: its name is enough
            if not (REPO / target).exists():
                raise FileNotFoundError(f"{home_of(uri)}: no such file: {link}")
            return text
        way = posixpath.relpath(there, posixpath.dirname(uri) or ".")
        return f"{mark}[{text}]({way}{'#' + anchor if anchor else ''})"

    return LINK.sub(moved, markdown)


def on_post_build(config: Any) -> None:
    while _temporary:
        shutil.rmtree(_temporary.pop(), ignore_errors=True)


def on_build_error(error: Exception) -> None:
    on_post_build(None)
