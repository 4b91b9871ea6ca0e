"""What sudo.py and train_tiny.py claim, checked on a CPU without a download.

The oracle is written from the equations, in float64. Except for flow matching the noise is that of
diffusers' own schedulers. It shares no line with sudo.py.
"""

import copy
import json
import math
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are those of a CPU, wherever they run

import diffusers
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers import FlowMatchEulerDiscreteScheduler as FlowScheduler
from diffusers.hooks import HookRegistry, ModelHook
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import softplus
from torch.testing import assert_close
from transformers import CLIPTextModelWithProjection

import sudo
import train_tiny

HERE = Path(__file__).parent
TINY = HERE / "lab" / "tiny-sd"
README = (HERE / "README.md").read_text(encoding="utf-8")
B = 4
exactly = partial(assert_close, rtol=0, atol=0)
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
    with torch.no_grad():
        for p in policy.parameters():
            p += scale * torch.randn_like(p)
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
    "SUDO at first, DPO": ("v_prediction", ALONE, lambda d, _: softplus(0.5 * 5000 * d)),
    "diffusers": ("v_prediction", ALONE | {"beta": 2 * 2500.0}, lambda d, _: softplus(2500 * d)),
    "DDSPO": ("flow", ALONE | {"beta": 2000.0}, lambda d, _: softplus(2000 / 2 * d)),
    "weighted": ("epsilon", WEIGHTED, lambda d, e_w: 0.9 * W * softplus(150 * d) + 0.5 * e_w),
    "undecided": ("epsilon", WEIGHTED | {"pair_weight": 0 * W}, lambda _, e_w: 0.5 * e_w),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradients_and_metrics_are_those_of_the_equations(name):
    prediction_type, given, objective = LOSSES[name]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_sees_the_dtype_of_the_latents_and_errors_are_fp32(dtype):
    model, b, seen = tiny_unet().train().to(dtype), batch(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    latents, words = b.winners.to(dtype), b.conditions.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        given = model, sudo.frozen_copy(model), DDPMScheduler(), latents, words
        loss, metrics = sudo.sudo_loss(*given)
    assert seen == [dtype, dtype] and loss.dtype == torch.float32
    assert metrics["dpo"] == torch.tensor(math.log(2)) and metrics["implicit_acc"] == 0.5
    assert metrics["margin"] == 0 and metrics["winner_drift"] == 0 and metrics["loser_drift"] == 0
    assert sudo.make_pairs(DDPMScheduler(), latents, latents).target.dtype == torch.float32


def hooked(model):
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "hook")


@pytest.mark.parametrize("change", [hooked, lambda module: setattr(module, "forward", abs)])
@pytest.mark.parametrize("place", ["", "1"])
def test_a_forward_replaced_by_a_function_is_not_copied(change, place):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    change(model.get_submodule(place))
    with pytest.raises(ValueError, match="forward was replaced"):
        sudo.frozen_copy(model)


@pytest.mark.parametrize("wrapped_by", ["nothing", "accelerate", "torch.compile"])
def test_a_frozen_copy_runs_apart_from_its_model(wrapped_by):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout())
    if wrapped_by == "accelerate":
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    elif wrapped_by == "torch.compile":
        model = torch.compile(model, backend="eager")
    x, reference = torch.randn(2, 3), sudo.frozen_copy(model)
    before = reference(x)
    exactly(before, model.eval()(x).detach())
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    exactly(reference(x), before)
    assert not before.requires_grad and (model(x) != before).all()


def test_random_image_is_a_derangement_with_every_other_image_equally_likely():
    rng = torch.Generator().manual_seed(0)
    for size in (2, 3, 8):
        images, counts = torch.arange(size).view(size, 1, 1, 1).float(), torch.zeros(size, size)
        for _ in range(2000):
            losers = sudo.random_image(images, rng).flatten().long()
            assert sorted(losers.tolist()) == list(range(size))
            counts[torch.arange(size), losers] += 1
        assert counts.diagonal().sum() == 0
        off_diagonal = counts[~torch.eye(size, dtype=torch.bool)] * (size - 1) / 2000
        assert (off_diagonal - 1).abs().max() < 0.25


def test_blur_keeps_means_alone_and_random_grid_swaps_two_cells_of_each_image():
    fine = (torch.arange(16).view(1, 1, 1, -1) % 2 * 2.0 - 1).expand(1, 3, 16, 16)
    assert sudo.blur(fine).abs().max() < 0.2 and sudo.blur(fine).shape == fine.shape
    assert_close(sudo.blur(0 * fine + 0.3), 0 * fine + 0.3)
    cell_number = torch.arange(64).view(8, 8).repeat_interleave(3, 0).repeat_interleave(2, 1)
    images, moves = cell_number.expand(20, 3, 24, 16).float(), set()
    for image in sudo.random_grid(images, generator=torch.Generator().manual_seed(0)):
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
    assert_close(sudo.training_target(x, eps, t, scheduler), scheduler.get_velocity(x, eps, t))
    flow = FlowScheduler(shift=3.0)
    t = flow.timesteps[t]
    for scheduler in (flow, diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction")):
        assert_close(sudo.add_noise(x, eps, t, scheduler), flow.scale_noise(x, t, eps))
        assert_close(sudo.training_target(x, eps, t, scheduler), eps - x)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowScheduler()])
def test_noise_and_timesteps_are_drawn_once_for_winner_and_loser(scheduler):
    x, rng = torch.zeros(2000, 1, 1, 1), torch.Generator().manual_seed(3)
    pairs = sudo.make_pairs(scheduler, x, x, generator=rng)
    assert all(torch.equal(*tensor.chunk(2)) for tensor in pairs)
    t, flow = pairs.timesteps.float(), isinstance(scheduler, FlowScheduler)
    assert 0 <= t.min() < 5 and 995 < t.max() <= (1000 if flow else 999)
    assert abs(t.mean() - 500) < 20 and abs(pairs.target.std() - 1) < 0.05


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
    ({"scheduler": DDPMScheduler(prediction_type="sample")}, "'sample' is not supported"),
    ({"scheduler": diffusers.EDMEulerScheduler()}, "'epsilon' is not .*'v_pred.* flow matching"),
    ({"losers": R(B - 1, 4, 8, 8)}, "losers has shape"),
    ({"encoder_hidden_states": R(8, 5, 64)}, "encoder_hidden_states has shape"),
    ({"added_cond_kwargs": {"time_ids": R(2, 6)}}, "time_ids"),
    ({"block_residuals": [R(2, 6)]}, "block_residuals"),
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


def ddp(model):
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return torch.nn.parallel.DistributedDataParallel(model)


class Switched(torch.nn.Module):
    """As one that turns adapters off for its pass: all weights are the policy's."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *inputs):
        return self.module(*inputs).sample + 0.1


def test_a_reference_that_is_the_policy_is_refused_however_it_is_wrapped():
    compiled, unet, b = partial(torch.compile, backend="eager"), tiny_unet(), batch()
    given = DDPMScheduler(), b.winners, b.conditions
    for wrap in (lambda model: model, compiled, ddp, lambda model: compiled(ddp(model))):
        for policy, reference in ((wrap(unet), unet), (unet, wrap(unet))):
            with pytest.raises(ValueError, match="frozen copy, or .* adapters off"):
                sudo.sudo_loss(policy, reference, *given)
    torch.distributed.destroy_process_group()
    _, metrics = sudo.sudo_loss(unet, Switched(unet), *given)
    assert metrics["margin"] != 0


def test_a_reference_may_lend_the_policy_other_weights_under_autocast():
    base, b = tiny_unet().eval(), batch()
    policy = moved(base)
    own, before = copy.deepcopy(policy.state_dict()), base.state_dict()

    def lent(*inputs):
        policy.load_state_dict(before)
        output = policy(*inputs)
        policy.load_state_dict(own)
        return output

    margins = []
    for reference in (sudo.frozen_copy(base), lent):
        with torch.autocast("cpu", torch.bfloat16):  # which keeps its casts until it ends
            for _ in range(2):
                given = policy, reference, DDPMScheduler(), b.winners, b.conditions
                _, metrics = sudo.sudo_loss(*given, **b.draws)
                margins.append(metrics["margin"].item())
    assert len(set(margins)) == 1 and margins[0] != 0


# ------------------------------------------- the trainer: how the tests run it

QUICK = "import train_tiny as t; t.SAMPLING_STEPS = t.PROMPTS = 1; t.main()"  # in its own process
COLUMNS, FILE = ("file_name", "text"), "diffusion_pytorch_model.safetensors"


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


def in_a_process(command, code=QUICK, **env):
    command = [sys.executable, "-c", code, *command]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)


def log_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output):
    return load_file(output / "unet" / FILE)


def same_run(output, other, exact=True):
    """Two runs from tiny-sd took the same steps, bit for bit or summed in another order."""
    for a, b in zip(log_of(output), log_of(other), strict=True):
        del a["seconds"], b["seconds"]
        assert a == (b if exact else pytest.approx(b, rel=1e-3, abs=1e-4))
    three = (weights(folder).values() for folder in (output, other, TINY))
    a, b, start = (torch.cat([tensor.flatten() for tensor in each]) for each in three)
    # Adam enlarges a difference where gradients are 0.
    assert (a - b).norm() <= (0 if exact else 0.01 * (b - start).norm())


def copy_of(model, folder, part="unet", **config):
    """A copy of a model, a part of it with another configuration."""
    shutil.copytree(model, folder)
    name = {".": "model_index.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
    says = json.loads((folder / part / name).read_text()) | config
    says = {name: value for name, value in says.items() if value != "gone"}
    (folder / part / name).write_text(json.dumps(says))
    return folder


def edit(model, part, change):
    (file,) = (model / part).glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def shrunk_pipeline(folder):
    """SDXL's, with a random UNet among the parts of tiny-sd."""
    tiny = DiffusionPipeline.from_pretrained(TINY)
    vae, text, words = tiny.vae, tiny.text_encoder, tiny.tokenizer
    texts = text, CLIPTextModelWithProjection(text.config), words, words
    wide = {"cross_attention_dim": 2 * 64, "transformer_layers_per_block": (1, 2)}
    unet = sdxl_unet(text.config.projection_dim, **wide)
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    diffusers.StableDiffusionXLPipeline(vae, *texts, unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny():
    return train_tiny.load_pipeline(str(TINY))


# ------------------------------------------- the trainer: its runs, recipes and data


def test_the_main_job_raises_the_margin_and_leaves_a_pipeline(tmp_path, capsys):
    given = {"data": data_in(tmp_path, 64), "steps": 20, "batch": 16}
    log = run(tmp_path / "out", "--lr", 4e-4, "--beta", 100, **given)
    assert [row["step"] for row in log] == [*range(20)]
    assert log[0]["dpo"] == pytest.approx(math.log(2), abs=1e-6) and log[0]["margin"] == 0
    assert log[0]["lr"] == pytest.approx(4e-4 / 5) and log[-1]["lr"] == pytest.approx(4e-4)
    expected = "step lr grad_norm seconds loss pairs dpo winner_error loser_error winner_drift "
    expected += "loser_drift margin implicit_acc saturated"
    assert all(row.keys() == set(expected.split()) for row in log)
    # About 100 pairs, so that chance alone would have to be off by two standard deviations.
    last = {name: sum(row[name] for row in log[-8:]) / 8 for name in log[0]}
    assert last["margin"] > 0.25 and last["implicit_acc"] > 0.6
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        pixels = sheet.convert("RGB").tobytes()
    before, now = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]
    assert before != now and len(set(before)) > 9 and len(set(now)) > 9
    said = capsys.readouterr()
    what = "tiny-sd on 64 pictures, 20 steps of 16 pairs, lr 0.0004, β 100, on 1 x cpu in fp32"
    assert what in said.out and "does it fit" not in said.err
    loads = re.search(r"DiffusionPipeline\.from_pretrained\(.*?\)", said.out)[0]
    assert eval(loads)("a red square").images[0].size == (32, 32)


@pytest.mark.parametrize("flags", ["", "--lora 4", "--optimizer adafactor", "--loss sft", "fp16"])
def test_killed_and_accumulated_runs_end_as_one_that_never_stopped(tmp_path, monkeypatch, flags):
    """fp16 as on a card that has no bf16; its first steps are too large for it, and skipped."""
    half = "torch.float16" if flags == "fp16" else "None"
    monkeypatch.setattr(train_tiny, "HALF", eval(half))
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**17))
    flags = [*flags.replace("fp16", "").split(), "--checkpoint-every", "2"]
    lora, whole, halves, killed = "--lora" in flags, *(tmp_path / n for n in ("a", "b", "c"))
    lr = {"--lora": 10 * 5e-5, "--loss": train_tiny.RECIPES["tiny"]["sft_lr"] / 4}.get(
        flags[0], 5e-5
    )
    log = run(whole, *flags, steps=6)
    assert log[-1]["lr"] == pytest.approx(lr)  # that of SFT falls to 0
    skipped = [row["grad_norm"] is None for row in log]
    assert skipped[0] == (half != "None") and any(skipped) == skipped[0] and not all(skipped)
    if half == "None":
        run(halves, *flags, "--grad-accum", 2, steps=6, batch=2)
        same_run(halves, whole, exact=False)
    code = f"import functools, torch, train_tiny as t; t.HALF = {half}; "
    code += "torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**17); "
    code += "t.SAMPLING_STEPS = t.PROMPTS = 2; "
    command = [sys.executable, "-c", code + "t.main()", *arguments(killed, *flags, steps=6)]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL)
    log, end = killed / "metrics.jsonl", time.time() + 300
    while process.poll() is None and time.time() < end:
        if log.exists() and log.read_text().count("\n") > 2:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9, "it should have been training"
    saved = torch.load(killed / "checkpoint.pt", weights_only=True)
    step, start = killed / f"step-{saved['step']:06d}", "unet." if lora else ""
    (file,) = step.glob("*.safetensors")  # what was trained, by the names that loaders expect
    trained = {start + n.replace(".default", ""): p.data for n, p in saved["trained"].items()}
    exactly(load_file(file), trained)
    assert lora or UNet2DConditionModel.from_pretrained(step)
    (killed / "checkpoint.pt.unfinished").write_bytes(b"half")
    for _ in range(2):  # to go on from step 2 or 4, then from the end
        resume(killed)
        same_run(killed, whole)
        assert (killed / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


@pytest.mark.parametrize("lora", [0, 4])
def test_two_processes_take_the_steps_of_one(tmp_path, lora):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--lora", lora, "--gradient-checkpointing", "--grad-accum")
    run(one, *flags, 4, batch=2, steps=3)
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --no-python".split()
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, *torchrun, sys.executable, "-c", QUICK]
    command += arguments(two, *flags, 2, batch=2, steps=3)
    process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("16 pictures") == 1, "one process speaks"
    same_run(two, one, exact=False)
    with pytest.raises(SystemExit, match="machine was 2 x cpu in fp32 and is 1 x cpu in fp32"):
        resume(two)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora", [0, 4])
def test_frozen_weights_held_in_half_are_the_same_arithmetic(tiny, monkeypatch, lora, half):
    monkeypatch.setattr(train_tiny, "HALF", half)
    flags = f"--data x --model tiny --lora {lora} --gradient-checkpointing --lr 0.01"
    fresh, b = SimpleNamespace(unet=copy.deepcopy(tiny.unet)), batch()
    unet, reference, optimizer = train_tiny.prepare(fresh, train_tiny.parse(flags.split()))
    for layer in (unet if lora else reference).modules():
        for weight in layer.parameters(recurse=False):
            cast = isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and not weight.requires_grad
            assert weight.dtype == (half if cast else torch.float32)
    trained = train_tiny.trained_weights(unet)
    assert {("lora_" in n, p.dtype) for n, p in trained.items()} == {(lora > 0, torch.float32)}

    def error(model):
        pairs = sudo.make_pairs(tiny.scheduler, b.winners, **b.draws)
        with torch.no_grad(), train_tiny.half_precision():
            return sudo.denoising_error(model, pairs, b.conditions)

    fp32 = sudo.frozen_copy(tiny.unet).to(memory_format=torch.channels_last)
    exact = error(fp32)  # whose weights are cast in each pass
    with train_tiny.half_precision():
        given = unet, reference, tiny.scheduler, b.winners, b.conditions
        loss, metrics = sudo.sudo_loss(*given, beta=300.0, **b.draws)
    assert metrics["margin"] == 0 and metrics["winner_drift"] == 0 and metrics["loser_drift"] == 0
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trained.values())
    optimizer.step()
    exactly(error(reference), exact)
    assert (error(unet) != exact).all()


def test_a_run_that_fp16_cannot_hold_ends_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "HALF", torch.float16)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=1.5))
    huge = {name: partial(loss, mse_weight=1e38) for name, loss in [("dpo", sudo.sudo_loss)]}
    monkeypatch.setattr(train_tiny, "LOSSES", huge)
    with pytest.raises(SystemExit, match="gradients of step 0 are too large for fp16.*lower --lr"):
        run(tmp_path / "out", "--loss", "dpo", steps=2)


@pytest.mark.parametrize("kind", ["tiny in bf16", "sdxl"])
def test_lora_is_fused_loads_into_its_base_and_goes_on_from_there(tmp_path, monkeypatch, kind):
    sft, flags = tmp_path / "sft", ("--lora", 4, "--lr", 0.003)
    model = shrunk_pipeline(tmp_path / "model") if kind == "sdxl" else TINY
    with monkeypatch.context() as patch:
        patch.setattr(train_tiny, "HALF", None if kind == "sdxl" else torch.bfloat16)
        run(sft, "--model", model, "--loss", "sft", *flags, steps=2)
    lora, base, fused = load_file(sft / train_tiny.LORA_FILE), weights(model), weights(sft)
    assert base.keys() == fused.keys()
    for name, weight in base.items():  # W + B A
        a, b = (f"unet.{name.removesuffix('weight')}lora_{x}.weight" for x in "AB")
        if a in lora:
            assert lora[b].abs().max() > 1e-4
            weight = weight + lora.pop(b) @ lora.pop(a)
        assert_close(fused[name], weight, rtol=0, atol=1e-6)
    assert not lora
    on, fused = (DiffusionPipeline.from_pretrained(folder) for folder in (model, sft))
    on.load_lora_weights(sft)
    seeds = (torch.Generator().manual_seed(0) for _ in range(2))
    pictures = (pipe("a", generator=next(seeds), output_type="pt").images for pipe in (on, fused))
    assert_close(*pictures, rtol=0, atol=1e-3)
    flags = ("--model", sft, *flags)
    log = run(tmp_path / "sudo", *flags, steps=2)
    assert log[0]["margin"] == 0 and log[1]["winner_drift"] != 0
    config = train_tiny.parse(arguments(tmp_path / "sudo", *flags))
    pipe = train_tiny.load_pipeline(str(sft))
    data = train_tiny.encode(pipe, train_tiny.read_rows(config.data, *COLUMNS, config.size))
    for step, row in enumerate(log):  # the reference is the SFT model
        (part,) = train_tiny.micro_batches(data, config, step)
        same = sudo.frozen_copy(pipe.unet)
        _, metrics = sudo.sudo_loss(pipe.unet.eval(), same, pipe.scheduler, **part)
        r_w = row["winner_error"] - row["winner_drift"]
        assert r_w == pytest.approx(float(metrics["winner_error"]), rel=1e-4)
    adapted, _, _ = train_tiny.prepare(pipe, config)  # with its adapters it is the fused one
    saved = torch.load(tmp_path / "sudo" / "checkpoint.pt", weights_only=True)
    adapted.load_state_dict(saved["trained"], strict=False)
    fused = UNet2DConditionModel.from_pretrained(tmp_path / "sudo" / "unet").eval()
    _, metrics = sudo.sudo_loss(adapted, fused, pipe.scheduler, **part)
    assert abs(metrics["winner_drift"]) < 0.01 * abs(row["winner_drift"])


def test_a_steps_draw_depends_on_seed_and_step_alone_and_losers_differ(monkeypatch):
    N = 30
    data = train_tiny.Data(
        latents=torch.arange(N).view(N, 1, 1, 1).float(),
        losers=None,
        picture=torch.arange(N) // 2,  # every picture twice
        caption=1 + torch.arange(N) % 3,  # and three captions in all
        conditions={"encoder_hidden_states": torch.arange(4.0).view(4, 1, 1)},
        texts=["", "a", "b", "c"],
        num_timesteps=50,
    )
    monkeypatch.setattr(train_tiny, "WORLD", 2)
    flags = "--seed 5 --caption-dropout 0.25 --batch-size 5 --grad-accum 2 --model tiny --data x"
    config = train_tiny.parse(flags.split())
    draws = [train_tiny.draw(data, config, step) for step in range(30)]
    exactly(draws[7], train_tiny.draw(data, config, 7))
    for other in (draws[8], train_tiny.draw(data, replace(config, seed=6), 7)):
        assert not any(torch.equal(a, b) for a, b in zip(draws[7], other))
    rows, losers, captions, timesteps = (torch.cat(parts) for parts in list(zip(*draws))[:4])
    assert (rows.view(20, N).sort(1).values == torch.arange(N)).all(), "epochs are whole"
    assert (data.picture[losers] != data.picture[rows]).all()
    assert (data.caption[losers] != data.caption[rows]).all()
    assert sorted(set(timesteps.tolist())) == list(range(50))
    dropped = captions == train_tiny.EMPTY
    assert torch.equal(captions[~dropped], data.caption[rows][~dropped])
    assert 0.17 < dropped.float().mean() < 0.33
    first = [next(train_tiny.micro_batches(data, config, step)) for step in range(30)]
    part = {name: torch.cat([each[name] for each in first]).flatten() for name in first[0]}
    rows, losers, captions = (torch.cat([draw[i][:5] for draw in draws]).float() for i in range(3))
    assert torch.equal(part["latents"], rows), "which are numbers here"
    assert torch.equal(part["losers"], losers)
    assert torch.equal(part["pair_weight"], (captions != train_tiny.EMPTY).float())
    assert torch.equal(part["encoder_hidden_states"], captions)
    made = data._replace(losers=data.latents + 100)  # by a downgrade, one for each winner
    part = next(train_tiny.micro_batches(made, config, 0))
    assert torch.equal(part["losers"], part["latents"] + 100)
    alone = data._replace(caption=torch.ones(N, dtype=int))  # SFT needs no losers, and draws alike
    sft = train_tiny.draw(alone, replace(config, loss="sft"), 7)
    assert sft[1] is None and all(torch.equal(a, b) for a, b in zip(sft[3:], draws[7][3:]))


@pytest.mark.parametrize("sdxl", [False, True])
def test_what_is_encoded_is_what_the_pipeline_draws_and_decodes(tmp_path, sdxl):
    """An SDXL pipeline decodes with latents_mean and latents_std, one of SD without."""
    base = shrunk_pipeline(tmp_path / "base") if sdxl else TINY
    stats = {"scaling_factor": 0.5, "latents_mean": [-1.7, 1.9, -1.4, 2.5]}
    stats["latents_std"] = [8.5, 5.9, 6.5, 5.2]
    model = str(copy_of(base, tmp_path / "model", "vae", **stats))
    config = train_tiny.parse(["--data", "x", "--model", model, "--guidance", "4", "--seed", "3"])
    read = train_tiny.read_rows(data_in(tmp_path, 3), *COLUMNS, 32)
    pipe = train_tiny.load_pipeline(model)
    data = train_tiny.encode(pipe, read)
    assert data.texts == ["", *(row.text for row in read)]
    ours, own = train_tiny.sample(pipe, data, config), []
    for i, row in enumerate(read[:2]):
        given = {"guidance_scale": 4.0, "num_inference_steps": 2}
        own += pipe(row.text, generator=torch.Generator().manual_seed(3 + i), **given).images
    ours, own = (torch.tensor([list(p.tobytes()) for p in each]).float() for each in (ours, own))
    assert ours.shape == (2, 32 * 32 * 3) and (ours[0] - ours[1]).abs().mean() > 1
    assert (ours - own).abs().max() <= 3, "but for the rounding of captions to fp16"

    pixels = train_tiny.load_picture(read[0].file, 32)[None]
    pipe.scheduler.step = lambda *_, **__: (data.latents[:1].float(),)
    drawn = pipe("what it decodes", num_inference_steps=1, output_type="pt").images
    with torch.no_grad():
        right = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    assert_close(drawn, (right / 2 + 0.5).clamp(0, 1), rtol=0, atol=0.01)


RATES = {"": "lr", "--loss sft": "sft_lr", "--lora 2": "lora_lr"}
RATES["--loss sft --lora 2"] = "sft_lora_lr"


def test_a_folders_recipe_is_that_of_the_width_of_its_captions(tmp_path):
    for width, recipe in {64: "tiny", 768: "sd15", 1024: "sd15", 2048: "sdxl"}.items():
        model = str(copy_of(TINY, tmp_path / str(width), cross_attention_dim=width))
        for flags, rate in RATES.items():
            flags = ["--data", "x", *flags.split(), "--model"]
            known, config = train_tiny.parse([*flags, recipe]), train_tiny.parse([*flags, model])
            assert config == replace(known, model=model, size=32)
            default = train_tiny.RECIPES[recipe].get(rate, getattr(train_tiny.Config, rate))
            assert config.lr == default and (config.lr_schedule == "linear") == ("sft" in rate)
            assert train_tiny.parse([*flags, model, "--lr", "1"]).lr == 1


CARDS = [
    (8, "", 16, "8 GB.*--lora 0.* 21"),
    (24, "", 0, "^$"),
    (8, "--lora 0", 0, "^$"),
    (24, "--model sdxl", 16, "24 GB.*--lora 0.* 33"),
    (8, "--model tiny", 0, "^$"),
]


@pytest.mark.parametrize("gigabytes, flags, rank, note", CARDS)
def test_a_gpu_too_small_for_all_weights_trains_lora(monkeypatch, gigabytes, flags, rank, note):
    memory, flags = SimpleNamespace(total_memory=gigabytes * 1e9), ["--data", "x", *flags.split()]
    monkeypatch.setattr(train_tiny, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    config = train_tiny.parse(flags)
    assert config.lora == rank and re.search(note, config.note)
    assert config.lr == pytest.approx((5e-5 if "tiny" in flags else 1e-6) * (10 if rank else 1))
    monkeypatch.setattr(train_tiny, "find_spec", lambda name: None)
    if rank:
        with pytest.raises(SystemExit, match="pip install peft.*--lora 0"):
            train_tiny.parse(flags)


def test_captions_are_the_same_where_the_model_sees_the_same_words(tiny, capsys):
    long = "a picture of the small world with two coloured shapes side by side on a background , "
    texts = [long + "a red square", long + "a blue circle", long, "A Red  square", "a red square"]
    texts += ["a red squares", "", "猫", "\N{CAT FACE}", *(" red" * n for n in (13, 14, 15, 16))]
    made = [train_tiny.Row(None, text.strip(), "") for text in texts]
    number, shown = train_tiny.number_captions(tiny, made)
    with torch.no_grad():
        seen, _ = tiny.encode_prompt(["", *texts], "cpu", 1, False)
    numbers = [train_tiny.EMPTY, *number]
    for a, seen_a in zip(numbers, seen):
        assert [a == b for b in numbers] == [torch.equal(seen_a, seen_b) for seen_b in seen]
    assert shown[:3] == ["", texts[0], texts[3]] and len(shown) == max(number) + 1
    train_tiny.encode_captions(tiny, texts, 32)
    assert capsys.readouterr().out.count("5 captions have more than 16 tokens") == 1


@pytest.mark.parametrize("rows", ["a1", "a1 A2 a3", "a1 b1 c1", "a1 A2 b1", "a1 a2 b1 a3 c1"])
def test_a_row_without_another_picture_and_another_caption_ends_the_run(tiny, rows):
    made = [train_tiny.Row(None, caption, picture) for caption, picture in rows.split()]
    with pytest.raises(SystemExit, match="needs a loser"):
        train_tiny.check_losers(tiny, made)


def test_sft_trains_on_pictures_of_one_caption(tmp_path):
    lines = [json.loads(line) for line in data_in(tmp_path).read_text().splitlines()]
    for text in ("a photo of sks dog", ""):
        data = tmp_path / "one.jsonl"
        data.write_text("\n".join(json.dumps(row | {"text": text}) for row in lines))
        assert len(run(tmp_path / f"out{len(text)}", "--loss", "sft", data=data, steps=1)) == 1
        with pytest.raises(SystemExit, match="needs a loser"):
            run(tmp_path / "sudo", data=data)


# ------------------------------------------- the trainer: pictures


def chunked(file, kind, content):
    """The PNG with another chunk before its pixels, as image tools write what they know."""
    raw = file.read_bytes()
    place = raw.index(b"IDAT") - 4
    chunk = kind + content
    chunk = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    file.write_bytes(raw[:place] + chunk + raw[place:])


def test_pictures_of_every_kind_are_taken_right_and_known_by_their_pixels(tmp_path):
    """A red left and a blue right half, however they are stored; an odd aspect loses its ends."""
    upright, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    upright.paste("blue", (20, 0, 40, 20))
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for name, mode in (("a.png", "P"), ("b.png", "RGBA"), ("a.bmp", "RGB"), ("a.jpg", "CMYK")):
        upright.convert(mode).save(tmp_path / name, quality=100)
    upright.save(tmp_path / "a.webp", lossless=True)
    upright.save(tmp_path / "broken.jpg", exif=b"Exif\0\0broken", quality=100)
    upright.save(tmp_path / "broken.png", exif=b"\0\x08\0\x02\x01\x12\0\x03")
    for name, kind, before in (("text", b"zTXt", b"workflow\0\0"), ("icc", b"iCCP", b"x\0\0")):
        upright.save(tmp_path / f"~{name}.png")
        chunked(tmp_path / f"~{name}.png", kind, before + zlib.compress(b"x" * 3_000_000))
    files = sorted(tmp_path.iterdir())
    for file in files:
        pixels = train_tiny.load_picture(file, 16)
        assert pixels.shape == (3, 16, 16), file
        assert_close(pixels[:, 8, 3], torch.tensor([1.0, -1, -1]), atol=0.1, rtol=0)
        assert_close(pixels[:, 8, 12], torch.tensor([-1.0, -1, 1]), atol=0.1, rtol=0)
    lines = [{"image": file.name, "prompt": "猫 "} for file in files if file.suffix != ".jpg"]
    (tmp_path / "metadata.jsonl").write_text("\r\n\r\n".join(map(json.dumps, lines)))
    rows = train_tiny.read_rows(tmp_path, "image", "prompt", 16)
    assert len(rows) == 8 and {row[1:] for row in rows} == {("猫", rows[0].digest)}
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "alpha.png")
    assert (train_tiny.load_picture(tmp_path / "alpha.png", 16) == 1).all()
    for name, mode in (("deep.png", "I;16"), ("deep.tiff", "I;16"), ("big.tiff", "I;16B")):
        quarter = (0x4000).to_bytes(2, "big" if mode == "I;16B" else "little")
        Image.frombytes(mode, (20, 20), 400 * quarter).save(tmp_path / name)
        assert (train_tiny.load_picture(tmp_path / name, 16) + 0.5).abs().max() < 0.01


def test_large_pictures_are_taken_up_to_twice_pillows_limit(tmp_path, monkeypatch):
    Image.new("1", (200, 100), 1).save(tmp_path / "large.png")
    for limit, fits in ((19_000, True), (10_001, True), (9_999, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with nullcontext() if fits else pytest.raises(Image.DecompressionBombError):
            assert (train_tiny.load_picture(tmp_path / "large.png", 8) == 1).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_deep_and_transparent_pictures_are_taken_right_or_refused(tmp_path, depth):
    """A grey PNG, its left half black, its right half of the transparent colour, on white."""
    file, most = tmp_path / "a.png", 2**depth - 1
    colour = most if depth == 1 else most // 3
    side = [0] * 8 + [colour] * 8
    bits = "".join(f"{value:0{depth}b}" for value in side)
    row = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    header = struct.pack(">IIBBBBB", 16, 16, depth, 0, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n")
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(row * 16)), (b"IEND", b"")):
        chunk = struct.pack(">I", len(content)) + kind + content
        with file.open("ab") as end:
            end.write(chunk + struct.pack(">I", zlib.crc32(kind + content)))
    grey = train_tiny.load_picture(file, 16)
    assert grey[0, 8, 3] == -1 and grey[0, 8, 12] == pytest.approx(2 * colour / most - 1, abs=0.01)
    chunked(file, b"tRNS", struct.pack(">H", colour))
    try:
        flat = train_tiny.load_picture(file, 16)
        assert flat[0, 8, 3] == -1 and (flat[:, :, 8:] == 1).all()
    except ValueError as error:
        assert depth != 8 and "save an alpha channel" in str(error)


# ------------------------------------------- the mistakes of a user end in a sentence

PICTURE = (HERE / "lab" / "images" / "0001.png").read_bytes()
FAULTS = [
    ('{"file_name": "1.png", "text": ["x", "y"]}', "must be one string under 'text'"),
    ('{"file_name": "1.png", ', "Expecting property name"),
    ('{"file_name": "1.png", "text": "a \\ud83d cat"}', "surrogates not allowed"),
    ('{"file_name": "none.png", "text": "x"}', "none.png: .*No such file"),
    (lambda file: file.mkdir(), "x.png: .*Is a directory"),
    (lambda file: file.write_bytes(PICTURE[:-2000]), "x.png: .*truncated"),
    (lambda file: Image.new("F", (9, 9), 0.5).save(file, "TIFF"), "x.png: .*32-bit"),
    (lambda file: Image.new("I", (9, 9), 99).save(file, "TIFF"), "x.png: .*32-bit"),
]


@pytest.mark.parametrize("line, message", FAULTS)
def test_a_faulty_row_is_named_before_anything_is_written(tmp_path, line, message):
    if callable(line):
        line(tmp_path / "x.png")
        line = '{"file_name": "x.png", "text": "x"}'
    (data := data_in(tmp_path, 3)).write_text(data.read_text() + line + "\n")
    with pytest.raises(SystemExit, match=f"captions.jsonl:4: .*{message}"):
        run(tmp_path / "out", data=data)
    assert not (tmp_path / "out").exists()


def test_ten_faulty_rows_are_named_and_all_are_counted(tmp_path):
    (tmp_path / "data").write_text("{}\n" * 16)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "out", data=tmp_path / "data")
    *lines, count = str(end.value).splitlines()
    assert [int(re.search(r"data:(\d+): ", line)[1]) for line in lines] == list(range(1, 11))
    assert "16 faulty" in count
    for content, message in {b"": "0 sound rows", b"\xff\xfe": "UTF-8"}.items():
        (tmp_path / "data").write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "out", data=tmp_path / "data")
    assert not (tmp_path / "out").exists()


def test_flags_are_checked_and_explained(capsys):
    wrong = "--lr=0 --beta=nan --steps=-1 --grad-accum=0 --checkpoint-every=0 --lora=-1 --loss=ppo"
    for flag in [*wrong.split(), "--caption-dropout=1.5", "--batch-size=x"]:
        with pytest.raises(SystemExit):
            train_tiny.parse(["--data", "x", flag])
        assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        train_tiny.parse(["--help"])
    text = capsys.readouterr().out
    assert str(HERE) not in text and "(1" not in text and text.isascii()


UNFIT = [  # what a part says in its configuration, how its weights or its files are changed
    ("scheduler", {"prediction_type": "sample"}, "'sample' is not supported"),
    ("unet", {"sample_size": "gone"}, "sample_size None"),
    ("unet", {"sample_size": [8, 12]}, r"sample_size \[8, 12\]"),
    (".", {"_class_name": "StableDiffusionInpaintPipeline"}, "StableDiffusionInpaintPipeline"),
    (".", {"text_encoder": [None, None]}, ""),
    ("unet", lambda w: {"_orig_mod." + n: w[n] for n in w}, "weights of its unet"),  # compiled
    ("vae", lambda w: dict([*w.items()][1:]), "weights of its vae"),
    ("text_encoder", lambda w: {n: w[n][:-1].clone() for n in w}, ""),
    ("text_encoder/model.safetensors", lambda file: os.truncate(file, 9999), ""),
    ("vae/" + FILE, lambda file: file.rename(file.with_suffix(".fp16.safetensors")), "a variant"),
    ("tokenizer/tokenizer.json", Path.unlink, "its tokenizer"),
    ("tokenizer/tokenizer_config.json", Path.unlink, "its tokenizer"),
    ("tokenizer", shutil.rmtree, "its tokenizer"),
]


@pytest.mark.parametrize("part, change, message", UNFIT)
def test_an_unfit_model_is_refused_before_anything_is_written(tmp_path, part, change, message):
    says = change if isinstance(change, dict) else {}
    model = copy_of(TINY, tmp_path / "model", part if says else ".", **says)
    if not says:
        parts = part in ("unet", "vae", "text_encoder")
        edit(model, part, change) if parts else change(model / part)
    with pytest.raises(SystemExit, match=f"(?s)model.*{message}"):
        run(tmp_path / "out", "--model", model)
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(SystemExit, match="a.ckpt: .*from_single_file"):
        run(tmp_path / "out", "--model", tmp_path / "a.ckpt")
    assert not (tmp_path / "out").exists()


def test_a_model_that_knows_nothing_is_told_at_the_first_step(tmp_path, capsys):
    model = copy_of(TINY, tmp_path / "model")
    edit(model, "unet", lambda w: {name: 0 * weight for name, weight in w.items()})
    run(tmp_path / "out", "--model", model, "--gradient-checkpointing", steps=1)
    assert re.search("error is (0.9|1.0).*does it fit", capsys.readouterr().out)


# ------------------------------------------- the output and the way on, whatever happens


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_that_is_there_is_ever_deleted(tmp_path, monkeypatch):
    """A long run's step folders, its checkpoint removed to make room, and a thesis beside them."""
    mine, typo = tmp_path / "mine", tmp_path / "typo"
    for name in ("step-000100/unet.safetensors", "step-by-step.tex", "metrics.jsonl"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("of worth")
    before = contents(mine)
    for flags in ([], ["--model", typo], ["--data", typo], ["--lora", "2"]):
        with pytest.raises(SystemExit):
            run(mine, *flags)
    with pytest.raises(SystemExit, match="no checkpoint to resume"):
        resume(mine)
    assert contents(mine) == before
    (empty := tmp_path / "empty").mkdir()  # was not made by the run, so it stays
    with pytest.raises(SystemExit):
        run(empty, "--data", typo)
    assert empty.exists() and len(run(empty, steps=1)) == 1


def test_an_output_that_cannot_be_made_ends_the_run_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to("/no such disk/deep")
    monkeypatch.setattr(train_tiny, "read_rows", None)  # the first that would take its time
    for name in ("file", "file/out", "link", "x" * 300):
        with pytest.raises(SystemExit, match="cannot be made"):
            run(tmp_path / name, data=tmp_path)


def test_of_two_runs_into_one_folder_one_is_refused(tmp_path, monkeypatch):
    output, encode = tmp_path / "out", train_tiny.encode

    def meanwhile(*given):
        monkeypatch.setattr(train_tiny, "encode", encode)
        run(output, steps=1)
        return encode(*given)

    monkeypatch.setattr(train_tiny, "encode", meanwhile)
    with pytest.raises(SystemExit, match="metrics.jsonl .*File exists"):
        run(output, "--seed", 1, steps=1)
    before = contents(output)
    with pytest.raises(SystemExit, match="in use.*--resume"):
        run(output, steps=1)
    resume(output)
    assert contents(output) == before and len(log_of(output)) == 1


WRITES = {
    "samples.png": (Image.Image, "save"),
    "step-000002": (UNet2DConditionModel, "save_pretrained"),
    "checkpoint.pt": (torch, "save"),
    "the pipeline": (DiffusionPipeline, "save_pretrained"),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("first", [True, False])
def test_a_full_disk_is_one_sentence_that_names_what_is_whole(tmp_path, monkeypatch, name, first):
    """By a limit of the system on the bytes in a file, which torch and safetensors word anew."""
    output, most, calls = tmp_path / "out", resource.RLIM_INFINITY, []
    owner, method = WRITES[name]
    save = getattr(owner, method)

    def with_little_room(*given, **kwargs):
        calls.append(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (999 if len(calls) == 2 - first else most, most))
        try:
            return save(*given, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    if name == "the pipeline" and not first:
        calls.append(1)  # it is written once, in the end
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(owner, method, with_little_room)
        run(output, "--checkpoint-every", 2, steps=5)
    text = str(end.value)
    assert f"{name.split('-')[0]}" in text.split(" could not be written: ")[0]
    assert "too large" in text
    steps = {file.name for file in output.glob("step-*") if not file.suffix}
    if (output / "checkpoint.pt").exists():
        assert "go on by --resume" in text
        resume(output)
        assert len(log_of(output)) == 5 and (output / "model_index.json").exists()
    else:
        assert first and "--resume" not in text and all(step in text for step in steps)
        assert steps == ({"step-000002"} if name == "checkpoint.pt" else set())


def test_other_failures_keep_their_cause(tmp_path, monkeypatch):
    def gone(*given):
        raise FileNotFoundError(2, "No such file or directory", "0003.png")

    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError, match="0003.png"):
        patch.setattr(train_tiny, "encode", gone)
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    base, train = copy_of(TINY, tmp_path / "base"), train_tiny.train

    def then_the_base_is_gone(*given):
        yield from train(*given)
        shutil.rmtree(base)

    monkeypatch.setattr(train_tiny, "train", then_the_base_is_gone)
    with pytest.raises(SystemExit, match=f"{train_tiny.LORA_FILE} is whole.*{base}"):
        run(tmp_path / "lora", "--model", base, "--lora", 2, steps=1)
    assert (tmp_path / "lora" / train_tiny.LORA_FILE).exists()


def test_early_ends_leave_nothing_and_are_one_line(tmp_path, monkeypatch):
    ends = {torch.OutOfMemoryError(): "--lora 16 .*--batch-size", KeyboardInterrupt(): "Stopped"}
    for error, message in ends.items():
        monkeypatch.setattr(sudo, "implicit_margin", Mock(side_effect=error))
        with pytest.raises(SystemExit, match=message):
            run(tmp_path / "out", steps=1)
        assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_it_whole(tmp_path):
    with pytest.raises(SystemExit, match="Stopped.* step 1 .*lower --lr"):
        run(output := tmp_path / "out", "--lr", 1e12, "--checkpoint-every", 1)
    assert len(log_of(output)) == 1 and not (output / "model_index.json").exists()
    assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == 1


def test_a_run_is_resumed_by_its_flags_if_all_else_is_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, output = copy_of(TINY, tmp_path / "model"), tmp_path / "out"
    flags = "--model ~/model --data ~/captions.jsonl --output ~/out --loss dpo --lora 2".split()
    log = run(output, *flags, "--caption-dropout", 0, steps=1)
    assert log[0]["pairs"] == 4 and log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for flag in ("--steps=2", "--lora=2", "--output=x"):
        with pytest.raises(SystemExit):
            resume(output, flag)
        assert "--data and --model that moved" in capsys.readouterr().err
    for change in ({"text": "another"}, {"file_name": str(HERE / "lab" / "images" / "0099.png")}):
        data_in(tmp_path, **change)
        with pytest.raises(SystemExit, match=r"its data was 16 rows .* and is 16 rows \("):
            resume(output)
    data_in(tmp_path)
    for part in ("unet", "vae"):
        edit(model, part, lambda weights: {name: w + 0.01 for name, w in weights.items()})
        with pytest.raises(SystemExit, match="its model was .* and is"):
            resume(output)
        shutil.rmtree(model)
        copy_of(TINY, model)
    train_tiny.main(["--resume", "~/out"])
    model.rename(tmp_path / "moved")
    (tmp_path / "captions.jsonl").rename(tmp_path / "moved.jsonl")
    with pytest.raises(SystemExit, match="captions.jsonl"):
        resume(output)
    resume(output, "--data", "~/moved.jsonl", "--model", tmp_path / "moved")
    assert log_of(output) == log


def test_a_run_is_resumed_whatever_the_order_of_sets(tmp_path):
    """SD1.5's scheduler lacks values that diffusers now has, and lists their names in any order."""
    names = "prediction_type timestep_spacing thresholding sample_max_value"
    old = dict.fromkeys(names.split(), "gone")
    model, output = copy_of(TINY, tmp_path / "model", "scheduler", **old), tmp_path / "out"
    first = arguments(output, "--model", model, steps=1)
    for seed, command in (("0", first), ("1", ["--resume", output]), ("2", ["--resume", output])):
        ended = in_a_process(map(str, command), PYTHONHASHSEED=seed)
        assert ended.returncode == 0, ended.stderr


def test_a_checkpoint_that_does_not_fit_is_one_sentence(tmp_path):
    output = tmp_path / "out"
    run(output, "--lora", 2, "--checkpoint-every", 1, steps=2)
    whole = (output / "checkpoint.pt").read_bytes()
    saved = torch.load(output / "checkpoint.pt", weights_only=True)
    renamed = {n.replace(".default", ".first"): p for n, p in saved["trained"].items()}
    unet = contents(output / "unet")
    damage = {
        "holds no checkpoint": whole[: len(whole) // 2],
        "or one that is broken": b"",
        "of edition 3": saved | {"edition": 3},
        "names of another peft": saved | {"trained": renamed},
    }
    for message, content in damage.items():
        if isinstance(content, bytes):
            (output / "checkpoint.pt").write_bytes(content)
        else:
            torch.save(content, output / "checkpoint.pt")
        with pytest.raises(SystemExit, match=message):
            resume(output)
    assert contents(output / "unet") == unet


def test_consoles_without_beta_and_seeds_of_any_size(tmp_path):
    command = arguments(tmp_path / "猫", "--seed", 2**64, "--lora", 2, steps=1)
    ended = in_a_process(command, PYTHONIOENCODING="cp1252")
    assert ended.returncode == 0 and "?" in ended.stdout, ended.stderr
    assert len(run(tmp_path / "out", "--seed", -1, steps=1)) == 1


# ------------------------------------------- the README


def snippet(line):
    """The one python block of the README that has this line."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if line in block)
    return block


@pytest.fixture
def names():
    """What a reader's trainer has by the time that it comes to a snippet."""
    b, accelerator = batch(), Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.log = Mock()
    named = {"latents": b.winners, "encoder_hidden_states": b.conditions, "global_step": 0}
    named |= {"noise_scheduler": DDPMScheduler(), "accelerator": accelerator}
    return named | {"torch": torch, "F": torch.nn.functional}


def test_the_lines_on_the_first_screen_are_the_loss(names):
    exec(snippet("def loss("), names)
    b, reference, results = batch(), tiny_unet(), []
    for loss in (names["loss"], partial(sudo.sudo_loss, losers=b.winners.roll(1, 0))):
        policy = moved(reference, 1e-3)
        torch.manual_seed(3)  # both draw the noise and then the timesteps
        value = loss(policy, reference, DDPMScheduler(), b.winners, b.conditions)
        (value if isinstance(value, torch.Tensor) else value[0]).backward()
        results.append([p.grad for p in policy.parameters()])
    assert_close(*results, rtol=1e-3, atol=1e-4)


def test_the_snippets_for_the_script_of_diffusers(names):
    names["unet"] = tiny_unet().eval()
    exec(snippet("reference = frozen_copy(unet)"), names)
    exec(snippet("accelerator.log("), names)
    assert names["metrics"]["margin"] == 0 and names["loss"].requires_grad
    assert names["accelerator"].log.call_args[0][0]["dpo"] == pytest.approx(math.log(2))
