"""What the forkserver of `processes.py` imports once, so that its children need not.

Only imports: nothing is computed in the server, which would start threads that a fork does not have.
"""

import accelerate  # noqa: F401
import highdicom  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import nibabel  # noqa: F401
import pyarrow.pandas_compat  # noqa: F401
import torch._dynamo  # optimisers import it when they first step
import torch.onnx
import torch.utils.tensorboard  # noqa: F401

import smartlab as sl
from smartlab.evaluation.finetune import classify, segment  # noqa: F401
from smartlab.methods import masked_distillation, multiscale_mae  # noqa: F401
from smartlab.training import families, picture, pretrain  # noqa: F401

used = (sl.pretrain, sl.evaluate, sl.build_store, sl.Run)  # each imports its modules when it is first named
