"""Pictures with preference labels: a base model draws each caption twice, the judge prefers one.

    python lab/pairs.py lab/tiny-sd  # draws the pairs of this model, and counts

Each picture is drawn at a guidance of 1, 2, 3 or 5, by chance. The one with more right attributes
is preferred; where both have as many, both are drawn again.
"""

import json
import random
import sys
from pathlib import Path
from statistics import fmean

import torch
from diffusers import DiffusionPipeline
from PIL import Image

LAB = Path(__file__).parent
sys.path.insert(0, str(LAB.parent))

import train_tiny  # noqa: E402
import world  # noqa: E402

SCALES = (1.0, 2.0, 3.0, 5.0)


def folder(model: str) -> Path:
    """The folder of the pairs for captions.jsonl's captions, as train_tiny.read_rows takes it.

    Its column "file_name" has the preferred pictures, "loser" the others.
    """
    return LAB / "pairs" / Path(model).name


def draw(model: str) -> None:
    """Draw the pairs of this model, if they are not there: all methods train on the same ones."""
    if folder(model).exists():
        return
    pipe = DiffusionPipeline.from_pretrained(model).to(train_tiny.DEVICE)
    lines = (LAB.parent / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(0)
    decided = {}
    again = 0
    while len(decided) < len(texts):
        left = [i for i in range(len(texts)) if i not in decided]
        pictures = {}
        todo = [(i, k, rng.choice(SCALES)) for i in left for k in (0, 1)]
        for scale in SCALES:
            mine = [(i, k) for i, k, its in todo if its == scale]
            noise = [train_tiny.generator("pairs", 0, again, *which) for which in mine]
            given = {"guidance_scale": scale, "num_inference_steps": 15, "generator": noise}
            if mine:
                pictures |= zip(mine, pipe([texts[i] for i, _ in mine], **given).images)
        for i in left:
            first, second = (world.score(pictures[i, k], texts[i])[1] for k in (0, 1))
            if first != second:
                order = (0, 1) if first > second else (1, 0)
                decided[i] = [pictures[i, k] for k in order]
        again += 1

    beside = folder(model).with_suffix(".unfinished")
    beside.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, text in enumerate(texts):
        row = {"file_name": f"{i + 1:04d}-winner.png", "loser": f"{i + 1:04d}-loser.png"}
        for name, picture in zip(row.values(), decided[i]):
            picture.save(beside / name)
        rows.append(json.dumps(row | {"text": text}) + "\n")
    (beside / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    beside.rename(folder(model))


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in compare.py
    draw(sys.argv[1])
    there = folder(sys.argv[1])
    rows = [json.loads(line) for line in (there / "metadata.jsonl").read_text().splitlines()]
    for column in ("file_name", "loser"):
        seen = [world.score(Image.open(there / row[column]), row["text"]) for row in rows]
        whole, attributes = (fmean(values) for values in zip(*seen))
        print(f"{len(rows)} under {column}: whole {whole:.2f}, attributes {attributes:.2f}")
