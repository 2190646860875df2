"""A YOLO learns to find squares and discs, and loses half of its parameters: two minutes on a CPU, no download.

pip install '.[prune]' ultralytics && python examples/ultralytics_yolo.py
"""

import logging
import os
import shutil
from pathlib import Path

os.environ["YOLO_OFFLINE"] = "true"  # read when ultralytics is imported
os.environ["YOLO_CONFIG_DIR"] = "runs/yolo/config"

import cv2
import numpy as np
from matplotlib import font_manager
from ultralytics import YOLO
from ultralytics.utils import USER_CONFIG_DIR

from flatprune.integrations.ultralytics import pruning_trainer

FOLDER, SIDE, CLASSES = Path("runs/yolo"), 96, ("square", "disc")


def draw(rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """A noisy image with up to three shapes, and a line of each: class, center, width and height as parts of a side."""
    image = rng.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8)
    lines = []
    for _ in range(rng.integers(1, 4)):
        kind, radius = int(rng.integers(2)), int(rng.integers(8, 16))
        x, y = (int(v) for v in rng.integers(radius, SIDE - radius, 2))
        color = tuple(int(v) for v in rng.integers(120, 256, 3))
        if kind:
            cv2.circle(image, (x, y), radius, color, thickness=-1)
        else:
            cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), color, thickness=-1)
        lines.append(f"{kind} {x / SIDE} {y / SIDE} {2 * radius / SIDE} {2 * radius / SIDE}")
    return image, lines


def write_data(folder: Path, **sizes: int) -> Path:
    """Images and labels as Ultralytics reads them, so many of each part; returns the file that describes them."""
    rng = np.random.default_rng(0)
    for part, size in sizes.items():
        images, labels = folder / "images" / part, folder / "labels" / part
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for number in range(size):
            image, lines = draw(rng)
            cv2.imwrite(str(images / f"{number}.png"), image)
            (labels / f"{number}.txt").write_text("\n".join(lines))
    parts = "".join(f"{part}: images/{part}\n" for part in sizes)
    description = folder / "data.yaml"
    description.write_text(f"path: {folder.resolve()}\n{parts}names: {list(CLASSES)}\n")
    return description


def install_font() -> None:
    """Put a font where Ultralytics looks before it downloads one."""
    font = USER_CONFIG_DIR / "Arial.ttf"
    if not font.exists():
        shutil.copy(font_manager.findfont("DejaVu Sans"), font)


def main(epochs: int = 12) -> None:
    """Train, prune, load what was saved, find what is in an image."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("flatprune").setLevel(logging.INFO)
    install_font()
    data = write_data(FOLDER / "data", train=256, val=64)
    yolo = YOLO("yolov8n.yaml")
    yolo.train(
        trainer=pruning_trainer(yolo, target=0.5),
        data=str(data),
        epochs=epochs,
        imgsz=SIDE,
        batch=16,
        nbs=16,  # a step a batch
        amp=False,  # on a GPU, its check would download a network; amp="bf16" does not check
        plots=False,
        project=str(FOLDER.resolve()),
        name="train",
        exist_ok=True,
    )
    print(yolo.trainer.pruning.summary())
    small = YOLO(str(yolo.trainer.best))
    print(f"{sum(p.numel() for p in small.model.parameters()):,} parameters in {yolo.trainer.best}")
    print(f"mAP50-95 of the loaded network: {small.val(data=str(data), imgsz=SIDE, plots=False).box.map:.3f}")
    small.predict(str(FOLDER / "data/images/val/0.png"), imgsz=SIDE)


if __name__ == "__main__":
    main()
