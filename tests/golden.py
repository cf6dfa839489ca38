"""Writes tests/golden_detections.json: what the committed detector finds on 15 validation images.

    python tests/golden.py

To be run only when checkpoints/best_model.pth was trained anew; tests/test_detect.py compares with it.
"""

import json
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).with_name("golden_detections.json")
BEST = Path(__file__).parent.parent / "checkpoints" / "best_model.pth"
NUMBER, LEAST = 15, 0.3


def stored():
    """What this script wrote: {"weights": fingerprint of the detector, "detections": by image id}."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def detections(nb, bccd_root):
    """{image id: [[label, score, x0, y0, x1, y1], ...]} with scores of LEAST or more, best first."""
    split = nb.SmearSplit(nb.dataset_root(bccd_root), "val")
    model, _ = nb.load_detector(BEST)
    rows = [round(i * (len(split) - 1) / (NUMBER - 1)) for i in range(NUMBER)]
    found = nb.detect(model, [split.image(row) for row in rows], min_score=LEAST)
    return {
        split.ids[row]: [
            [label, round(score, 4), *(round(side, 1) for side in box)]
            for label, score, box in zip(
                *(one[k].tolist() for k in ("labels", "scores", "boxes")), strict=True
            )
        ]
        for row, one in zip(rows, found, strict=True)
    }


if __name__ == "__main__":
    from conftest import ROOT, load_definitions

    nb = load_definitions()
    with tempfile.TemporaryDirectory() as folder:
        data = nb.fetch_dataset(
            Path(folder) / "BCCD_Dataset", "", ROOT / "data" / "BCCD_Dataset.zip"
        )
        content = detections(nb, data)
        weights = nb.fingerprint(nb.load_checkpoint(BEST, "detector")["model"])
    lines = ",\n".join(f'"{name}": {json.dumps(rows)}' for name, rows in content.items())
    text = f'{{"weights": "{weights}", "detections": {{\n{lines}\n}}}}\n'
    GOLDEN.write_text(text, encoding="utf-8")
    number = sum(len(rows) for rows in content.values())
    print(f"{number} detections on {len(content)} images in {GOLDEN.name}")
