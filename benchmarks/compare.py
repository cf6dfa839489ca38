#!/usr/bin/env python3
"""Ours and torchvision's ssd300_vgg16 side by side: the same weights, images, threads and top-k.

    python benchmarks/compare.py --dataset BCCD_Dataset [--repeats 7] [--threads 2] [--device cpu]

Both run in one process, in turn, after a warm-up; the detections are first asserted to agree.
"Defaults" is what a user of each gets: ours in the arithmetic that pays on this machine, or for
own images count_cells.py with the int8 file beside best_model.pth, torchvision in float32; "like"
is both in float32. Prints for each row the medians, the ratio ours / torchvision pair by pair with
its quartiles, and, where convolutions are the work, the floor: the floating-point operations that
torch counts, at the machine's measured rate in that row's arithmetic, and the share of it that
ours reaches. --profile prints where the time of a training step, of the loss and of decoding goes.
Weights come from checkpoints/best_model.pth.
"""

import argparse
import contextlib
import functools
import io
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.io import decode_jpeg, read_file
from torchvision.models.detection import ssd300_vgg16
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
from conftest import load_definitions  # noqa: E402

import count_cells  # noqa: E402


def quiet_definitions():
    """The notebook's definitions, without what its cells print."""
    with contextlib.redirect_stdout(io.StringIO()):
        return load_definitions()


def torchvision_twin(nb, model, **options):
    """torchvision's SSD300 with the weights and the priors of `model` (N outputs agree to
    rounding).
    """
    twin = ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=model.num_classes, **options
    )
    heads = [*twin.head.regression_head.parameters(), *twin.head.classification_head.parameters()]
    theirs = [*twin.backbone.parameters(), *heads]
    named = [*model.named_parameters()]
    named.sort(key=lambda item: item[0].startswith("loc.") + 2 * item[0].startswith("conf."))
    with torch.no_grad():
        for target, (_, source) in zip(theirs, named, strict=True):
            target.copy_(source.view_as(target))
    start = 0
    # the priors are configuration, not code: give it ours
    for level, cells in enumerate(nb.FEATURE_MAPS):
        count = 2 + 2 * len(nb.PRIOR_RATIOS[level])
        twin.anchor_generator._wh_pairs[level] = (
            model.priors[start : start + count, 2:].clone().cpu()
        )
        start += cells * cells * count
    twin.anchor_generator.clip, twin.anchor_generator.steps = False, None
    twin.transform.image_mean = [value / 255 for value in nb.VGG_MEAN]
    twin.score_thresh, twin.nms_thresh, twin.detections_per_img = (
        nb.MIN_SCORE,
        nb.MAX_OVERLAP,
        nb.TOP_K,
    )
    twin.topk_candidates = nb.MAX_CANDIDATES
    return twin


def paired(ours, theirs, repeats, device):
    """Seconds of both, in turn: two lists."""

    def clock(function):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    clock(ours), clock(theirs)
    pairs = [(clock(ours), clock(theirs)) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def row(name, ours, theirs, goal, floor=None):
    """One line of the table: medians in ms, ratio and quartiles, floor (s) and share of it."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    middle = statistics.median(ratios)
    a, b = statistics.median(ours) * 1000, statistics.median(theirs) * 1000
    reached = f"{floor * 1000:.0f} ms, {floor * 1000 / a:.0%}" if floor else ""
    ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    print(f"| {name} | {a:.1f} | {b:.1f} | {ratio} | {goal} | {reached} |", flush=True)


@functools.lru_cache
def peak_rate(nb, dtype, device):
    """The most floating-point operations a second seen here: a large matrix product or one of
    conv4's convolutions.
    """
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    product = 2 * 2048**3 / min(paired(lambda: a @ a, lambda: a @ a, 8, device)[0])
    if device.type != "cpu":
        return product
    form = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
    layer, x = torch.nn.Conv2d(256, 256, 3, padding=1).to(**form), torch.randn(4, 256, 38, 38)
    x = x.to(**form)
    with torch.no_grad():
        seconds = min(paired(lambda: layer(x), lambda: None, 8, device)[0])
    return max(product, 2 * 4 * 38 * 38 * 256 * 256 * 9 / seconds)


def floor_of(nb, function, dtype, device):
    """Seconds that the counted floating-point operations of a call would take at the machine's
    measured rate.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / peak_rate(nb, dtype, device)


def profile(title, function, repeats=3):
    """Print the ten operators that take most of a call's time on the CPU."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for _ in range(repeats):
            function()
    events = sorted(trace.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"\n{title}: {total / repeats / 1000:.1f} ms of operators\n")
    print("| operator | ms | share |\n|---|---|---|")
    for event in events[:10]:
        print(
            f"| {event.key} | {event.self_cpu_time_total / repeats / 1000:.2f} "
            f"| {event.self_cpu_time_total / total:.0%} |"
        )


def targets_of(boxes, labels, size, device="cpu"):
    """Lists of boxes in [0, 1] and labels as torchvision wants them: a list of dicts in pixels."""
    pairs = zip(boxes, labels, strict=True)
    return [{"boxes": b.to(device) * size, "labels": c.to(device)} for b, c in pairs]


def our_step(nb, model, batch, device, dtype):
    """A function that does one training step of ours, as the notebook's defaults freeze the
    layers.
    """
    copy = nb.SSD300(model.num_classes, model.priors.clone())
    copy.load_state_dict(model.state_dict())
    nb.freeze_blocks(copy, nb.FROZEN_BLOCKS)
    run = nb.Run(copy, 1, dtype, device, {})
    return lambda: nb.training_step(run, *batch)


def their_step(nb, model, batch, device, frozen):
    """A function that does one float32 step of torchvision's; the first `frozen` tensors of VGG
    are not trained.
    """
    images, boxes, labels, _ = batch
    twin = torchvision_twin(nb, model).to(device).train()
    for index, parameter in enumerate(twin.backbone.features.parameters()):
        parameter.requires_grad_(index >= frozen)
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, weight_decay=5e-4)
    given, wanted = list(images / 255), targets_of(boxes, labels, 300, device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        sum(twin(given, wanted).values()).backward()
        optimizer.step()

    return step


def training_rows(nb, model, batch, repeats, device):
    """Whole steps: default settings of each; the same layers trained and the same float32
    arithmetic in both.
    """
    for name, dtype, frozen, goal in (
        ("training step, batch 8, defaults of each", nb.pick_precision(device), 4, "0.6 / 0.5"),
        ("training step, batch 8, like: same layers, both float32", torch.float32, 14, "0.9 / 0.7"),
    ):
        ours = our_step(nb, model, batch, device, dtype)
        theirs = their_step(nb, model, batch, device, frozen)
        row(name, *paired(ours, theirs, repeats, device), goal, floor_of(nb, ours, dtype, device))


def loss_inputs(nb, model, split, device):
    """Outputs and targets of a batch of 32: locs, scores, boxes, labels."""
    _, boxes, labels = nb.SmearDataset(split).batch(range(32))
    torch.manual_seed(0)
    locs = torch.randn(32, 8732, 4, device=device, requires_grad=True)
    scores = torch.randn(32, 8732, model.num_classes, device=device, requires_grad=True)
    return locs, scores, boxes, labels


def loss_row(nb, model, split, repeats, device):
    """Matching and loss with gradients, batch 32, from the same outputs."""
    locs, scores, boxes, labels = loss_inputs(nb, model, split, device)
    twin = torchvision_twin(nb, model).to(device)
    wanted = targets_of(boxes, labels, 300, device)
    anchors = [nb.cxcywh_to_xyxy(model.priors) * 300] * 32

    def theirs():
        matched = []
        for anchor, target in zip(anchors, wanted, strict=True):
            quality = nb.ops.box_iou(target["boxes"], anchor)
            matched.append(twin.proposal_matcher(quality))
        losses = twin.compute_loss(
            wanted, {"bbox_regression": locs, "cls_logits": scores}, anchors, matched
        )
        sum(losses.values()).backward()

    criterion = nb.MultiBoxLoss(model.priors)

    def ours():
        sum(criterion(locs, scores, boxes, labels).values()).backward()

    row("matching and loss, batch 32", *paired(ours, theirs, repeats, device), "0.5 / 0.25")


def profiles(nb, model, split, batch, device):
    """Where the time of ours goes."""
    profile("training step, batch 8", our_step(nb, model, batch, device, nb.pick_precision(device)))
    inputs = loss_inputs(nb, model, split, device)
    criterion = nb.MultiBoxLoss(model.priors)
    profile("matching and loss, batch 32", lambda: sum(criterion(*inputs).values()).backward())
    with torch.no_grad():
        locs, scores = model(nb.normalize(batch[0]))
    profile("decoding and NMS, batch 8", lambda: decode_and_select(nb, model, locs, scores))


def decode_and_select(nb, model, locs, scores):
    """From the outputs of the network to the detections of each image."""
    boxes = nb.decode(locs, model.priors).clamp(0, 1).cpu()
    chances = scores.cpu().transpose(1, 2).softmax(1).transpose(1, 2)
    limits = nb.MIN_SCORE, nb.MAX_OVERLAP, nb.TOP_K
    pairs = zip(boxes, chances, strict=True)
    return [nb.select_detections(*pair, *limits) for pair in pairs]


def detection_rows(nb, model, split, repeats, device):
    """Decoding and NMS alone; file to boxes for one image and for eight. First: do the detections
    agree?
    """
    twin = torchvision_twin(nb, model).to(device).eval()
    files = [str(picture) for _, picture in split.files[:8]]
    small = (
        torch.stack([nb.resize_to_square(split.image(i), 300) for i in range(8)]).float().to(device)
    )
    with torch.no_grad():
        locs, scores = model(nb.normalize(small))
        outputs = {"bbox_regression": locs, "cls_logits": scores}
        anchors = [nb.cxcywh_to_xyxy(model.priors) * 300] * 8
        found = decode_and_select(nb, model, locs, scores)
        expected = twin(list(small / 255))
        for mine, other in zip(found, expected, strict=True):
            n = min(len(mine["scores"]), len(other["scores"]), 100)
            assert torch.allclose(mine["scores"][:n], other["scores"][:n], atol=1e-4), (
                "scores differ"
            )
            assert torch.allclose(mine["boxes"][:n] * 300, other["boxes"][:n], atol=0.1), (
                "boxes differ"
            )
    print("| detections agree: scores to 1e-4, boxes to 0.1 pixel | | | | | |")

    @torch.no_grad()
    def ours():
        decode_and_select(nb, model, locs, scores)

    @torch.no_grad()
    def theirs():
        twin.postprocess_detections(outputs, anchors, [(300, 300)] * 8)

    row("decoding and NMS, batch 8", *paired(ours, theirs, repeats, device), "0.5 / 0.25")
    file_rows(nb, model, twin, files, repeats, device)
    exported_rows(nb, twin, files, repeats, device)


def from_files(twin, files, device):
    """A function that finds cells in image files by torchvision's."""

    @torch.no_grad()
    def theirs():
        twin([decode_jpeg(read_file(path)).to(device) / 255 for path in files])

    return theirs


def file_rows(nb, model, twin, files, repeats, device):
    """File to boxes: by the fastest way that each has, and both in float32."""
    fast = nb.detection_precision(device)
    exported = ROOT / "checkpoints" / "ssd300_int8.onnx"
    if not exported.is_file():
        print(f"| {exported.name} is not there: run the page first | | | | | |")
        return
    counter = count_cells.CellCounter(exported, threads=torch.get_num_threads())

    def own(paths):
        return [counter.find(nb.read_image(path), [640, 480]) for path in paths]

    def eager(paths, dtype):
        return nb.detect(model, [nb.read_image(path) for path in paths], dtype=dtype)

    in_fast = functools.partial(eager, dtype=fast)
    in_float32 = functools.partial(eager, dtype=torch.float32)
    ways = [
        ("own images: count_cells, int8", own, fast, "0.3"),
        (f"detect in the faster type: {str(fast)[6:]}", in_fast, fast, "0.45 / 0.3"),
        ("like: both float32", in_float32, torch.float32, "0.85 / 0.3"),
    ]
    for name, function, dtype, goal in ways:
        for count in (1, 8):
            ours = functools.partial(function, files[:count])
            theirs = from_files(twin, files[:count], device)
            times = paired(ours, theirs, repeats, device)
            floor = floor_of(nb, theirs, dtype, device)
            row(f"file to boxes, batch {count}, {name}", *times, goal, floor)


def exported_rows(nb, twin, files, repeats, device):
    """File to boxes by the ONNX files that the page writes, against torchvision in eager mode."""
    for file, kind, goal in (
        ("ssd300.onnx", "float32", "0.7"),
        ("ssd300_int8.onnx", "int8", "0.3"),
    ):
        if not (ROOT / "checkpoints" / file).is_file():
            print(f"| {file} is not there: run the page first | | | | | |")
            continue
        session = nb.onnx_session(ROOT / "checkpoints" / file)

        def ours(session=session):
            nb.detect_onnx(session, [nb.read_image(path) for path in files[:1]])

        times = paired(ours, from_files(twin, files[:1], device), repeats, device)
        row(f"file to boxes, batch 1, ONNX Runtime {kind}", *times, goal)


def pipeline_row(nb, split, repeats, device):
    """Decoded images to augmented batches of 8; torchvision's reference recipe for SSD."""
    data = nb.SmearDataset(split, nb.WORKING_SIZE)
    generator = torch.Generator().manual_seed(0)
    steps = [v2.ToImage(), v2.RandomPhotometricDistort(), v2.RandomZoomOut(), v2.RandomIoUCrop()]
    steps += [
        v2.RandomHorizontalFlip(),
        v2.Resize((300, 300)),
        v2.ToDtype(torch.float32, scale=True),
    ]
    recipe = v2.Compose([*steps, v2.SanitizeBoundingBoxes()])

    def ours():
        images, boxes, _ = data.batch(range(8))
        nb.augment(images, boxes, generator, 4 / 3)

    def theirs():
        items = []
        for index in range(8):
            image, boxes, labels = split[index]
            boxes = BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[:2])
            items.append(
                recipe(
                    transforms.functional.to_pil_image(image), {"boxes": boxes, "labels": labels}
                )
            )

    row(
        "input pipeline with augmentation, 8 images", *paired(ours, theirs, repeats, device), "0.33"
    )


def memory_row(arguments):
    """Peak memory of a process that does three training steps of the defaults."""
    peaks = []
    for side in ("ours", "theirs"):
        command = [
            sys.executable,
            __file__,
            "--dataset",
            str(arguments.dataset),
            "--peak",
            side,
            "--device",
            arguments.device,
        ]
        peaks.append(
            float(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[
                    -1
                ]
            )
        )
    name = "peak memory of training steps, batch 8 (GB, whole process)"
    print(f"| {name} | {peaks[0]:.2f} | {peaks[1]:.2f} | {peaks[0] / peaks[1]:.2f} | 0.8 | |")


def peak_gb(nb, device):
    """Peak memory of this process in GB; on Linux from /proc, since ru_maxrss starts at the
    parent's size.
    """
    status = Path("/proc/self/status")
    if device.type == "cpu" and status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e6
    return nb.peak_memory_gb(device)


def peak(nb, model, batch, side, device):
    """Print the peak memory in GB of a process that does three steps of one side."""
    if side == "ours":
        step = our_step(nb, model, batch, device, nb.pick_precision(device))
    else:
        step = their_step(nb, model, batch, device, 4)
    for _ in range(3):
        step()
    print(peak_gb(nb, device))


def main():
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default=os.environ.get("BCCD_DATASET", "BCCD_Dataset"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--profile", action="store_true", help="where the time goes, instead of the table"
    )
    parser.add_argument("--peak", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    nb = quiet_definitions()
    model, _ = nb.load_detector(ROOT / "checkpoints" / "best_model.pth", device)
    split = nb.SmearSplit(nb.dataset_root(arguments.dataset), "val")
    images, boxes, labels = nb.SmearDataset(split).batch(range(8))
    complete = torch.zeros(8, dtype=torch.bool)
    batch = images.to(device).float(), boxes, labels, complete
    if arguments.peak:
        return peak(nb, model, batch, arguments.peak, device)
    if arguments.profile:
        return profiles(nb, model, split, batch, device)
    rates = ", ".join(
        f"{str(t)[6:]} {peak_rate(nb, t, device) / 1e9:.0f} GFLOP/s"
        for t in (torch.float32, torch.bfloat16)
    )
    print(f"{nb.device_name(device)}, torch {torch.__version__.split('+')[0]}, peak {rates}\n")
    print("| what | ours, ms | torchvision, ms | ratio [quartiles] | goal (CPU / CUDA) | floor |")
    print("|---|---|---|---|---|---|")
    detection_rows(nb, model, split, arguments.repeats, device)
    loss_row(nb, model, split, arguments.repeats, device)
    pipeline_row(nb, split, arguments.repeats, device)
    training_rows(nb, model, batch, arguments.repeats, device)
    memory_row(arguments)


if __name__ == "__main__":
    main()
