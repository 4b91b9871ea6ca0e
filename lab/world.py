"""A small world of captioned scenes with an exact judge: `draw` a scene, `read` it off its picture.

A scene is two different shapes, one left of the other, on a plain ground:

    text = "a red circle left of a blue square on a white background"
    scene = place(text, random.Random(0))  # positions and sizes, which the caption leaves open
    picture = draw(scene)  # PIL.Image, RGB, anti-aliased
    caption(read(picture)) == text
    score(picture, text)  # (True, 1.0): the whole caption, the share of its six attributes

    python lab/world.py out  # have a trained pipeline draw the test captions, and count
"""

import random
import re
import sys
from itertools import permutations, product
from math import pi, sqrt
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw

COLOURS = {
    "red": (225, 40, 40),
    "green": (30, 165, 60),
    "blue": (45, 75, 230),
    "yellow": (250, 220, 40),
    "purple": (150, 45, 190),
    "cyan": (50, 215, 230),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle")

GRID = 32  # `read` works on GRID x GRID pixels; tiny-sd paints as many
SIZES = (0.23, 0.30)  # of a shape: the side of the square of the same area, in picture widths
GAP = 0.06  # least distance between two shapes and MARGIN to the edge, in picture widths
MARGIN = 0.03
SLANT = 0.16  # most that one shape lies higher than the other, in picture widths


class Thing(NamedTuple):
    """One shape; centroid and size in picture widths, from the upper left corner."""

    colour: str
    shape: str | None  # None: no shape of this world
    x: float
    y: float
    size: float


class Scene(NamedTuple):
    things: tuple[Thing, ...]  # from left to right
    background: str


# ---------------------------------------------------------------------------------------- captions

THING = f"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
CAPTION = re.compile(f"{THING} left of {THING} on a ({'|'.join(BACKGROUNDS)}) background")


def captions(split: str) -> list[str]:
    """All captions of a split: "train" (756), "validation" (54) or "test" (108), none in two.

    Only those of "train" are ever trained on. Choose on "validation", report on "test".
    """
    things = [f"a {colour} {shape}" for colour, shape in product(COLOURS, SHAPES)]
    every = [
        f"{a} left of {b} on a {background} background"
        for a, b in permutations(things, 2)
        for background in BACKGROUNDS
    ]
    random.Random(0).shuffle(every)
    start, stop = {"test": (0, 108), "validation": (108, 162), "train": (162, None)}[split]
    return every[start:stop]


def caption(scene: Scene) -> str | None:
    """The caption of a scene; None where it is not one whole shape left of another."""
    if len(scene.things) != 2 or None in (thing.shape for thing in scene.things):
        return None
    a, b = scene.things
    if not _left_of(a, b):
        return None
    return (
        f"a {a.colour} {a.shape} left of a {b.colour} {b.shape} on a {scene.background} background"
    )


def _left_of(a: Thing, b: Thing) -> bool:
    return b.x - a.x > abs(b.y - a.y)


# ---------------------------------------------------------------------------------------- drawing


def _outline(shape: str, size: float) -> tuple[float, float, float, float]:
    """Bounding box about the centroid (left, top, right, bottom) of a shape with area size²."""
    if shape == "circle":
        r = size / sqrt(pi)
        return -r, -r, r, r
    if shape == "square":
        return -size / 2, -size / 2, size / 2, size / 2
    side = sqrt(2) * size  # a triangle as wide as high; its centroid is a third above its base
    return -side / 2, -side * 2 / 3, side / 2, side / 3


def place(text: str, rng: random.Random) -> Scene:
    """A scene for a caption, its positions and sizes drawn from rng. ValueError for other texts."""
    match = CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"not a caption of this world: {text!r}")
    colour_a, shape_a, colour_b, shape_b, background = match.groups()
    while True:
        sizes = rng.uniform(*SIZES), rng.uniform(*SIZES)
        boxes = _outline(shape_a, sizes[0]), _outline(shape_b, sizes[1])
        (ax, ay), (bx, by) = (
            (
                rng.uniform(MARGIN - left, 1 - MARGIN - right),
                rng.uniform(MARGIN - top, 1 - MARGIN - bottom),
            )
            for left, top, right, bottom in boxes
        )
        gap = (bx + boxes[1][0]) - (ax + boxes[0][2])
        if gap >= GAP and abs(by - ay) <= SLANT:
            break
    a = Thing(colour_a, shape_a, ax, ay, sizes[0])
    b = Thing(colour_b, shape_b, bx, by, sizes[1])
    return Scene((a, b), background)


def _paint(picture: Image.Image, thing: Thing, fill) -> None:
    left, top, right, bottom = (
        picture.width * (centre + offset)
        for centre, offset in zip((thing.x, thing.y) * 2, _outline(thing.shape, thing.size))
    )
    right, bottom = right - 1, bottom - 1  # Pillow fills the last pixel too
    brush = ImageDraw.Draw(picture)
    if thing.shape == "circle":
        brush.ellipse((left, top, right, bottom), fill)
    elif thing.shape == "square":
        brush.rectangle((left, top, right, bottom), fill)
    else:
        brush.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill)


def draw(scene: Scene, size: int = GRID) -> Image.Image:
    """The scene as RGB, size x size pixels, drawn eight times as large and averaged down."""
    picture = Image.new("RGB", (8 * size, 8 * size), BACKGROUNDS[scene.background])
    for thing in scene.things:
        _paint(picture, thing, COLOURS[thing.colour])
    return picture.reduce(8)


# ---------------------------------------------------------------------------------------- reading

SEEN = 0.2  # a pixel this far from the background (RGB in [0, 1]) belongs to a thing
SPECK = 8  # fewer connected pixels are dirt
ALIKE = 0.8  # least overlap (intersection over union) of a thing with the shape it is read as


def read(picture: Image.Image) -> Scene:
    """The scene in a square picture of any size, from its pixels alone.

    The border's median is the background, each connected patch that differs from it a thing, with
    the colour of its pixel of median contrast. Its coverage gives area and centroid; its shape is
    the one which, drawn there with that area, overlaps it best, or None if none overlaps it well.
    """
    small = picture.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX)
    pixels = torch.tensor(list(small.tobytes()), dtype=torch.float32).view(GRID, GRID, 3) / 255
    border = torch.cat([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]).median(0).values
    background = _nearest(border, BACKGROUNDS)

    things = []
    for patch in _patches((pixels - border).norm(dim=-1) > SEEN):
        inside = pixels[patch]
        ink = inside[(inside - border).norm(dim=-1).argsort()[len(inside) // 2]]
        # A pixel at the edge is a mix of ink and background: how much of it is ink?
        coverage = ((pixels - border) @ (ink - border) / (ink - border).square().sum()).clamp(0, 1)
        coverage = coverage * _grown(patch)
        area = coverage.sum()
        ys, xs = torch.meshgrid(*[torch.arange(GRID) + 0.5] * 2, indexing="ij")
        x, y = (float((coverage * axis).sum() / area / GRID) for axis in (xs, ys))
        guesses = [
            Thing(_nearest(ink, COLOURS), shape, x, y, float(area.sqrt()) / GRID)
            for shape in SHAPES
        ]
        overlap, best = max((_overlap(coverage, guess), guess) for guess in guesses)
        things.append(best if overlap >= ALIKE else best._replace(shape=None))
    return Scene(tuple(sorted(things, key=lambda thing: thing.x)), background)


def _nearest(rgb: torch.Tensor, palette: dict) -> str:
    return min(palette, key=lambda name: (torch.tensor(palette[name]) / 255 - rgb).norm())


def _grown(mask: torch.Tensor) -> torch.Tensor:
    """The mask and the pixels that touch it, where anti-aliasing may have left some ink."""
    return torch.nn.functional.max_pool2d(mask[None].float(), 3, stride=1, padding=1)[0].bool()


def _patches(mask: torch.Tensor) -> list[torch.Tensor]:
    """The connected patches (4 neighbours) of a (H, W) mask, specks left out."""
    left, patches = set(map(tuple, mask.nonzero().tolist())), []
    while left:
        patch, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            patch.add((y, x))
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            edge.extend(near)
        if len(patch) >= SPECK:
            where = torch.zeros_like(mask)
            where[tuple(torch.tensor(sorted(patch)).T)] = True
            patches.append(where)
    return patches


def _overlap(coverage: torch.Tensor, guess: Thing) -> float:
    canvas = Image.new("L", (8 * GRID, 8 * GRID))
    _paint(canvas, guess, 255)
    drawn = torch.tensor(list(canvas.reduce(8).tobytes())).view(GRID, GRID) / 255
    return float(torch.minimum(coverage, drawn).sum() / torch.maximum(coverage, drawn).sum())


def score(picture: Image.Image, text: str) -> tuple[bool, float]:
    """(whether the picture matches its caption whole, the share of six attributes that are right).

    The six are the background, two colours, two shapes and the relation. Of more than two things
    those count that fit the caption best, but only two and no other can match it whole.
    """
    scene = read(picture)
    colour_a, shape_a, colour_b, shape_b, background = CAPTION.fullmatch(text).groups()

    def right(a: Thing | None, b: Thing | None) -> int:
        pairs = ((a, colour_a, shape_a), (b, colour_b, shape_b))
        hits = sum((t.colour == c) + (t.shape == s) for t, c, s in pairs if t is not None)
        return hits + (a is not None and b is not None and _left_of(a, b))

    things = [*scene.things, None, None]
    best = max(right(a, b) for a, b in permutations(things, 2))
    return caption(scene) == text, (best + (scene.background == background)) / 6


@torch.no_grad()
def judge(pipe, texts: list[str], guidance: float = 1.0, seed: int = 0, steps: int = 15):
    """Have a diffusers pipeline draw each caption once, and score the pictures.

    Returns (share of whole matches, mean share of right attributes, the pictures). A seed stands
    for the same initial noise whatever the pipeline.
    """
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        texts,
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    ).images
    scores = torch.tensor([score(picture, text) for picture, text in zip(pictures, texts)])
    return *scores.double().mean(0).tolist(), pictures


if __name__ == "__main__":
    from diffusers import DiffusionPipeline

    trained = DiffusionPipeline.from_pretrained(sys.argv[1])
    for guidance in (1.0, 3.0):
        whole, attributes, _ = judge(trained, captions("test") * 2, guidance)
        print(f"guidance {guidance}: whole {whole:.2f}, attributes {attributes:.2f}")
