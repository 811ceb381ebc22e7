"""Keep notebooks clean in git: `python -m smartlab.notebook_files [--check] [FILE …]` (`make notebooks`).

No outputs, no counts, cell ids that say notebook and place ("03-07"), no metadata but tags: so that a
diff shows what somebody wrote and nothing else. `--check` changes nothing and names what is not clean.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from smartlab.core.files import write_text
from smartlab.core.places import notebook_folder

LARGEST = 60_000  # bytes of a notebook without outputs
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cleaned(content: dict[str, Any], number: str) -> dict[str, Any]:
    """The same notebook without outputs, counts and metadata, with ids `number`-00, -01, …"""
    cells = []
    for place, cell in enumerate(content["cells"]):
        tags = cell.get("metadata", {}).get("tags")
        kept: dict[str, Any] = {
            "cell_type": cell["cell_type"],
            "id": f"{number}-{place:02d}",
            "metadata": {"tags": tags} if tags else {},
            "source": "".join(cell["source"]).strip("\n").splitlines(keepends=True),
        }
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        cells.append(dict(sorted(kept.items())))
    return {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}


def text_of(path: Path) -> str:
    """The clean text of a notebook file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return json.dumps(cleaned(content, path.stem.partition("_")[0]), indent=1, ensure_ascii=False) + "\n"


def problems(path: Path) -> list[str]:
    """What is not clean about a notebook file; an empty list when nothing is."""
    found, text = [], path.read_text(encoding="utf-8")
    content = json.loads(text)
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    if any(cell.get("outputs") or cell.get("execution_count") for cell in code):
        found.append("has outputs")
    tagged = sum("parameters" in cell["metadata"].get("tags", []) for cell in code)
    if tagged != 1:
        found.append(f"has {tagged} cells tagged `parameters`, not one")
    if len(text.encode()) >= LARGEST:
        found.append(f"is {len(text.encode())} bytes, more than {LARGEST}")
    if not found and text != text_of(path):
        found.append("has other cell ids, metadata or layout than `make notebooks` gives it")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Clean the files, or with --check only say what is not clean; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="default: every notebook of the package")
    parser.add_argument("--check", action="store_true", help="change nothing")
    given = parser.parse_args(arguments)
    tours = sorted((notebook_folder() / "tour").glob("*.ipynb"))
    dirty = 0
    for path in given.files or sorted(notebook_folder().glob("[0-9]*_*.ipynb")) + tours:
        if given.check:
            for problem in problems(path):
                dirty += 1
                print(f"{path}: {problem}", file=sys.stderr)
            continue
        text = text_of(path)
        if text != path.read_text(encoding="utf-8"):
            write_text(path, text)
            print(f"{path}: cleaned")
    return 1 if dirty else 0


if __name__ == "__main__":
    sys.exit(main())
