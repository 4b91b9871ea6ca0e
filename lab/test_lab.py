"""The judge is exact, the pages show what the results say, and each cell of each method runs."""

import json
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import compare
import pairs
import report
import train_tiny
import world
from compare import Setting

LAB = Path(__file__).parent
RESULTS = json.loads(compare.RESULTS.read_text(encoding="utf-8"))
ROWS = [json.loads(line) for line in (LAB.parent / "captions.jsonl").read_text().splitlines()]


# ------------------------------------------- the judge


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
    assert {row["text"] for row in ROWS} <= set(world.captions("train"))
    for row in ROWS[::8]:
        assert world.score(Image.open(LAB.parent / row["file_name"]), row["text"])[0], row


# ------------------------------------------- the pages


def tables_of(page):
    return [found[0] for found in re.finditer(r"^\|.*(\n\|.*)*", page.read_text("utf-8"), re.M)]


def test_tables_md_is_what_report_makes_of_what_compare_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results.json")
    compare.save(RESULTS["cells"])  # with the choices that these cells make
    assert compare.RESULTS.read_bytes() == (LAB / "results.json").read_bytes()
    assert tables_of(LAB / "tables.md") == report.tables(RESULTS)


@pytest.mark.parametrize("page", [LAB.parent / "README.md", LAB / "evidence.md"])
def test_the_tables_of_whole_matches_on_a_page_are_those_of_report(page):
    tables = [table for table in tables_of(page) if table.startswith("| whole matches")]
    assert tables and set(tables) <= set(report.tables(RESULTS))


def test_the_front_page_shows_the_trainers_own_recipe():
    flags = ["--data", str(LAB.parent / "captions.jsonl"), "--model", "tiny"]
    recipe = train_tiny.parse(flags)
    setting = Setting(train_tiny.parse([*flags, "--loss", "sft"]).lr, recipe.lr, recipe.beta)
    cell = RESULTS["cells"][compare.key(compare.SFT_SUDO, "test", setting, 0)]
    strip = Image.open(LAB / "strips" / "then SUDO.png")
    texts = world.captions("test")
    boxes = [(x, 0, x + 32, 32) for x in range(0, 32 * len(texts), 32)]
    first = sum(world.score(strip.crop(box), text)[0] for box, text in zip(boxes, texts))
    # A cell has the mean of two drawings, which differ by fewer by chance; the strip is the first.
    second = 2 * cell["1"][0] * len(texts) - first
    assert second == pytest.approx(round(second), abs=1e-6) and abs(second - first) < 20


# ------------------------------------------- what is chosen, and what a table says


def validated(method, matches_by_setting):
    """Cells whose mean over the seeds has these whole matches, by scale, for each setting."""
    cells = {}
    for number, (setting, matches) in enumerate(matches_by_setting.items()):
        for seed, aside in zip(compare.CHOSEN_ON, (-0.1 * number, 0.1 * number)):
            cell = {scale: [whole + aside] for scale, whole in zip(compare.SCALES, matches)}
            cells[compare.key(method, "validation", Setting(0.0, *setting), seed)] = cell
    return cells


def test_a_setting_is_chosen_for_each_use_and_a_tie_goes_to_the_gentler():
    settings = [(1e-5, 400.0), (2e-5, 400.0), (2e-5, 800.0), (3e-5, 400.0)]
    method = replace(compare.SUDO, grid=settings)
    tame, weak = [0.5, 0.6, 0.7, 0.8, 0.8], [0.1] * 5
    gentle, bold = [0.7, 0.8, 0.9, 0.95, 0.5], [0.9, 0.9, 0.9, 0.8, 0.4]
    cells = validated(method, dict(zip(settings, (tame, gentle, weak, bold))))
    chosen = compare.choices(method, cells)
    assert [chosen[use].lr for use in report.USES] == [3e-5, 2e-5, 1e-5]
    chosen = compare.choices(method, validated(method, dict(zip(settings, (weak, *[bold] * 3)))))
    assert set(chosen.values()) == {(0.0, 2e-5, 800.0)}
    del cells[compare.key(method, "validation", Setting(0.0, 3e-5, 400.0), 101)]
    with pytest.raises(KeyError):  # a choice needs all of its cells
        compare.choices(method, cells)


def test_what_comes_after_sft_takes_the_sft_of_guidance_1():
    whole = {setting: [0.1, 0.9, 0.9, 0.9, 0.9] for setting in compare.SFT.grid}
    whole[4e-3, 0.0] = [0.6, 0.3, 0.3, 0.3, 0.3]
    settings = compare.settings(compare.SFT_SUDO, validated(compare.SFT, whole))
    assert {setting.sft_lr for setting in settings} == {4e-3}


def test_a_row_is_a_model_and_a_lead_is_paired_by_seed():
    cells = {}
    for lr, matches, seeds in ((1e-3, 0.6, range(4)), (2e-3, 0.5, range(1, 5))):
        for n in seeds:
            name = compare.key(compare.SFT, "test", Setting(0.0, lr, 0.0), n)
            cells[name] = {"1": [matches + n / 10]}
    choices = {"SFT": {"guidance 1": [0.0, 2e-3, 0.0]}}
    first, second = report.rows_of({"cells": cells, "choices": choices})
    assert (first.lr, first.uses, second.lr, second.uses) == (1e-3, [], 2e-3, ["guidance 1"])
    assert report.lead(first, "1", second, "1") == "**0.100 ± 0.000**"
    assert report.shown([0.5, 0.6, 0.7]) == "0.60 ± 0.25"  # 4.30 * 0.1 / 3 ** 0.5


# ------------------------------------------- pairs, and a cell of each method


def paint(texts, guidance_scale, num_inference_steps, generator):
    """Stands in for a pipeline: draws each caption right or, as the noise has it, another one."""
    others = world.captions("train")[:2]
    drawn = []
    for text, noise in zip(texts, generator, strict=True):
        which = int(torch.randint(3, (1,), generator=noise))
        drawn.append(world.draw(world.place([text, *others][which], random.Random(which))))
    return SimpleNamespace(images=drawn)


paint.set_progress_bar_config = lambda disable: None


def test_pairs_are_preferred_as_the_judge_does_and_kept(tmp_path, monkeypatch):
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, ROWS[:20])))
    monkeypatch.setattr(pairs, "LAB", tmp_path / "lab")
    folder = pairs.drawn(paint, "some/base")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS[:20]]
    for row in rows:
        better, worse = (Image.open(folder / row[name]) for name in ("file_name", "loser"))
        assert world.score(better, row["text"])[1] > world.score(worse, row["text"])[1]
    assert pairs.drawn(None, "some/base") == folder  # nothing is drawn twice
    assert [path.name for path in folder.parent.iterdir()] == ["base"]  # and nothing stays beside


@pytest.mark.parametrize("method", compare.METHODS, ids=lambda method: method.name)
def test_a_cell_of_each_method_runs(method, tmp_path, monkeypatch):
    files = [str(LAB.parent / row["file_name"]) for row in ROWS]
    rows = [{"file_name": files[i], "text": ROWS[i]["text"], "loser": files[-i]} for i in range(40)]
    for name in ("captions.jsonl", "metadata.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "lab").mkdir()
    monkeypatch.setattr(compare, "LAB", tmp_path / "lab")
    monkeypatch.setattr(compare, "SCALES", ("1", "2"))
    monkeypatch.setattr(pairs, "drawn", lambda pipe, model: tmp_path)
    captions = world.captions("validation")[:2]
    monkeypatch.setattr(world, "captions", lambda split: captions)
    monkeypatch.setattr(world, "judge", partial(world.judge, steps=2))
    runs = []
    train = train_tiny.train
    monkeypatch.setattr(train_tiny, "train", lambda *given: runs.append(given) or train(*given))

    lr = train_tiny.parse(["--data", str(tmp_path), "--model", "tiny"]).lr
    after = method.after and replace(method.after, steps=2)
    short = replace(method, steps=min(2, method.steps), after=after)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    cell = compare.cell(short, "validation", Setting(1e-4 if after else 0.0, lr, 400.0), 100)
    taken = [(run.loss, run.lr, run.lr_schedule, run.steps) for *_, run in runs]
    first = [("sft", 1e-4, "linear", 1)] if after else []
    schedule = "linear" if method.name in ("SFT", "SFT on preferred") else "constant"
    assert taken == [*first, (method.loss, lr, schedule, short.steps)]
    *_, batches, _ = runs[-1]
    assert (batches.args[0].losers is not None) == method.name.endswith("on pairs")
    assert {"1", "2", "loser_drift", "implicit_acc"} <= cell.keys()
    assert ("2 ref" in cell) == (method.loss != "sft" and method.data == "captions.jsonl")
    # It learnt, and the model that it began with, its reference, did not.
    assert (cell["winner_drift"] != 0) == (method != compare.BASE)
