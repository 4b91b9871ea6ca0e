"""fit.py counts right, the rows of bench.py do what they say, and cost.md shows the counts."""

import math
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import bench
import fit
import models
import train_tiny

PAGE = Path(__file__).with_name("cost.md").read_text(encoding="utf-8")
UNIT = 4 * 64 * 64  # bytes of a [64, 64] tensor in fp32


@pytest.fixture
def small(monkeypatch):
    """Models of the same kinds as SD1.5's, in small."""

    def parts(model):
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=48,
        )
        return SimpleNamespace(unet=unet, scheduler=DDPMScheduler(), words=7)

    def text_encoders(model):
        size = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 2}
        return [CLIPTextModel(CLIPTextConfig(**size, num_hidden_layers=1))]

    def vae(model):
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "norm_num_groups": 8}
        blocks["up_block_types"] = ("UpDecoderBlock2D",) * 4
        return AutoencoderKL(block_out_channels=(8, 8, 16, 16), **blocks)

    monkeypatch.setattr(models, "parts", parts)
    monkeypatch.setattr(models, "vae", vae)
    monkeypatch.setattr(models, "text_encoders", text_encoders)


# ------------------------------------------- the counter


def test_the_counter_follows_each_storage_once_until_it_is_freed():
    with fit.Live() as live:
        a = torch.ones(64, 64)
        view, b = a.T[1:], a + 1
        b.mul_(2)
        assert live.now == live.peak == 2 * UNIT
        del a
        assert live.now == 2 * UNIT  # the view holds it
        del view
        assert (live.now, live.peak) == (UNIT, 2 * UNIT)
        assert (live.lap(), live.lap()) == (2 * UNIT / 1e9, UNIT / 1e9)


def test_the_counter_sees_the_card_alone():
    with fit.card(), fit.Live() as live:
        torch.ones(64, 64), (on_card := torch.ones(64, 64, device=train_tiny.DEVICE))
        assert live.now == live.peak == on_card.nbytes == UNIT


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_the_counter_knows_the_activations_that_checkpointing_keeps(segments):
    with fit.Live() as live:
        layers = [torch.nn.Linear(64, 64, bias=False) for _ in range(8)]
        blocks = [torch.nn.Sequential(layer, torch.nn.Tanh()) for layer in layers]
        x = y = torch.ones(64, 64)
        assert live.now == (8 + 1) * UNIT
        for block in blocks:
            y = block(y)
        assert live.now == (8 + 1 + 8) * UNIT  # a tanh keeps its result
        size, y = 8 // segments, x
        for first in range(0, 8, size):
            part = torch.nn.Sequential(*blocks[first : first + size])
            y = checkpoint(part, y, use_reentrant=False)
        assert live.now == (8 + 1 + segments) * UNIT  # a segment keeps its last result alone
        y.sum().backward()
        del y
        assert live.now == (8 + 1 + 8) * UNIT  # the gradients


def test_the_counter_sees_weights_gradients_and_moments():
    with fit.Live() as live:
        weight = torch.nn.Parameter(torch.ones(64, 64))
        optimizer = torch.optim.AdamW([weight], fused=True)
        weight.square().sum().backward()
        optimizer.step()
        steps_taken = 4  # bytes of the count in the optimizer
        assert live.now == 4 * UNIT + steps_taken


@contextmanager
def cpu(low=torch.bfloat16):
    """In the place of `fit.card`: a real run, cast by torch's own autocast of a CPU."""

    # Which, unlike that of a GPU, leaves norms in bf16.
    def in_fp32(norm):
        return lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs)

    norms = {name: in_fp32(getattr(F, name)) for name in ("group_norm", "layer_norm")}
    with mock.patch.multiple(F, **norms), mock.patch.object(train_tiny, "BF16", True):
        yield


def size(values):
    if isinstance(values, torch.Tensor):
        return values.nbytes / 1e9
    return sum(map(size, values.values() if isinstance(values, dict) else values))


def test_a_batch_that_does_not_fit_fits_no_card(small, monkeypatch):
    steps = models.Run.steps

    def limited(run):
        if run.config.batch_size > 4:
            raise torch.OutOfMemoryError
        return steps(run)

    monkeypatch.setattr(models.Run, "steps", limited)
    monkeypatch.setattr(fit, "BATCHES", (2, 8))
    peaks = fit.memory("sd15 --lora 16")
    for way in fit.WAYS:
        assert fit.needed(peaks, way, 2) < 2
        assert fit.needed(peaks, way, 8) == math.inf


@pytest.mark.parametrize("kind", fit.KINDS)
def test_a_count_is_that_of_a_real_run(small, monkeypatch, kind):
    monkeypatch.setattr(fit, "BATCHES", (2,))
    counted = fit.memory(f"sd15 {kind}")
    monkeypatch.setattr(fit, "card", cpu)
    real = fit.memory(f"sd15 {kind}")
    # The data stay in main memory, which is the card of a real run here.
    data = models.random_data(models.parts("sd15").unet, words=7)
    held = size([data.latents, data.picture, data.caption, data.conditions])
    for part, GB in real.items():
        beside = 0 if "encoded" in part else held
        assert GB == pytest.approx(counted[part] + beside, rel=5e-3), part


def test_the_models_have_the_weights_of_the_public_ones():
    millions = {"sd15": [859.52, 83.65, 123.06], "sdxl": [2567.46, 83.65, 123.06, 694.66]}
    for model in fit.MODELS:
        with torch.device("meta"):
            parts = models.parts(model).unet, models.vae(model), *models.text_encoders(model)
        assert [round(part.num_parameters() / 1e6, 2) for part in parts] == millions[model]


@pytest.mark.parametrize("kind", ["--lora 0", "--lora 16"])
def test_frozen_layers_arrive_in_bf16(small, kind):
    unet = models.parts("sd15").unet
    layers = [m for m in unet.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    low = sum(p.numel() for layer in layers for p in layer.parameters())
    frozen = 4 * unet.num_parameters() - 2 * low
    with fit.card(), fit.Live() as live:
        run = models.random_run("sd15", *kind.split())
        trained = 4 * run.unet.num_parameters(only_trainable=True)
        assert live.now == pytest.approx(frozen + trained, abs=3e4)  # the scheduler has 20 KB


def test_work_is_that_of_the_passes(small):
    """SUDO: two rows forward and backward, and two forward."""
    with fit.card(), FlopCounterMode(display=False) as counter, torch.no_grad():
        run = models.random_run("sd15")
        run.unet(**run.inputs(2))
        forward = counter.get_total_flops() / 1e12
    sudo, sft = (fit.work(f"sd15 --loss {loss} {fit.WAYS[1]}") for loss in ("sudo", "sft"))
    assert sudo == pytest.approx(2 * sft + forward, rel=1e-6)
    assert fit.work("sd15") > sudo > fit.work(f"sd15 --lora 16 {fit.WAYS[1]}")


def test_attention_is_counted():
    with fit.card(), FlopCounterMode(display=False) as counter:
        q = torch.zeros(2, 8, 64, 40, device=train_tiny.DEVICE, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * 8 * (2 * 64 * 64 * 40) * 2  # q k, and that with v


def test_a_card_keeps_room_for_what_is_not_counted():
    """Of the 25.8 GB of a card of 24 GiB 22.5 are room, and 0.3 of these stay free."""
    room = (24 * 2**30 / 1e9 - 1) / 1.1
    assert round(room, 1) == 22.5
    for peak, fits in ((room - 0.31, True), (room - 0.29, False)):
        peaks = {"a sample drawn": 3.0, ("way", 1): peak, ("way", 2): 99.0}
        assert (fit.needed(peaks, "way", 1) <= 24 * 2**30 / 1e9) == fits
        assert fit.needed(peaks | {"a sample drawn": 99.0}, "way", 1) > 100


# ------------------------------------------- the rows of the benchmark


def test_a_step_of_every_row_runs():
    for row, make in bench.ROWS.items():
        step, pairs = make("tiny")
        assert pairs == 32, row
        assert bench.seconds(step) > 0


def test_the_official_arrangement_is_sudo_from_pixels(small):
    run = models.random_run("sd15", "--batch-size", "2")
    loss_fn, batches = bench.official(run, "sd15")
    seen = []
    loss_fn.keywords["vae"].encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = next(batches(0))
    loss, metrics = loss_fn(run.unet, **batch)
    winners, losers = seen[0].chunk(2)  # losers are winners in another order, and encoded again
    assert winners.equal(batch["winners"]) and losers.sum() == pytest.approx(winners.sum(), abs=1)
    assert metrics["dpo"].item() == pytest.approx(math.log(2), abs=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in run.unet.parameters())


def test_ours_and_the_official_arrangement_take_turns(small, capsys):
    bench.against_the_official()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:5]]
    assert [row[0].strip("| ") for row in rows] == [
        "the official arrangement",
        "ours",
        "ours, with gradient checkpointing",
    ]
    assert all(len(row[1].split(", ")) == 3 for row in rows) and rows[0][2] == "1.00 |"


# ------------------------------------------- the page


def row_of(name):
    """The cells of a table's row on the page."""
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    return line.strip("| ").split(" | ")[1:]


def test_the_page_shows_what_fit_counts(monkeypatch):
    """The counts for one row; those for all take a quarter of an hour."""
    monkeypatch.setattr(fit, "BATCHES", (4,))
    monkeypatch.setattr(fit, "WAYS", fit.WAYS[:1])
    peaks = fit.memory("sd15 --optimizer adamw")
    step = fit.WAYS[0], 4
    assert row_of(f"`sd15 --optimizer adamw {step[0]}`")[2] == f"{peaks[step]:.1f}"
    rest = [f"{GB:.1f}" for part, GB in peaks.items() if part != step]
    assert row_of("`sd15 --optimizer adamw`") == rest
    assert (
        f"All weights of sd15, by the flags of its recipe: {fit.needed(peaks, *step):.1f} GB"
        in PAGE
    )
    assert row_of("`sd15 --loss sudo`")[0] == f"{fit.work('sd15'):.2f}"


def test_a_gpu_that_is_too_small_for_all_weights_gets_lora():
    """The trainer's threshold is the count for the recipe."""
    counted = dict(
        re.findall(r"All weights of (\w+), by the flags of its recipe: ([\d.]+) GB", PAGE)
    )
    thresholds = train_tiny.FLAGS["memory"][1]
    assert [round(float(counted[model])) for model in fit.MODELS] == [*thresholds[1:]]
