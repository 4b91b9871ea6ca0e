"""Fine-tune a text-to-image model with SUDO: captions.jsonl in, a diffusers pipeline out.

    python train_tiny.py --data ./captions.jsonl
    torchrun --nproc-per-node 4 train_tiny.py --data ./captions.jsonl

This trains Stable Diffusion 1.5 where there is a GPU, and the tiny model in lab/tiny-sd where there
is none. The data has one line {"file_name": "picture.png", "text": "its caption"} per picture, with
paths relative to the file. Any StableDiffusionPipeline or StableDiffusionXLPipeline with ε- or
v-prediction can be trained.

The file reads in the order in which a run happens:

1. the configuration, complete and frozen before any work starts;
2. the data: every row is checked, then every picture and caption is encoded, once;
3. the randomness of a step, a function of (seed, step): a resumed run, or one on several processes,
   takes the very steps of one that never stopped;
4. the loss and the loop;
5. what a run leaves behind: a checkpoint, metrics.jsonl, samples.png and the pipeline.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import textwrap
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import Adafactor

import sudo

diffusers.utils.logging.set_verbosity_error()  # what is left to say is said here
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.simplefilter("error", Image.DecompressionBombWarning)

# This process, as torchrun numbers it.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
BF16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
SILENT = {"disable": True} if RANK > 0 else {}  # else TQDM_DISABLE decides

WARMUP = 0.25  # share of the steps over which lr rises linearly
MAX_GRAD_NORM = 1.0
# These metrics of `sudo_objective` are means over the pairs with weight, the others over all pairs.
WITH_WEIGHT = ("dpo", "margin", "implicit_acc", "saturated")
EMPTY = -1  # index of the empty caption, the last of all
PROMPTS = 8  # captions of the data that samples.png shows
SAMPLING_STEPS = 30


# ------------------------------------------- 1. the configuration

TINY = str(Path(__file__).parent / "lab" / "tiny-sd")
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

# What suits a model wherever the flags say nothing else. Those of tiny were chosen on the
# validation captions of its world. sd15 has the paper's lr and β, and 32 pairs per step where the
# paper has 2048, so that a run ends within an hour on a 24 GB card; sdxl has the paper's 96.
RECIPES = {
    "tiny": dict(model=TINY, steps=300, batch_size=32, grad_accum=1, lr=5e-5, beta=400.0),
    "sd15": dict(model=SD15, steps=400, batch_size=4, grad_accum=8, lr=1e-6, beta=5000.0),
    "sdxl": dict(model=SDXL, steps=1000, batch_size=1, grad_accum=96, lr=1e-6, beta=5000.0)
    | {"optimizer": "adafactor"},  # as in the paper
}
# Plain fine-tuning wants a larger lr, which falls to 0; SUDO's is constant, as in the paper.
SFT_LR = {"tiny": 3e-4, "sd15": 1e-5, "sdxl": 1e-5}
GUIDANCE = {"tiny": 1.0, "sd15": 7.5, "sdxl": 5.0}  # of samples.png
# λ1 and λ2 of Eq. 9 by --loss; the official code has no MSE term.
WEIGHTS = {"sudo": {}, "dpo": {"dpo_weight": 1.0, "mse_weight": 0.0}}
POSITIVE = {"steps", "batch_size", "grad_accum", "lr", "beta", "checkpoint_every"}


def flag(help: str, default=MISSING, **options):
    """A field that is a flag of the command line; without a default it has the recipe's."""
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run: what is trained, on what, and how."""

    data: Path = flag("a jsonl file, or a folder with a metadata.jsonl", required=True)
    image_column: str = flag("column of the pictures' paths", "file_name")
    caption_column: str = flag("column of the captions", "text")
    model: str = flag("sd15, sdxl, tiny, a folder or a hub name; sd15 on a GPU, tiny without one")
    family: str  # the key of RECIPES that suits the model
    output: Path = flag("a new folder", Path("out"))
    loss: str = flag(
        "sft is the MSE term alone, dpo the preference", "sudo", choices=("sudo", "sft", "dpo")
    )
    downgrade: str = flag(
        "what makes a loser", "random_image", choices=("random_image", "blur", "random_grid")
    )
    steps: int = flag("updates of the weights")
    batch_size: int = flag("pairs in a micro-batch of one process")
    grad_accum: int = flag("micro-batches in a step")
    lr: float = flag("learning rate after the warm-up")
    lr_schedule: str = flag("linear falls to 0 at the end", choices=("constant", "linear"))
    optimizer: str = flag("adafactor takes less memory", "adamw", choices=("adamw", "adafactor"))
    beta: float = flag("β, where C of Eq. 8 is -β/2; less for a model with larger errors")
    caption_dropout: float = flag('share of the captions replaced by ""', 0.2)
    seed: int = flag("of everything random", 0)
    precompute_reference: bool = flag("compute the reference's errors first: no second UNet", False)
    checkpoint_every: int = flag("steps between checkpoints", 100)
    resume: bool = flag("go on from the checkpoint in --output", False)
    sample_every: int = flag("steps between samples; 0: only before and after", 0)


def parse(argv: list[str] | None = None) -> Config:
    """The flags, over the recipe of the model, over the defaults of Config."""
    title = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(description=title, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        if f.metadata:
            kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
            no_default = f.default is MISSING or f.default is False
            default = "" if no_default else f" (default: {f.default})"
            kind |= {**f.metadata, "help": f.metadata["help"] + default}
            parser.add_argument("--" + f.name.replace("_", "-"), **kind)
    given = vars(parser.parse_args(argv))
    for name in given.keys() & POSITIVE:
        if not 0 < given[name] < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {given[name]}")

    if "model" not in given and DEVICE.type == "cpu" and RANK == 0:
        print("No GPU found: training the tiny model in lab/tiny-sd, not Stable Diffusion 1.5.")
    model = given.pop("model", "sd15" if DEVICE.type == "cuda" else "tiny")
    family, own = (model, {}) if model in RECIPES else (family_of(model), {"model": model})
    sft = {"lr": SFT_LR[family], "lr_schedule": "linear"} if given.get("loss") == "sft" else {}
    recipe = {"family": family, "lr_schedule": "constant", **RECIPES[family], **sft}
    config = Config(**recipe | own | given)
    if not 0 <= config.caption_dropout <= 1:
        parser.error("--caption-dropout is a share, from 0 to 1")
    return config


def family_of(model: str) -> str:
    """The recipe for a folder or a hub name, by its configuration files alone."""
    families = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}
    kind = load(DiffusionPipeline.load_config, model).get("_class_name")
    scheduler = load(DDPMScheduler.load_config, model, subfolder="scheduler")
    prediction_type = scheduler.get("prediction_type", "epsilon")
    known = prediction_type in ("epsilon", "v_prediction") and "beta_schedule" in scheduler
    if kind not in families or not known:
        sys.exit(
            f"{model} is a {kind} with {scheduler.get('_class_name')} and prediction_type "
            f"{prediction_type!r}. What can be trained is a {' or a '.join(families)} with a "
            "beta_schedule and 'epsilon' or 'v_prediction'."
        )
    unet = load(UNet2DConditionModel.load_config, model, subfolder="unet")
    # These are the widths of lab/tiny-sd and of what was trained from it.
    return "tiny" if unet["block_out_channels"] == [40, 80] else families[kind]


def load(from_model: Callable, model: str, **options):
    try:
        return from_model(model, **options)
    except (OSError, ValueError) as error:
        sys.exit(
            f"No pipeline could be loaded from {model!r}: {str(error).strip().splitlines()[0]}\n"
            "--model takes the folder of a diffusers pipeline with a UNet, the name of one on a "
            "hub that can be reached, or tiny."
        )


# ------------------------------------------- 2. the data


class Row(NamedTuple):
    file: Path
    text: str
    digest: str  # of the file's bytes: copies of a picture are one picture


def read_rows(data: Path, image_column: str, caption_column: str, losers: bool = True) -> list[Row]:
    """The rows of a jsonl, each picture decoded; exits with a sentence for each kind of fault.

    With `losers` each row must find one, a row with another picture and another caption.
    """
    data = data / "metadata.jsonl" if data.is_dir() else data
    try:
        lines = data.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--data wants a jsonl in UTF-8, or a folder with a metadata.jsonl: {error}")
    rows, faults, sentences = [], {}, []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(read_row(line, data.parent, image_column, caption_column))
        except ValueError as error:
            faults.setdefault(str(error), []).append(str(number))
    if faults:
        for fault, numbers in faults.items():
            first, more = ", ".join(numbers[:10]), f" and {len(numbers) - 10} more"
            where = f"{data}, line {first}{more if len(numbers) > 10 else ''}"
            sentences.append(f"{where}: {fault}")
        count = sum(map(len, faults.values()))
        sys.exit("\n".join([*sentences[:10], f"{count} faulty lines: mend or remove them."]))
    by_digest, by_text = Counter(row.digest for row in rows), Counter(row.text for row in rows)
    by_both = Counter((row.digest, row.text) for row in rows)
    unfit = (by_digest[d] + by_text[t] - n for (d, t), n in by_both.items())
    if not rows or losers and len(rows) in unfit:
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
            there = ", ".join(row) if isinstance(row, dict) else "none"
            raise ValueError(
                f"no text under {column!r}. The columns that are there: {there}. A row should be "
                f"like {wanted}; --image-column and --caption-column take other names."
            )
    row[caption_column].encode()  # half of a surrogate pair is a ValueError here
    file = folder / row[image_column]
    try:
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
    """Everything the steps read: N rows with M different captions, on the CPU and in fp16."""

    latents: Tensor  # [N, C, h, w], clean and scaled; of blur and random_grid N losers follow
    picture: Tensor  # [N], the same number for the same picture
    caption: Tensor  # [N], index into the conditions; the last one, EMPTY, belongs to ""
    conditions: dict  # of tensors [M + 1, ...]; SDXL's further ones under "added_cond_kwargs"
    num_timesteps: int  # T of the noise schedule
    reference: Tensor | None = None  # with --precompute-reference: errors, in fp32 on the device


@torch.no_grad()
def encode(pipe: DiffusionPipeline, rows: list[Row], config: Config) -> Data:
    """Each picture through the VAE, each caption through the text encoders, once and for all."""
    pipe.to(DEVICE)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    at_once = 4 if size <= 512 else 1
    swap = partial(sudo.random_grid, generator=generator(config.seed, "swaps"))
    # Without one of these, the loser is another row.
    downgrade = {"blur": sudo.blur, "random_grid": swap}.get(config.downgrade)

    def to_latents(pixels: Tensor) -> Tensor:
        posterior = pipe.vae.encode(pixels.to(DEVICE)).latent_dist
        return (posterior.mode() * pipe.vae.config.scaling_factor).half().cpu()

    winners, losers, prompts = [], [], []
    for i in tqdm(range(0, len(rows), at_once), "encoding pictures", **SILENT):
        pixels = torch.stack([load_picture(row.file, size) for row in rows[i : i + at_once]])
        winners.append(to_latents(pixels))
        if downgrade:
            losers.append(to_latents(downgrade(pixels)))
    texts = [*dict.fromkeys(row.text for row in rows if row.text), ""]
    one_each = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    for i in tqdm(range(0, len(texts), 32), "encoding captions", **SILENT):
        prompt = pipe.encode_prompt(texts[i : i + 32], device=DEVICE, **one_each)
        prompts.append([part.half().cpu() for part in prompt if part is not None])
    pipe.to("cpu")

    words, *pooled = (torch.cat(parts) for parts in zip(*prompts))
    if pipe.config.get("force_zeros_for_empty_prompt"):  # SDXL: so it was trained, and so it guides
        words[EMPTY], pooled[0][EMPTY] = 0, 0
    conditions = {"encoder_hidden_states": words}
    if pooled:  # the time ids are original size, crop and target size
        time_ids = torch.tensor([[size, size, 0, 0, size, size]] * len(texts))
        conditions["added_cond_kwargs"] = {"text_embeds": pooled[0], "time_ids": time_ids}
    picture, caption = {}, {text: i for i, text in enumerate(texts)} | {"": EMPTY}
    return Data(
        latents=torch.cat(winners + losers),
        picture=torch.tensor([picture.setdefault(row.digest, len(picture)) for row in rows]),
        caption=torch.tensor([caption[row.text] for row in rows]),
        conditions=conditions,
        num_timesteps=pipe.scheduler.config.num_train_timesteps,
    )


# ------------------------------------------- 3. the randomness of a step


def generator(*key) -> torch.Generator:
    """A generator that is a function of its key, hashed since torch keeps 32 bits of a CPU seed."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def draw(data: Data, config: Config, step: int) -> tuple[Tensor, ...]:
    """The random choices of a step for all of its G pairs: [G] each, and the noise [G, C, h, w].

    Rows of the winners, rows of their losers, captions (after dropout), timesteps, noise. Rows come
    in epochs, shuffled: each of them once before any comes again.
    """
    N, G = len(data.picture), config.batch_size * config.grad_accum * WORLD
    epochs = range(step * G // N, ((step + 1) * G - 1) // N + 1)  # those that the step reaches into
    orders = [torch.randperm(N, generator=generator(config.seed, "epoch", e)) for e in epochs]
    rows = torch.cat(orders)[step * G - epochs[0] * N :][:G]

    random = generator(config.seed, "step", step)
    timesteps = torch.randint(data.num_timesteps, (G,), generator=random)
    noise = torch.randn(G, *data.latents.shape[1:], generator=random)
    empty = torch.rand(G, generator=random) < config.caption_dropout
    captions = data.caption[rows].masked_fill(empty, EMPTY)
    if len(data.latents) > N:
        return rows, rows + N, captions, timesteps, noise
    losers, unfit = rows.clone(), torch.ones(G, dtype=torch.bool)
    while unfit.any():  # uniform over the rows with another picture and another caption
        losers[unfit] = torch.randint(N, (int(unfit.sum()),), generator=random)
        same_picture = data.picture[losers] == data.picture[rows]
        unfit = same_picture | (data.caption[losers] == data.caption[rows])
    return rows, losers, captions, timesteps, noise


def micro_batches(data: Data, config: Config, step: int) -> Iterator[dict]:
    """What this process passes to the loss, by name, for each micro-batch of a step."""
    rows, losers, captions, timesteps, noise = draw(data, config, step)
    # An empty caption favours neither image: there is nothing to prefer.
    pair_weight = (captions != EMPTY).float()
    for k in range(config.grad_accum):
        first = (k * WORLD + RANK) * config.batch_size
        mine = slice(first, first + config.batch_size)
        batch = {
            "latents": pick(rows[mine], data.latents),
            "losers": pick(losers[mine], data.latents),
            "noise": pick(mine, noise),
            "timesteps": pick(mine, timesteps),
            "pair_weight": pick(mine, pair_weight),
            **pick(captions[mine], data.conditions),
        }
        if data.reference is not None:
            batch["reference"] = data.reference[step, k * WORLD + RANK]
        yield batch


def pick(rows: Tensor | slice, values: Tensor | dict) -> Tensor | dict:
    """Rows, in fp32 on the device; from pinned memory, which a GPU reads while it computes."""
    if isinstance(values, dict):
        return {name: pick(rows, tensor) for name, tensor in values.items()}
    picked = values[rows].float() if values.is_floating_point() else values[rows]
    picked = picked.pin_memory() if DEVICE.type == "cuda" else picked
    return picked.to(DEVICE, non_blocking=True)


# ------------------------------------------- 4. the loss and the loop


def half_precision() -> torch.autocast:
    """bf16 autocast on a GPU whose hardware has it, nothing elsewhere; the weights stay fp32.

    A pass casts each weight where it uses it; a cache would hold bf16 copies of all of them.
    """
    return torch.autocast(DEVICE.type, torch.bfloat16, BF16, cache_enabled=False)


def sft_loss(unet, scheduler, latents, noise, timesteps, losers, pair_weight, **conditions):
    """The MSE term of Eq. 9 alone, on the winners alone: what SUDO is compared with."""
    noisy = sudo.add_noise(latents, noise, timesteps, scheduler)
    target = sudo.training_target(latents, noise, timesteps, scheduler)
    loss = (unet(noisy, timesteps, **conditions).sample.float() - target).square().mean()
    return loss, dict.fromkeys(("loss", "winner_error"), loss.detach())


@torch.no_grad()
def pair_errors(unet, scheduler, latents, losers, noise, timesteps, pair_weight=None, **conditions):
    """The errors of a UNet on a micro-batch, as `sudo_loss` computes them: [2B]."""
    pairs = sudo.make_pairs(scheduler, latents, losers, noise=noise, timesteps=timesteps)
    with half_precision():
        return sudo.denoising_error(unet, pairs, **conditions)


def reference_errors(unet, scheduler, data: Data, config: Config) -> Tensor:
    """The errors in each micro-batch of the run, of all processes: [steps, micro-batches, 2B]."""
    shape = config.steps, config.grad_accum * WORLD, 2 * config.batch_size
    errors = torch.zeros(shape, device=DEVICE)
    for step in tqdm(range(config.steps), "reference errors", **SILENT):
        for k, batch in enumerate(micro_batches(data, config, step)):
            errors[step, k * WORLD + RANK] = pair_errors(unet, scheduler, **batch)
    if WORLD > 1:
        dist.all_reduce(errors)  # each process left the entries of the others at 0
    return errors


def prepare(pipe: DiffusionPipeline, config: Config):
    """The UNet to train, on the device, and its optimizer."""
    # In eval mode, as the reference is: u then starts at exactly 0, see `frozen_copy`.
    unet = pipe.unet.to(DEVICE, memory_format=torch.channels_last).eval()
    if config.family != "tiny":  # a small model fits without, and is faster
        unet.enable_gradient_checkpointing()
    if config.optimizer == "adafactor":
        fixed_lr = {"scale_parameter": False, "relative_step": False}
        optimizer = Adafactor(unet.parameters(), config.lr, weight_decay=1e-2, **fixed_lr)
    else:
        optimizer = torch.optim.AdamW(unet.parameters(), config.lr, weight_decay=1e-2, fused=True)
    return unet, optimizer


def lr_factor(step: int, steps: int, schedule: str) -> float:
    """A linear warm-up to 1, which stays (as in the paper) or falls linearly to 0."""
    warmup = max(1, round(WARMUP * steps))
    rest = (steps - step) / max(1, steps - warmup) if schedule == "linear" else 1.0
    return min(1.0, (step + 1) / warmup, rest)


def train(
    unet, optimizer, loss_fn: Callable, batches: Callable, config: Config, start: int = 0
) -> Iterator[dict[str, float]]:
    """Train in place: each `next` takes a step and gives its metrics, over all pairs of it.

    loss_fn(policy, **batch) returns (loss, metrics), as `sudo_loss` does. batches(step) yields this
    process's micro-batches. Raises FloatingPointError before an update that is not finite.
    """
    # Views, so that the buckets of gradients are no second copy of them.
    policy = DistributedDataParallel(unet, gradient_as_bucket_view=True) if WORLD > 1 else unet
    for step in range(start, config.steps):
        began, sums = time.perf_counter(), 0
        for k, batch in enumerate(batches(step)):
            # Processes average their gradients once per step, in its last backward pass.
            apart = WORLD > 1 and k + 1 < config.grad_accum
            with policy.no_sync() if apart else nullcontext():
                with half_precision():
                    loss, metrics = loss_fn(policy, **batch)
                (loss / config.grad_accum).backward()
            sums = sums + weighted(metrics, batch["pair_weight"])
        if WORLD > 1:
            dist.all_reduce(sums)
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
        # The one place in a step that waits for the GPU: nothing infinite may reach the weights.
        *means, norm = torch.cat([sums[0] / sums[1].clamp(min=1), norm[None]]).tolist()
        metrics = dict(zip(metrics, means))
        if not math.isfinite(metrics["loss"] + norm):
            raise FloatingPointError(f"its loss is {metrics['loss']}, its gradient norm {norm}")

        lr = config.lr * lr_factor(step, config.steps, config.lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        yield {"step": step, "lr": lr, **metrics, "grad_norm": norm, "seconds": seconds}


def weighted(metrics: dict[str, Tensor], pair_weight: Tensor) -> Tensor:
    """Sums of the metrics over the pairs they are means of, and the numbers of those: [2, n]."""
    with_weight, pairs = (pair_weight != 0).sum(), torch.ones_like(pair_weight).sum()
    counts = torch.stack([with_weight if name in WITH_WEIGHT else pairs for name in metrics])
    return torch.stack([torch.stack(list(metrics.values())) * counts, counts])


# ------------------------------------------- 5. what a run leaves behind


def check_output(output: Path, resume: bool) -> None:
    """Exit if --output cannot take the run, before anything slow starts."""
    if resume and not (output / "checkpoint.pt").exists():
        sys.exit(f"{output} holds no checkpoint to resume: leave out --resume to begin a run.")
    if not resume and output.exists():
        # A run that ended before its first checkpoint gives way to the next.
        remains = "metrics.jsonl", "checkpoint.unfinished", "samples-"
        if not output.is_dir() or not all(f.name.startswith(remains) for f in output.iterdir()):
            sys.exit(f"{output} is in use: name a new --output, or --resume the run in it.")
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        sys.exit(f"{output} cannot be made in {parent}: name a new --output.")


def identity(rows: list[Row], config: Config) -> dict:
    """What a run must have in common with the checkpoint that it resumes."""
    names = "model steps batch_size grad_accum lr lr_schedule optimizer beta loss downgrade "
    names += "caption_dropout seed precompute_reference"
    run = {name: getattr(config, name) for name in names.split()}
    content = repr([(row.digest, row.text) for row in rows])
    data = f"{len(rows)} rows with checksum {zlib.crc32(content.encode()):08x}"
    return run | {"processes": WORLD, "data": data}


def save_checkpoint(output: Path, **state) -> None:
    """Written beside, then renamed: a checkpoint is whole or not there at all."""
    beside = output / "checkpoint.unfinished"
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, output / "checkpoint.pt")


def load_checkpoint(output: Path, run: dict) -> dict:
    """The checkpoint in --output; exits with a sentence if it is of another run."""
    saved = torch.load(output / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
    was = saved["run"]
    changed = [
        f"{name} was {was.get(name)} and is {run[name]}"
        for name in run
        if was.get(name) != run[name]
    ]
    if changed:
        sys.exit(
            f"The run in {output} is another: {'; '.join(changed)}. Resume it with its own "
            f"settings, or train its result further with --model {output} and a new --output."
        )
    return saved


@torch.no_grad()
def sample(pipe: DiffusionPipeline, prompts: list[str], config: Config) -> list[Image.Image]:
    """A picture for each prompt from fixed seeds; leaves all but the UNet on the CPU."""
    pipe.to(DEVICE).set_progress_bar_config(desc="sampling", leave=False)
    options = {"guidance_scale": GUIDANCE[config.family], "num_inference_steps": SAMPLING_STEPS}
    pictures = []
    for i, prompt in enumerate(prompts):
        rng = torch.Generator().manual_seed(config.seed + i)
        with half_precision():
            pictures += pipe(prompt, generator=rng, **options).images
    pipe.to("cpu").unet.to(DEVICE)
    return pictures


def sheet(prompts: list[str], **rows: list[Image.Image]) -> Image.Image:
    """The rows of pictures one above the other, each picture over its caption."""
    tiles, font = [], ImageFont.load_default(16)
    for name, pictures in rows.items():
        for i, (prompt, picture) in enumerate(zip(prompts, pictures), 1):
            tile = Image.new("RGB", (190, 300), "white")
            tile.paste(ImageOps.expand(picture.resize((178, 178)), 1, "gray"), (5, 5))
            # The font has Western letters only.
            text = prompt if all(ord(c) < 256 for c in prompt) else f"caption {i} of the data"
            text = textwrap.fill(f"{name}: {text}", 22, max_lines=5)
            ImageDraw.Draw(tile).text((6, 190), text, "black", font)
            tiles.append(tile)
    return make_image_grid(tiles, len(rows), len(prompts))


def announce(pipe: DiffusionPipeline, rows: list[Row], config: Config) -> None:
    """What is trained on what and how, in one line, and what the user may not expect."""
    pairs = config.batch_size * config.grad_accum * WORLD
    slow = "fp32, which takes at least twice the time and more memory: this GPU has no bf16"
    precision = "bf16" if BF16 else slow if DEVICE.type == "cuda" else "fp32"
    print(
        f"{config.loss}: {config.model} on {len(rows)} pictures, {config.steps} steps of {pairs} "
        f"pairs, lr {config.lr:g}, β {config.beta:g}, on {WORLD} x {DEVICE.type} in {precision}."
    )
    if config.family != "tiny":
        return
    # Each word of its own world is one token to the tiny model.
    new = [row for row in rows if len(pipe.tokenizer.tokenize(row.text)) > len(row.text.split())]
    if new:
        print(
            "The tiny model is a demonstration on its own small world of coloured shapes, and "
            f"{len(new)} of the captions have words that it has never seen. For pictures of your "
            "own take --model sd15, on a GPU."
        )


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    try:
        run(config)
    except torch.OutOfMemoryError:
        sys.exit(
            "Out of GPU memory. --precompute-reference saves the second UNet and --optimizer "
            "adafactor most of the optimizer's state; half the --batch-size with twice the "
            "--grad-accum is the same step."
        )


def run(config: Config) -> None:
    output = config.output
    if RANK == 0:
        check_output(output, config.resume)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    from_rows = config.downgrade == "random_image"  # else a loser is made from its winner
    rows = read_rows(config.data, config.image_column, config.caption_column, losers=from_rows)
    this = identity(rows, config)
    saved = load_checkpoint(output, this) if config.resume else {}
    no_checker = {"safety_checker": None, "requires_safety_checker": False}
    pipe = load(DiffusionPipeline.from_pretrained, config.model, dtype=torch.float32, **no_checker)
    if RANK == 0:
        announce(pipe, rows, config)
    data = encode(pipe, rows, config)
    prompts = list(dict.fromkeys(row.text for row in rows))[:PROMPTS]
    before = sample(pipe, prompts, config) if RANK == 0 else []

    unet, optimizer = prepare(pipe, config)
    if config.loss == "sft":
        loss_fn = partial(sft_loss, scheduler=pipe.scheduler)
    else:
        given = {"beta": config.beta, **WEIGHTS[config.loss]}
        loss_fn = partial(sudo.sudo_loss, scheduler=pipe.scheduler, **given)
        if not config.precompute_reference:
            loss_fn = partial(loss_fn, reference=sudo.frozen_copy(unet))
        elif saved:
            data = data._replace(reference=saved["reference_errors"].to(DEVICE))
        else:
            errors = reference_errors(unet, pipe.scheduler, data, config)
            data = data._replace(reference=errors)

    done, log = saved.get("step", 0), output / "metrics.jsonl"
    if saved:
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
    if RANK == 0:
        output.mkdir(parents=True, exist_ok=True)
        kept = log.read_text().splitlines(keepends=True)[:done] if log.exists() else []
        log.write_text("".join(kept))
    steps = train(unet, optimizer, loss_fn, partial(micro_batches, data, config), config, done)
    bar = tqdm(steps, config.loss, initial=done, total=config.steps, **SILENT)
    try:
        for metrics in bar:
            done = metrics["step"] + 1
            if RANK > 0:
                continue
            with log.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            shown = metrics.keys() & {"loss", "margin", "implicit_acc"}
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in sorted(shown)})
            if done % config.checkpoint_every == 0 or done == config.steps:
                state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"reference_errors": data.reference, "step": done, "run": this}
                save_checkpoint(output, **state)
            if config.sample_every and done % config.sample_every == 0 and done < config.steps:
                pictures = sheet(prompts, before=before, now=sample(pipe, prompts, config))
                pictures.save(output / f"samples-{done:06d}.png")
    except FloatingPointError as error:
        names = ", ".join(rows[row].file.name for row in draw(data, config, done)[0][:8])
        sys.exit(
            f"Stopped before the update of step {done}: {error}. Its first pictures: {names}. If "
            "they are in order, begin a new --output with a lower --lr. A checkpoint that "
            f"{output} may hold is from before and whole."
        )
    if RANK == 0:
        pictures = sheet(prompts, before=before, after=sample(pipe, prompts, config))
        pictures.save(output / "samples.png")
        pipe.save_pretrained(output)
        print(
            f"The pipeline is in {output}, beside samples.png and metrics.jsonl. Draw with it:\n"
            "from diffusers import DiffusionPipeline\n"
            f"pipe = DiffusionPipeline.from_pretrained({str(output)!r})\n"
            f"pipe({prompts[0]!r}, guidance_scale={GUIDANCE[config.family]}).images[0].show()"
        )
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
