"""Fine-tune MONAI's own SwinUNETR from an encoder pretrained here.

Export a run, then train a segmentation network that knows nothing of smartlab:

    smartlab pretrain tiny --out runs/tiny
    smartlab export runs/tiny --to monai --out encoder.pt
    python docs/examples/finetune_swinunetr.py encoder.pt IMAGE.nii.gz LABELS.nii.gz --steps 100

The file fits any SwinUNETR with the same embedding, depths, heads and window: `strict=True` on `swinViT`.
"""

from __future__ import annotations

import argparse

import torch
from monai.data import decollate_batch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import SwinUNETR
from monai.transforms import (
    AsDiscrete,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandSpatialCropd,
    ScaleIntensityRanged,
    Spacingd,
)


def network(weights: str, classes: int) -> SwinUNETR:
    """SwinUNETR of the size the file has, its encoder strictly loaded."""
    state = torch.load(weights, weights_only=True)["state_dict"]
    encoder = {key.removeprefix("swinViT."): value for key, value in state.items()}
    stages = range(1, 5)
    span = round(encoder["layers1.0.blocks.0.attn.relative_position_bias_table"].shape[0] ** (1 / 3))
    net = SwinUNETR(
        in_channels=1,
        out_channels=classes,
        feature_size=encoder["patch_embed.proj.weight"].shape[0],
        depths=[
            len({k.split(".")[3] for k in encoder if k.startswith(f"layers{s}.0.blocks.")}) for s in stages
        ],
        num_heads=[
            encoder[f"layers{s}.0.blocks.0.attn.relative_position_bias_table"].shape[1] for s in stages
        ],
        window_size=(span + 1) // 2,
    )
    net.swinViT.load_state_dict(encoder, strict=True)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", help="written by smartlab export --to monai")
    parser.add_argument("image"), parser.add_argument("labels")
    parser.add_argument("--classes", type=int, default=19, help="labels 0 … classes − 1")
    parser.add_argument("--spacing", type=float, default=3.0, help="mm, as in pretraining")
    parser.add_argument(
        "--window", type=float, nargs=2, default=(-1000.0, 400.0), help="HU, as in pretraining"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    keys = ["image", "labels"]
    load = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, "RAS", labels=None),
            Spacingd(keys, (args.spacing,) * 3, mode=("bilinear", "nearest")),
            ScaleIntensityRanged("image", *args.window, 0, 1, clip=True),
        ]
    )
    crop = RandSpatialCropd(keys, (64, 64, 64), random_size=False).set_random_state(seed=0)
    case = load({"image": args.image, "labels": args.labels})
    net = network(args.weights, args.classes)
    optimiser = torch.optim.AdamW(net.parameters(), lr=args.lr)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    for step in range(args.steps):
        patch = crop(case)
        loss = loss_of(net(patch["image"].as_tensor()[None]), patch["labels"].as_tensor()[None])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step + 1:4d}  loss {loss.item():.3f}", flush=True)

    net.eval()
    with torch.no_grad():
        guess = sliding_window_inference(case["image"].as_tensor()[None], (64, 64, 64), 2, net)
    dice = DiceMetric(include_background=False, reduction="mean_batch", ignore_empty=True)
    one_hot = AsDiscrete(to_onehot=args.classes)
    truth = [one_hot(case["labels"].as_tensor())]
    dice([AsDiscrete(argmax=True, to_onehot=args.classes)(g) for g in decollate_batch(guess)], truth)
    scores = dice.aggregate()
    print(f"mean Dice over the labels of this one case, trained on it: {scores[~scores.isnan()].mean():.3f}")


if __name__ == "__main__":
    main()
