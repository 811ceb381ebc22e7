"""Start an IPython kernel that ends with the process that started it: `python -m smartlab.batch.kernel -f FILE`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process when `parent` does, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    die_with(int(os.environ.pop("SMARTLAB_BATCH_PARENT")))
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()
