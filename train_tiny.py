"""Fine-tune a text-to-image model with SUDO: captions.jsonl in, a diffusers pipeline out.

    python train_tiny.py --data ./captions.jsonl
    torchrun --nproc-per-node 4 train_tiny.py --data ./captions.jsonl

trains Stable Diffusion 1.5 where there is a GPU, and the tiny model in lab/tiny-sd where there is
none. The data is a line {"file_name": "picture.png", "text": "its caption"} for each picture, with
paths relative to the file.

In order: check the rows, load the pipeline, encode every picture and caption once, train the UNet,
save the pipeline. Whatever is random in a step is a function of (seed, step), drawn on the CPU for
the whole batch and cut into micro-batches and processes: a resumed run, or one on several
processes, takes the very steps of one that never stopped.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
import textwrap
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import Adafactor

import sudo

diffusers.utils.logging.set_verbosity_error()  # what is left to say is said here
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Recipe(NamedTuple):
    """How a model is trained where the flags say nothing else."""

    path: str
    steps: int
    batch_size: int
    grad_accum: int
    lr: float
    beta: float
    guidance: float  # of samples.png


RECIPES = {
    # What suits the small world, chosen on its validation captions: two minutes on 2 CPU cores.
    "tiny": Recipe(str(Path(__file__).parent / "lab" / "tiny-sd"), 300, 32, 1, 5e-5, 400.0, 1.0),
    # The paper's lr and β, and for one GPU 128 pairs a step, not 2048; SDXL has the paper's 96.
    "sd15": Recipe("stable-diffusion-v1-5/stable-diffusion-v1-5", 1000, 4, 32, 1e-6, 5000.0, 7.5),
    "sdxl": Recipe("stabilityai/stable-diffusion-xl-base-1.0", 1000, 1, 96, 1e-6, 5000.0, 5.0),
}
# These metrics are means over the pairs with weight, the others over all pairs.
OVER_PAIRS = ("dpo", "margin", "implicit_acc", "saturated")
WARMUP = 0.25  # share of the steps over which lr rises linearly
MAX_GRAD_NORM = 1.0
PROMPTS = 8  # captions of the data that samples.png shows
SAMPLING_STEPS = 30
POSITIVE = ("steps", "batch_size", "grad_accum", "lr", "beta", "checkpoint_every")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a jsonl, or a folder with metadata.jsonl")
    add("--image-column", default="file_name", help="default: %(default)s")
    add("--caption-column", default="text", help="default: %(default)s")
    add("--model", help="sd15, sdxl, tiny, a folder or a hub name (sd15 on a GPU, else tiny)")
    add("--output", type=Path, default=Path("out"), help="a new folder; default: %(default)s")
    add("--steps", type=int, help="updates of the weights")
    add("--batch-size", type=int, help="pairs in a forward pass, for each process")
    add("--grad-accum", type=int, help="forward passes in a step")
    add("--lr", type=float, help="learning rate after the warm-up")
    add("--beta", type=float, help="β of Eq. 8, to go with the size of the model's errors")
    add("--loss", choices=("sudo", "sft"), default="sudo", help="sft: the MSE term alone")
    add("--downgrade", choices=("random_image", "blur", "random_grid"), default="random_image")
    add("--caption-dropout", type=float, default=0.2, help="share emptied; default: %(default)s")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, default=100, help="steps; default: %(default)s")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--precompute-reference", action="store_true", help="and then hold no second UNet")
    add("--sample-every", type=int, default=0, help="steps; 0: only before and after")
    args = parser.parse_args(argv)
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if not 0 <= args.caption_dropout <= 1 or args.sample_every < 0:
        parser.error("--caption-dropout is a share, 0 to 1, and --sample-every 0 or more steps")

    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = torch.device("cpu")
    if torch.cuda.is_available():
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
    if args.model is None:
        args.model = "sd15" if args.device.type == "cuda" else "tiny"
        if args.model == "tiny" and args.rank == 0:
            print("No GPU found: training the tiny model in lab/tiny-sd, not Stable Diffusion 1.5.")
    return args


# ------------------------------------------- the data


class Row(NamedTuple):
    file: Path
    text: str
    digest: str  # of the file's bytes: copies of a picture are one picture


def read_rows(data: Path, image_column: str, caption_column: str) -> list[Row]:
    """The rows of a jsonl, each picture decoded; exits with a sentence for each faulty line."""
    data = data / "metadata.jsonl" if data.is_dir() else data
    try:
        lines = data.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--data wants a jsonl in UTF-8, or a folder with a metadata.jsonl: {error}")
    rows, faults = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(read_row(line, data.parent, image_column, caption_column))
        except ValueError as error:
            faults.append(f"{data}, line {number}: {error}")
    if faults:
        sys.exit("\n".join([*faults[:10], f"{len(faults)} faulty lines: mend or remove them."]))
    # A loser has another picture and another caption: is there one for each row?
    by_digest, by_text = Counter(row.digest for row in rows), Counter(row.text for row in rows)
    by_both = Counter((row.digest, row.text) for row in rows)
    if not rows or any(by_digest[d] + by_text[t] - n == len(rows) for (d, t), n in by_both.items()):
        sys.exit(
            f"{data}: every row needs a loser, a row with another picture and another caption. "
            f"Add some to the {len(rows)} that are there."
        )
    return rows


def read_row(line: str, folder: Path, image_column: str, caption_column: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at column {error.colno}: {error.msg}") from None
    for column in (image_column, caption_column):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            wanted = json.dumps({image_column: "picture.png", caption_column: "its caption"})
            raise ValueError(f"no text under {column!r}, the row should look like {wanted}")
    file = folder / row[image_column]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            load_picture(file, 8)
    except Exception as error:  # Pillow has many names for a broken file
        raise ValueError(f"no picture under {image_column!r}: {error}, in {str(file)!r}") from None
    return Row(file, row[caption_column].strip(), hashlib.sha256(file.read_bytes()).hexdigest())


def load_picture(file: Path, size: int) -> Tensor:
    """Turned by its EXIF, flattened on white, cropped at the centre: [3, size, size] in -1..1."""
    with Image.open(file) as picture:
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
            picture = picture.point(lambda value: value * (1 / 256)).convert("L")
        rgba = ImageOps.exif_transpose(picture).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    raw = bytearray(ImageOps.fit(flat, (size, size)).tobytes())
    pixels = torch.frombuffer(raw, dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1) / 127.5 - 1


class Data(NamedTuple):
    """Everything the steps read, on the CPU and in fp16: N rows with M different captions."""

    files: list[Path]  # [N]
    latents: Tensor  # [N, C, h, w], clean and scaled
    downgraded: Tensor | None  # [N, C, h, w], each row's own loser; None: another row is the loser
    picture: Tensor  # [N], the same number for the same picture
    caption: Tensor  # [N], index into what follows, in which the last row is for ""
    conditions: Tensor  # [M + 1, S, D]
    pooled: Tensor | None  # [M + 1, P], SDXL only
    time_ids: Tensor | None  # [M + 1, 6], SDXL only: original size, crop, target size


def encoders(pipe: DiffusionPipeline) -> list[torch.nn.Module]:
    names = ("vae", "text_encoder", "text_encoder_2")
    return [getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None]


@torch.no_grad()
def encode(pipe: DiffusionPipeline, rows: list[Row], args: argparse.Namespace) -> Data:
    """Each picture through the VAE, each caption through the text encoders, once and for all."""
    for module in encoders(pipe):
        module.to(args.device)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    own_loser = args.downgrade != "random_image"
    swaps = {"generator": generator(args.seed, "swaps")} if args.downgrade == "random_grid" else {}

    def to_latents(pixels: Tensor) -> Tensor:
        # SDXL's VAE overflows in fp16.
        with nullcontext() if is_sdxl(pipe) else half_precision(args, torch.float16):
            posterior = pipe.vae.encode(pixels.to(args.device)).latent_dist
        return (posterior.mode() * pipe.vae.config.scaling_factor).half().cpu()

    latents, downgraded, prompts = [], [], []
    texts = [*dict.fromkeys(row.text for row in rows if row.text), ""]
    at_once = 8 if size <= 512 else 1
    for i in progress(range(0, len(rows), at_once), "encoding pictures", args):
        pixels = torch.stack([load_picture(row.file, size) for row in rows[i : i + at_once]])
        latents.append(to_latents(pixels))
        if own_loser:
            downgraded.append(to_latents(getattr(sudo, args.downgrade)(pixels, **swaps)))
    for i in progress(range(0, len(texts), 32), "encoding captions", args):
        with half_precision(args, torch.float16):
            prompt = pipe.encode_prompt(
                texts[i : i + 32],
                device=args.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        prompts.append([part.half().cpu() for part in prompt if part is not None])
    for module in encoders(pipe):
        module.to("cpu")

    picture, caption = {}, {text: i for i, text in enumerate(texts)}
    conditions, *pooled = (torch.cat(parts) for parts in zip(*prompts))
    return Data(
        files=[row.file for row in rows],
        latents=torch.cat(latents),
        downgraded=torch.cat(downgraded) if own_loser else None,
        picture=torch.tensor([picture.setdefault(row.digest, len(picture)) for row in rows]),
        caption=torch.tensor([caption[row.text] for row in rows]),
        conditions=conditions,
        pooled=pooled[0] if pooled else None,
        time_ids=torch.tensor([[size, size, 0, 0, size, size]] * len(conditions))
        if pooled
        else None,
    )


def is_sdxl(pipe: DiffusionPipeline) -> bool:
    return getattr(pipe, "text_encoder_2", None) is not None


def progress(steps: Iterable, name: str, args: argparse.Namespace, **options) -> tqdm:
    silent = {"disable": True} if args.rank > 0 else {}  # else TQDM_DISABLE decides
    return tqdm(steps, name, **silent, **options)


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


def draw(data: Data, step: int, args: argparse.Namespace, num_timesteps: int) -> Draw:
    """A step's draw. Rows come in epochs, shuffled: each of them once before any comes again."""
    N, batch = len(data.latents), args.batch_size * args.grad_accum * args.world
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


def micro_batches(data: Data, step: int, args: argparse.Namespace, scheduler) -> Iterator[dict]:
    """What this process passes to `sudo_loss`, by name, for each forward pass of a step."""
    d = draw(data, step, args, scheduler.config.num_train_timesteps)
    for k in range(args.grad_accum):
        i = (k * args.world + args.rank) * args.batch_size
        rows, losers, captions, timesteps, noise = (x[i : i + args.batch_size] for x in d)
        loser_latents = data.latents[losers] if data.downgraded is None else data.downgraded[rows]
        batch = {
            "latents": data.latents[rows],
            "losers": loser_latents,
            "encoder_hidden_states": data.conditions[captions],
            "noise": noise,
            "timesteps": timesteps,
            # Under "" no picture is the better one: there is nothing to prefer.
            "pair_weight": (captions != len(data.conditions) - 1).float(),
        }
        batch = {name: to_device(value, args.device) for name, value in batch.items()}
        if data.pooled is not None:
            added = {"text_embeds": data.pooled[captions], "time_ids": data.time_ids[captions]}
            added = {name: to_device(value, args.device) for name, value in added.items()}
            batch["added_cond_kwargs"] = added
        yield batch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """In fp32 on the device; from pinned memory, which a GPU reads while it computes."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


# ------------------------------------------- training


def half_precision(args: argparse.Namespace, dtype: torch.dtype = torch.bfloat16):
    """Autocast on a GPU whose hardware has the dtype, nothing elsewhere; the weights stay fp32."""
    if args.device.type != "cuda":
        return nullcontext()
    has_it = dtype is torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", dtype, enabled=has_it)


def sft_loss(
    unet, scheduler, latents, encoder_hidden_states, noise, timesteps, **unet_kwargs
) -> tuple[Tensor, dict[str, Tensor]]:
    """The MSE term of Eq. 9 alone, on the winners alone: what SUDO is compared with."""
    noisy = sudo.add_noise(latents, noise, timesteps, scheduler)
    target = sudo.training_target(latents, noise, timesteps, scheduler)
    prediction = unet(noisy, timesteps, encoder_hidden_states, **unet_kwargs).sample
    loss = (prediction.float() - target).square().mean()
    return loss, dict.fromkeys(("loss", "mse", "winner_error"), loss.detach())


@torch.no_grad()
def pair_errors(unet, scheduler, batch: dict) -> Tensor:
    """The errors, (2B,), of a UNet on a micro-batch, as `sudo_loss` computes them."""
    images = {"winners": batch["latents"], "losers": batch["losers"]}
    draws = {name: batch[name] for name in ("noise", "timesteps")}
    given = batch.keys() & {"encoder_hidden_states", "added_cond_kwargs"}
    pairs = sudo.make_pairs(scheduler, **images, **draws)
    return sudo.denoising_error(unet, pairs, **{name: batch[name] for name in given})


def reference_errors(unet, scheduler, data: Data, args: argparse.Namespace) -> Tensor:
    """The reference's errors in each forward pass of the run: [steps, passes in a step, 2B].

    Kept in --output, so that a resumed run need not compute them again.
    """
    file, beside = args.output / "reference.safetensors", args.output / "unfinished.safetensors"
    if file.exists():
        return load_file(file, str(args.device))["errors"]
    passes = args.grad_accum * args.world
    errors = torch.zeros(args.steps, passes, 2 * args.batch_size, device=args.device)
    for step in progress(range(args.steps), "reference errors", args):
        for k, batch in enumerate(micro_batches(data, step, args, scheduler)):
            with half_precision(args):
                errors[step, k * args.world + args.rank] = pair_errors(unet, scheduler, batch)
    if args.world > 1:
        dist.all_reduce(errors)  # the other processes' entries are 0
    if args.rank == 0:
        save_file({"errors": errors.cpu()}, beside)
        beside.rename(file)
    return errors


class Trainer:
    """Trains pipe.unet in place: step(i) is the i-th step of the run that args describe."""

    def __init__(self, pipe: DiffusionPipeline, data: Data, args: argparse.Namespace):
        self.data, self.args = data, args
        # In eval mode, as the reference is: u then starts at exactly 0, see `frozen_copy`.
        self.unet = pipe.unet.to(args.device, memory_format=torch.channels_last).eval()
        # On the device once, not anew in every pass; a copy, since samplers want theirs on the CPU.
        self.scheduler = copy.copy(pipe.scheduler)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(args.device)
        if args.model != "tiny":  # which is faster without, and has the memory
            self.unet.enable_gradient_checkpointing()

        self.reference = self.table = None
        if args.loss == "sudo" and args.precompute_reference:
            self.table = reference_errors(self.unet, self.scheduler, data, args)
        elif args.loss == "sudo":
            self.reference = sudo.frozen_copy(self.unet)

        weights, decay = self.unet.parameters(), 1e-2
        if is_sdxl(pipe):  # as in the paper
            fixed_lr = {"scale_parameter": False, "relative_step": False}
            self.optimizer = Adafactor(weights, args.lr, weight_decay=decay, **fixed_lr)
        else:
            self.optimizer = torch.optim.AdamW(weights, args.lr, weight_decay=decay, fused=True)
        self.start = restore(self.unet, self.optimizer, args) if args.resume else 0
        self.policy = DistributedDataParallel(self.unet) if args.world > 1 else self.unet

    def backward(self, step: int, k: int, batch: dict) -> tuple[list[str], Tensor]:
        """The k-th pass of a step; the names of its metrics, their sums and what to divide by."""
        with half_precision(self.args):
            if self.args.loss == "sft":
                winners = {k: v for k, v in batch.items() if k not in ("losers", "pair_weight")}
                loss, metrics = sft_loss(self.policy, self.scheduler, **winners)
            else:
                ref = self.reference or self.table[step, k * self.args.world + self.args.rank]
                given = batch | {"beta": self.args.beta}
                loss, metrics = sudo.sudo_loss(self.policy, ref, self.scheduler, **given)
        (loss / self.args.grad_accum).backward()
        weight = batch["pair_weight"]
        pairs = torch.ones_like(weight)
        counts = [(weight if name in OVER_PAIRS else pairs).sum() for name in metrics]
        counts = torch.stack(counts)
        return list(metrics), torch.stack([torch.stack(list(metrics.values())) * counts, counts])

    def step(self, step: int) -> dict[str, float]:
        """Its metrics, over all pairs of all processes; exits if they are not finite."""
        args, sums = self.args, 0
        for k, batch in enumerate(micro_batches(self.data, step, args, self.scheduler)):
            # Processes average their gradients once a step, in its last backward pass.
            apart = args.world > 1 and k + 1 < args.grad_accum
            with self.policy.no_sync() if apart else nullcontext():
                names, more = self.backward(step, k, batch)
            sums = sums + more
        if args.world > 1:
            dist.all_reduce(sums)
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), MAX_GRAD_NORM)
        # The one place in a step that waits for the GPU: nothing infinite may reach the weights.
        *means, norm = torch.cat([sums[0] / sums[1].clamp(min=1), norm[None]]).tolist()
        metrics = dict(zip(names, means))
        if not math.isfinite(metrics["loss"] + norm):
            rows = draw(self.data, step, args, 1).rows[:8]
            names = ", ".join(self.data.files[i].name for i in rows)
            sys.exit(
                f"Stopped before the update of step {step}: its loss is {metrics['loss']}, its "
                f"gradient norm {norm}. Its first pictures: {names}. If they are in order, begin a "
                f"new --output with a lower --lr; {args.output} keeps its last checkpoint."
            )
        lr = args.lr * min(1.0, (step + 1) / max(1, round(WARMUP * args.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"lr": lr, **metrics, "grad_norm": norm}


def train(pipe: DiffusionPipeline, data: Data, args: argparse.Namespace, show: Callable) -> None:
    """Train pipe.unet in place; show(step) is called every --sample-every steps."""
    trainer = Trainer(pipe, data, args)

    if trainer.start < args.steps:
        rehearse(trainer, args, len(data.latents))

    steps = range(trainer.start, args.steps)
    bar = progress(steps, args.loss, args, initial=trainer.start, total=args.steps)
    for step in bar:
        began, done = time.perf_counter(), step + 1
        metrics = trainer.step(step)
        if args.rank > 0:
            continue
        row = {"step": step, **metrics, "seconds": time.perf_counter() - began}
        with open(args.output / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        shown = ("loss", "margin", "implicit_acc", "winner_drift")
        bar.set_postfix({name: f"{row[name]:.3f}" for name in shown if name in row})
        if done % args.checkpoint_every == 0 or done == args.steps:
            checkpoint(args.output, done, trainer.unet, trainer.optimizer)
        if args.sample_every and done % args.sample_every == 0 and done < args.steps:
            show(done)


def rehearse(trainer: Trainer, args: argparse.Namespace, N: int) -> None:
    """Two passes whose gradients are dropped: the second is warm and tells the time."""
    batch = next(micro_batches(trainer.data, trainer.start, args, trainer.scheduler))
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of encoding and sampling
    for _ in range(2):
        began = time.perf_counter()
        trainer.backward(trainer.start, 0, batch)[1].tolist()
    trainer.optimizer.zero_grad()
    if args.rank == 0:
        seconds = (time.perf_counter() - began) * args.grad_accum * (args.steps - trainer.start)
        announce(trainer, args, N, seconds)


# ------------------------------------------- what a person sees, and what a run leaves behind


def check_output(args: argparse.Namespace) -> None:
    """Exit if --output cannot take the run, before anything slow starts."""
    begun = (args.output / "run.json").exists()
    if args.resume and not begun:
        sys.exit(f"{args.output} holds no run to resume: leave out --resume to begin one.")
    # A run that ended before its first step left its run.json alone and gives way to the next.
    if not args.resume and args.output.exists():
        if not args.output.is_dir() or any(f.name != "run.json" for f in args.output.iterdir()):
            sys.exit(f"{args.output} is in use: name a new --output, or --resume the run in it.")


def open_run(args: argparse.Namespace, rows: list[Row]) -> None:
    """Note in --output which run it is of, or check that it holds this very run to resume."""
    names = "model steps batch_size grad_accum world lr beta loss downgrade caption_dropout seed"
    run = {name: getattr(args, name) for name in (*names.split(), "precompute_reference")}
    content = [(row.digest, row.text) for row in rows]
    run["data"] = f"{len(rows)} rows with checksum {zlib.crc32(repr(content).encode()):08x}"
    file = args.output / "run.json"
    if not args.resume:
        args.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        return
    begun = json.loads(file.read_text(encoding="utf-8"))
    changed = [name for name in run if begun.get(name) != run[name]]
    if changed:
        changes = "; ".join(f"{k} was {begun.get(k)} and is {run[k]}" for k in changed)
        sys.exit(f"The run in {args.output} is another: {changes}.")


def announce(trainer: Trainer, args: argparse.Namespace, N: int, seconds: float) -> None:
    """One line: what is trained on what, in how much memory and how long."""
    weights = 4 * sum(p.numel() for p in trainer.unet.parameters())
    copies = 2 if trainer.reference is None else 3  # weights, gradients and the reference
    held = torch.cuda.max_memory_allocated() if args.device.type == "cuda" else copies * weights
    moments = 0 if isinstance(trainer.optimizer, Adafactor) else 2 * weights
    print(
        f"{args.loss}: {args.path} on {N} pictures, {args.steps} steps of "
        f"{args.batch_size * args.grad_accum * args.world} pairs, lr {args.lr:g}, β {args.beta:g}. "
        f"It takes {(held + moments) / 1e9:.2g} GB and about {seconds / 60:.2g} minutes on "
        f"{args.world} x {args.device.type}."
    )


def checkpoint(output: Path, step: int, unet, optimizer) -> None:
    """Write beside, then rename into place, so that a checkpoint is whole or not there at all."""
    beside = output / "unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    unet.save_pretrained(beside, max_shard_size="1TB")  # one file, SDXL's too
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    beside.rename(output / f"checkpoint-{step:06d}")
    for old in sorted(output.glob("checkpoint-*"))[:-2]:
        shutil.rmtree(old)


def restore(unet, optimizer, args: argparse.Namespace) -> int:
    """Load the newest checkpoint, cut metrics.jsonl back to it and return its step, 0 for none."""
    newest = max(args.output.glob("checkpoint-*"), default=None)
    start = int(newest.name.removeprefix("checkpoint-")) if newest else 0
    if newest:
        weights = load_file(newest / "diffusion_pytorch_model.safetensors", str(args.device))
        unet.load_state_dict(weights)
        state = torch.load(newest / "optimizer.pt", args.device, weights_only=True)
        optimizer.load_state_dict(state)
    log = args.output / "metrics.jsonl"
    if args.rank == 0 and log.exists():
        kept = log.read_text(encoding="utf-8").splitlines(keepends=True)[:start]
        log.write_text("".join(kept), encoding="utf-8")
    return start


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline, prompts: list[str], args: argparse.Namespace
) -> list[Image.Image]:
    """A picture for each prompt from fixed seeds; leaves VAE and text encoders on the CPU."""
    pipe.to(args.device).set_progress_bar_config(desc="sampling", leave=False)
    pictures = []
    for i, prompt in enumerate(prompts):
        seed = torch.Generator().manual_seed(args.seed + i)
        with half_precision(args):
            options = {"guidance_scale": args.guidance, "num_inference_steps": SAMPLING_STEPS}
            pictures += pipe(prompt, generator=seed, **options).images
    for module in encoders(pipe):
        module.to("cpu")
    return pictures


def sheet(rows: dict[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
    """The rows of pictures one above the other, each behind its name, the prompts below."""
    side, left, below, font = 180, 76, 100, ImageFont.load_default(17)
    canvas = Image.new("RGB", (left + side * len(prompts), side * len(rows) + below), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (name, pictures) in enumerate(rows.items()):
        pen.text((8, y * side + side // 2), name, "black", font, "lm")
        for x, picture in enumerate(pictures):
            framed = ImageOps.expand(picture.resize((side - 12, side - 12)), 1, "gray")
            canvas.paste(framed, (left + x * side, y * side + 8))
    for x, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, 20, max_lines=4)
        pen.text((left + x * side, side * len(rows) + 8), "\n".join(lines), "black", font)
    return canvas


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline that --model names; what the flags leave open is filled in from its recipe."""
    args.path = RECIPES[args.model].path if args.model in RECIPES else args.model
    try:
        no_checker = {"safety_checker": None, "requires_safety_checker": False}
        pipe = DiffusionPipeline.from_pretrained(args.path, dtype=torch.float32, **no_checker)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        sys.exit(
            f"No pipeline could be loaded from {args.path!r}: {reason}\n"
            "--model takes the folder of a diffusers pipeline, the name of one on a hub that can "
            "be reached, or tiny."
        )
    scheduler, unet = pipe.scheduler, getattr(pipe, "unet", None)
    if (
        unet is None
        or not hasattr(pipe, "vae")
        or unet.config.in_channels != pipe.vae.config.latent_channels
        or not hasattr(scheduler, "alphas_cumprod")
        or scheduler.config.prediction_type not in ("epsilon", "v_prediction")
    ):
        sys.exit(
            f"{args.path} is no text-to-image pipeline like Stable Diffusion 1, 2 or XL "
            "with epsilon- or v-prediction, and no other can be trained here."
        )
    recipe = RECIPES[args.model if args.model in RECIPES else "sdxl" if is_sdxl(pipe) else "sd15"]
    for name, value in recipe._asdict().items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return pipe


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.rank == 0:
        check_output(args)
    if args.world > 1:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    rows = read_rows(args.data, args.image_column, args.caption_column)
    pipe = load_pipeline(args)
    if args.rank == 0:
        open_run(args, rows)
    try:
        fine_tune(pipe, rows, args)
    except torch.OutOfMemoryError:
        sys.exit(
            "Out of GPU memory. --precompute-reference saves the second UNet; half the "
            "--batch-size with twice the --grad-accum is the same step."
        )
    if args.world > 1:
        dist.destroy_process_group()


def fine_tune(pipe: DiffusionPipeline, rows: list[Row], args: argparse.Namespace) -> None:
    data = encode(pipe, rows, args)
    prompts = list(dict.fromkeys(row.text for row in rows))[:PROMPTS]
    before = sample(pipe, prompts, args) if args.rank == 0 else None

    def show(name: str, file: str) -> None:
        now = sample(pipe, prompts, args)
        sheet({"before": before, name: now}, prompts).save(args.output / file)

    train(pipe, data, args, lambda step: show(f"step {step}", f"samples-{step:06d}.png"))
    if args.rank == 0:
        show("after", "samples.png")
        pipe.save_pretrained(args.output)
        code = (
            "from diffusers import DiffusionPipeline as P; "
            f"P.from_pretrained({str(args.output)!r})({prompts[0]!r}, "
            f"guidance_scale={args.guidance}).images[0].save('sample.png')"
        )
        print(
            f"The pipeline is {args.output}; there, samples.png shows before and after, and "
            f"metrics.jsonl every step. A picture from it:\npython -c {shlex.quote(code)}"
        )


if __name__ == "__main__":
    main()
