"""The judge is exact, the pages show what the results say, and each cell of each method runs."""

import json
import random
import re
from dataclasses import replace
from functools import partial
from statistics import fmean

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import compare
import pairs
import report
import train_tiny
import world

LAB = compare.LAB
RESULTS = json.loads(compare.RESULTS.read_text(encoding="utf-8"))
ROWS = [json.loads(line) for line in (LAB.parent / "captions.jsonl").read_text().splitlines()]


def test_the_judge_reads_what_was_drawn_and_what_the_vae_makes_of_it():
    rng = random.Random(7)
    texts = rng.sample(world.captions("train") + world.captions("test"), 150)
    scenes = [world.place(text, rng) for text in texts]
    read = [world.read(world.draw(scene, size=rng.choice([32, 64, 512]))) for scene in scenes]
    right = [world.caption(scene) == text for scene, text in zip(read, texts)]
    assert sum(right) >= 0.99 * len(texts)
    for scene, original in zip(read, scenes):
        for thing, drawn in zip(scene.things, original.things):
            assert thing[2:] == pytest.approx(drawn[2:], abs=0.01)  # x, y and size

    pipe = DiffusionPipeline.from_pretrained(LAB / "tiny-sd")
    pixels = pipe.image_processor.preprocess([world.draw(scene) for scene in scenes])
    with torch.no_grad():
        pictures = pipe.image_processor.postprocess(pipe.vae(pixels).sample)
    right = [world.score(picture, text)[0] for picture, text in zip(pictures, texts)]
    assert sum(right) >= 0.95 * len(texts)


def test_the_judge_counts_attributes_and_rejects_what_is_no_scene():
    text = "a red circle left of a blue square on a white background"
    picture = world.draw(world.place(text, random.Random(0)))
    assert world.score(picture, text) == (True, 1.0)
    other = "a red circle left of a blue triangle on a black background"
    assert world.score(picture, other) == (False, pytest.approx(4 / 6))
    swapped = "a blue square left of a red circle on a white background"
    assert world.score(picture, swapped) == (False, pytest.approx(5 / 6))
    stretched = Image.new("RGB", (32, 32), "white")
    stretched.paste(world.COLOURS["red"], (4, 12, 28, 18))
    assert [thing.shape for thing in world.read(stretched).things] == [None]


def test_what_is_judged_was_never_trained_on():
    train, validation, test = (set(world.captions(s)) for s in ("train", "validation", "test"))
    assert [len(train), len(validation), len(test)] == [756, 54, 108]
    assert len(train | validation | test) == 756 + 54 + 108
    assert {row["text"] for row in ROWS} <= train
    for row in ROWS[::8]:
        assert world.score(Image.open(LAB.parent / row["file_name"]), row["text"])[0], row


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


@pytest.mark.parametrize("use", report.USES)
def test_a_chosen_model_did_best_of_its_grid_and_a_tie_goes_to_the_gentler(use):
    grids = {method.name: method.grid for method in compare.METHODS}
    tried = {}
    for row in report.rows_of(RESULTS):
        scale = row.best() if use == "best above 1" else use.split()[-1]
        if row.validation and row[2:4] in grids.get(row.method, []):
            whole = round(fmean(row.by_seed(scale, 0, "validation").values()), 6)
            tried.setdefault(row[:2], []).append((whole, -row.lr, row.beta, use in row.uses))
    for models in tried.values():
        assert max(models)[-1] or not any(chosen for *_, chosen in models)


def test_a_lead_is_paired_by_seed_and_has_the_interval_of_student():
    cells = {seed: {"1": [0.6 + seed / 10]} for seed in range(4)}
    row = report.Row("SFT", 0.0, 1e-3, 0.0, [], {}, cells)
    other = row._replace(test={seed: {"1": [0.5 + seed / 10]} for seed in range(1, 5)})
    assert report.lead(row, "1", other, "1") == "**0.100 ± 0.000**"
    assert report.shown([0.5, 0.6, 0.7]) == "0.60 ± 0.25"  # 4.30 * 0.1 / 3 ** 0.5


def test_the_front_page_shows_the_trainers_own_recipe():
    recipe = train_tiny.RECIPES["tiny"]
    setting = compare.Setting(recipe["sft_lr"], recipe["lr"], recipe["beta"])
    cell = RESULTS["cells"][compare.key(compare.SFT_SUDO, "test", setting, 0)]
    strip = Image.open(LAB / "strips" / "then SUDO.png")
    pictures = [strip.crop((x, 0, x + 32, 32)) for x in range(0, strip.width, 32)]
    right = [world.score(*each)[0] for each in zip(pictures, world.captions("test"), strict=True)]
    # The cell has the mean of two drawings, of which the strip is one.
    assert cell["1"][0] == pytest.approx(fmean(right), abs=0.1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A lab with eight captioned pictures, and with the pairs that tiny-sd draws for them."""
    folder = tmp_path_factory.mktemp("top") / "lab"
    rows = [row | {"file_name": str(LAB.parent / row["file_name"])} for row in ROWS[:8]]
    (folder.parent / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "LAB", folder)
        pairs.draw(train_tiny.TINY)
    return folder


def test_pairs_are_preferred_as_the_judge_does(lab):
    folder = lab / "pairs" / "tiny-sd"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        better, worse = (Image.open(folder / row[name]) for name in ("file_name", "loser"))
        assert world.score(better, row["text"])[1] > world.score(worse, row["text"])[1]


@pytest.mark.parametrize("method", compare.METHODS, ids=lambda method: method.name)
def test_a_cell_of_each_method_runs(method, lab, monkeypatch):
    captions = world.captions("test")[:2]
    monkeypatch.setattr(compare, "LAB", lab)
    monkeypatch.setattr(pairs, "LAB", lab)
    monkeypatch.setattr(compare, "SCALES", ("1", "2"))
    monkeypatch.setattr(world, "captions", lambda split: captions)
    monkeypatch.setattr(world, "judge", partial(world.judge, steps=2))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    runs = []
    train = train_tiny.train
    monkeypatch.setattr(train_tiny, "train", lambda *given: runs.append(given) or train(*given))

    lr = compare.HARMFUL
    after = method.after and replace(method.after, steps=2)
    short = replace(method, steps=min(2, method.steps), after=after)
    seed = 1 + compare.METHODS.index(method)  # with one of its own no SFT is there already
    cell = compare.cell(short, "test", compare.Setting(1e-4 if after else 0.0, lr, 400.0), seed)
    taken = [(run.loss, run.lr, run.lr_schedule, run.steps) for *_, run in runs]
    first = [("sft", 1e-4, "linear", 1)] if after else []
    assert taken == [*first, (method.loss, lr, method.lr_schedule, short.steps)]
    *_, batches, _ = runs[-1]
    assert (batches.args[0].losers is not None) == method.name.endswith("on pairs")
    assert ("2 ref" in cell) == (method.loss != "sft" and method.data == "captions.jsonl")
    # It learnt, and the model that it began with, its reference, did not.
    assert (cell["winner_drift"] != 0) == (method != compare.BASE)
