"""The judge is exact, the pages show what results.json has, and the memory counter counts right."""

import json
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.checkpoint import checkpoint

import bench
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


# ------------------------------------------- the memory counter of lab/bench.py

UNIT = 4 * 64 * 64  # bytes of a [64, 64] tensor in fp32


def test_the_counter_follows_each_storage_once_until_it_is_freed():
    with bench.Live() as live:
        a = torch.ones(64, 64)
        view, b = a.T[1:], a + 1
        b.mul_(2)
        assert live.now == live.peak == 2 * UNIT
        del a
        assert live.now == 2 * UNIT  # the view holds it
        del view
        assert (live.now, live.peak) == (UNIT, 2 * UNIT)


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_the_counter_knows_the_activations_that_checkpointing_keeps(segments):
    with bench.Live() as live:
        layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(8)]
        blocks = [torch.nn.Sequential(layer, torch.nn.Tanh()) for layer in layers]
        x = y = torch.ones(64, 64)
        assert live.now == (8 + 1) * UNIT
        for block in blocks:
            y = block(y)
        assert live.now == (8 + 1 + 8) * UNIT  # a tanh keeps its result
        size, y = 8 // segments, x
        for first in range(0, 8, size):
            y = checkpoint(
                torch.nn.Sequential(*blocks[first : first + size]), y, use_reentrant=False
            )
        assert live.now == (8 + 1 + segments) * UNIT  # a segment keeps its last result alone
        y.sum().backward()
        del y
        assert live.now == (8 + 1 + 8) * UNIT  # the gradients


def test_the_counter_sees_weights_gradients_and_moments():
    with bench.Live() as live:
        weight = torch.nn.Parameter(torch.ones(64, 64))
        optimizer = torch.optim.AdamW([weight], fused=True)
        weight.square().sum().backward()
        optimizer.step()
        steps_taken = 4  # bytes of the count in the optimizer
        assert live.now == 4 * UNIT + steps_taken


def small(model):
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=48,
    )
    return SimpleNamespace(unet=unet, scheduler=DDPMScheduler())


def test_a_count_on_fake_tensors_is_that_of_a_real_run(monkeypatch):
    monkeypatch.setattr(bench, "parts", small)
    weights = 4 * sum(p.numel() for p in small("").unet.parameters()) / 1e9
    for arrangement in (
        {"batch_size": 1},
        {"batch_size": 4, "held": False},
        {"batch_size": 2, "checkpointing": False, "optimizer": "adafactor"},
    ):
        fake = bench.counted_peak("sd15", **arrangement)
        with monkeypatch.context() as patch:
            patch.setattr(bench, "FakeTensorMode", nullcontext)
            assert fake == pytest.approx(bench.counted_peak("sd15", **arrangement), rel=1e-3)
    held, precomputed = (bench.counted_peak("sd15", 1, held=held) for held in (True, False))
    assert held - precomputed == pytest.approx(weights, rel=1e-3)
    # Weights, gradients, two moments and the reference.
    assert 5 * weights < held < 6 * weights


def test_the_counter_starts_from_the_unet_alone():
    with bench.fake_gpu(), bench.Live() as live:
        pipe = bench.parts("sd15")
        assert live.now == pytest.approx(4 * pipe.unet.num_parameters(), rel=1e-4)
