"""Puts what the last `make demo` found into the README: the picture, and the answer as it came.

make demo && .venv/bin/python -m examples.show_demo
"""

import json
import re
from pathlib import Path

from PIL import Image

from examples.demo import DEFAULT_IMAGE, ROOT, pretty, shortened

OUT = ROOT / "demo-out"
PICTURE = ROOT / "docs" / "images" / "demo.png"
PANEL_WIDTH = 560
GAP = 12


def picture() -> Image.Image:
    """The image, the overlay of one prompt and that of several, side by side."""
    panels = [
        Image.open(path).convert("RGB")
        for path in (DEFAULT_IMAGE, OUT / "overlay.png", OUT / "overlay-batch.png")
    ]
    height = round(PANEL_WIDTH * panels[0].height / panels[0].width)
    panels = [panel.resize((PANEL_WIDTH, height), Image.Resampling.LANCZOS) for panel in panels]
    canvas = Image.new("RGB", (len(panels) * (PANEL_WIDTH + GAP) - GAP, height), "white")
    for index, panel in enumerate(panels):
        canvas.paste(panel, (index * (PANEL_WIDTH + GAP), 0))
    return canvas


def with_answer(readme: str) -> str:
    """The README with the answer in its first JSON block."""
    answer = shortened(json.loads((OUT / "predict.json").read_text()))
    # As the curl above it would have had it, from `make serve`.
    answer["task_id"] = "first"
    answer["mask_url"] = "http://127.0.0.1:8000/files/masks/first.png"
    for instance in answer["instances"]:
        instance["score"] = round(instance["score"], 4)
        instance["box_xyxy_px"] = [round(value, 1) for value in instance["box_xyxy_px"]]
    answer["confidence"] = round(answer["confidence"], 4)
    block = f"```json\n{pretty(answer)}\n```"
    return re.sub(r"```json\n.*?```", lambda _: block, readme, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    picture().quantize(200).save(PICTURE, optimize=True)
    page = Path(ROOT / "README.md")
    page.write_text(with_answer(page.read_text()))
    print(PICTURE, page)
