"""Time and memory of a training step on this machine, beside the least that its UNet calls take.

    python lab/bench.py                # lab/tiny-sd: two minutes on a CPU
    python lab/bench.py --model sd15   # a quarter of an hour and 15 GB on a CPU
    python lab/bench.py --model sdxl   # on a GPU alone; there each takes ten minutes, by estimate

The data are random, and so are the weights of sd15 and sdxl: they are as much work and memory as
trained ones, and nothing is downloaded.

A pair's time is that of a step, divided by its pairs. The first two rows run the passes of a step,
forward and backward. The others are the trainer's own loop, which also draws the data, clips the
gradients and updates the weights once. So the fewer pairs a step has, the more an update adds.

On a GPU one row runs after the other, in steps of 4 micro-batches. The time is the mean of two
steps after one to warm up. The memory is the most that torch has allocated, and the CUDA context
comes on top. A "-" stands where it was not enough. On a CPU rows take turns, a step each, and a
ratio is the median over the rounds. For sd15 the official arrangement and ours then run the passes
for one pair, by the same weights and without an optimizer, which would take another 7 GB.
"""

import argparse
import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import sudo  # noqa: E402
import train_tiny  # noqa: E402

CUDA = train_tiny.DEVICE.type == "cuda"
BATCHES = (1, 2, 4, 8)  # pairs in a micro-batch, on a GPU
MICRO_BATCHES = 4  # in a step, on a GPU
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


# ------------------------------------------- a run of the trainer, with random weights and data


class Run(NamedTuple):
    """What a run of the trainer has when its first step begins."""

    config: train_tiny.Config
    pipe: DiffusionPipeline | SimpleNamespace
    unet: UNet2DConditionModel
    reference: Callable | None
    optimizer: torch.optim.Optimizer
    data: train_tiny.Data


def random_run(model: str, flags: str) -> Run:
    """`python train_tiny.py --model MODEL FLAGS`, with random weights and data."""
    config = train_tiny.parse(["--data", "random", "--model", model, *flags.split()])
    pipe = pipeline(model)
    data = random_data(pipe.unet.config, pipe.text_encoder.config.max_position_embeddings)
    return Run(config, pipe, *train_tiny.prepare(pipe, config), data)


def pipeline(model: str) -> DiffusionPipeline | SimpleNamespace:
    """tiny-sd; or the parts of a pipeline with random weights, all but SDXL's second encoder."""
    if model == "tiny":
        return DiffusionPipeline.from_pretrained(train_tiny.TINY).to(train_tiny.DEVICE)
    shape = SDXL if model == "sdxl" else {"sample_size": 64, "cross_attention_dim": 768}
    with train_tiny.DEVICE:
        unet = UNet2DConditionModel(**shape)
    vae = AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    text_encoder = CLIPTextModel(clip)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return SimpleNamespace(unet=unet, vae=vae, text_encoder=text_encoder, scheduler=scheduler)


def random_data(shape, words: int, rows: int = 64) -> train_tiny.Data:
    """What `train_tiny.encode` makes of so many pictures, each with a caption of its own."""
    embeddings = torch.randn(1 + rows, words, shape.cross_attention_dim).half()
    conditions = {"encoder_hidden_states": embeddings}
    if shape.addition_embed_type:
        added = {"text_embeds": torch.randn(1 + rows, 1280), "time_ids": torch.zeros(1 + rows, 6)}
        conditions["added_cond_kwargs"] = added
    latents = torch.randn(rows, shape.in_channels, shape.sample_size, shape.sample_size).half()
    number = torch.arange(rows)
    return train_tiny.Data(latents, None, number, 1 + number, conditions, [], num_timesteps=1000)


# ------------------------------------------- the rows: each is a loss_fn and its batches


def ours(run: Run) -> tuple[Callable, Callable]:
    lay_out(run, official=False)
    given = {"reference": run.reference, "scheduler": run.pipe.scheduler, "beta": run.config.beta}
    loss_fn = partial(train_tiny.LOSSES[run.config.loss], **given)
    return loss_fn, partial(train_tiny.micro_batches, run.data, run.config)


def floor(run: Run) -> tuple[Callable, Callable]:
    """The reference and the policy see as many rows as in ours, and nothing else is done."""
    both = replace(run.config, batch_size=2 * run.config.batch_size)  # winners and losers

    def loss_fn(policy: Callable, latents, timesteps, losers, noise, pair_weight, **conditions):
        with torch.no_grad():
            run.reference(latents, timesteps, **conditions)
        return policy(latents, timesteps, **conditions).sample.float().square().mean(), {}

    return loss_fn, partial(train_tiny.micro_batches, run.data, both)


def official(run: Run) -> tuple[Callable, Callable]:
    """The official script for SD1.5 in our words, on random pixels; S:n is line n of it."""
    pipe = run.pipe
    half = train_tiny.HALF or torch.float32  # a CPU has no fast one of 16 bits
    for frozen in (pipe.vae, pipe.text_encoder, run.reference):
        frozen.to(train_tiny.DEVICE, half).requires_grad_(False)  # S:939
    lay_out(run, official=True)
    side = pipe.vae.config.sample_size

    def loss_fn(policy: Callable, encoder_hidden_states, **_):
        B, words, _ = encoder_hidden_states.shape
        with train_tiny.DEVICE:
            winners = 2 * torch.rand(B, 3, side, side) - 1
            tokens = torch.randint(pipe.text_encoder.config.vocab_size, (B, words))
            pixels = torch.cat([winners, winners[torch.randperm(B)]])  # S:1018-1027
        with torch.no_grad(), torch.autocast(train_tiny.DEVICE.type, enabled=False):
            x_0 = pipe.vae.encode(pixels.to(half)).latent_dist.sample()  # S:1040
            x_0 = x_0 * pipe.vae.config.scaling_factor  # S:1041
            condition = pipe.text_encoder(tokens)[0]  # S:1112
        pairs = sudo.make_pairs(pipe.scheduler, *x_0.chunk(2))  # S:1044-1074
        errors = sudo.denoising_error(policy, pairs, condition)  # S:1126-1137
        with torch.no_grad(), torch.autocast(train_tiny.DEVICE.type, enabled=False):
            ref_errors = sudo.denoising_error(run.reference, pairs, condition)  # S:1144-1149
        loss, metrics = sudo.sudo_objective(errors, ref_errors, run.config.beta)  # S:1154-1159
        loss.item()  # S:1160-1170: metrics are read in each micro-batch, and a GPU waited for
        return loss, metrics

    return loss_fn, partial(train_tiny.micro_batches, run.data, run.config)


def lay_out(run: Run, official: bool) -> None:
    """Mode and memory layout of the models, and no checkpointing in the official arrangement."""
    layout = torch.contiguous_format if official else torch.channels_last
    run.unet.to(memory_format=layout).train(official)  # S:1003
    if isinstance(run.reference, torch.nn.Module):
        run.reference.to(memory_format=layout)
    if run.config.gradient_checkpointing and not official:
        run.unet.enable_gradient_checkpointing()
    else:
        run.unet.disable_gradient_checkpointing()


OFFICIAL = "the official arrangement"
ROWS = {  # the flags of the run, its loss_fn and batches, and whether a step is a whole one
    "bare UNet calls: the floor": ("--lora 0", floor, False),
    "`sudo_loss` and its backward pass": ("--lora 0", ours, False),
    "`train_tiny.py`, a whole step": ("--lora 0", ours, True),
    "the same with `--lora 16`": ("--lora 16", ours, True),
    "the same with `--loss sft`": ("--lora 0 --loss sft", ours, True),
    OFFICIAL: ("--lora 0", official, True),
}


def step_of(run: Run, arrange: Callable, whole: bool) -> Callable:
    """A step of the trainer's loop, or its passes on batches that are there already."""
    loss_fn, batches = arrange(run)
    if whole:
        return train_tiny.train(run.unet, run.optimizer, loss_fn, batches, run.config).__next__
    drawn = list(batches(0))

    def passes() -> None:
        for batch in drawn:
            with train_tiny.half_precision():
                loss, _ = loss_fn(run.unet, **batch)
            loss.backward()
        run.unet.zero_grad()

    return passes


# ------------------------------------------- measuring


def seconds(step: Callable) -> float:
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def table(head: list[str], lines: list[list[str]]) -> None:
    for cells in (head, ["---"] * len(head), *lines):
        print("|", " | ".join(cells), "|")
    print()


def by_batch(model: str, flags: str, arrange: Callable, whole: bool) -> list[tuple[str, str]]:
    """Milliseconds a pair and GB at the peak, for each of BATCHES that fits the GPU."""
    cells = [("-", "-")] * len(BATCHES)
    gc.collect()  # so that nothing of the row before is left on the GPU
    try:
        run = random_run(model, flags)
        for i, B in enumerate(BATCHES):
            config = replace(run.config, batch_size=B, grad_accum=MICRO_BATCHES)
            step = step_of(run._replace(config=config), arrange, whole)
            step()  # which also makes the optimizer's state
            torch.cuda.reset_peak_memory_stats()
            ms = 1e3 * fmean([seconds(step), seconds(step)]) / (B * MICRO_BATCHES)
            cells[i] = f"{ms:.1f}", f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
    except torch.OutOfMemoryError:
        pass  # larger ones do not fit either
    return cells


def on_a_gpu(model: str) -> None:
    rows = [row for row in ROWS if row != OFFICIAL or model != "sdxl"]
    measured = {row: by_batch(model, *ROWS[row]) for row in tqdm(rows, "rows")}
    for i, unit in enumerate(("ms a pair", "GB at the peak")):
        lines = [[row, *(cell[i] for cell in cells)] for row, cells in measured.items()]
        table([unit, *(f"`--batch-size {B}`" for B in BATCHES)], lines)


def on_a_cpu(model: str, rounds: int) -> None:
    if model == "tiny":
        rows = {}
        for row, (flags, arrange, whole) in ROWS.items():
            run = random_run(model, flags)
            rows[row] = partial(step_of, run, arrange, whole)
    else:
        run = random_run(model, "--lora 0 --batch-size 1 --grad-accum 1")
        kept = run._replace(config=replace(run.config, gradient_checkpointing=False))
        rows = {
            OFFICIAL: partial(step_of, run, official, False),
            "ours": partial(step_of, kept, ours, False),
            "ours, with gradient checkpointing": partial(step_of, run, ours, False),
        }
    times = {row: [] for row in rows}
    for _ in tqdm(range(rounds), "rounds"):
        for row, new_step in rows.items():
            times[row].append(seconds(new_step()))
    first = next(iter(rows))
    pairs = run.config.batch_size * run.config.grad_accum
    lines = []
    for row, its in times.items():
        ratio = median(mine / other for mine, other in zip(its, times[first]))
        lines.append([row, f"{1e3 * median(its) / pairs:,.1f}", f"{ratio:.2f}"])
    table(["", "ms a pair", "× the first row"], lines)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
    GB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    print(f"{GB:.1f} GB at the peak.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(train_tiny.RECIPES), default="tiny")
    model = parser.parse_args().model
    if model == "sdxl" and not CUDA:
        parser.error("sdxl needs a GPU")
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU cores"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    diffusers.utils.logging.set_verbosity_error()  # it has a line on every cast to a dtype
    print(f"{model} on {machine}, {time.strftime('%Y-%m-%d')}, {versions}\n")
    if CUDA:
        on_a_gpu(model)
    else:
        on_a_cpu(model, rounds=25 if model == "tiny" else 3)


if __name__ == "__main__":
    main()
