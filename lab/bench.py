"""Time of a training step, beside the least that its UNet calls take.

    python lab/bench.py                # lab/tiny-sd; every row below
    python lab/bench.py --model sd15   # without a GPU: against the official arrangement, in 15 GB
    python lab/bench.py --model sdxl   # for a GPU of 80 GB, as all rows of sd15 are

Weights and data are random, see models.py. Rows take turns, one step each, and a ratio is the
median over the rounds. Memory is the peak of a process that runs only one row.
"""

import argparse
import platform
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from statistics import median

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import models
import sudo
import train_tiny
from report import table

CUDA = train_tiny.DEVICE.type == "cuda"
ROUNDS = 25  # of steps that take less than a second; where they take a minute, 3


# ------------------------------------------- the official arrangement, in our words


def official_loss(
    policy,
    winners: Tensor,
    tokens: Tensor,
    *,
    vae,
    text_encoder,
    reference,
    scheduler,
    beta,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the official code does with a micro-batch on SD1.5 (S:1018-1159, see lab/fidelity.md).

    Both halves of the pixels go through the VAE, captions through the text encoder, the reference
    is in half precision and outside autocast, and metrics are read at once.
    """
    pixels = torch.cat([winners, winners[torch.randperm(len(winners))]])
    with torch.no_grad(), torch.autocast(train_tiny.DEVICE.type, enabled=False):
        pixels = pixels.to(train_tiny.DEVICE, vae.dtype)
        x_0 = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        words = text_encoder(tokens.to(train_tiny.DEVICE))[0]
    pairs = sudo.make_pairs(scheduler, *x_0.chunk(2))
    errors = sudo.denoising_error(policy, pairs, words)
    with torch.no_grad(), torch.autocast(train_tiny.DEVICE.type, enabled=False):
        ref_errors = sudo.denoising_error(reference, pairs, words)
    loss, metrics = sudo.sudo_objective(errors, ref_errors, beta)
    loss.item(), metrics["implicit_acc"].item()
    return loss, metrics


def official(run: models.Run, model: str) -> tuple[Callable, Callable]:
    """Lays the run out as the official launcher for SD1.5 does; returns its loss_fn and batches."""
    half = torch.bfloat16 if train_tiny.BF16 else torch.float32  # a CPU has no fast one of 16 bits
    run.checkpoint(False)
    run.unet.train().to(memory_format=torch.contiguous_format)
    frozen = {"vae": models.vae(model), "text_encoder": models.text_encoders(model)[0]}
    frozen["reference"] = run.reference.to(memory_format=torch.contiguous_format)
    for module in frozen.values():
        module.to(train_tiny.DEVICE, half).requires_grad_(False)
    B, words = run.config.batch_size, frozen["text_encoder"].config
    # The VAE halves a picture's side in all of its blocks but the last.
    side = run.data.latents.shape[-1] * 2 ** (len(frozen["vae"].config.block_out_channels) - 1)

    def batches(step: int) -> Iterator[dict]:
        for _ in range(run.config.grad_accum):
            winners = 2 * torch.rand(B, 3, side, side) - 1
            tokens = torch.randint(words.vocab_size, (B, words.max_position_embeddings))
            yield {"winners": winners, "tokens": tokens}

    return partial(official_loss, **frozen, scheduler=run.scheduler, beta=run.config.beta), batches


# ------------------------------------------- the rows: each makes a function, and says its pairs


@cache
def new_run(model: str, *flags: str) -> models.Run:
    """A run of few micro-batches a step: more of them cost the same a pair."""
    few = () if model == "tiny" else ("--grad-accum", "4")
    return models.random_run(model, *few, *flags)


def floor(model: str) -> tuple[Callable, int]:
    run = new_run(model, "--lora", "0")
    inputs = run.inputs(2 * run.config.batch_size)  # winners and losers

    def step() -> None:
        with train_tiny.half_precision():
            with torch.no_grad():
                run.reference(**inputs)
            loss = run.unet(**inputs).sample.float().square().mean()
        loss.backward()
        run.unet.zero_grad()

    return step, run.config.batch_size


def loss_alone(model: str) -> tuple[Callable, int]:
    run = new_run(model, "--lora", "0")
    batch = next(run.batches(0))

    def step() -> None:
        with train_tiny.half_precision():
            loss, _ = run.loss_fn(run.unet, **batch)
        loss.backward()
        run.unet.zero_grad()

    return step, run.config.batch_size


def whole_step(flags: str, model: str) -> tuple[Callable, int]:
    run = new_run(model, *flags.split())
    return run.steps().__next__, run.config.batch_size * run.config.grad_accum


def official_step(model: str) -> tuple[Callable, int]:
    run = new_run(model, "--lora", "0", "--no-gradient-checkpointing")  # no other row's
    steps = train_tiny.train(run.unet, run.optimizer, *official(run, model), run.config)
    return steps.__next__, run.config.batch_size * run.config.grad_accum


FLOOR, OFFICIAL = "bare UNet calls: the floor", "the official arrangement"
ROWS = {
    FLOOR: floor,
    "`sudo_loss` and its backward pass": loss_alone,
    "`train_tiny.py`, a whole step": partial(whole_step, "--lora 0"),
    "the same with `--lora 16`": partial(whole_step, "--lora 16"),
    "the same with `--loss sft`": partial(whole_step, "--lora 0 --loss sft"),
    OFFICIAL: official_step,
}


# ------------------------------------------- measuring


def seconds(step: Callable) -> float:
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(row: str, model: str) -> float:
    """GB that this process has needed at most after two steps; on a GPU, those of the GPU alone."""
    step, _ = ROWS[row](model)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    step(), step()
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e9
    return resident()


def resident() -> float:
    """The most GB that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # it counts in KiB


def alone(*arguments) -> float:
    """`peak_memory` of a row in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(peak_memory, *arguments).result()


def every_row(model: str) -> None:
    rows = [row for row in ROWS if row != OFFICIAL or model != "sdxl"]
    memories = [alone(row, model) for row in tqdm(rows, "memory")]
    steps = {row: ROWS[row](model) for row in rows}
    for step, _ in steps.values():
        step()  # warm
    times = {row: [] for row in rows}
    for _ in tqdm(range(ROUNDS), "steps in turn"):
        for row, (step, pairs) in steps.items():
            times[row].append(seconds(step) / pairs)
    lines = []
    for row, GB in zip(rows, memories):
        ratio = median(mine / least for mine, least in zip(times[row], times[FLOOR]))
        lines.append([row, f"{1e3 * median(times[row]):.3g}", f"{ratio:.2f}", f"{GB:.2f}"])
    table(" | ms a pair | × floor | peak GB", lines)


def backward(loss_fn: Callable, unet: Callable, batch: dict) -> None:
    loss, _ = loss_fn(unet, **batch)
    loss.backward()


def against_the_official() -> None:
    """SD1.5 without a GPU: one pair forward and backward, by the same weights in turn.

    Without the optimizer, whose state would take 7 GB.
    """
    run = models.random_run("sd15", "--batch-size", "1", "--grad-accum", "1")
    its = official(run, "sd15")
    rows = {
        OFFICIAL: (*its, False),
        "ours": (run.loss_fn, run.batches, False),
        "ours, with gradient checkpointing": (run.loss_fn, run.batches, True),
    }
    times = {row: [] for row in rows}
    for number, row in tqdm([*product(range(3), rows)], "passes in turn"):
        loss_fn, batches, checkpointing = rows[row]
        # Each side trains in its own mode and memory layout.
        layout = torch.contiguous_format if row == OFFICIAL else torch.channels_last
        for unet in (run.unet, run.reference):
            unet.to(memory_format=layout)
        run.unet.train(row == OFFICIAL)
        run.checkpoint(checkpointing)

        batch = next(batches(number))
        times[row].append(seconds(partial(backward, loss_fn, run.unet, batch)))
        run.unet.zero_grad()
    lines = []
    for row in rows:
        ratio = median(its / mine for its, mine in zip(times[OFFICIAL], times[row]))
        lines.append([row, ", ".join(f"{each:.0f}" for each in times[row]), f"{ratio:.2f}"])
    table("one pair at 512 x 512 | seconds, by round | the official time over this", lines)
    print(f"{resident():.1f} GB at the peak.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=train_tiny.RECIPES, default="tiny")
    model = parser.parse_args().model
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU cores"
    print(
        f"{model} on {machine}, {time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}\n"
    )
    if model == "tiny" or CUDA:
        every_row(model)
    elif model == "sd15":
        against_the_official()
    else:
        parser.error("sdxl needs a GPU")


if __name__ == "__main__":
    main()
