"""Time and memory of a training step, beside the least that its UNet passes take.

    python lab/bench.py                # lab/tiny-sd: three minutes on 2 CPU cores
    python lab/bench.py --model sd15   # without a GPU one step, in 20 GB
    python lab/bench.py --model sdxl   # for a GPU

sd15 and sdxl have their public configurations and random weights, which are as much work as trained
ones, so nothing is downloaded. The rows of a table take turns, a step each, round after round, and
a ratio is the median of the rounds' ratios. Memory is that of a process which runs one row alone.
On a CPU torch's FLOP counter leaves attention out.
"""

import argparse
import copy
import gc
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

LAB = Path(__file__).parent
sys.path.insert(0, str(LAB.parent))

import sudo  # noqa: E402
import train_tiny  # noqa: E402
from compare import table  # noqa: E402

CUDA = torch.cuda.is_available()
PASSES = 4  # micro-batches in a step of sd15 and sdxl; the recipes have more, for the same cost
ROUNDS = 25


# ------------------------------------------- models


def parts(model: str):
    """UNet, VAE, text encoders and scheduler, by the names that a pipeline has for them."""
    if model == "tiny":
        return DiffusionPipeline.from_pretrained(LAB / "tiny-sd")
    pipe = SimpleNamespace(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        ),
        text_encoder=clip(CLIPTextModel, width=768, layers=12),
        scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    if model == "sd15":
        pipe.unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return pipe
    pipe.text_encoder_2 = clip(CLIPTextModelWithProjection, width=1280, layers=32)
    pipe.unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return pipe


def clip(kind: type, width: int, layers: int):
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    return kind(config)


# ------------------------------------------- what is measured


class Bench:
    """A model and random data; the methods named in ROWS take a step each.

    All share one policy, one reference and one optimizer; `official` has its own.
    """

    def __init__(self, model: str, batch_size: int, passes: int):
        config = train_tiny.parse(["--data", "random", "--model", model])
        self.config = replace(config, grad_accum=passes, steps=10**6)
        torch.manual_seed(0)
        self.pipe = parts(model)
        self.words = self.pipe.tokenizer.model_max_length if model == "tiny" else 77
        self.unet, self.scheduler, self.optimizer = train_tiny.prepare(self.pipe, self.config)
        self.reference = sudo.frozen_copy(self.unet)
        self.feed(batch_size, self.pipe.unet.config.sample_size)

    def feed(self, batch_size: int, side: int) -> None:
        """Random data, latents of side x side, a batch of it, and the trainer's loops on it."""
        N, width = 8 * batch_size, self.pipe.unet.config.cross_attention_dim
        self.config = replace(self.config, batch_size=batch_size)
        conditions = {"encoder_hidden_states": torch.randn(N + 1, self.words, width).half()}
        if self.config.family == "sdxl":
            time_ids = torch.tensor([[8 * side] * 2 + [0, 0] + [8 * side] * 2] * (N + 1))
            added = {"text_embeds": torch.randn(N + 1, 1280).half(), "time_ids": time_ids}
            conditions["added_cond_kwargs"] = added
        self.data = train_tiny.Data(
            files=[Path("random")] * N,
            latents=torch.randn(N, 4, side, side).half(),
            picture=torch.arange(N),
            caption=torch.arange(N),
            conditions=conditions,
            num_timesteps=1000,
        )
        batches = partial(train_tiny.micro_batches, self.data, self.config)
        self.batch = next(batches(0))
        # What the UNet is given for winners and losers, 2B rows.
        names = {"encoder_hidden_states", "added_cond_kwargs", "timesteps"} & self.batch.keys()
        given = {name: sudo._repeat(name, self.batch[name], batch_size) for name in names}
        self.given = given | {"timestep": given.pop("timesteps")}
        self.latents = torch.cat([self.batch["latents"], self.batch["losers"]])

        def steps(loss_fn: Callable, more: dict) -> Iterator[dict]:
            with_more = lambda step: (batch | more for batch in batches(step))  # noqa: E731
            return train_tiny.train(self.unet, self.optimizer, loss_fn, with_more, self.config)

        errors = torch.rand(2 * batch_size, device=train_tiny.DEVICE)
        self.loss = partial(sudo.sudo_loss, scheduler=self.scheduler, beta=self.config.beta)
        self.sudo_steps = steps(self.loss, {"reference": self.reference})
        self.precomputed_steps = steps(self.loss, {"reference": errors})
        self.sft_steps = steps(partial(train_tiny.sft_loss, scheduler=self.scheduler), {})

    def floor(self) -> None:
        with train_tiny.half_precision():
            with torch.no_grad():
                self.reference(self.latents, **self.given)
            loss = self.unet(self.latents, **self.given).sample.float().square().mean()
        loss.backward()
        self.unet.zero_grad()

    def loss_alone(self) -> None:
        with train_tiny.half_precision():
            loss, _ = self.loss(self.unet, reference=self.reference, **self.batch)
        loss.backward()
        self.unet.zero_grad()

    def whole_step(self) -> None:
        next(self.sudo_steps)

    def precomputed(self) -> None:
        next(self.precomputed_steps)

    def sft(self) -> None:
        next(self.sft_steps)

    def set_up_official(self) -> None:
        policy = copy.deepcopy(self.unet).to(memory_format=torch.contiguous_format)
        policy.disable_gradient_checkpointing()  # as its launcher for SD1.5 has it
        frozen = sudo.frozen_copy(policy), self.pipe.vae, self.pipe.text_encoder
        half = torch.float16 if CUDA else torch.float32  # which a CPU has no fast one of
        self.frozen = [module.to(train_tiny.DEVICE, half) for module in frozen]
        optimizer = torch.optim.AdamW(policy.parameters(), self.config.lr, weight_decay=1e-2)
        self.own = policy, optimizer

    def official(self) -> None:
        """What the official code does in a step, for SD1.5 and in our words.

        Both halves of the pixels go through the VAE (S:1027, 1040), captions through the text
        encoder, the reference is in half precision (S:939, 1149), metrics are read at once.
        """
        (policy, optimizer), (reference, vae, text_encoder) = self.own, self.frozen
        B, device = self.config.batch_size, train_tiny.DEVICE
        side = self.latents.shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
        alphas_cumprod = self.scheduler.alphas_cumprod
        for _ in range(self.config.grad_accum):
            winners = torch.rand(B, 3, side, side)
            tokens = torch.randint(text_encoder.config.vocab_size, (B, self.words))
            pixels = torch.cat([winners, winners[torch.randperm(B)]]).to(device, vae.dtype)
            with torch.no_grad():
                x_0 = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                words = text_encoder(tokens.to(device))[0].repeat(2, 1, 1)
            noise = torch.randn_like(x_0[:B]).repeat(2, 1, 1, 1)
            t = torch.randint(1000, (B,), device=device).repeat(2)
            alpha = alphas_cumprod[t].view(-1, 1, 1, 1).to(x_0.dtype)
            noisy = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
            with train_tiny.half_precision():
                prediction = policy(noisy, t, words).sample
            with torch.no_grad():
                ref_prediction = reference(noisy, t, words).sample
            error, ref_error = (
                (output.float() - noise.float()).square().mean((1, 2, 3))
                for output in (prediction, ref_prediction)
            )
            winner, loser = (error - ref_error).chunk(2)
            u = -self.config.beta / 2 * (winner - loser)
            loss = -F.logsigmoid(u).mean() / self.config.grad_accum
            loss.backward()
            loss.item(), (u > 0).float().mean().item()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), train_tiny.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


ROWS = {
    Bench.floor: "bare UNet calls: the floor",
    Bench.loss_alone: "`sudo_loss` and its backward pass",
    Bench.whole_step: "`train_tiny.py`, a whole step",
    Bench.precomputed: "with `--precompute-reference`, which comes before",
    Bench.sft: "with `--loss sft`",
    Bench.official: "the official arrangement",
}


# ------------------------------------------- measuring


def seconds(step: Callable, *arguments) -> float:
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(*arguments)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate() -> float:
    """FLOP a second of a large matrix product, in the precision that the steps compute in."""
    n, form = (8192, {"device": "cuda", "dtype": torch.bfloat16}) if CUDA else (2048, {})
    a = torch.randn(n, n, **form)
    return 2 * n**3 / median(seconds(torch.mm, a, a) for _ in range(12))


def peak_memory(row: Callable, model: str, batch_size: int, side: int | None = None) -> float:
    """GB that a process needs which takes two steps of a row; on a GPU, those of the GPU alone."""
    bench = Bench(model, batch_size, 1)
    if side:
        bench.feed(batch_size, side)
    if row in (Bench.precomputed, Bench.sft, Bench.official):
        del bench.reference, bench.sudo_steps  # the first two need none, the last has its own
    if row is Bench.official:
        bench.set_up_official()
        bench.unet.to("cpu")
    if CUDA:
        torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        row(bench)
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # counted in KiB


def alone(function: Callable, *arguments) -> float:
    """The result of a function that is called in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def steps(model: str, batch_size: int, passes: int) -> None:
    """The first table: every row of ROWS."""
    rows = [row for row in ROWS if row is not Bench.official or model != "sdxl"]
    memories = [alone(peak_memory, row, model, batch_size) for row in tqdm(rows, "memory")]

    bench = Bench(model, batch_size, passes)
    if Bench.official in rows:
        bench.set_up_official()
    pairs = {row: batch_size * passes for row in rows}
    pairs[Bench.floor] = pairs[Bench.loss_alone] = batch_size
    times, flops = {row: [] for row in rows}, {}
    for row in rows:
        row(bench)  # warm
        with FlopCounterMode(display=False) as counter:
            row(bench)
        flops[row] = counter.get_total_flops() / pairs[row]
    for _ in tqdm(range(ROUNDS), "steps in turn"):
        for row in rows:
            times[row].append(seconds(row, bench) / pairs[row])

    rate, floor = matrix_rate(), times[Bench.floor]
    head = ["", "ms a pair", "× floor", "GFLOP a pair", "of the matrix rate", "peak GB"]
    print(f"{batch_size} pairs a pass, {passes} passes a step; matrices: {rate / 1e12:.3g} TFLOP/s")
    lines = [head]
    for row, gigabytes in zip(rows, memories):
        took = median(times[row])
        ratio = median(mine / least for mine, least in zip(times[row], floor))
        lines.append(
            [
                ROWS[row],
                f"{1e3 * took:.3g}",
                f"{ratio:.2f}",
                f"{flops[row] / 1e9:.3g}",
                f"{flops[row] / took / rate:.0%}",
                f"{gigabytes:.2f}",
            ]
        )
    table(lines)


def growth(model: str, batch_size: int) -> None:
    """The second table: a step of train_tiny at other sizes, in turn as well."""
    side = parts(model).unet.config.sample_size
    sizes = [(batch_size, side), (2 * batch_size, side), (batch_size, 2 * side)]
    memories = [alone(peak_memory, Bench.whole_step, model, *size) for size in sizes]
    bench = Bench(model, batch_size, 1)
    times = {size: [] for size in sizes}
    for _ in range(ROUNDS // 4 + 1):
        for size in sizes:
            bench.feed(*size)
            times[size].append(seconds(bench.whole_step) / size[0])
    lines = [["`train_tiny.py`, a whole step", "ms a pair", "× the first", "peak GB"]]
    for (size, (_, *took)), gigabytes in zip(times.items(), memories):  # the first round warms
        ratio = median(mine / first for mine, first in zip(took, times[sizes[0]][1:]))
        name = f"{size[0]} pairs, latents of {size[1]} x {size[1]}"
        lines.append([name, f"{1e3 * median(took):.3g}", f"{ratio:.2f}", f"{gigabytes:.2f}"])
    table(lines)


def encode(pictures: int) -> tuple[float, float, float]:
    """Seconds a picture to encode the sample data, over and over; MB held; GB at the peak."""
    config = train_tiny.parse(["--data", str(LAB.parent / "captions.jsonl"), "--model", "tiny"])
    pipe = DiffusionPipeline.from_pretrained(config.model)
    rows = train_tiny.read_rows(config.data, config.image_column, config.caption_column)
    rows = (rows * (pictures // len(rows) + 1))[:pictures]
    began = time.perf_counter()
    data = train_tiny.encode(pipe, rows, config)
    took = time.perf_counter() - began
    words = data.conditions["encoder_hidden_states"]
    held = (data.latents.nbytes + words.nbytes) / 1e6
    return took / pictures, held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def loader() -> None:
    """The third table: the loader on the sample data and on 10,000 pictures."""
    lines = [["pictures of 512 x 512 encoded", "ms a picture", "MB held after", "peak GB"]]
    for pictures in (384, 10_000):
        took, held, peak = alone(encode, pictures)
        lines.append([f"{pictures:,}", f"{1e3 * took:.2g}", f"{held:.2g}", f"{peak:.2f}"])
    table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("tiny", "sd15", "sdxl"), default="tiny")
    parser.add_argument("--batch-size", type=int, help="pairs a pass; default: the recipe's")
    args = parser.parse_args()
    tiny = args.model == "tiny"
    batch_size = args.batch_size or train_tiny.RECIPES[args.model]["batch_size"]
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU cores"
    print(
        f"{args.model} on {machine}, {time.strftime('%Y-%m-%d')}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
    if not tiny and not CUDA:
        took = seconds(Bench(args.model, 1, 1).whole_step)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"One step of one pair in fp32: {took:.0f} s and {peak:.1f} GB.")
        return
    steps(args.model, batch_size, 1 if tiny else PASSES)
    gc.collect(), torch.cuda.empty_cache()
    growth(args.model, batch_size)
    if tiny:
        loader()


if __name__ == "__main__":
    main()
