"""Fine-tune a text-to-image model with SUDO: captions.jsonl in, a diffusers pipeline out.

    python train_tiny.py --data ./captions.jsonl

trains Stable Diffusion 1.5 where there is a GPU, and the tiny model in lab/tiny-sd where there is
none. The data is a line {"file_name": "picture.png", "text": "its caption"} for each picture, with
paths relative to the file.

In order: check the rows, load the pipeline, encode every picture and caption once, train the UNet,
save the pipeline. Whatever is random in a step is a function of (seed, step), drawn on the CPU for
the whole batch: a resumed run takes the very steps of one that never stopped.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import textwrap
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import sudo


class Recipe(NamedTuple):
    """How a model is trained where the flags say nothing else."""

    path: str
    steps: int
    batch_size: int
    grad_accum: int
    lr: float
    beta: float
    guidance: float  # of samples.png
    checkpointing: bool  # recompute activations in the backward pass: slower, far less memory


RECIPES = {
    # What suits the small world, chosen on its validation captions: two minutes on 2 CPU cores.
    "tiny": Recipe(
        str(Path(__file__).parent / "lab" / "tiny-sd"), 300, 32, 1, 1e-4, 100.0, 1.0, False
    ),
    # The paper's lr and β, but 128 pairs a step, for one GPU, where the paper has 2048.
    "sd15": Recipe(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", 1000, 4, 32, 1e-6, 5000.0, 7.5, True
    ),
}
WARMUP = 0.25  # share of the steps over which lr rises linearly
MAX_GRAD_NORM = 1.0
PROMPTS = 6  # captions of the data that samples.png shows
ROW = {"file_name": "picture.png", "text": "its caption"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help='a jsonl of {"file_name", "text"}')
    add("--model", help="sd15, tiny, a folder or a hub name; by default sd15 on a GPU, else tiny")
    add("--output", type=Path, default=Path("out"), help="a new folder; default: %(default)s")
    add("--steps", type=int, help="updates of the weights")
    add("--batch-size", type=int, help="pairs in a forward pass")
    add("--grad-accum", type=int, help="forward passes in a step")
    add("--lr", type=float, help="learning rate after the warm-up")
    add("--beta", type=float, help="β of Eq. 8, to go with the size of the model's errors")
    add("--loss", choices=("sudo", "sft"), default="sudo", help="sft: the MSE term alone")
    add("--downgrade", choices=("random_image", "blur", "random_grid"), default="random_image")
    add("--caption-dropout", type=float, default=0.2, help="share emptied (%(default)s)")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, default=100, help="steps (%(default)s)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--precompute-reference", action="store_true", help="then hold no second UNet")
    add("--sample-every", type=int, default=0, help="steps; 0: only before and after")
    args = parser.parse_args(argv)
    if args.model is None:
        args.model = "sd15" if torch.cuda.is_available() else "tiny"
        if args.model == "tiny":
            print("No GPU found: training the tiny model in lab/tiny-sd, not Stable Diffusion 1.5.")
    args.recipe = RECIPES.get(args.model) or RECIPES["sd15"]._replace(path=args.model)
    for name in ("steps", "batch_size", "grad_accum", "lr", "beta"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.recipe, name))
    for name in ("steps", "batch_size", "grad_accum", "lr", "beta", "checkpoint_every"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if not 0 <= args.caption_dropout <= 1:
        parser.error("--caption-dropout is a share: 0 to 1")
    return args


# ------------------------------------------- the data


class Row(NamedTuple):
    file: Path
    text: str
    digest: str  # of the file's bytes: copies of a picture are one picture


def read_rows(data: Path) -> list[Row]:
    """The rows of a jsonl, each picture decoded; exits with a sentence for each faulty line."""
    try:
        lines = data.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--data wants a jsonl file in UTF-8: {error}")
    rows, faults = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(read_row(line, data.parent))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            faults.append(f"{data}, line {number}: {error}")
    if faults:
        sys.exit("\n".join([*faults[:10], f"{len(faults)} faulty lines; nothing was trained."]))
    # A loser has another picture and another caption: is there one for each row?
    by_digest, by_text = Counter(row.digest for row in rows), Counter(row.text for row in rows)
    by_both = Counter((row.digest, row.text) for row in rows)
    if not rows or any(by_digest[d] + by_text[t] - n == len(rows) for (d, t), n in by_both.items()):
        sys.exit(
            f"{data}: every row needs a loser, a row with another picture and another caption. "
            f"Add some to the {len(rows)} that are there."
        )
    return rows


def read_row(line: str, folder: Path) -> Row:
    row = json.loads(line)
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ROW):
        raise ValueError(f"not a row of the form {json.dumps(ROW)}")
    file = folder / row["file_name"]
    with Image.open(file) as picture:
        picture.load()
    return Row(file, row["text"].strip(), hashlib.sha256(file.read_bytes()).hexdigest())


def load_picture(file: Path, size: int) -> Tensor:
    """Turned by its EXIF, flattened on white, cropped at the centre: [3, size, size] in -1..1."""
    with Image.open(file) as picture:
        rgba = ImageOps.exif_transpose(picture).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    pixels = bytearray(ImageOps.fit(flat, (size, size)).tobytes())
    return (
        torch.frombuffer(pixels, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 127.5 - 1
    )


class Data(NamedTuple):
    """Everything the steps read, on the CPU: N rows with M different captions."""

    latents: Tensor  # [N, C, h, w], clean and scaled
    downgraded: Tensor | None  # [N, C, h, w], each row's own loser; None: another row is the loser
    picture: Tensor  # [N], the same number for the same picture
    caption: Tensor  # [N], index into conditions
    conditions: Tensor  # [M + 1, S, D], the last one for ""


@torch.no_grad()
def encode(pipe: DiffusionPipeline, rows: list[Row], args, device: str) -> Data:
    """Each picture through the VAE, each caption through the text encoder, once and for all."""
    pipe.vae.to(device), pipe.text_encoder.to(device)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    swaps = generator(args.seed, "random_grid")
    downgrade = {
        "random_image": None,
        "blur": sudo.blur,
        "random_grid": lambda pixels: sudo.random_grid(pixels, generator=swaps),
    }[args.downgrade]

    def to_latents(pixels: Tensor) -> Tensor:
        posterior = pipe.vae.encode(pixels.to(device)).latent_dist
        return (posterior.mode() * pipe.vae.config.scaling_factor).cpu()

    latents, downgraded, conditions = [], [], []
    texts = [*dict.fromkeys(row.text for row in rows if row.text), ""]
    with half_precision(device, torch.float16):
        for i in tqdm(range(0, len(rows), 8), "encoding pictures", leave=False):
            pixels = torch.stack([load_picture(row.file, size) for row in rows[i : i + 8]])
            latents.append(to_latents(pixels))
            if downgrade:
                downgraded.append(to_latents(downgrade(pixels)))
        for i in tqdm(range(0, len(texts), 32), "encoding captions", leave=False):
            conditions.append(pipe.encode_prompt(texts[i : i + 32], device, 1, False)[0].cpu())
    pipe.vae.to("cpu"), pipe.text_encoder.to("cpu")

    digests = list(dict.fromkeys(row.digest for row in rows))
    return Data(
        latents=torch.cat(latents),
        downgraded=torch.cat(downgraded) if downgrade else None,
        picture=numbered([row.digest for row in rows], digests),
        caption=numbered([row.text for row in rows], texts),
        conditions=torch.cat(conditions),
    )


def numbered(values: list[str], of: list[str]) -> Tensor:
    number = {value: i for i, value in enumerate(of)}
    return torch.tensor([number[value] for value in values])


# ------------------------------------------- what is random in a step


def generator(*key) -> torch.Generator:
    """A generator that is a function of its key, hashed since torch keeps 32 bits of a CPU seed."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


class Draw(NamedTuple):
    """The random choices of a step, for all of its G pairs."""

    rows: Tensor  # [G], the winners
    losers: Tensor  # [G], rows of their losers
    captions: Tensor  # [G], index into conditions, after dropout
    timesteps: Tensor  # [G]
    noise: Tensor  # [G, C, h, w]


def draw(data: Data, step: int, batch: int, args, num_timesteps: int) -> Draw:
    """A step's draw. Rows come in epochs, shuffled: each of them once before any comes again."""
    N = len(data.latents)
    places = range(step * batch, (step + 1) * batch)
    epochs = {place // N for place in places}
    order = {e: torch.randperm(N, generator=generator(args.seed, "epoch", e)) for e in epochs}
    rows = torch.stack([order[place // N][place % N] for place in places])

    random = generator(args.seed, "step", step)
    timesteps = torch.randint(num_timesteps, (batch,), generator=random)
    noise = torch.randn(batch, *data.latents.shape[1:], generator=random)
    dropped = torch.rand(batch, generator=random) < args.caption_dropout
    captions = data.caption[rows].masked_fill(dropped, len(data.conditions) - 1)
    losers, unfit = rows.clone(), torch.ones(batch, dtype=torch.bool)
    while unfit.any():  # uniform over the rows with another picture and another caption
        losers[unfit] = torch.randint(N, (int(unfit.sum()),), generator=random)
        same_picture = data.picture[losers] == data.picture[rows]
        unfit = same_picture | (data.caption[losers] == data.caption[rows])
    return Draw(rows, losers, captions, timesteps, noise)


def micro_batches(data: Data, step: int, args, num_timesteps: int, device: str) -> Iterator[dict]:
    """The tensors of a step's forward passes, by the names that `sudo_loss` has for them."""
    d = draw(data, step, args.batch_size * args.grad_accum, args, num_timesteps)
    losers = data.latents[d.losers] if data.downgraded is None else data.downgraded[d.rows]
    for i in range(0, len(d.rows), args.batch_size):
        cut = slice(i, i + args.batch_size)
        batch = {
            "latents": data.latents[d.rows[cut]],
            "encoder_hidden_states": data.conditions[d.captions[cut]],
            "losers": losers[cut],
            "noise": d.noise[cut],
            "timesteps": d.timesteps[cut],
            # Under "" no picture is the better one: there is nothing to prefer.
            "pair_weight": (d.captions[cut] != len(data.conditions) - 1).float(),
        }
        yield {name: tensor.to(device) for name, tensor in batch.items()}


# ------------------------------------------- training


def half_precision(device: str, dtype: torch.dtype = torch.bfloat16):
    """Autocast on a GPU that has the dtype, nothing elsewhere; the weights stay fp32."""
    has_it = device == "cuda" and (dtype is torch.float16 or torch.cuda.is_bf16_supported())
    return torch.autocast(device, dtype) if has_it else nullcontext()


def sft_loss(
    unet, scheduler, latents, encoder_hidden_states, noise, timesteps
) -> tuple[Tensor, dict[str, Tensor]]:
    """The MSE term of Eq. 9 alone, on the winners alone: what SUDO is compared with."""
    noisy = sudo.add_noise(latents, noise, timesteps, scheduler.alphas_cumprod)
    target = sudo.training_target(latents, noise, timesteps, scheduler)
    loss = (unet(noisy, timesteps, encoder_hidden_states).sample.float() - target).square().mean()
    return loss, dict.fromkeys(("loss", "mse", "winner_error"), loss.detach())


@torch.no_grad()
def reference_errors(pipe: DiffusionPipeline, data: Data, args, device: str) -> Tensor:
    """The reference's errors in every forward pass of the run: [steps * grad_accum, 2 * batch]."""
    errors = []
    for step in tqdm(range(args.steps), "reference errors"):
        T = pipe.scheduler.config.num_train_timesteps
        for batch in micro_batches(data, step, args, T, device):
            draws = {name: batch[name] for name in ("noise", "timesteps")}
            pairs = sudo.make_pairs(pipe.scheduler, batch["latents"], batch["losers"], **draws)
            with half_precision(device):
                condition = batch["encoder_hidden_states"]
                errors.append(sudo.denoising_error(pipe.unet, pairs, condition).cpu())
    return torch.stack(errors)


def train(pipe: DiffusionPipeline, data: Data, args, device: str, show: Callable) -> None:
    """Train pipe.unet in place; show(step) is called every --sample-every steps."""
    unet, T = pipe.unet.to(device).train(), pipe.scheduler.config.num_train_timesteps
    if args.recipe.checkpointing:
        unet.enable_gradient_checkpointing()

    reference = table = None
    if args.loss == "sudo" and args.precompute_reference:
        file = args.output / "reference.safetensors"
        if not file.exists():  # so the run begins here: policy and reference are still the same
            unfinished = file.with_suffix(".tmp")
            save_file({"errors": reference_errors(pipe, data, args, device)}, unfinished)
            unfinished.replace(file)
        table = load_file(file, device)["errors"]
    elif args.loss == "sudo":
        reference = sudo.frozen_copy(unet)

    optimizer = torch.optim.AdamW(unet.parameters(), args.lr, weight_decay=1e-2, fused=True)
    start = restore(args.output, unet, optimizer, device) if args.resume else 0
    bar = tqdm(range(start, args.steps), args.loss, initial=start, total=args.steps)
    for step in bar:
        began = time.perf_counter()
        sums, counts = Counter(), Counter()
        for k, batch in enumerate(micro_batches(data, step, args, T, device)):
            pairs_with_weight = batch["pair_weight"].sum()
            with half_precision(device):
                if args.loss == "sft":
                    del batch["losers"], batch["pair_weight"]
                    loss, metrics = sft_loss(unet, pipe.scheduler, **batch)
                else:
                    ref = reference or table[step * args.grad_accum + k]
                    loss, metrics = sudo.sudo_loss(
                        unet, ref, pipe.scheduler, **batch, beta=args.beta
                    )
            (loss / args.grad_accum).backward()
            for name, value in metrics.items():
                over_pairs = name in ("dpo", "margin", "implicit_acc", "saturated")
                count = pairs_with_weight if over_pairs else args.batch_size
                sums[name] += value * count
                counts[name] += count

        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
        means = {name: float(sums[name] / max(counts[name], 1)) for name in sums}
        if not math.isfinite(means["loss"] + float(norm)):
            sys.exit(
                f"Stopped before the update of step {step}: its loss is {means['loss']}, its "
                f"gradient's norm {float(norm)}. A lower --lr or --beta may help; the checkpoints "
                f"in {args.output} are whole."
            )
        lr = args.lr * min(1.0, (step + 1) / max(1, round(WARMUP * args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        row = {"step": step, "lr": lr, **means, "seconds": time.perf_counter() - began}
        with open(args.output / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        shown = {name: means.get(name) for name in ("loss", "margin", "implicit_acc")}
        bar.set_postfix(
            {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
        )
        done = step + 1
        if done % args.checkpoint_every == 0 or done == args.steps:
            checkpoint(args.output, done, unet, optimizer)
        if args.sample_every and done % args.sample_every == 0 and done < args.steps:
            show(done)


# ------------------------------------------- what a run leaves behind


def open_run(args, rows: list[Row]) -> None:
    """Claim the output folder for this run, or check that it holds this very run to resume."""
    names = "model steps batch_size grad_accum lr beta loss downgrade caption_dropout seed"
    run = {name: getattr(args, name) for name in (*names.split(), "precompute_reference")}
    content = [(row.digest, row.text) for row in rows]
    run["data"] = f"{len(rows)} rows with checksum {zlib.crc32(repr(content).encode()):08x}"
    file = args.output / "run.json"
    if args.resume:
        if not file.exists():
            sys.exit(
                f"{args.output} holds no run to resume: leave out --resume to begin one there."
            )
        begun = json.loads(file.read_text(encoding="utf-8"))
        changes = [
            f"{k} was {begun.get(k)} and is {v}" for k, v in run.items() if begun.get(k) != v
        ]
        if changes:
            sys.exit(f"The run in {args.output} is another: {'; '.join(changes)}.")
    elif args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        sys.exit(
            f"{args.output} is in use: name a new --output, or --resume the run that it holds."
        )
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def checkpoint(output: Path, step: int, unet, optimizer) -> None:
    """Write beside, then rename into place, so that a checkpoint is whole or not there at all."""
    beside = output / "unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    unet.save_pretrained(beside)
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    beside.rename(output / f"checkpoint-{step:06d}")
    for old in sorted(output.glob("checkpoint-*"))[:-2]:
        shutil.rmtree(old)


def restore(output: Path, unet, optimizer, device: str) -> int:
    """Load the newest checkpoint, cut metrics.jsonl back to it and return its step, 0 for none."""
    newest = max(output.glob("checkpoint-*"), default=None)
    start = int(newest.name.removeprefix("checkpoint-")) if newest else 0
    if newest:
        weights = load_file(newest / "diffusion_pytorch_model.safetensors", device)
        unet.load_state_dict(weights)
        optimizer.load_state_dict(torch.load(newest / "optimizer.pt", device, weights_only=True))
    log = output / "metrics.jsonl"
    if log.exists():
        kept = log.read_text(encoding="utf-8").splitlines(keepends=True)[:start]
        log.write_text("".join(kept), encoding="utf-8")
    return start


@torch.no_grad()
def sample(pipe: DiffusionPipeline, prompts: list[str], args, device: str) -> list[Image.Image]:
    """A picture for each prompt from fixed seeds; leaves the VAE and text encoder on the CPU."""
    pipe.to(device).set_progress_bar_config(desc="sampling", leave=False)
    pipe.unet.eval()
    with half_precision(device):
        pictures = pipe(
            prompts,
            guidance_scale=args.recipe.guidance,
            num_inference_steps=30,
            generator=[torch.Generator().manual_seed(args.seed + i) for i in range(len(prompts))],
        ).images
    pipe.unet.train(), pipe.vae.to("cpu"), pipe.text_encoder.to("cpu")
    return pictures


def sheet(rows: dict[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """The rows of pictures one above the other, each behind its name, the prompts below."""
    side, left, below, font = 224, 76, 92, ImageFont.load_default(17)
    canvas = Image.new("RGB", (left + side * len(prompts), side * len(rows) + below), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (name, pictures) in enumerate(rows.items()):
        pen.text((8, y * side + side // 2), name, "black", font, "lm")
        for x, picture in enumerate(pictures):
            canvas.paste(picture.resize((side - 8, side - 8)), (left + x * side, y * side + 8))
    for x, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, 25, max_lines=4)
        pen.text((left + x * side, side * len(rows) + 8), "\n".join(lines), "black", font)
    return canvas


def load_pipeline(path: str) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(
            path, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        sys.exit(
            f"No pipeline could be loaded from {path!r}: {reason}\n"
            "--model takes tiny, sd15, a folder that holds a diffusers pipeline, or the name of "
            "one on a hub that can be reached."
        )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = read_rows(args.data)
    pipe = load_pipeline(args.recipe.path)
    open_run(args, rows)
    print(
        f"{args.loss} of {args.recipe.path} on {len(rows)} pictures: {args.steps} steps of "
        f"{args.batch_size * args.grad_accum} pairs, lr {args.lr:g}, β {args.beta:g}, on {device}."
    )
    data = encode(pipe, rows, args, device)
    prompts = list(dict.fromkeys(row.text for row in rows))[:PROMPTS]
    before = sample(pipe, prompts, args, device)

    def show(name: str, file: str) -> None:
        now = sample(pipe, prompts, args, device)
        sheet({"before": before, name: now}, prompts).save(args.output / file)

    train(pipe, data, args, device, lambda step: show(f"step {step}", f"samples-{step:06d}.png"))
    show("after", "samples.png")
    pipe.save_pretrained(args.output)
    print(
        f"The pipeline: DiffusionPipeline.from_pretrained('{args.output}'). Before and after: "
        f"{args.output / 'samples.png'}. Every step: {args.output / 'metrics.jsonl'}."
    )


if __name__ == "__main__":
    main()
