"""Keep on disk what numba compiles of a package that does not do so itself."""

from __future__ import annotations

import sys
from contextlib import suppress


def keep_compiled(package: str) -> None:
    """Of a package that was imported: UMAP would otherwise take nine seconds in every process.

    numba has no setting for this, only a folder (NUMBA_CACHE_DIR); each of its functions can be asked.
    """
    from numba.core.dispatcher import Dispatcher

    parts = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == package]
    compiled = [v for part in parts for v in vars(part).values() if isinstance(v, Dispatcher)]
    with suppress(RuntimeError):  # nowhere to write: compiled anew, as it always was
        for function in compiled:
            if not function.stats.cache_path:
                function.enable_caching()
