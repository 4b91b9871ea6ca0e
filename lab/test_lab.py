"""The judge of the small world is exact, and the pages show the tables of results.json."""

import json
import random
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import compare
import world

LAB = Path(__file__).parent


def test_splits_share_no_composition():
    splits = [set(world.captions(split)) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [756, 54, 108]
    assert len(set.union(*splits)) == 756 + 54 + 108


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(7)
    texts = rng.sample(world.captions("train") + world.captions("test"), 300)
    return [(text, world.place(text, rng)) for text in texts]


def test_the_judge_reads_what_was_drawn(scenes):
    size = random.Random(8)
    right = 0
    for text, scene in scenes:
        seen = world.read(world.draw(scene, size=size.choice([32, 64, 512])))
        right += world.caption(seen) == text
        for thing, original in zip(seen.things, scene.things):
            assert thing.x == pytest.approx(original.x, abs=0.01)
            assert thing.y == pytest.approx(original.y, abs=0.01)
            assert thing.size == pytest.approx(original.size, abs=0.01)
    assert right >= 0.99 * len(scenes)


def test_the_judge_reads_what_the_vae_makes_of_it(scenes):
    pipe = DiffusionPipeline.from_pretrained(LAB / "tiny-sd")
    pictures = [world.draw(scene) for _, scene in scenes]
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.image_processor.preprocess(pictures)).latent_dist.mode()
        decoded = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample)
    right = sum(world.score(image, text)[0] for image, (text, _) in zip(decoded, scenes))
    assert right >= 0.95 * len(scenes)


def test_the_judge_counts_attributes_and_rejects_what_is_no_scene():
    text = "a red circle left of a blue square on a white background"
    other = "a red circle left of a blue triangle on a black background"
    picture = world.draw(world.place(text, random.Random(0)))
    assert world.score(picture, text) == (True, 1.0)
    assert world.score(picture, other) == (False, pytest.approx(4 / 6))
    swapped = "a blue square left of a red circle on a white background"
    assert world.score(picture, swapped) == (False, pytest.approx(5 / 6))
    assert world.read(Image.new("RGB", (32, 32), "white")).things == ()
    stretched = Image.new("RGB", (32, 32), "white")
    stretched.paste(world.COLOURS["red"], (4, 12, 28, 18))
    assert [(t.colour, t.shape) for t in world.read(stretched).things] == [("red", None)]
    noise = Image.frombytes("RGB", (32, 32), random.Random(0).randbytes(32 * 32 * 3))
    assert world.caption(world.read(noise)) is None


def test_sample_data_shows_its_captions_and_nothing_held_out():
    rows = [json.loads(line) for line in (LAB.parent / "captions.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows} <= set(world.captions("train"))
    for row in rows[::8]:
        assert world.score(Image.open(LAB.parent / row["file_name"]), row["text"])[0], row


def test_the_tables_on_the_pages_are_those_of_the_results(capsys):
    results = json.loads(compare.RESULTS.read_text(encoding="utf-8"))
    compare.tables(results)
    printed = capsys.readouterr().out
    short, *others = [part for part in printed.split("\n\n") if part.startswith("|")]
    assert short in (LAB.parent / "README.md").read_text(encoding="utf-8")
    for table in others:
        assert table in (LAB / "README.md").read_text(encoding="utf-8")
