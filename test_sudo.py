"""What sudo.py and train_tiny.py claim, checked on a CPU without a download.

The oracle is written from the equations, in float64, and shares no line with sudo.py.
"""

import copy
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are those of a CPU, wherever they run
os.environ["PYTHONHASHSEED"] = "1"  # sets have another order in processes that a test starts

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers import FlowMatchEulerDiscreteScheduler as FlowScheduler
from PIL import Image, ImageChops, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch.nn.functional import softplus
from torch.testing import assert_close
from transformers import CLIPTextModelWithProjection

import sudo
import train_tiny

HERE = Path(__file__).parent
TINY = HERE / "lab" / "tiny-sd"
SAMPLE = HERE / "lab" / "images" / "0001.png"
UNET = "unet/diffusion_pytorch_model.safetensors"
README = (HERE / "README.md").read_text(encoding="utf-8")
B = 4
exactly = partial(assert_close, rtol=0, atol=0)
compiled = partial(torch.compile, backend="eager")
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
train_tiny.SAMPLING_STEPS = train_tiny.PROMPTS = 2


def tiny_unet(**config):
    torch.manual_seed(0)
    tiny = UNet2DConditionModel.load_config(TINY / "unet")
    return UNet2DConditionModel.from_config(tiny, **config)


def sdxl_unet(text=10, **config):
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return tiny_unet(projection_class_embeddings_input_dim=6 * 4 + text, **added, **config)


def moved(unet, scale=0.01):
    """The policy after some training: the reference with its weights shaken."""
    policy = copy.deepcopy(unet)
    torch.manual_seed(1)
    for p in policy.parameters():
        p.data += scale * torch.randn_like(p)
    return policy


def batch():
    torch.manual_seed(2)
    latents = {name: torch.randn(B, 4, 8, 8) for name in ("winners", "losers", "noise")}
    added = {"text_embeds": torch.randn(B, 10), "time_ids": torch.randint(64, (B, 6)).float()}
    b = SimpleNamespace(**latents, conditions=torch.randn(B, 5, 64), added=added)
    b.draws = {"losers": b.losers, "noise": b.noise, "timesteps": torch.tensor([3, 250, 600, 999])}
    return b


# ------------------------------------------- sudo.py: the loss and what it is made of
def errors64(unet, scheduler, b, x):
    """(B,): each image's mean squared error, as the equations have it."""
    x, eps, t = x.double(), b.noise.double(), b.draws["timesteps"]
    if isinstance(scheduler, FlowScheduler):
        sigma = t.view(-1, 1, 1, 1).double() / 1000
        x_t, goal = (1 - sigma) * x + sigma * eps, eps - x
    else:
        x_t, goal = scheduler.add_noise(x, eps, t), eps
        if scheduler.config.prediction_type == "v_prediction":
            goal = scheduler.get_velocity(x, eps, t)
    added = {name: value.double() for name, value in b.added.items()}
    answer = unet(x_t, t, b.conditions.double(), added_cond_kwargs=added).sample
    return ((answer - goal) ** 2).mean((1, 2, 3))


W, ALONE = torch.tensor([0.5, 2, 0, 1]), {"dpo_weight": 1.0, "mse_weight": 0.0}
WEIGHTED = {"beta": 300.0, "dpo_weight": 0.9, "pair_weight": W}
LOSSES = {  # with d = e_w - e_l - (r_w - r_l), as the script of that name writes it
    "SUDO": ("epsilon", {}, lambda d, e_w: 0.5 * softplus(0.5 * 5000 * d) + 0.5 * e_w),
    "DPO of diffusers": ("v_prediction", ALONE, lambda d, _: softplus(0.5 * 5000 * d)),
    "DDSPO": ("flow", ALONE | {"beta": 2000.0}, lambda d, _: softplus(2000 / 2 * d)),
    "weighted": ("epsilon", WEIGHTED, lambda d, e_w: 0.9 * W * softplus(150 * d) + 0.5 * e_w),
    "undecided": ("epsilon", WEIGHTED | {"pair_weight": 0 * W}, lambda _, e_w: 0.5 * e_w),
}


@pytest.mark.parametrize("prediction_type, given, objective", LOSSES.values(), ids=LOSSES)
def test_loss_gradients_and_metrics_are_those_of_the_equations(prediction_type, given, objective):
    reference, b, beta = sdxl_unet(), batch(), given.get("beta", 5000.0)
    policy = moved(reference, 3 / beta)
    if prediction_type == "flow":
        scheduler = FlowScheduler(shift=3.0)
        b.draws["timesteps"] = b.draws["timesteps"] + 0.3
    else:
        scheduler = DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")
    # A model may also answer with a tuple, or with the tensor alone, as below.
    models = policy, partial(reference, return_dict=False), scheduler, b.winners, b.conditions
    loss, metrics = sudo.sudo_loss(*models, added_cond_kwargs=b.added, **b.draws, **given)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters()), "although it could be trained"

    policy64, reference64 = copy.deepcopy(policy).double(), copy.deepcopy(reference).double()
    policy64.zero_grad()
    sides = [(model, x) for model in (policy64, reference64) for x in (b.winners, b.losers)]
    e_w, e_l, r_w, r_l = (errors64(model, scheduler, b, x) for model, x in sides)
    expected = objective(e_w - e_l - (r_w - r_l), e_w).mean()
    expected.backward()
    assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    for p, q in zip(policy.parameters(), policy64.parameters()):
        scale = float(q.grad.abs().max())
        assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=2e-3 * scale + 1e-6)

    u = -beta / 2 * (e_w - e_l - (r_w - r_l))
    assert set((u > 0).tolist()) == {True, False}, "the case should have hits and misses"
    values = {"dpo": softplus(-u), "winner_error": e_w, "loser_error": e_l, "margin": u}
    values |= {"winner_drift": e_w - r_w, "loser_drift": e_l - r_l, "implicit_acc": 1.0 * (u > 0)}
    values["saturated"] = 1.0 * (u.abs() > 10)
    counted = given.get("pair_weight", torch.ones(B)) != 0  # the pairs that have a preference
    assert metrics.pop("pairs") == counted.sum() and metrics.keys() == values.keys()
    for name, value in metrics.items():
        assert value.dtype == torch.float32 and value.ndim == 0 and not value.requires_grad
        mean = values[name][counted].mean().nan_to_num().detach()  # 0 without any
        assert_close(float(value), float(mean), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("wrap", [lambda model: model, compiled, accelerator.prepare])
def test_a_frozen_copy_runs_apart_from_its_model(wrap):
    model = wrap(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout()))
    x, reference = torch.randn(2, 3), sudo.frozen_copy(model)
    before = reference(x)
    exactly(before, model.eval()(x).detach())
    for p in model.parameters():
        p.data += 1
    exactly(reference(x), before)
    assert not before.requires_grad and (model(x) != before).all()


@pytest.mark.parametrize("forward", [abs, partial(abs)], ids=["function", "hook of diffusers"])
def test_a_forward_replaced_by_a_function_is_not_copied(forward):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].forward = forward
    with pytest.raises(ValueError, match="forward was replaced"):
        sudo.frozen_copy(model)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_random_image_is_a_derangement_with_every_other_image_equally_likely(size):
    rng = torch.Generator().manual_seed(0)
    draws = torch.stack([sudo.random_image(torch.arange(size), rng) for _ in range(2000)])
    assert (draws.sort().values == torch.arange(size)).all()
    counts = torch.nn.functional.one_hot(draws).sum(0)
    expected = (1 - torch.eye(size)) * 2000 / (size - 1)
    assert ((counts - expected).abs() <= 0.25 * expected).all()


def test_blur_keeps_means_alone_and_random_grid_swaps_two_cells_of_each_image():
    fine = (torch.arange(16).view(1, 1, 1, -1) % 2 * 2.0 - 1).expand(1, 3, 16, 16)
    assert sudo.blur(fine).abs().max() < 0.2 and sudo.blur(fine).shape == fine.shape
    assert_close(sudo.blur(0 * fine + 0.3), 0 * fine + 0.3)
    images = torch.rand(20, 3, 24, 16)
    swapped = sudo.random_grid(images, generator=torch.Generator())
    moved_pixels = (swapped != images).flatten(1)
    assert (moved_pixels.sum(1) == 3 * 2 * (24 // 8) * (16 // 8)).all()
    assert len(moved_pixels.unique(dim=0)) > 15
    exactly(swapped.flatten(1).sort().values, images.flatten(1).sort().values)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowScheduler(shift=3.0)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1, 1), (1, 2)], ids=["image", "video", "Flux"])
def test_a_pair_has_one_noise_and_one_timestep_of_the_whole_schedule(scheduler, shape):
    x, rng = torch.zeros(2000, *shape).bfloat16(), torch.Generator().manual_seed(3)
    pairs = sudo.make_pairs(scheduler, x, x, generator=rng)
    assert all(torch.equal(*tensor.chunk(2)) for tensor in pairs)
    t, flow = pairs.timesteps.float(), isinstance(scheduler, FlowScheduler)
    assert 0 <= t.min() < 5 and 995 < t.max() <= (1000 if flow else 999)
    assert abs(t.mean() - 500) < 20 and abs(pairs.target.std() - 1) < 0.05
    assert pairs.target.dtype == torch.float32 and pairs.noisy.dtype == torch.bfloat16
    scale = t / 1000 if flow else (1 - scheduler.alphas_cumprod[pairs.timesteps]).sqrt()
    exactly(pairs.noisy, (pairs.target * scale.view(-1, *[1] * len(shape))).bfloat16())


R = torch.rand
NOT_T = (torch.float32, torch.uint8, torch.bool)  # an index of these is a mask, or none
TWO = {"latents": R(2, 4, 8, 8), "encoder_hidden_states": R(2, 5, 64)}  # 2B = C would broadcast
MISTAKES = [
    ({"latents": R(1, 4, 8, 8)}, "pass losers=.*drop_last=True"),
    ({"scheduler": FlowScheduler()}, "β: pass beta="),
    *(({"beta": beta}, f"beta is {beta}") for beta in (0, -5000.0, math.nan, math.inf)),
    *(({"timesteps": (9 * R(B)).to(dtype)}, f"timesteps has dtype .*{dtype}") for dtype in NOT_T),
    *(({"timesteps": torch.tensor([0, 1, 2, t])}, f"timesteps .* {t}") for t in (-1, 1000)),
    ({"scheduler": FlowScheduler(), "beta": 9.0, "timesteps": 1001 * torch.ones(B)}, "to 1000"),
    ({"losers": R(B - 1, 4, 8, 8)}, "losers has shape"),
    ({"encoder_hidden_states": R(8, 5, 64)}, "encoder_hidden_states has shape"),
    ({"added_cond_kwargs": {"time_ids": R(2, 6)}}, "time_ids"),
    (TWO | {"reference": lambda x, *_: x[:, :, None]}, r"\(4, 4, 1, 8, 8\).* \(4, 4, 8, 8\)"),
    ({"reference": lambda x, *_: (x[:, :1],)}, r"prediction .*\(8, 1, 8, 8\).* \(8, 4, 8, 8\)"),
    (lambda: sudo.sudo_objective(R(8), R(6)), "ref_errors has shape"),
    (lambda: sudo.sudo_objective(R(7), R(7)), "^errors has shape"),
    (lambda: sudo.sudo_objective(R(8), R(8), pair_weight=R(4, 1)), "pair_weight has shape"),
    (lambda: sudo.random_grid(R(1, 3, 30, 32)), "do not divide"),
]


@pytest.mark.parametrize("wrong, message", MISTAKES)
def test_mistakes_are_refused_before_the_unet_runs(wrong, message):
    given = {"unet": None, "reference": "none", "scheduler": DDPMScheduler()}
    given |= {"latents": batch().winners, "encoder_hidden_states": batch().conditions}
    with pytest.raises(ValueError, match=message):
        wrong() if callable(wrong) else sudo.sudo_loss(**given | wrong)


def test_a_reference_that_is_the_policy_is_refused_however_it_is_wrapped():
    unet, b = tiny_unet(), batch()
    given = DDPMScheduler(), b.winners, b.conditions
    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel = torch.nn.parallel.DistributedDataParallel(unet)
    torch.distributed.destroy_process_group()
    for wrapped in (unet, compiled(unet), parallel, compiled(parallel)):
        for policy, reference in ((wrapped, unet), (unet, wrapped)):
            with pytest.raises(ValueError, match="frozen copy, or .* adapters off"):
                sudo.sudo_loss(policy, reference, *given)
    switched = torch.nn.Module()  # as one that turns adapters off: all weights are the policy's
    switched.module = unet
    switched.forward = lambda *inputs: unet(*inputs).sample + 0.1
    assert sudo.sudo_loss(unet, switched, *given)[1]["margin"] != 0


def test_a_reference_may_lend_the_policy_other_weights_under_autocast():
    base, b = tiny_unet().eval(), batch()
    policy = moved(base)
    own = copy.deepcopy(policy.state_dict())

    def lent(*inputs):
        policy.load_state_dict(base.state_dict())
        output = policy(*inputs)
        policy.load_state_dict(own)
        return output

    margins = []
    for reference in (sudo.frozen_copy(base), lent):
        given = policy, reference, DDPMScheduler(), b.winners, b.conditions
        with torch.autocast("cpu", torch.bfloat16):  # which keeps its casts until it ends
            for _ in range(2):
                margins.append(float(sudo.sudo_loss(*given, **b.draws)[1]["margin"]))
    assert len(set(margins)) == 1 and margins[0] != 0


# ------------------------------------------- train_tiny.py: its runs and its small print

APART = multiprocessing.get_context("forkserver")  # which imports once for all its processes
APART.set_forkserver_preload(["test_sudo"])


def data_in(folder, count=16, **first):
    """The first rows of the sample data in a jsonl there, the first of them changed."""
    lines = (HERE / "captions.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line.replace("lab/", f"{HERE}/lab/")) for line in lines]
    rows[0] |= first
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "captions.jsonl"


def arguments(output, *flags, data=None, steps=4, batch=4):
    data = data or data_in(output.parent)
    fixed = f"--data {data} --output {output} --model tiny --steps {steps} --batch-size {batch}"
    return [*fixed.split(), *map(str, flags)]


def run(output, *flags, **given):
    train_tiny.main(arguments(output, *flags, **given))
    return log_of(output)


def resume(output, *flags):
    train_tiny.main(["--resume", str(output), *map(str, flags)])


def log_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def stops(message, call, *given, **named):
    with pytest.raises(SystemExit, match=message):
        call(*given, **named)


def exit_code(call, *given):
    process = APART.Process(target=call, args=given)
    process.start()
    process.join(300)
    return process.exitcode


def same_run(output, other, exact=True):
    """Two runs from tiny-sd took the same steps, bit for bit or summed in another order."""
    for a, b in zip(log_of(output), log_of(other), strict=True):
        del a["seconds"], b["seconds"]
        assert a == (b if exact else pytest.approx(b, rel=1e-3, abs=1e-4))
    three = (load_file(folder / UNET).values() for folder in (output, other, TINY))
    a, b, start = (torch.cat([tensor.flatten() for tensor in each]) for each in three)
    # Adam enlarges a difference where gradients are 0.
    assert (a - b).norm() <= (0 if exact else 0.01 * (b - start).norm())


def edit(file, change):
    """Of a model: what else it says, or what becomes of its weights, or None for a missing file."""
    if change is None:
        file.unlink()
    elif isinstance(change, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})


def shrunk_pipeline(folder):
    """SDXL's, with a random UNet among the parts of tiny-sd."""
    tiny = DiffusionPipeline.from_pretrained(TINY)
    text = tiny.text_encoder
    texts = text, CLIPTextModelWithProjection(text.config), tiny.tokenizer, tiny.tokenizer
    wide = {"cross_attention_dim": 2 * 64, "transformer_layers_per_block": (1, 2)}
    unet = sdxl_unet(text.config.projection_dim, **wide)
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    diffusers.StableDiffusionXLPipeline(tiny.vae, *texts, unet, scheduler).save_pretrained(folder)
    return folder


def test_the_main_job_raises_the_margin_and_leaves_a_pipeline(tmp_path, capsys):
    given = {"data": data_in(tmp_path, 64), "steps": 20, "batch": 16}
    log = run(tmp_path / "out", "--lr", 4e-4, "--beta", 100, **given)
    assert log[0]["dpo"] == pytest.approx(math.log(2), abs=1e-6) and log[0]["margin"] == 0
    assert log[0]["lr"] == pytest.approx(4e-4 / 5) and log[-1]["lr"] == pytest.approx(4e-4)
    expected = "step lr grad_norm seconds loss pairs dpo winner_error loser_error winner_drift "
    expected += "loser_drift margin implicit_acc saturated"
    for row in log:
        assert row.keys() == set(expected.split()) and row["pairs"] <= 16
        drift = row["winner_drift"] - row["loser_drift"]
        assert row["margin"] == pytest.approx(-100 / 2 * drift, abs=1e-4)
    # About 100 pairs, so that chance alone would have to be off by two standard deviations.
    last = {name: sum(row[name] for row in log[-8:]) / 8 for name in log[0]}
    assert last["margin"] > 0.25 and last["implicit_acc"] > 0.6
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        pixels = sheet.convert("RGB").tobytes()
    before, now = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]
    assert before != now and len(set(before)) > 9 and len(set(now)) > 9
    said = capsys.readouterr().out
    assert "64 pictures, 20 steps of 16 pairs, lr 0.0004, β 100, on 1 x cpu in fp32" in said
    pipe = eval(re.search(r"DiffusionPipeline\.from_pretrained\(.*?\)", said)[0])
    assert pipe("a red square", num_inference_steps=2).images[0].size == (32, 32)


def compute_in(half, change, scale=2.0**17):
    """As a card does that has no bf16, at a scale that is too large for the first gradients."""
    change(train_tiny, "HALF", half)
    change(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))


def killed_in_step_3(half, argv):
    own = train_tiny.draw
    die = partial(os.kill, os.getpid(), 9)
    train_tiny.draw = lambda data, config, step: die() if step == 3 else own(data, config, step)
    compute_in(half, setattr)
    train_tiny.main(argv)


@pytest.mark.parametrize("flags", ["", "--lora 4", "--optimizer adafactor", "--loss sft", "fp16"])
def test_killed_and_accumulated_runs_end_as_one_that_never_stopped(tmp_path, monkeypatch, flags):
    whole, halves, killed = (tmp_path / name for name in ("whole", "halves", "killed"))
    half = torch.float16 if flags == "fp16" else None
    flags = [*flags.replace("fp16", "").split(), "--checkpoint-every", 2]
    compute_in(half, monkeypatch.setattr)
    log = run(whole, *flags)
    assert log[-1]["lr"] == pytest.approx(log[1]["lr"] / (3 if "sft" in flags else 1))
    skipped = [row["grad_norm"] is None for row in log]
    assert any(skipped) == skipped[0] == bool(half) and not all(skipped)
    if not half:
        run(halves, *flags, "--grad-accum", 2, batch=2)
        same_run(halves, whole, exact=False)

    assert exit_code(killed_in_step_3, half, arguments(killed, *flags)) == -9
    assert len(log_of(killed)) == 3 and (killed / "step-000002").exists()
    (killed / "checkpoint.pt.unfinished").write_bytes(b"half")
    for _ in range(2):  # to go on from step 2, then from the end
        resume(killed)
        same_run(killed, whole)
        assert (killed / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


def test_two_processes_take_the_steps_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--lora", 4, "--gradient-checkpointing", "--grad-accum")
    run(one, *flags, 4, batch=2, steps=3)
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --no-python".split()
    code = "import train_tiny as t; t.SAMPLING_STEPS = t.PROMPTS = 2; t.main()"
    command = [sys.executable, *torchrun, sys.executable, "-c", code]
    command += arguments(two, *flags, 2, batch=2, steps=3)
    process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("16 pictures") == 1, "one process speaks"
    same_run(two, one, exact=False)
    stops("machine was 2 x cpu in fp32 and is 1 x cpu in fp32", resume, two)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [0, 4])
def test_frozen_weights_held_in_half_are_the_same_arithmetic(monkeypatch, lora, half):
    monkeypatch.setattr(train_tiny, "HALF", half)
    config = train_tiny.parse(f"--data x --model tiny --lora {lora}".split())
    pipe = train_tiny.load_pipeline(str(TINY))
    fp32 = sudo.frozen_copy(pipe.unet).to(memory_format=torch.channels_last)
    unet, reference, _ = train_tiny.prepare(pipe, config)
    assert not unet.training
    layers = (unet if lora else reference).modules()
    cast = [x.weight for x in layers if isinstance(x, torch.nn.Linear | torch.nn.Conv2d)]
    assert {weight.dtype for weight in cast if not weight.requires_grad} == {half}
    assert {p.dtype for p in train_tiny.trained_weights(unet).values()} == {torch.float32}
    b = batch()
    pairs = sudo.make_pairs(pipe.scheduler, b.winners, **b.draws)
    with torch.no_grad(), train_tiny.half_precision():
        exact = sudo.denoising_error(fp32, pairs, b.conditions)  # with weights cast in each pass
        for model in (reference, unet):
            exactly(sudo.denoising_error(model, pairs, b.conditions), exact)


@pytest.mark.parametrize("kind", ["tiny in bf16", "sdxl"])
def test_lora_is_fused_loads_into_its_base_and_goes_on(tmp_path, monkeypatch, capsys, kind):
    sft, flags = tmp_path / "sft", ("--lora", 4, "--lr", 0.003)
    model = shrunk_pipeline(tmp_path / "model") if kind == "sdxl" else TINY
    monkeypatch.setattr(train_tiny, "HALF", None if kind == "sdxl" else torch.bfloat16)
    run(sft, "--model", model, "--loss", "sft", *flags, steps=2)
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.load_lora_weights(sft)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = load_file(sft / UNET)
    assert_close({**pipe.unet.state_dict()}, fused, rtol=0, atol=1e-6)
    assert any((fused[n] - w).abs().max() > 1e-3 for n, w in load_file(model / UNET).items())
    log = run(tmp_path / "sudo", "--model", sft, *flags, steps=2)
    assert log[0]["margin"] == 0 and log[1]["winner_drift"] != 0, "the reference is the SFT model"
    untrained = re.search("error is (0.9|1.).*does it fit", capsys.readouterr().out)
    assert bool(untrained) == (kind == "sdxl"), "at the first step"


def test_a_steps_draw_depends_on_seed_and_step_alone_and_losers_differ(monkeypatch):
    order = torch.arange(30)
    picture = order // 2  # every picture twice
    caption = 1 + order % 3  # and three captions in all
    latents = order.view(-1, 1, 1, 1).float()  # so that one sees which is which
    words = {"encoder_hidden_states": torch.arange(4.0).view(-1, 1, 1)}
    data = train_tiny.Data(latents, None, picture, caption, words, ["", "a", "b", "c"], 50)
    monkeypatch.setattr(train_tiny, "WORLD", 2)
    flags = "--seed 5 --caption-dropout 0.25 --batch-size 5 --grad-accum 2 --model tiny --data x"
    config = train_tiny.parse(flags.split())
    draws = [train_tiny.draw(data, config, step) for step in range(30)]
    exactly(draws[7], train_tiny.draw(data, config, 7))
    for other in (draws[8], train_tiny.draw(data, replace(config, seed=6), 7)):
        assert not any(torch.equal(a, b) for a, b in zip(draws[7], other))
    rows, losers, captions, timesteps, _ = (torch.cat(parts) for parts in zip(*draws))
    assert (rows.view(20, 30).sort().values == order).all(), "epochs are whole"
    assert (picture[losers] != picture[rows]).all()
    assert (caption[losers] != caption[rows]).all()
    assert sorted(set(timesteps.tolist())) == list(range(50))
    dropped = captions == train_tiny.EMPTY
    assert torch.equal(captions[~dropped], caption[rows][~dropped])
    assert 0.17 < dropped.float().mean() < 0.33

    monkeypatch.setattr(train_tiny, "RANK", 1)
    _, part = train_tiny.micro_batches(data, config, 7)
    rows, losers, captions, *others = (values[15:] for values in draws[7])
    assert part["latents"].flatten().tolist() == rows.tolist()
    assert part["losers"].flatten().tolist() == losers.tolist()
    assert part["encoder_hidden_states"].flatten().tolist() == captions.tolist()
    assert part["pair_weight"].tolist() == (captions != train_tiny.EMPTY).tolist()
    exactly([part["timesteps"], part["noise"]], others)


@pytest.mark.parametrize("sdxl", [False, True])
def test_what_is_encoded_is_what_the_pipeline_draws_and_decodes(tmp_path, sdxl):
    """An SDXL pipeline decodes with latents_mean and latents_std, one of SD without."""
    model = tmp_path / "model"
    shrunk_pipeline(model) if sdxl else shutil.copytree(TINY, model)
    stats = {"scaling_factor": 0.5, "latents_mean": [-1.7, 1.9, -1.4, 2.5]}
    stats["latents_std"] = [8.5, 5.9, 6.5, 5.2]
    edit(model / "vae" / "config.json", stats)
    flags = ["--data", "x", "--model", str(model), "--guidance", "4", "--seed", "3"]
    read = train_tiny.read_rows(data_in(tmp_path, 3), "file_name", "text", 32)
    pipe = train_tiny.load_pipeline(str(model))
    data = train_tiny.encode(pipe, read)
    ours = train_tiny.sample(pipe, data, train_tiny.parse(flags))
    assert len(ours) == 2 and ours[0] != ours[1]
    for i, row in enumerate(read[:2]):
        given = {"guidance_scale": 4.0, "num_inference_steps": 2}
        own = pipe(row.text, generator=torch.Generator().manual_seed(3 + i), **given).images[0]
        difference = ImageChops.difference(ours[i], own)
        assert max(difference.tobytes()) <= 3, "but for the rounding of captions to fp16"

    pixels = train_tiny.load_picture(read[0].file, 32)[None]
    pipe.scheduler.step = lambda *_, **__: (data.latents[:1].float(),)
    drawn = pipe("what it decodes", num_inference_steps=1, output_type="pt").images
    with torch.no_grad():
        right = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    assert_close(drawn, (right / 2 + 0.5).clamp(0, 1), rtol=0, atol=0.01)


@pytest.mark.parametrize("width, recipe", [(64, "tiny"), (1024, "sd15"), (2048, "sdxl")])
def test_a_folders_recipe_is_that_of_the_width_of_its_captions(tmp_path, width, recipe):
    model = str(shutil.copytree(TINY, tmp_path / "model"))
    edit(Path(model, "unet", "config.json"), {"cross_attention_dim": width})
    for loss in ("sudo", "sft"):
        for lora in (0, 2):
            flags = f"--data x --loss {loss} --lora {lora} --model".split()
            config = train_tiny.parse([*flags, model])
            assert config == replace(train_tiny.parse([*flags, recipe]), model=model, size=32)
            rate = ("sft_" if loss == "sft" else "") + ("lora_" if lora else "") + "lr"
            assert config.lr == getattr(config, rate)


def test_a_gpu_too_small_for_all_weights_trains_lora(monkeypatch):
    cards = [
        (8, "", 16, "8 GB.*--lora 0.* 21"),
        (24, "", 0, "^$"),
        (8, "--lora 0", 0, "^$"),
        (8, "--model tiny", 0, "^$"),
        (24, "--model sdxl", 16, "24 GB.*--lora 0.* 33"),
    ]
    monkeypatch.setattr(train_tiny, "DEVICE", torch.device("cuda"))
    for gigabytes, flags, rank, note in cards:
        card = Mock(return_value=SimpleNamespace(total_memory=gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", card)
        config = train_tiny.parse(["--data", "x", *flags.split()])
        assert config.lora == rank and re.search(note, config.note)


def test_captions_are_the_same_where_the_model_sees_the_same_words_and_losers_have_others(capsys):
    pipe = train_tiny.load_pipeline(str(TINY))
    long = "a picture of the small world with two coloured shapes side by side on a background , "
    texts = [long + "a red square", long + "a blue circle", long, "A Red  square", "a red square"]
    texts += ["a red squares", "", "猫", "\N{CAT FACE}", *(" red" * n for n in (13, 14, 15, 16))]
    data = train_tiny.encode(pipe, [train_tiny.Row(SAMPLE, text.strip(), "") for text in texts])
    assert "5 captions have more than 16 tokens" in capsys.readouterr().out
    numbers = [train_tiny.EMPTY, *data.caption.tolist()]
    with torch.no_grad():
        seen, _ = pipe.encode_prompt(["", *texts], "cpu", 1, False)
    for a, seen_a in zip(numbers, seen):
        assert [a == b for b in numbers] == [torch.equal(seen_a, seen_b) for seen_b in seen]
    assert data.texts[:3] == ["", texts[0], texts[3]] and len(data.texts) == max(numbers) + 1
    for rows in ("a1", "a1 A2 a3", "a1 b1 c1", "a1 A2 b1", "a1 a2 b1 a3 c1"):
        made = [train_tiny.Row(None, caption, picture) for caption, picture in rows.split()]
        stops("needs a loser", train_tiny.check_losers, pipe, made)


def test_sft_alone_trains_on_pictures_of_one_caption_even_if_it_is_empty(tmp_path):
    data = data_in(tmp_path)
    data.write_text(re.sub('"text": ".*"', '"text": ""', data.read_text()))
    assert len(run(tmp_path / "sft", "--loss", "sft", data=data, steps=1)) == 1
    stops("needs a loser", run, tmp_path / "sudo", data=data)


def test_pictures_of_every_kind_are_taken_right_and_known_by_their_pixels(tmp_path):
    """A red left and a blue right half, however they are stored; an odd aspect loses its ends."""
    upright = Image.new("RGB", (40, 20), "red")
    upright.paste("blue", (20, 0, 40, 20))
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for name, mode in (("a.png", "P"), ("b.png", "RGBA"), ("a.bmp", "RGB"), ("a.jpg", "CMYK")):
        upright.convert(mode).save(tmp_path / name, quality=100)
    upright.save(tmp_path / "broken.png", exif=b"\0\x08\0\x02\x01\x12\0\x03")
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", 3_000_000 * "x", zip=True)
    upright.save(tmp_path / "~", "PNG", pnginfo=text, icc_profile=bytes(3_000_000))
    files = sorted(tmp_path.iterdir())
    for file in files:
        pixels = train_tiny.load_picture(file, 16)
        assert pixels.shape == (3, 16, 16), file
        assert_close(pixels[:, 8, 3], torch.tensor([1.0, -1, -1]), atol=0.1, rtol=0)
        assert_close(pixels[:, 8, 12], torch.tensor([-1.0, -1, 1]), atol=0.1, rtol=0)
    lines = [{"image": file.name, "prompt": "猫 "} for file in files if file.suffix != ".jpg"]
    (tmp_path / "metadata.jsonl").write_text("\r\n\r\n".join(map(json.dumps, lines)))
    rows = train_tiny.read_rows(tmp_path, "image", "prompt", 16)
    assert len(rows) == 6 and {row[1:] for row in rows} == {("猫", rows[0].digest)}
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (train_tiny.load_picture(tmp_path / "clear.png", 16) == 1).all(), "on white"
    Image.frombytes("I;16", (9, 9), 81 * b"\0\x40").save(tmp_path / "deep.png")
    assert (train_tiny.load_picture(tmp_path / "deep.png", 16) + 0.5).abs().max() < 0.01


FAULTS = [  # what the data says, or what makes its one picture, x.png
    (b"", "0 sound rows"),
    (b"\xff", "UTF-8"),
    (b"{}\n" * 16, "(.*jsonl:[0-9]+: .*\n){10}.*16 faulty"),
    (b'{"file_name": "x.png", "text": ["x", "y"]}', "jsonl:1: .*one string under 'text'"),
    (lambda file: None, "jsonl:2: x.png: .*No such file"),
    (lambda file: file.write_bytes(SAMPLE.read_bytes()[:-2000]), "x.png: .*truncated"),
    (lambda file: Image.new("I", (9, 9)).save(file, "TIFF"), "x.png: .*32-bit"),
    (lambda file: Image.new("I;16", (9, 9)).save(file, transparency=1), "x.png: .*alpha"),
]


@pytest.mark.parametrize("fault, message", FAULTS)
def test_faulty_rows_are_named_before_anything_is_written(tmp_path, fault, message):
    data = tmp_path / "a.jsonl"
    data.write_text('\n{"file_name": "x.png", "text": "x"}')
    fault(tmp_path / "x.png") if callable(fault) else data.write_bytes(fault)
    stops(message, run, tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_flags_are_checked_and_explained(capsys):
    wrong = "--lr=0 --beta=nan --steps=-1 --grad-accum=0 --checkpoint-every=0 --lora=-1 --loss=ppo"
    for flag in [*wrong.split(), "--caption-dropout=1.5", "--batch-size=x"]:
        stops("2", train_tiny.parse, ["--data", "x", flag])
        assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
    stops("0", train_tiny.parse, ["--help"])
    text = capsys.readouterr().out
    assert str(HERE) not in text and "(1" not in text and text.isascii()


UNFIT = [  # a file of a model, and what it says instead, or that it is missing
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample' is not supported"),
    ("unet/config.json", {"sample_size": [8, 12]}, r"sample_size \[8, 12\]"),
    ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "InpaintPipeline"),
    (UNET, lambda w: {"_orig_mod." + name: w[name] for name in w}, "weights of its unet"),
    (UNET.replace("unet", "vae"), lambda w: dict([*w.items()][1:]), "weights of its vae"),
    ("tokenizer/tokenizer.json", None, "its tokenizer"),
    ("tokenizer/tokenizer_config.json", None, "its tokenizer"),
]


@pytest.mark.parametrize("name, change, message", UNFIT)
def test_an_unfit_model_is_refused_before_anything_is_written(tmp_path, name, change, message):
    edit(shutil.copytree(TINY, tmp_path / "model") / name, change)
    stops(f"(?s)model.*{message}", run, tmp_path / "out", "--model", tmp_path / "model")
    assert not (tmp_path / "out").exists()


def test_nothing_that_is_there_is_ever_deleted_or_written_over(tmp_path, monkeypatch):
    """A long run's step folders, its checkpoint removed to make room, and a thesis beside them."""
    mine, empty, typo = (tmp_path / name for name in ("mine", "empty", "typo"))
    (mine / "step-000100").mkdir(parents=True)
    for name in ("step-000100/unet.safetensors", "step-by-step.tex", "metrics.jsonl"):
        (mine / name).write_text("of worth")
    stops("in use.*--resume", run, mine)
    stops("typo", run, mine, "--model", typo)
    stops("no checkpoint to resume", resume, mine)
    stops("cannot be made", run, mine / "metrics.jsonl" / "out", data=typo)
    assert [file.read_text() for file in mine.rglob("*.*")] == ["of worth"] * 3
    empty.mkdir()
    stops("typo", run, empty, "--data", typo)
    assert empty.exists(), "which the run did not make"

    def meanwhile(*given):
        (empty / "metrics.jsonl").write_text("of another run")
        return encode(*given)

    encode = train_tiny.encode
    monkeypatch.setattr(train_tiny, "encode", meanwhile)
    stops("metrics.jsonl .*File exists", run, empty, "--seed", -1)
    assert (empty / "metrics.jsonl").read_text() == "of another run"


def test_a_full_disk_is_one_sentence_that_names_what_is_whole(tmp_path):
    """By a limit of the system on the bytes in a file, which torch and safetensors word anew."""
    run(tmp_path / "done", "--loss", "sft", steps=1)
    unet = (TINY / UNET).stat().st_size
    begin = arguments(tmp_path / "out", "--checkpoint-every", 1)
    rooms = [
        (20_000, begin, "samples.png could not .*too large.* Whole in .*: nothing"),
        (unet // 2, begin, "step-000001 could not .*too large.* Whole in .*: nothing"),
        (unet + 9999, begin, "checkpoint.pt could not .*too large.* Whole in .*: step-000001"),
        (unet // 2, ["--resume", str(tmp_path / "done")], "pipeline could not .*by --resume"),
    ]
    for room, argv, message in rooms:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            stops(message, train_tiny.main, argv)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (resource.RLIM_INFINITY,))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    resume(tmp_path / "done")


def test_early_ends_leave_nothing_and_keep_their_cause(tmp_path, monkeypatch):
    ends = {torch.OutOfMemoryError(): "--lora 16 .*--batch-size", KeyboardInterrupt(): "Stopped"}
    ends[FileNotFoundError("0003.png")] = "^0003.png$"
    for error, message in ends.items():
        monkeypatch.setattr(sudo, "implicit_margin", Mock(side_effect=error))
        with pytest.raises((SystemExit, FileNotFoundError), match=message):
            run(tmp_path / "out", steps=1)
        assert not (tmp_path / "out").exists()


def test_what_is_not_finite_ends_the_run_and_leaves_it_whole(tmp_path, monkeypatch):
    output = tmp_path / "out"
    stops("Stopped.* step 1 .*lower --lr", run, output, "--lr", 1e12, "--checkpoint-every", 1)
    saved = torch.load(output / "checkpoint.pt")
    assert saved["step"] == len(log_of(output)) == 1 < log_of(output)[0]["grad_norm"]
    first_moments = [state["exp_avg"].norm() for state in saved["optimizer"]["state"].values()]
    assert torch.stack(first_moments).norm() == pytest.approx(0.1), "of a gradient clipped at 1"
    compute_in(torch.float16, monkeypatch.setattr, scale=1.5)
    monkeypatch.setitem(train_tiny.LOSSES, "dpo", partial(sudo.sudo_loss, mse_weight=1e38))
    stops("gradients of step 0 are too large for fp16", run, tmp_path / "fp16", "--loss", "dpo")


def test_a_run_is_resumed_by_its_flags_if_all_else_is_the_same(tmp_path, monkeypatch, capsys):
    """SD1.5's scheduler lacks values that diffusers now has, and lists their names in any order."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model, output = shutil.copytree(TINY, tmp_path / "model"), tmp_path / "猫"
    (model / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    flags = ["--model", model, "--loss", "dpo", "--lora", 2, "--caption-dropout", 0]
    assert exit_code(train_tiny.main, arguments(output, *flags, "--seed", 2**64, steps=1)) == 0
    log = log_of(output)
    assert log[0]["pairs"] == 4 and log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for flag in ("--steps=2", "--lora=2", "--output=x"):
        stops("2", resume, output, flag)
        assert "--data and --model that moved" in capsys.readouterr().err
    for change in ({"text": "another"}, {"file_name": str(SAMPLE.with_name("0099.png"))}):
        data_in(tmp_path, **change)
        stops(r"its data was 16 rows .* and is 16 rows \(", resume, output)
    data_in(tmp_path)
    vae = UNET.replace("unet", "vae")
    edit(model / vae, lambda weights: {name: w + 0.01 for name, w in weights.items()})
    stops("its model was .* and is", resume, output)
    shutil.copy(TINY / vae, model / vae)
    model.rename(tmp_path / "moved")
    (tmp_path / "captions.jsonl").rename(tmp_path / "moved.jsonl")
    stops("captions.jsonl", resume, "~/猫")
    monkeypatch.setattr(sys, "stdout", (tmp_path / "said").open("w", encoding="cp1252"))  # no β
    resume("~/猫", "--data", "~/moved.jsonl", "--model", tmp_path / "moved")
    assert log_of(output) == log


def test_a_checkpoint_that_does_not_fit_is_one_sentence(tmp_path):
    output = tmp_path / "out"
    run(output, "--lora", 2, steps=1)
    before = (output / UNET).read_bytes()
    file = output / "checkpoint.pt"
    whole = file.read_bytes()
    saved = torch.load(file)
    renamed = {n.replace(".default", ".first"): p for n, p in saved["trained"].items()}
    for message, change in (("edition 3", {"edition": 3}), ("another peft", {"trained": renamed})):
        torch.save(saved | change, file)
        stops(message, resume, output)
    for broken in (whole[: len(whole) // 2], b""):
        file.write_bytes(broken)
        stops("holds no checkpoint .*broken", resume, output)
    assert (output / UNET).read_bytes() == before


def snippet(line):
    """The one python block of the README that has this line."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if line in block)
    return block


def test_the_lines_on_the_first_screen_are_the_loss():
    names = {"torch": torch, "F": torch.nn.functional}
    exec(snippet("def loss("), names)
    b, reference, gradients = batch(), tiny_unet(), []
    given = reference, DDPMScheduler(), b.winners, b.conditions
    ours = partial(sudo.sudo_loss, losers=b.winners.roll(1, 0))
    for loss in (names["loss"], lambda *given: ours(*given)[0]):
        policy = moved(reference, 1e-3)
        torch.manual_seed(3)  # both draw the noise and then the timesteps
        loss(policy, *given).backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_the_snippets_for_the_script_of_diffusers(monkeypatch):
    monkeypatch.setattr(accelerator, "log", Mock())
    b = batch()
    names = {"noise_scheduler": DDPMScheduler(), "accelerator": accelerator, "global_step": 0}
    names |= {"latents": b.winners, "encoder_hidden_states": b.conditions}
    names["unet"] = tiny_unet().eval()
    exec(snippet("reference = frozen_copy(unet)") + snippet("accelerator.log("), names)
    assert names["metrics"]["margin"] == 0 and names["loss"].requires_grad
    assert accelerator.log.call_args[0][0]["dpo"] == pytest.approx(math.log(2))
