"""What sudo.py and train_tiny.py claim, checked on a CPU without a download.

The oracle is written from the equations, in float64, one image at a time. Except for flow matching
the noise is that of diffusers' own schedulers. It shares no line with sudo.py.
"""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are those of a CPU, wherever they run

import torch
import torch.distributed as dist
from accelerate import Accelerator
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from peft import LoraConfig
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import CLIPTextModelWithProjection

import sudo
import train_tiny

HERE = Path(__file__).parent
B, BETA = 4, 300.0
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}


def tiny_unet(**config):
    torch.manual_seed(0)
    tiny = UNet2DConditionModel.load_config(HERE / "lab" / "tiny-sd" / "unet")
    return UNet2DConditionModel.from_config(tiny, **config)


def tiny_transformer(name):
    """SD3's, Flux's or Wan's, its latents, its conditions and what has no batch axis."""
    torch.manual_seed(0)
    size = {"num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2}
    channels, text = {"in_channels": 4, "out_channels": 4}, {"joint_attention_dim": 64}
    if name == "Wan":
        model = WanTransformer3DModel(text_dim=64, freq_dim=16, ffn_dim=32, **size, **channels)
        return model, torch.randn(B, 4, 2, 8, 8), {}, {}
    pooled = {"pooled_projections": torch.randn(B, 10)}
    text["pooled_projection_dim"] = 10
    if name == "SD3":
        place = {"sample_size": 8, "pos_embed_max_size": 4, "caption_projection_dim": 24}
        model = SD3Transformer2DModel(**place, **size, **channels, **text)
        return model, torch.randn(B, 4, 8, 8), pooled, {}
    rope = {"num_single_layers": 1, "axes_dims_rope": (4, 4, 4), "guidance_embeds": True}
    model = FluxTransformer2DModel(in_channels=16, **rope, **size, **text)
    ids = {"img_ids": torch.rand(16, 3), "txt_ids": torch.zeros(5, 3)}
    return model, torch.randn(B, 16, 16), pooled | {"guidance": torch.ones(B)}, ids


def moved(unet, scale=0.01):
    """The policy after some training: the reference with its weights shaken."""
    policy = copy.deepcopy(unet)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p += scale * torch.randn_like(p)
    return policy


def batch(seed=2):
    rng = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        winners=torch.randn(B, 4, 8, 8, generator=rng),
        losers=torch.randn(B, 4, 8, 8, generator=rng),
        conditions=torch.randn(B, 5, 64, generator=rng),
        noise=torch.randn(B, 4, 8, 8, generator=rng),
        timesteps=torch.tensor([3, 250, 600, 999]),
        added={
            "text_embeds": torch.randn(B, 10, generator=rng),
            "time_ids": torch.randint(64, (B, 6), generator=rng).float(),
        },
    )


# ------------------------------------------- the oracle


def oracle(unet, reference, scheduler, b, pair_weight, beta=BETA, l1=0.5, l2=0.5):
    """L, u and the mean errors of Eq. 8 and 9, a pair at a time, in float64."""
    dpo = mse = 0.0
    margins, errors = [], {"w": [], "l": [], "rw": [], "rl": []}
    for i in range(B):
        t, eps = b.timesteps[i : i + 1], b.noise[i : i + 1].double()
        added = {name: value[i : i + 1].double() for name, value in b.added.items()}
        given = {"added_cond_kwargs": added}
        given["encoder_hidden_states"] = b.conditions[i : i + 1].double()
        side = {}
        for name, x in (("w", b.winners), ("l", b.losers)):
            x = x[i : i + 1].double()
            if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
                sigma = t.double() / 1000
                x_t, goal = (1 - sigma) * x + sigma * eps, eps - x
            else:
                x_t = scheduler.add_noise(x, eps, t)
                v_prediction = scheduler.config.prediction_type == "v_prediction"
                goal = scheduler.get_velocity(x, eps, t) if v_prediction else eps
            side[name] = ((unet(x_t, t, **given).sample - goal) ** 2).sum() / goal.numel()
            with torch.no_grad():
                answer = reference(x_t, t, **given).sample
                side["r" + name] = ((answer - goal) ** 2).sum() / goal.numel()
        u = -beta / 2 * (side["w"] - side["l"] - side["rw"] + side["rl"])
        dpo = dpo + pair_weight[i] * torch.log(1 + torch.exp(-u)) / B
        mse = mse + side["w"] / B
        margins.append(float(u.detach()))
        for name, error in side.items():
            errors[name].append(float(error.detach()))
    return l1 * dpo + l2 * mse, margins, errors


@pytest.mark.parametrize(
    "prediction_type, pair_weight, unet",
    [
        ("epsilon", None, {}),
        ("epsilon", [0.5, 2.0, 0.0, 1.0], SDXL),
        ("v_prediction", [1.0, 0.0, 1.0, 0.0], {}),
        ("flow", None, {}),
    ],
)
def test_loss_gradients_and_metrics_are_those_of_the_equations(prediction_type, pair_weight, unet):
    reference = tiny_unet(**unet)
    policy, b = moved(reference), batch()
    if prediction_type == "flow":
        exact = scheduler = FlowMatchEulerDiscreteScheduler()
        b.timesteps = b.timesteps + 0.3
    else:
        scheduler = DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")
        exact = copy.deepcopy(scheduler)
        exact.alphas_cumprod = exact.alphas_cumprod.double()
    draws = {"losers": b.losers, "noise": b.noise, "timesteps": b.timesteps}
    given = {"beta": BETA, "added_cond_kwargs": b.added, **draws}
    if pair_weight:
        given["pair_weight"] = torch.tensor(pair_weight)
    arguments = (policy, reference, scheduler, b.winners, b.conditions)
    loss, metrics = sudo.sudo_loss(*arguments, **given)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters()), "although it could be trained"

    policy64, weight = copy.deepcopy(policy).double(), pair_weight or [1.0] * B
    policy64.zero_grad()
    expected, u, errors = oracle(policy64, copy.deepcopy(reference).double(), exact, b, weight)
    expected.backward()
    assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    for p, q in zip(policy.parameters(), policy64.parameters()):
        scale = float(q.grad.abs().max())
        assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-3 * scale + 1e-6)

    mean = {name: sum(values) / B for name, values in errors.items()}
    counted = [ui for ui, w in zip(u, weight) if w]
    expected_metrics = {
        "loss": float(expected.detach()),
        "dpo": sum(math.log(1 + math.exp(-ui)) for ui in counted) / len(counted),
        "winner_error": mean["w"],
        "loser_error": mean["l"],
        "winner_drift": mean["w"] - mean["rw"],
        "loser_drift": mean["l"] - mean["rl"],
        "margin": sum(counted) / len(counted),
        "implicit_acc": sum(ui > 0 for ui in counted) / len(counted),
        "saturated": sum(abs(ui) > 10 for ui in counted) / len(counted),
    }
    assert {ui > 0 for ui in u} == {True, False}, "the case should have hits and misses"
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert value.dtype == torch.float32 and value.ndim == 0 and not value.requires_grad
        assert_close(float(value), expected_metrics[name], rtol=1e-3, atol=1e-5)


def test_gradient_of_the_objective_in_closed_form():
    """dL/de_w = λ1·w·(β/2)·σ(-u)/B + λ2/B and dL/de_l = -λ1·w·(β/2)·σ(-u)/B; at u = 0, 1250 : 1."""
    ref_errors = torch.tensor([0.30, 0.10, 0.25, 0.35])
    errors = torch.tensor([0.30, 0.1002, 0.25, 0.3496], requires_grad=True)
    loss, _ = sudo.sudo_objective(errors, ref_errors, pair_weight=torch.tensor([1.0, 3.0]))
    loss.backward()
    u = torch.tensor([0.0, -2500 * (0.0002 + 0.0004)], dtype=torch.float64)
    pull = 0.5 * torch.tensor([1.0, 3.0]) * 2500 * torch.sigmoid(-u) / 2
    assert_close(errors.grad.double(), torch.cat([pull + 0.25, -pull]), rtol=1e-3, atol=0)
    assert errors.grad[0] / 0.25 == pytest.approx(1250 + 1)


# ------------------------------------------- the first step


@pytest.mark.parametrize("half", [None, "autocast and checkpointing", "weights"])
def test_step_zero_is_exactly_ln2_with_margin_zero_and_fp32_errors(half):
    policy, b = tiny_unet().train(), batch()
    if half == "weights":
        policy, b.conditions = policy.bfloat16(), b.conditions.bfloat16()
    reference = sudo.frozen_copy(policy)
    autocast = half == "autocast and checkpointing"
    if autocast:
        policy.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, metrics = sudo.sudo_loss(policy, reference, DDPMScheduler(), b.winners, b.conditions)
    assert loss.dtype == torch.float32
    loss.backward()
    assert metrics["margin"] == 0 and metrics["winner_drift"] == 0 and metrics["loser_drift"] == 0
    assert metrics["dpo"] == torch.tensor(math.log(2)) and metrics["implicit_acc"] == 0.5
    assert_close(loss.detach(), 0.5 * math.log(2) + 0.5 * metrics["winner_error"])
    assert all(p.grad.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("name", ["UNet", "SD3", "Flux", "Wan"])
def test_steps_prefer_the_winner_and_leave_the_reference_alone(name):
    b, scheduler = batch(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    policy, latents, condition, ids = tiny_unet(), b.winners, {}, {}
    if name != "UNet":
        policy, latents, condition, ids = tiny_transformer(name)

    def ordered(model):
        if name in ("UNet", "Wan"):  # take their arguments in this order already
            return model
        return lambda x, t, c, **kwargs: model(
            hidden_states=x, timestep=t, encoder_hidden_states=c, **ids, **kwargs
        )

    reference = sudo.frozen_copy(policy)
    kept = copy.deepcopy(reference.state_dict())
    optimizer = torch.optim.SGD(policy.parameters(), 1e-4)
    margins = []
    for _ in range(4):
        same = {"generator": torch.Generator().manual_seed(4), "beta": BETA, "mse_weight": 0.0}
        arguments = (scheduler, latents, b.conditions)
        loss, metrics = sudo.sudo_loss(
            ordered(policy), ordered(reference), *arguments, **same, **condition
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not margins:
            assert metrics["dpo"] == torch.tensor(math.log(2)) and metrics["margin"] == 0
        margins.append(float(metrics["margin"]))
    assert margins == sorted(set(margins)) and metrics["winner_drift"] < metrics["loser_drift"]
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    assert_close(reference.state_dict(), kept, rtol=0, atol=0)


# ------------------------------------------- pairs


def test_random_image_is_a_derangement_with_every_other_image_equally_likely():
    rng = torch.Generator().manual_seed(0)
    for size in (2, 3, 8):
        images = torch.arange(size).view(size, 1, 1, 1).float()
        counts = torch.zeros(size, size)
        for _ in range(2000):
            losers = sudo.random_image(images, rng).flatten().long()
            assert sorted(losers.tolist()) == list(range(size))
            counts[torch.arange(size), losers] += 1
        assert counts.diagonal().sum() == 0
        off_diagonal = counts[~torch.eye(size, dtype=torch.bool)] * (size - 1) / 2000
        assert (off_diagonal - 1).abs().max() < 0.25


def test_blur_removes_detail_and_keeps_means():
    fine = (torch.arange(16).view(1, 1, 1, -1) % 2 * 2.0 - 1).expand(1, 3, 16, 16)
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert sudo.blur(fine).abs().max() < 0.2 and sudo.blur(fine).shape == fine.shape
    assert_close(sudo.blur(flat), flat)


def test_random_grid_swaps_two_cells_of_each_image():
    cell_number = torch.arange(64).view(8, 8).repeat_interleave(3, 0).repeat_interleave(2, 1)
    images = cell_number.expand(20, 3, 24, 16).float()
    swapped = sudo.random_grid(images, generator=torch.Generator().manual_seed(0))
    moves = set()
    for image in swapped:
        where = (image != images[0]).all(0)
        assert where.sum() == 2 * 3 * 2 and torch.equal(where, (image != images[0]).any(0))
        a, b = image[0][where].unique().tolist()
        assert (image[0][cell_number == a] == b).all() and (image[0][cell_number == b] == a).all()
        moves.add((a, b))
    assert len(moves) > 15


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 3, 8, 8), (16, 16)], ids=len)
def test_noise_and_targets_are_those_of_diffusers(shape):
    x, eps, t = torch.randn(B, *shape), torch.randn(B, *shape), torch.tensor([0, 10, 500, 999])
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    assert_close(sudo.add_noise(x, eps, t, scheduler), scheduler.add_noise(x, eps, t))
    velocity = sudo.training_target(x, eps, t, scheduler)
    assert_close(velocity, scheduler.get_velocity(x, eps, t))
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = flow.timesteps[t]
    for scheduler in (flow, UniPCMultistepScheduler(prediction_type="flow_prediction")):
        assert_close(sudo.add_noise(x, eps, t, scheduler), flow.scale_noise(x, t, eps))
        assert_close(sudo.training_target(x, eps, t, scheduler), eps - x)
        assert sudo.add_noise(x.half(), eps.half(), t, scheduler).dtype == torch.float32


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_winner_and_loser_share_noise_and_timestep(scheduler):
    b, rng = batch(), torch.Generator().manual_seed(3)
    pairs = sudo.make_pairs(scheduler, b.winners, b.losers, generator=rng)
    t, x = pairs.timesteps.view(-1, 1, 1, 1), torch.cat([b.winners, b.losers])
    assert torch.equal(t[:B], t[B:]) and len(t.unique()) == B and t.min() >= 0 and t.max() > 1
    flow, alpha = t.is_floating_point(), DDPMScheduler().alphas_cumprod[t.long()]
    scale, sigma = (1 - t / 1000, t / 1000) if flow else (alpha.sqrt(), (1 - alpha).sqrt())
    eps = (pairs.noisy - scale * x) / sigma
    assert_close(eps[:B], eps[B:], rtol=1e-3, atol=1e-3)
    assert_close(eps - x if flow else eps, pairs.target, rtol=1e-3, atol=1e-3)


def test_pairs_without_weight_keep_their_mse_term():
    errors, ref_errors = torch.rand(2 * B), torch.rand(2 * B)
    loss, metrics = sudo.sudo_objective(errors, ref_errors, pair_weight=torch.zeros(B))
    assert_close(loss, 0.5 * errors[:B].mean())
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents": torch.randn(1, 4, 8, 8)}, "pass losers="),
        ({"scheduler": DDPMScheduler(prediction_type="sample")}, "'sample' is not supported"),
        ({"scheduler": EDMEulerScheduler()}, "'epsilon' is not .* 'v_prediction' .* flow matching"),
        ({"losers": torch.randn(B - 1, 4, 8, 8)}, "losers has shape"),
        ({"noise": torch.randn(1, 4, 8, 8)}, "noise has shape"),
        ({"timesteps": torch.tensor([5])}, "timesteps has shape"),
        ({"encoder_hidden_states": torch.randn(2 * B, 5, 64)}, "encoder_hidden_states has shape"),
        ({"added_cond_kwargs": {"time_ids": torch.randn(2, 6)}}, "time_ids"),
        (
            {"down_block_additional_residuals": [torch.randn(2, 6)]},
            "down_block_additional_residuals",
        ),
    ],
)
def test_mistakes_are_refused_before_the_unet_runs(changes, message):
    b = batch()
    given = {"unet": None, "reference": None, "scheduler": DDPMScheduler(), "latents": b.winners}
    with pytest.raises(ValueError, match=message):
        sudo.sudo_loss(**given | {"encoder_hidden_states": b.conditions} | changes)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (sudo.sudo_objective, [torch.rand(8), torch.rand(6)], "ref_errors has shape"),
        (sudo.sudo_objective, [torch.rand(7), torch.rand(7)], "^errors has shape"),
        (sudo.sudo_objective, [torch.tensor(0.5), torch.rand(8)], "^errors has shape"),
        (partial(sudo.sudo_objective, pair_weight=torch.ones(4, 1)), [torch.rand(8)] * 2, "pair_w"),
        (sudo.random_grid, [torch.zeros(1, 3, 30, 32)], "do not divide"),
    ],
)
def test_what_would_broadcast_or_not_divide_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# ------------------------------------------- the trainer


@pytest.fixture
def rows(tmp_path):
    """Writes the first `count` rows of the sample data, changed by `edit`, to a jsonl."""

    def write(count=16, edit=lambda rows: rows):
        lines = (HERE / "captions.jsonl").read_text().splitlines()[:count]
        kept = [json.loads(line) for line in lines]
        for row in kept:
            row["file_name"] = str(HERE / row["file_name"])
        data = tmp_path / "captions.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in edit(kept)) + "\n")
        return data

    return write


@pytest.fixture(autouse=True)
def few_sampling_steps(monkeypatch):
    monkeypatch.setattr(train_tiny, "SAMPLING_STEPS", 3)


def arguments(data, output, *flags, steps=4, batch=4):
    fixed = f"--data {data} --output {output} --model tiny --steps {steps} --batch-size {batch}"
    return [*fixed.split(), *map(str, flags)]


def run(data, output, *flags, **sizes):
    train_tiny.main(arguments(data, output, *flags, **sizes))
    return log_of(output)


def log_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output):
    return UNet2DConditionModel.from_pretrained(output / "unet").state_dict()


def same_log(a, b, **tolerance):
    for row_a, row_b in zip(a, b, strict=True):
        assert row_a.keys() == row_b.keys()
        for name in row_a.keys() - {"seconds"}:
            assert row_a[name] == pytest.approx(row_b[name], **tolerance), name


def moved_alike(output, other):
    """Two runs from tiny-sd that sum in another order: Adam enlarges that where gradients are 0."""
    a, b, start = (
        torch.cat([tensor.flatten() for tensor in weights(folder).values()])
        for folder in (output, other, HERE / "lab" / "tiny-sd")
    )
    assert (a - b).norm() < 0.01 * (b - start).norm()


NOT_QUITE = {"rel": 1e-3, "abs": 1e-4}  # another order of summation


def test_the_main_job_raises_the_margin_and_leaves_a_pipeline(rows, tmp_path, capsys):
    log = run(rows(64), tmp_path / "out", "--lr", 2e-4, "--beta", 100, steps=32, batch=16)
    assert [row["step"] for row in log] == list(range(32))
    assert log[0]["dpo"] == pytest.approx(math.log(2), abs=1e-6) and log[0]["margin"] == 0
    assert log[0]["lr"] == pytest.approx(2e-4 / 8) and log[-1]["lr"] == pytest.approx(2e-4)
    expected = "step lr grad_norm seconds loss dpo winner_error loser_error winner_drift "
    expected += "loser_drift margin implicit_acc saturated"
    assert all(row.keys() == set(expected.split()) for row in log)
    # About 100 pairs, so that chance alone would have to be off by two standard deviations.
    last = {name: sum(row[name] for row in log[-8:]) / 8 for name in log[0]}
    assert last["margin"] > 0.25 and last["implicit_acc"] > 0.6 and last["dpo"] < math.log(2)

    before, after = weights(HERE / "lab" / "tiny-sd"), weights(tmp_path / "out")
    assert any((before[name] != tensor).any() for name, tensor in after.items())
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        first = [sheet.crop((80, top, 230, top + 150)) for top in (12, 192)]
    assert first[0] != first[1] and all(len(set(c.get_flattened_data())) > 9 for c in first)

    opening, closing = capsys.readouterr().out.split("The pipeline is in ")
    assert re.search(r"tiny-sd on 64 pictures, 32 steps of 16 pairs, lr 0.0002, β 100, ", opening)
    assert opening.endswith("on 1 x cpu in fp32.\n")
    drawing = closing[closing.index("from diffusers") :].replace(".show()", "")
    exec(drawing.replace("pipe('", "picture = pipe('"), names := {})
    assert names["picture"].size == (32, 32)


@pytest.mark.parametrize(
    "flags", ["", "--optimizer adafactor --precompute-reference", "--loss sft"], ids=str.split
)
def test_killed_accumulated_and_precomputed_runs_end_alike(rows, tmp_path, flags):
    data, flags = rows(), flags.split()
    whole = run(data, tmp_path / "whole", *flags, steps=10)
    last = 3e-4 / 8 if "sft" in flags else 5e-5  # the lr of plain fine-tuning falls to 0
    assert whole[-1]["lr"] == pytest.approx(last)

    flags = [*flags, "--checkpoint-every", 2]
    cut = [sys.executable, str(HERE / "train_tiny.py")]
    cut += arguments(data, tmp_path / "cut", *flags, steps=10)
    process = subprocess.Popen(cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, log = time.time() + 120, tmp_path / "cut" / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 5:
        if process.poll() is not None or time.time() > deadline:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it should have been training"
    (tmp_path / "cut" / "checkpoint.unfinished").write_bytes(b"half")
    for _ in range(2):  # to go on from step 4 or later, then from the end
        resumed = run(data, tmp_path / "cut", *flags, "--resume", steps=10)
        same_log(resumed, whole, rel=0, abs=0)
        assert_close(weights(tmp_path / "cut"), weights(tmp_path / "whole"), rtol=0, atol=0)

    halves = run(data, tmp_path / "halves", *flags, "--grad-accum", 2, steps=10, batch=2)
    same_log(halves, whole, **NOT_QUITE)
    moved_alike(tmp_path / "halves", tmp_path / "whole")
    if "--precompute-reference" in flags:
        same_log(run(data, tmp_path / "held", *flags[:2], steps=10), whole, rel=0, abs=0)
        assert_close(weights(tmp_path / "held"), weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.parametrize("loss, dpo, mse", [("sudo", 0.5, 0.5), ("dpo", 1, 0)])
def test_the_loss_has_the_terms_that_its_name_says(rows, tmp_path, loss, dpo, mse):
    (step,) = run(rows(), tmp_path / "out", "--loss", loss, "--caption-dropout", 0, steps=1)
    expected = dpo * math.log(2) + mse * step["winner_error"]
    assert step["loss"] == pytest.approx(expected, abs=1e-6)


def test_two_processes_take_the_steps_of_one(rows, tmp_path):
    data = rows()
    one = run(data, tmp_path / "one", "--grad-accum", 4, batch=2)
    flags = ("--grad-accum", 2, "--precompute-reference")
    two = subprocess.run(
        [sys.executable, *"-m torch.distributed.run --nproc-per-node 2".split()]
        + [str(HERE / "train_tiny.py"), *arguments(data, tmp_path / "two", *flags, batch=2)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("16 pictures") == 1, "one process speaks"
    same_log(log_of(tmp_path / "two"), one, **NOT_QUITE)
    moved_alike(tmp_path / "two", tmp_path / "one")


def test_a_steps_draw_depends_on_seed_and_step_alone_and_losers_differ(monkeypatch):
    N = 30
    data = train_tiny.Data(
        latents=torch.zeros(N, 4, 2, 2),
        picture=torch.arange(N) // 2,  # every picture twice
        caption=torch.arange(N) % 3,  # and three captions in all
        conditions={"encoder_hidden_states": torch.arange(4.0).view(4, 1, 1)},
        num_timesteps=50,
    )
    monkeypatch.setattr(train_tiny, "WORLD", 2)
    flags = "--seed 5 --caption-dropout 0.25 --batch-size 5 --grad-accum 2 --model tiny --data x"
    config = train_tiny.parse(flags.split())
    draws = [train_tiny.draw(data, config, step) for step in range(30)]
    again = train_tiny.draw(data, config, 7)
    assert all(torch.equal(a, b) for a, b in zip(draws[7], again))
    other = train_tiny.draw(data, replace(config, seed=6), 7)
    assert not any(torch.equal(a, b) for a, b in zip(again, other))
    assert not torch.equal(draws[7][4], draws[8][4])
    rows, losers, captions, timesteps = (torch.cat(parts) for parts in list(zip(*draws))[:4])
    assert (rows.view(20, N).sort(1).values == torch.arange(N)).all(), "epochs are whole"
    assert (data.picture[losers] != data.picture[rows]).all()
    assert (data.caption[losers] != data.caption[rows]).all()
    assert sorted(set(timesteps.tolist())) == list(range(50))
    dropped = captions == train_tiny.EMPTY
    assert torch.equal(captions[~dropped], data.caption[rows][~dropped])
    assert 0.17 < dropped.float().mean() < 0.33

    first = [next(train_tiny.micro_batches(data, config, step)) for step in range(30)]
    weight, words = (
        torch.cat([part[name] for part in first])
        for name in ("pair_weight", "encoder_hidden_states")
    )
    captions = torch.cat([draw[2][:5] for draw in draws])
    assert torch.equal(weight, (captions != train_tiny.EMPTY).float())
    assert torch.equal(words.flatten().long(), captions % 4), 'the last condition is that of ""'


@pytest.mark.parametrize("downgrade", ["blur", "random_grid"])
def test_the_other_downgrades_train(rows, tmp_path, downgrade):
    data = rows(16, lambda rows: [{**row, "text": "the same"} for row in rows])
    log = run(data, tmp_path / "out", "--downgrade", downgrade, steps=2)
    assert log[0]["margin"] == 0 and log[0]["loser_error"] != log[0]["winner_error"]


def shrunk_pipeline(folder, sdxl=False, prediction_type="epsilon"):
    """A random UNet of Stable Diffusion's architecture, narrow, among the parts of tiny-sd."""
    torch.manual_seed(0)
    tiny = DiffusionPipeline.from_pretrained(HERE / "lab" / "tiny-sd")
    vae, text, tokenizer = tiny.vae, tiny.text_encoder, tiny.tokenizer
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "steps_offset": 1,
    }
    if sdxl:
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(2, 4, 8),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + text.config.projection_dim,
            cross_attention_dim=2 * 64,
            norm_num_groups=8,
        )
        scheduler = EulerDiscreteScheduler(**schedule)
        second = CLIPTextModelWithProjection(text.config)
        parts = (vae, text, second, tokenizer, tokenizer, unet, scheduler)
        pipe = StableDiffusionXLPipeline(*parts)
    else:
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 32, 32),
            cross_attention_dim=64,
            attention_head_dim=8,
            norm_num_groups=8,
        )
        scheduler = PNDMScheduler(**schedule, skip_prk_steps=True)
        parts = (vae, text, tokenizer, unet, scheduler, None, None)
        pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind",
    [{}, {"prediction_type": "v_prediction"}, {"sdxl": True}],
    ids=["sd15", "sd2 with v-prediction", "sdxl"],
)
def test_stable_diffusions_architectures_train_from_a_folder(rows, tmp_path, kind):
    model = shrunk_pipeline(tmp_path / "model", **kind)
    data, output = rows(), tmp_path / "out"
    flags = ("--model", model, "--grad-accum", 2)
    log = run(data, output, *flags, steps=2)
    assert log[0]["dpo"] == pytest.approx(math.log(2), abs=1e-6) and log[0]["margin"] == 0
    assert log[1]["margin"] != 0
    trained = DiffusionPipeline.from_pretrained(output)
    assert type(trained) is type(DiffusionPipeline.from_pretrained(model))
    config = train_tiny.parse(arguments(data, output, *flags))
    assert config.beta == 5000 and config.family == ("sdxl" if "sdxl" in kind else "sd15")
    assert config.optimizer == ("adafactor" if "sdxl" in kind else "adamw")
    # A dropped caption is what the pipeline guides with, which for SDXL is zeros.
    read = train_tiny.read_rows(data, config.image_column, config.caption_column)
    conditions = train_tiny.encode(trained, read, config).conditions
    _, empty, *pooled = trained.encode_prompt(
        "", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    half = {"rtol": 1e-3, "atol": 1e-3}
    assert_close(conditions["encoder_hidden_states"][-1].float(), empty[0], **half)
    if "sdxl" in kind:
        assert_close(
            conditions["added_cond_kwargs"]["text_embeds"][-1].float(), pooled[1][0], **half
        )


def test_pictures_of_every_kind_are_taken_right(tmp_path):
    """A red left and a blue right half, however they are stored; an odd aspect loses its ends."""
    upright = Image.new("RGB", (40, 20), "red")
    upright.paste("blue", (20, 0, 40, 20))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "exif.png", exif=exif)
    upright.convert("P").save(tmp_path / "palette.png")
    upright.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    for name in ("exif.png", "palette.png", "cmyk.jpg"):
        pixels = train_tiny.load_picture(tmp_path / name, 16)
        assert pixels.shape == (3, 16, 16)
        assert_close(pixels[:, 8, 3], torch.tensor([1.0, -1, -1]), atol=0.1, rtol=0)
        assert_close(pixels[:, 8, 12], torch.tensor([-1.0, -1, 1]), atol=0.1, rtol=0)
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.save(tmp_path / "alpha.png")
    assert (train_tiny.load_picture(tmp_path / "alpha.png", 16) == 1).all()
    Image.new("I;16", (20, 20), 65535 // 2).save(tmp_path / "deep.png")
    assert train_tiny.load_picture(tmp_path / "deep.png", 16).abs().max() < 0.02


def test_a_users_own_folder_with_other_columns_and_captions(rows, tmp_path, capsys):
    """On captions that the tiny model does not know it says so; its result has its recipe."""
    folder = tmp_path / "folder"
    folder.mkdir()
    metadata = []
    for i, line in enumerate(rows(8).read_text().splitlines()):
        shutil.copy(json.loads(line)["file_name"], folder / f"{i}.png")
        metadata.append({"image": f"{i}.png", "caption": f"\N{CAT FACE} 猫 number {i}"})
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, metadata)))
    columns = ("--image-column", "image", "--caption-column", "caption")
    run(folder, tmp_path / "out", *columns, "--sample-every", 1, steps=2)
    assert "8 of the captions have words that it has never seen" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples-000001.png").exists()
    config = train_tiny.parse(["--data", "x", "--model", str(tmp_path / "out"), "--lr", "1"])
    assert config.family == "tiny" and (config.beta, config.lr) == (400, 1)


# ------------------------------------------- the mistakes of a user end in a sentence

FAULTS = {
    "missing key": ('{"file_name": "1.png"}', "no text under 'text'.*are there: file_name"),
    "no object": ('["a list"]', "no text under 'file_name'"),
    "no text": ('{"file_name": 5, "text": "x"}', "no text under 'file_name'"),
    "broken JSON": ('{"file_name": "1.png", ', "broken JSON at column"),
    "half a character": (
        '{"file_name": "1.png", "text": "a \\ud83d cat"}',
        "surrogates not allowed",
    ),
    "missing picture": ('{"file_name": "none.png", "text": "x"}', "No such file.*none.png"),
    "a folder": ('{"file_name": ".", "text": "x"}', "no picture under 'file_name'"),
    "no picture": (lambda png: b"text", "cannot identify"),
    "empty picture": (lambda png: b"", "cannot identify"),
    "truncated picture": (lambda png: png[: len(png) // 2], "truncated"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_row_is_named_before_anything_is_written(rows, tmp_path, kind):
    line, message = FAULTS[kind]
    if callable(line):
        (tmp_path / "x.png").write_bytes(line((HERE / "lab" / "images" / "0001.png").read_bytes()))
        line = '{"file_name": "x.png", "text": "x"}'
    data = rows(3)
    data.write_text(data.read_text() + line + "\n")
    with pytest.raises(SystemExit, match=f"captions.jsonl, line 4: .*{message}"):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_faulty_data_is_refused_as_a_whole(rows, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        with pytest.raises(SystemExit, match="decompression bomb") as end:
            run(rows(12), output)
    assert "12 faulty lines" in str(end.value) and "line 11" not in str(end.value)
    with pytest.raises(SystemExit, match="line 1, 2, .*10 and 2 more: no text under 'img'") as end:
        run(rows(12), output, "--image-column", "img")
    assert str(end.value).count("no text") == 1 and "file_name, text" in str(end.value)
    same = rows(4, lambda rows: [{**row, "text": "the same"} for row in rows])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    for data, message in (
        (same, "needs a loser"),
        (rows(1), "needs a loser"),
        (tmp_path / "empty.jsonl", "needs a loser"),
        (tmp_path / "latin.jsonl", "UTF-8"),
        (tmp_path / "nothing.jsonl", "--data wants a jsonl"),
        (HERE / "lab", "metadata.jsonl"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(data, output)
    assert not output.exists()


def test_other_mistakes_are_refused_before_anything_is_written(rows, tmp_path, capsys):
    data, output, file = rows(), tmp_path / "out", tmp_path / "file"
    file.write_text("in the way")
    sample = shrunk_pipeline(tmp_path / "sample", prediction_type="sample")
    sigmas = shrunk_pipeline(tmp_path / "sigmas")
    EDMEulerScheduler().save_pretrained(sigmas / "scheduler")
    for flags, message in (
        (("--model", tmp_path), "No pipeline could be loaded"),
        (("--model", sample), "'sample'. What can be trained is a StableDiffusionPipeline or"),
        (("--model", sigmas), "with EDMEulerScheduler"),
        (("--resume",), "holds no checkpoint to resume"),
        (("--output", file), "is in use"),
        (("--output", file / "out"), "cannot be made in .*file"),
        (("--output", file, "--resume"), "holds no checkpoint to resume"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(data, output, *flags)
    for flag, value, message in (
        ("--lr", 0, "must be above 0"),
        ("--beta", "nan", "must be above 0"),
        ("--steps", -1, "must be above 0"),
        ("--grad-accum", 0, "must be above 0"),
        ("--checkpoint-every", 0, "must be above 0"),
        ("--caption-dropout", 1.5, "a share"),
        ("--stepz", 3, "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit):
            run(data, output, flag, value)
        assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_run_in_the_output_is_neither_overwritten_nor_mixed_with_another(rows, tmp_path):
    data, output = rows(), tmp_path / "out"
    run(data, output, steps=1)
    with pytest.raises(SystemExit, match="is in use"):
        run(data, output, steps=1)
    cut = tmp_path / "cut"  # before its first checkpoint
    cut.mkdir()
    for name in ("metrics.jsonl", "checkpoint.unfinished", "samples-000001.png"):
        (cut / name).touch()
    assert len(run(data, cut, steps=1)) == 1
    for flag, value, message in (
        ("--seed", 1, "seed was 0 and is 1"),
        ("--beta", 5, "beta was 400.0 and is 5.0"),
        ("--loss", "sft", "loss was sudo and is sft"),
        ("--data", rows(15), "data was 16 rows .* and is 15 rows"),
        ("--steps", 2, "steps was 1 and is 2.* train its result further with --model .*out"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(data, output, "--resume", flag, value, steps=1)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_it_whole(rows, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"Stopped before the update of step 1: .*\.png"):
        run(rows(), output, "--lr", 1e30, "--checkpoint-every", 1)
    assert len(log_of(output)) == 1
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == 1
    assert not (output / "model_index.json").exists()


def test_out_of_memory_names_the_flags_and_leaves_the_output_free(rows, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError
        yield

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--precompute-reference"):
        patch.setattr(train_tiny, "train", full)
        run(rows(), tmp_path / "out", batch=4, steps=1)
    run(rows(), tmp_path / "out", batch=2, steps=1)


# ------------------------------------------- the pages


def snippets():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_snippets_of_the_readme_are_those_tested_here():
    assert len(snippets()) == 4


@pytest.fixture
def names():
    """What a reader's trainer has by the time that it comes to a snippet of the README."""
    b = batch()
    return {
        "noise_scheduler": DDPMScheduler(),
        "latents": b.winners,
        "encoder_hidden_states": b.conditions,
        "accelerator": Accelerator(cpu=True, mixed_precision="bf16"),
        "torch": torch,
        **{name: getattr(sudo, name) for name in ("sudo_loss", "frozen_copy")},
    }


def test_the_snippet_for_the_script_of_diffusers(names):
    names["unet"] = tiny_unet().eval()
    exec(snippets()[0], names)
    assert names["metrics"]["margin"] == 0 and names["loss"].requires_grad


def test_the_snippet_for_lora_also_on_several_processes(names, tmp_path):
    b, base = batch(), tiny_unet()
    policy = copy.deepcopy(base).requires_grad_(False)
    policy.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    torch.manual_seed(3)
    given = names["noise_scheduler"], b.winners, b.conditions
    expected, _ = sudo.sudo_loss(policy.eval(), base, *given)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        names["unet"] = DistributedDataParallel(policy)
        exec(snippets()[1], names)
        torch.manual_seed(3)
        loss, metrics = sudo.sudo_loss(names["unet"], names["reference"], *given)
        assert_close(loss, expected)
        assert metrics["margin"] != 0
        loss.backward()
    finally:
        dist.destroy_process_group()
    trained = {n.split(".")[-3] for n, p in policy.named_parameters() if p.grad is not None}
    assert trained == {"lora_A", "lora_B"}


def test_the_snippet_for_transformers(names):
    scheduler = names["noise_scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    names |= {"prompt_embeds": batch().conditions.bfloat16(), "beta": 9.0}
    for name, unit in (("SD3", 1), ("Flux", 1000)):
        transformer, latents, condition, ids = tiny_transformer(name)
        reference, seen = sudo.frozen_copy(transformer), {}
        transformer.register_forward_hook(
            lambda _, args, kwargs, out, seen=seen: seen.update(kwargs, out=out.sample),
            with_kwargs=True,
        )
        names |= {"transformer": transformer, "reference": reference, "model_input": latents}
        names["pooled_prompt_embeds"] = condition["pooled_projections"].bfloat16()
        torch.manual_seed(3)
        if name == "SD3":
            exec(snippets()[2], names)
            loss, metrics = names["loss"], names["metrics"]
            assert set(seen["timestep"].tolist()) <= set(scheduler.timesteps.tolist())
        else:  # what the README says of Flux
            unets = (names["as_unet"](model, 1000, **ids) for model in (transformer, reference))
            given = scheduler, latents, names["prompt_embeds"]
            with names["accelerator"].autocast():
                loss, metrics = sudo.sudo_loss(*unets, *given, **condition)
        t = seen["timestep"] * unit
        assert torch.equal(t[:B], t[B:]) and 1 < t.min() and t.max() <= 1000
        # The error of the winners by ε - x = (x_t - x) / σ, from what the transformer saw.
        sigma = (t[:B] / 1000).view(B, *[1] * (latents.ndim - 1))
        error = seen["out"][:B] - (seen["hidden_states"][:B] - latents) / sigma
        mse = error.square().mean().detach()
        assert_close(metrics["winner_error"], mse, rtol=1e-2, atol=0)  # x_t was cast to bf16
        assert metrics["margin"] == 0 and loss.requires_grad


@pytest.mark.parametrize("lora", [False, True], ids=["whole model", "LoRA"])
def test_the_snippet_for_sampling_takes_the_unconditional_branch_from_the_reference(
    tmp_path, monkeypatch, lora
):
    monkeypatch.chdir(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(HERE / "lab" / "tiny-sd")
    reference = pipe.unet
    reference.save_pretrained("sft/unet")
    pipe.unet = policy = copy.deepcopy(reference) if lora else moved(reference)
    pipe.save_pretrained("out2")
    loading, sampling = snippets()[3].replace('"cuda"', '"cpu"').split("policy = ", 1)
    exec(loading, names := {})
    if lora:
        adapters = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        names["pipe"].unet.add_adapter(adapters)
        policy = copy.deepcopy(names["pipe"].unet)

        def adapters_off(*inputs, **kwargs):
            names["pipe"].unet.disable_adapters()
            output = names["policy"](*inputs, **kwargs)
            names["pipe"].unet.enable_adapters()
            return output

        names["reference"] = adapters_off
    exec("policy = " + sampling, names)
    assert names["picture"].size == (32, 32)
    # A pipeline stacks the unconditional half first, then that of the caption.
    x, words = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 64)
    mixed = names["pipe"].unet(x, 500, encoder_hidden_states=words, return_dict=False)[0]
    both = [unet(x, 500, words).sample[i] for i, unet in enumerate((reference, policy))]
    assert_close(mixed, torch.stack(both), rtol=1e-4, atol=1e-5)
    assert (mixed[1] - reference(x, 500, words).sample[1]).abs().max() > 0.01
