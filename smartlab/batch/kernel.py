"""Start an IPython kernel that ends with the process that started it: `python -m smartlab.batch.kernel -f FILE`."""

import os

from smartlab.core.workers import die_with

if __name__ == "__main__":
    die_with(int(os.environ.pop("SMARTLAB_BATCH_PARENT")))
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()
