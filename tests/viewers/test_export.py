"""An executed notebook, its widgets included, stays small and keeps a picture where no kernel answers."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

CELLS = [
    "import numpy as np\nimport smartlab as sl\nrng = np.random.default_rng(0)",
    "image = rng.integers(-1000, 1000, (96, 96, 96)).astype(np.int16)  # 1.8 MB that does not compress",
    "sl.view(image, mask=rng.random((6, 6, 6)) < 0.7, title='Noise')",
    "sl.viewers.embedding.embedding(rng.normal(size=(50, 2)), ['a', 'b'] * 25, lambda i: image)",
]


@pytest.mark.slow
def test_export_to_html_shows_the_static_picture(tmp_path):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = nbformat.v4.new_notebook(metadata=kernel)
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    NotebookClient(book, timeout=300, store_widget_state=True).execute()
    assert "application/vnd.jupyter.widget-state+json" in book.metadata.widgets, "the unfavourable case"
    assert len(nbformat.writes(book)) < 1_000_000
    page, _ = HTMLExporter().from_notebook_node(book)
    pictures = re.findall(r"<img[^>]*>", page)
    assert sum("smartlab-still" in tag and "data:image/png;base64," in tag for tag in pictures) == 2
