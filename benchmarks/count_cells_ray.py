#!/usr/bin/env python3
"""Count pictures with Ray Data: the same table as count_cells.py, pictures a second by workers.

    pip install "ray[data]" onnxruntime opencv-python-headless numpy pillow tifffile tqdm
    python benchmarks/count_cells_ray.py --model checkpoints/ssd300_int8.onnx --pictures 120

Each worker loads the model once. A picture's scale is found on itself, as `--own-scale` of
count_cells.py does, so that a picture's counts depend on no other.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import ray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from count_cells import CellCounter, count_columns  # noqa: E402


def unpack_pictures(folder, number):
    """Some of BCCD's pictures from data/; they begin anew where there are more than it has."""
    with zipfile.ZipFile(ROOT / "data" / "BCCD_Dataset.zip") as bundle:
        names = sorted(name for name in bundle.namelist() if name.endswith(".jpg"))
        for place in range(number):
            content = bundle.read(names[place % len(names)])
            (folder / f"{place:05}.jpg").write_bytes(content)


def count_with_ray(pictures, model, workers):
    """The rows of counts.csv, by name, and the seconds of counting alone."""
    files = ray.data.read_binary_files(str(pictures), include_paths=True)
    files = files.repartition(8 * workers)
    counts = files.map_batches(
        CellCounter,
        fn_constructor_args=(str(model),),
        batch_size=4,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    started = time.perf_counter()
    rows = counts.take_all()
    return sorted(rows, key=by_name), time.perf_counter() - started


def by_name(row):
    """The key to sort rows by."""
    return row["image"]


def as_text(value):
    """A value as it stands in counts.csv."""
    if isinstance(value, str):
        return value
    return "" if np.isnan(value) else str(int(value))


def plain_rows(pictures, model, output):
    """The rows of counts.csv by count_cells.py, without the sum."""
    command = [sys.executable, str(ROOT / "count_cells.py"), str(pictures), "--own-scale"]
    command += ["--model", str(model), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    with open(output / "counts.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))[:-1]


def compare(ray_rows, rows):
    """How many rows of both tables differ."""
    different = abs(len(ray_rows) - len(rows))
    for ray_row, row in zip(ray_rows, rows, strict=False):
        texts = {name: as_text(value) for name, value in ray_row.items()}
        texts["image"] = Path(texts["image"]).name
        different += texts != row
    return different


def main():
    """Print pictures a second and whether the tables agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "checkpoints" / "ssd300_int8.onnx")
    parser.add_argument("--pictures", type=int, default=120)
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    # two for the counting, two for the reading, which waits for a free one
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    folder = Path(tempfile.mkdtemp())
    try:
        pictures = folder / "pictures"
        pictures.mkdir()
        unpack_pictures(pictures, arguments.pictures)
        rates = {}
        rows = []
        for workers in (1, 2):
            rows, seconds = count_with_ray(pictures, model, workers)
            rates[workers] = len(rows) / seconds
            print(
                f"{workers} workers: {seconds:.1f} s, {rates[workers]:.2f} pictures/s", flush=True
            )
        print(f"two workers / one: {rates[2] / rates[1]:.2f} (start of the workers included)")
        plain = plain_rows(pictures, model, folder / "plain")
        columns_agree = list(rows[0]) == count_columns(CellCounter(model).settings["class_names"])
        print(
            f"{len(plain)} rows, different: {compare(rows, plain)}; columns agree: {columns_agree}"
        )
    finally:
        ray.shutdown()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
