#!/usr/bin/env python3
"""Train our SSD300 and torchvision's on BCCD, each by its own recipe; compare on validation.

    python benchmarks/train_side_by_side.py --dataset BCCD_Dataset [--epochs 50] [--rates 0.0005]

Alike on both sides: the images and split, their official labels alone, the VGG-16 weights
(--weights FILE, else data/), the batch of 8, the number of epochs of one pass each, the arithmetic,
the seed and how the detections are scored (score 0.01, NMS 0.45, 200 boxes). torchvision's side
follows its reference recipe (references/detection, --data-augmentation ssd): photometric
distortion, zoom-out, IoU crop, flip; SGD with momentum 0.9, weight decay 5e-4, a warm-up over the
first epoch, the rate cut to a tenth after 2/3 and 11/12 of the epochs; its rate of 0.002 for 32
images is 0.0005 for 8. Every trial is one rate of one side. Prints a line an epoch and appends each
finished trial to OUTPUT/trials.jsonl. The test split is not touched. --clip is no part of
torchvision's recipe: it cuts the norm of its gradient, without which conv5 dies in the first forty
steps on BCCD (ACCURACY.md).
"""

import argparse
import functools
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import torch
from compare import ROOT, quiet_definitions
from torchvision.models.detection import ssd300_vgg16
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Image

REFERENCE_RATE, REFERENCE_BATCH = 0.002, 32  # torchvision's references/detection/README.md


def reference_recipe():
    """torchvision's augmentation for SSD: a tv_tensors.Image with its boxes in, float in [0, 1]
    out.
    """
    fill = {Image: (123, 117, 104), "others": 0}
    steps = [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop()]
    steps += [
        v2.RandomHorizontalFlip(p=0.5),
        v2.ToDtype(torch.float32, scale=True),
        v2.SanitizeBoundingBoxes(),
    ]
    return v2.Compose(steps)


def torchvision_model(nb, weights, num_classes):
    """ssd300_vgg16 as its builder makes it, VGG-16 from `weights`, conv1 frozen (its default of 4
    trainable stages).
    """
    model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes)
    convolutions = {key.removeprefix("features."): value for key, value in weights.items()}
    first = [layer for layer in model.backbone.features if isinstance(layer, torch.nn.Conv2d)]
    layers = [m for m in model.backbone.extra[0] if isinstance(m, torch.nn.Conv2d)]
    last = layers[:3]  # conv5
    numbers = sorted({int(key.split(".")[0]) for key in convolutions})
    with torch.no_grad():
        for number, layer in zip(numbers, [*first, *last], strict=True):
            layer.weight.copy_(convolutions[f"{number}.weight"])
            layer.bias.copy_(convolutions[f"{number}.bias"])
    for layer in first[:2]:
        layer.requires_grad_(False)
    model.score_thresh, model.nms_thresh, model.detections_per_img = (
        nb.MIN_SCORE,
        nb.MAX_OVERLAP,
        nb.TOP_K,
    )
    return model


def scores_of(nb, found, split):
    """Validation figures of detections, as the notebook computes them."""
    classes = len(split.class_names)
    matches = nb.match_all(found, split.boxes, split.labels, classes)
    map_50, map_all, by_class = nb.mean_average_precision(matches, classes)
    return {
        "map_50": round(map_50, 4),
        "map": round(map_all, 4),
        "ap_50": {n: round(a, 4) for n, a in zip(split.class_names, by_class, strict=True)},
    }


def train_torchvision(nb, train, val, weights, epochs, rate, dtype, device, clip=math.inf):
    """One trial of torchvision's side, the norm of its gradient cut at `clip`: its figures on
    validation.
    """
    torch.manual_seed(nb.SEED)
    model = torchvision_model(nb, weights, len(train.class_names) + 1).to(
        device, memory_format=torch.channels_last
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=5e-4)
    recipe, steps = reference_recipe(), math.ceil(len(train) / nb.BATCH_SIZE)
    living = [0.0]  # the share of conv5_3's outputs above zero in the last step
    conv5_3 = [layer for layer in model.backbone.extra[0] if isinstance(layer, torch.nn.ReLU)][2]
    watch = conv5_3.register_forward_hook(
        lambda _, __, out: living.__setitem__(0, float((out > 0).float().mean()))
    )
    half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    model.train()
    for epoch in range(epochs):
        started, total = time.perf_counter(), 0.0
        for number, batch in enumerate(torch.randperm(len(train)).split(nb.BATCH_SIZE)):
            warm = min(1.0, (epoch * steps + number) / max(1, steps - 1) + 1e-3)
            cut = 0.1 ** sum(epoch >= math.floor(epochs * share) for share in (2 / 3, 11 / 12))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * cut
            images, targets = [], []
            for index in batch.tolist():
                image, boxes, labels = train[index]
                boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[:2])
                image, target = recipe(
                    Image(torch.tensor(image).permute(2, 0, 1)), {"boxes": boxes, "labels": labels}
                )
                images.append(image.as_subclass(torch.Tensor).to(device))
                targets.append(
                    {
                        "boxes": target["boxes"].as_subclass(torch.Tensor).to(device),
                        "labels": target["labels"].to(device),
                    }
                )
            with half:
                loss = sum(model(images, targets).values())
            if not torch.isfinite(loss):
                print("the loss is not a number: this rate is too high")
                return None
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            total += float(loss.detach())
        print(
            f"torchvision, rate {rate:g}, epoch {epoch + 1}/{epochs}: "
            f"loss {total / steps:.3f}, conv5_3 above zero {living[0]:.2%}, "
            f"{time.perf_counter() - started:.0f} s",
            flush=True,
        )
    watch.remove()
    model.eval()
    found = []
    with torch.no_grad(), half:
        for index in range(len(val)):
            image = torch.tensor(val.image(index)).permute(2, 0, 1).to(device) / 255
            answer = model([image])[0]
            boxes, labels, scores = (answer[key].cpu() for key in ("boxes", "labels", "scores"))
            found.append({"boxes": boxes.float(), "labels": labels, "scores": scores.float()})
    return scores_of(nb, found, val)


def train_ours(nb, train, val, weights, epochs, rate, dtype, device):
    """One trial of ours, as the notebook trains: its figures on validation."""
    nb.LEARNING_RATE = rate
    every = range(0, len(train), max(1, len(train) // 16))
    first = nb.normalize(nb.SmearDataset(train).batch(every)[0])
    model = nb.build_model(len(train.class_names) + 1, weights, first, nb.SEED)
    run = nb.Run(model, epochs, dtype, device, {})
    run.passes = 1  # over the images in an epoch, as on the other side
    data = nb.EveryCellDataset(train, nb.WORKING_SIZE)
    while run.epoch < epochs:
        started = time.perf_counter()
        losses, _ = nb.train_epoch(run, data)
        print(
            f"ours, rate {rate:g}, epoch {run.epoch}/{epochs}: "
            f"loss {sum(losses):.3f}, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    model.load_state_dict(nb.averaged_state(run))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        found = nb.detect(model, [val.image(index) for index in range(len(val))])
    return scores_of(nb, found, val)


def main():
    """Run the trials that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=os.environ.get("BCCD_DATASET", "BCCD_Dataset"))
    parser.add_argument(
        "--weights",
        default=os.environ.get("VGG16_WEIGHTS", ""),
        help="VGG-16 features; empty: download",
    )
    parser.add_argument("--side", choices=("ours", "torchvision", "both"), default="both")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8, help="of both sides")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="one trial each; the default is each side's own rate"
    )
    parser.add_argument("--seed", type=int, help="of both sides; the default is the notebook's")
    parser.add_argument(
        "--clip",
        type=float,
        default=math.inf,
        help="gradient norm of torchvision's side at most this",
    )
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16", "float16"), default="auto"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="runs/side_by_side", help="folder of trials.jsonl")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    nb = quiet_definitions()
    nb.BATCH_SIZE, nb.PRECISION = arguments.batch_size, arguments.precision
    if arguments.seed is not None:
        nb.SEED = arguments.seed
    root = nb.dataset_root(arguments.dataset)
    train, val = nb.SmearSplit(root, "train"), nb.SmearSplit(root, "val")
    weights = nb.vgg16_features(arguments.weights, shipped=ROOT / "data" / "vgg16_features.pth")
    if weights is None:
        raise SystemExit("VGG-16's weights cannot be had: name a file with --weights.")
    dtype = nb.pick_precision(device)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    clipped = functools.partial(train_torchvision, clip=arguments.clip)
    sides = {
        "ours": (train_ours, nb.LEARNING_RATE),
        "torchvision": (clipped, REFERENCE_RATE * nb.BATCH_SIZE / REFERENCE_BATCH),
    }
    for side, (train_side, own_rate) in sides.items():
        if arguments.side not in (side, "both"):
            continue
        for rate in arguments.rates or [own_rate]:
            started = time.perf_counter()
            figures = train_side(nb, train, val, weights, arguments.epochs, rate, dtype, device)
            trial = {
                "side": side,
                "rate": rate,
                "epochs": arguments.epochs,
                "batch": nb.BATCH_SIZE,
                "seed": nb.SEED,
                "precision": str(dtype),
                "clip": arguments.clip
                if side == "torchvision" and math.isfinite(arguments.clip)
                else None,
                "weights": Path(arguments.weights).name or "ImageNet features",
                "minutes": round((time.perf_counter() - started) / 60, 1),
                "device": nb.device_name(device),
                "validation": figures,
            }
            print(json.dumps(trial), flush=True)
            with open(output / "trials.jsonl", "a") as log:
                log.write(json.dumps(trial) + "\n")


if __name__ == "__main__":
    main()
