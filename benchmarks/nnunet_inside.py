"""Runs a command of nnU-Net with nnU-Net's own Python, shortened, and counts what it loaded. Knows nothing of smartlab.

    NNUNET/bin/python benchmarks/nnunet_inside.py [--epochs 2 --iterations 10] nnUNetv2_train_pretrained 501 3d_fullres 0 …

- Without --epochs and --iterations, training is nnU-Net's: 1,000 epochs of 250 iterations.
- nnU-Net says only that it loaded a checkpoint (strictly: a tensor that is missing ends the run). Here a line says how many
  tensors of the network are then those of the file, which were resized, and what was left as it was initialised.
- `nnUNetv2_predict` cannot build the network of PretrainedTrainer_Primusx: it does not say the patch size. Here it does.
- OMP_NUM_THREADS holds; nnU-Net would take all cores. A torchvision that was built for another torch is made to import.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

COUNTED = "loaded weights: "


def declare_operators() -> Any:
    """torchvision's import names operators that its binary brings; where that does not load, they are only named."""
    found = importlib.util.find_spec("torchvision")
    for binary in Path(found.origin).parent.glob("_C*") if found and found.origin else ():
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            return library
    return None


OPERATORS = declare_operators()  # in nnU-Net's worker processes too


def shorten(trainer: Any, epochs: int, iterations: int) -> None:
    whole = trainer.__init__

    @functools.wraps(whole)  # nnU-Net looks at the names of its arguments
    def short(self: Any, *args: Any, **kwargs: Any) -> None:
        whole(self, *args, **kwargs)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = (
            epochs,
            iterations,
            2,
        )
        self.warmup_duration_whole_net = 1

    trainer.__init__ = short


def count_what_is_loaded(trainer: Any) -> None:
    load = trainer.load_pretrained_weights

    def counted(network: Any, pretrained_weights_path: str, **more: Any) -> Any:
        network, mismatch = load(network, pretrained_weights_path=pretrained_weights_path, **more)
        file = torch.load(pretrained_weights_path, weights_only=True, map_location="cpu")["network_weights"]
        now = {key: value.detach().cpu() for key, value in network.state_dict().items()}
        equal = [key for key, value in now.items() if key in file and torch.equal(value, file[key])]
        says = {
            "tensors_of_the_file": len(file),
            "equal_in_the_network": len(equal),
            "resized": [key for key in now if key in file and key not in equal],
            "of_the_file_not_in_the_network": [key for key in file if key not in now],
            "left_as_initialised": dict(Counter(key.split(".")[0] for key in now if key not in file)),
            "numbers_loaded": sum(now[key].numel() for key in equal),
            "numbers_of_the_network": sum(value.numel() for value in now.values()),
        }
        print(COUNTED + json.dumps(says), flush=True)
        return network, mismatch

    trainer.load_pretrained_weights = staticmethod(counted)


def say_the_patch_size(trainer: Any) -> None:
    """nnU-Net's newer signature of `build_network_architecture`, which its predictor prefers, around the older one."""
    build = trainer.build_network_architecture

    def built(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> Any:
        one = configuration_manager
        return build(
            one.network_arch_class_name,
            one.network_arch_init_kwargs,
            one.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            tuple(one.patch_size),
        )

    trainer.build_network_architecture = staticmethod(built)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("command", help="nnUNetv2_…")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    known = {point.name: point for point in entry_points(group="console_scripts")}
    if args.command not in known:
        parser.error(
            f"{args.command}: not a command of this nnU-Net (docs/NNUNET.md says which version has it)"
        )
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
        torch.set_num_threads = lambda _: None
    if args.command in ("nnUNetv2_train_pretrained", "nnUNetv2_predict"):
        from nnunetv2.training.nnUNetTrainer.pretraining.thrp_primusx_finetuning import (
            PretrainedTrainer_Primusx,
        )

        if args.command == "nnUNetv2_predict":
            say_the_patch_size(PretrainedTrainer_Primusx)
        else:
            count_what_is_loaded(PretrainedTrainer_Primusx)
            if args.epochs:
                shorten(PretrainedTrainer_Primusx, args.epochs, args.iterations)
    sys.argv = [args.command, *args.words]
    known[args.command].load()()


if __name__ == "__main__":
    main()
