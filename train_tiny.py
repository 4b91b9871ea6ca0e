"""Fine-tune a text-to-image model with SUDO: captions.jsonl in, a diffusers pipeline out.

    python train_tiny.py --data ./captions.jsonl
    torchrun --nproc-per-node 4 train_tiny.py --data ./captions.jsonl
    python train_tiny.py --resume out

The data has one line {"file_name": "picture.png", "text": "its caption"} per picture. This file
tells first how SUDO is trained. What any trainer needs is below the line "the small print".
"""

import hashlib
import json
import logging
import math
import os
import sys
import time
import warnings
import zlib
from argparse import Namespace
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import offload_models
from PIL import Image, ImageOps, PngImagePlugin
from safetensors import SafetensorError  # comes with diffusers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

import sudo

# This process, as torchrun has it.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cpu")
HALF = None  # what autocast computes in; None: all is in fp32
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(DEVICE)
    in_hardware = torch.cuda.is_bf16_supported(including_emulation=False)
    HALF = torch.bfloat16 if in_hardware else torch.float16
PRECISION = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[HALF]
MACHINE = f"{WORLD} x {DEVICE.type} in {PRECISION}"
EMPTY = 0  # index of the empty caption
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]  # layers with LoRA
TINY = str(Path(__file__).parent / "lab" / "tiny-sd")


# ------------------------------------------- 1. the settings


@dataclass(frozen=True)
class Flags:
    """One line a flag, with SD1.5's defaults; RECIPES has what differs for others."""

    data: str = HfArg(default="", help="a jsonl, or a folder with a metadata.jsonl")
    image_column: str = HfArg(default="file_name", help="of the paths in that file")
    caption_column: str = HfArg(default="text", help="of the captions")
    model: str = HfArg(default="sd15", help="tiny, sd15, sdxl, a folder or a hub name")
    output: str = HfArg(default="out", help="a new folder")
    resume: str = HfArg(default="", help="a folder whose run goes on")
    loss: Literal["sudo", "dpo", "sft"] = HfArg(default="sudo", help="dpo, sft: one term alone")
    lora: int = HfArg(default=0, help="rank of LoRA adapters; 0 trains all weights")
    steps: int = HfArg(default=400, help="updates of the weights")
    batch_size: int = HfArg(default=4, help="pairs in a micro-batch of one process")
    grad_accum: int = HfArg(default=8, help="micro-batches in a step")
    lr: float = HfArg(default=1e-6, help="after the warm-up; SFT and LoRA have others")
    lr_schedule: Literal["constant", "linear"] = HfArg(default="constant", help="SFT has linear")
    optimizer: Literal["adamw", "adafactor"] = HfArg(default="adamw", help="of the weights")
    beta: float = HfArg(default=5000.0, help="of Eq. 8; less where errors are larger")
    caption_dropout: float = HfArg(default=0.2, help='share of captions made ""')
    gradient_checkpointing: bool = HfArg(default=True, help="less memory for more time")
    guidance: float = HfArg(default=7.5, help="scale of samples.png")
    seed: int = HfArg(default=0, help="of everything random")
    checkpoint_every: int = HfArg(default=100, help="steps between checkpoints")


@dataclass(frozen=True)
class Config(Flags):  # and what a recipe has beside them
    sft_lr: float = 1e-5  # what lr is by default for --loss sft,
    lora_lr: float = 1e-5  # with LoRA
    sft_lora_lr: float = 1e-4  # and with both
    size: int = 512  # side of the model's pictures in pixels
    memory: int = 21  # GB of a GPU that can train all weights (lab/cost.md)
    note: str = ""  # what the opening line says first


# tiny's were chosen on its validation captions. sd15 has the paper's lr and the official β, but 32
# pairs a step and not 2048: a run takes an hour on 24 GB. sdxl has the paper's 96 and Adafactor.
RECIPES = {
    "sd15": {"model": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
    "tiny": {
        "model": TINY, "size": 32, "memory": 0, "guidance": 1.0, "gradient_checkpointing": False,
        "lr": 2e-5, "sft_lr": 2e-3, "lora_lr": 5e-4, "sft_lora_lr": 3e-3, "beta": 400.0,
        "steps": 300, "batch_size": 32, "grad_accum": 1,
    },
    "sdxl": {
        "model": "stabilityai/stable-diffusion-xl-base-1.0", "size": 1024, "memory": 33,
        "guidance": 5.0, "optimizer": "adafactor", "checkpoint_every": 500,
        "steps": 1000, "batch_size": 1, "grad_accum": 96,
    },
}  # fmt: skip


# ------------------------------------------- 2. what a step draws


class Data(NamedTuple):
    """What the steps read: N rows with M different captions, on the CPU, in fp16."""

    latents: Tensor  # [N, C, h, w], clean and scaled
    losers: Tensor | None  # [N, C, h, w], one a row; None: drawn from all rows
    picture: Tensor  # [N], the same number for the same picture
    caption: Tensor  # [N], index into the conditions, the same for the same words
    conditions: dict  # of tensors [1 + M, ...], by the UNet's names
    texts: list  # [1 + M], "" and the captions
    num_timesteps: int  # T of the noise schedule


def generator(*key) -> torch.Generator:
    """Seeded by the key, which is hashed since torch keeps 32 bits of a CPU's seed."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def draw(data: Data, config: Config, step: int) -> tuple[Tensor, ...]:
    """What is random in a step, for its G pairs: [G] each, and the noise [G, C, h, w].

    It depends on seed and step alone: a resumed run, or one on several processes, takes the steps
    of one that never stopped. Rows come in shuffled epochs.
    """
    N = len(data.picture)
    G = config.batch_size * config.grad_accum * WORLD
    epochs = range(step * G // N, ((step + 1) * G - 1) // N + 1)  # that the step reaches
    orders = [torch.randperm(N, generator=generator(config.seed, "epoch", e)) for e in epochs]
    rows = torch.cat(orders)[step * G - epochs[0] * N :][:G]

    random = generator(config.seed, "step", step)
    timesteps = torch.randint(data.num_timesteps, (G,), generator=random)
    noise = torch.randn(G, *data.latents.shape[1:], generator=random)
    empty = torch.rand(G, generator=random) < config.caption_dropout
    captions = data.caption[rows].masked_fill(empty, EMPTY)
    losers = None  # SFT has none
    if config.loss != "sft":
        losers = rows.clone()
        unfit = torch.full((G,), data.losers is None)
        while unfit.any():  # among all rows of the data
            losers[unfit] = torch.randint(N, (int(unfit.sum()),), generator=random)
            same_picture = data.picture[losers] == data.picture[rows]
            same_caption = data.caption[losers] == data.caption[rows]
            unfit = same_picture | same_caption
    return rows, losers, captions, timesteps, noise


def micro_batches(data: Data, config, step):
    rows, losers, captions, timesteps, noise = draw(data, config, step)
    # An empty caption favours neither image: there is nothing to prefer.
    weight = (captions != EMPTY).float()
    drawn = {"noise": noise, "timesteps": timesteps, "pair_weight": weight}
    for k in range(config.grad_accum):
        first = (k * WORLD + RANK) * config.batch_size
        mine = slice(first, first + config.batch_size)
        batch = pick(mine, drawn) | pick(captions[mine], data.conditions)
        batch["latents"] = pick(rows[mine], data.latents)
        if losers is not None:
            among = data.latents if data.losers is None else data.losers
            batch["losers"] = pick(losers[mine], among)
        yield batch


# ------------------------------------------- 3. the training


def half_precision():
    """Trained weights are cast in use: a cache would hold copies of all of them."""
    return torch.autocast(DEVICE.type, HALF, enabled=HALF is not None, cache_enabled=False)


def trained_weights(unet):
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


def without_adapters(unet, *inputs, **kwargs):
    unet.disable_adapters()
    try:
        return unet(*inputs, **kwargs)
    finally:
        unet.enable_adapters()


def prepare(pipe, config: Config):
    """The UNet to train, its reference (None for SFT) and the optimizer, where the pipeline is."""
    # In eval mode, as the reference is: u starts at exactly 0, see `frozen_copy`.
    unet = pipe.unet.eval()
    reference = None
    if config.lora:
        from peft import LoraConfig

        torch.manual_seed(config.seed % 2**64)
        # With alpha = rank the scale is 1, as loaders assume where a file has no alpha.
        lora = LoraConfig(r=config.lora, lora_alpha=config.lora, target_modules=ADAPTED)
        unet.requires_grad_(False).add_adapter(lora)
        reference = partial(without_adapters, unet)
    elif config.loss != "sft":
        reference = laid_out(sudo.frozen_copy(unet))
    laid_out(unet)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    kind = partial(torch.optim.AdamW, fused=True)
    if config.optimizer == "adafactor":
        kind = partial(transformers.Adafactor, scale_parameter=False, relative_step=False)
    optimizer = kind(trained_weights(unet).values(), lr=config.lr, weight_decay=1e-2)
    return unet, reference, optimizer


def sft_loss(unet, scheduler, latents, noise, timesteps, pair_weight, reference, beta, **words):
    """The MSE term of Eq. 9 alone, on all winners."""
    noisy = sudo.add_noise(latents, noise, timesteps, scheduler)
    target = sudo.training_target(latents, noise, timesteps, scheduler)
    loss = (unet(noisy, timesteps, **words).sample.float() - target).square().mean()
    return loss, {"pairs": torch.ones_like(pair_weight).sum(), "winner_error": loss.detach()}


LOSSES = {
    "sudo": sudo.sudo_loss,
    "dpo": partial(sudo.sudo_loss, dpo_weight=1.0, mse_weight=0.0),
    "sft": sft_loss,
}


def train(unet, optimizer, loss_fn, batches, config, start=0, scaler=None):
    """Train in place: each `next` takes a step and gives its metrics, over all processes.

    batches(step) yields this process's micro-batches, loss_fn(policy, **batch) returns (loss,
    metrics). A scaler serves fp16. Raises FloatingPointError before an update that is not finite.
    """
    scaler = scaler or torch.amp.GradScaler(DEVICE.type, enabled=False)
    # Views, so that buckets are no second copy of the gradients.
    policy = DistributedDataParallel(unet, gradient_as_bucket_view=True) if WORLD > 1 else unet
    warmup = max(1, round(0.25 * config.steps))
    for step in range(start, config.steps):
        began = time.perf_counter()
        sums = 0
        for k, batch in enumerate(batches(step)):
            # Processes average their gradients once per step, in its last backward pass.
            apart = WORLD > 1 and k + 1 < config.grad_accum
            with policy.no_sync() if apart else nullcontext():
                with half_precision():
                    loss, metrics = loss_fn(policy, **batch)
                scaler.scale(loss / config.grad_accum).backward()
            pairs = metrics.pop("pairs")  # that the other metrics are means over
            part = loss.detach() / (config.grad_accum * WORLD)
            sums = sums + torch.stack([part, pairs, *(pairs * mean for mean in metrics.values())])
        if WORLD > 1:
            dist.all_reduce(sums)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        # This waits for the GPU, once in a step: nothing infinite may reach the weights.
        loss, pairs, *totals, norm = torch.cat([sums, norm[None]]).tolist()
        skipped = scaler.is_enabled() and not math.isfinite(norm)  # by the scaler
        if not math.isfinite(loss) or not (skipped or math.isfinite(norm)):
            raise FloatingPointError(f"the loss of step {step} is {loss}, its gradient norm {norm}")

        # A linear warm-up; then lr stays, as in the paper, or falls to 0.
        share = min(1.0, (step + 1) / warmup)
        if config.lr_schedule == "linear":
            share = min(share, (config.steps - step) / max(1, config.steps - warmup))
        lr = config.lr * share
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() < 1:
            raise FloatingPointError(f"the gradients of step {step} are too large for fp16")
        norm = None if skipped else norm
        row = {"step": step, "lr": lr, "loss": loss, "grad_norm": norm, "pairs": pairs}
        row |= {name: total / max(pairs, 1) for name, total in zip(metrics, totals)}
        yield row | {"seconds": time.perf_counter() - began}


# ------------------------------------------- 4. the run


def run(config: Config):
    rows = read_rows(config.data, config.image_column, config.caption_column, config.size)
    pairs = config.batch_size * config.grad_accum * WORLD
    what = f"LoRA of rank {config.lora}" if config.lora else "all weights"
    what += f" of {config.model} on {len(rows)} pictures, {config.steps} steps of {pairs} pairs"
    say(f"{config.note}{config.loss}: {what}, lr {config.lr:g}, β {config.beta:g}, on {MACHINE}.")
    pipe = load_pipeline(config.model)
    origin = fingerprint(pipe, rows)
    saved = load_checkpoint(config.resume, origin) if config.resume else {}
    unet, reference, optimizer = prepare(pipe, config)
    if saved and [*saved["trained"]] != [*trained_weights(unet)]:
        sys.exit(f"{config.resume} cannot be resumed: its weights have the names of another peft.")
    if config.loss != "sft":
        check_losers(pipe, rows)
    data = encode(pipe, rows)  # before the UNet takes its place on the GPU
    for model in (unet, reference):
        if isinstance(model, torch.nn.Module):
            model.to(DEVICE)
    before = sample(pipe, data, config) if RANK == 0 else []
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=HALF is torch.float16)
    done = saved.get("step", 0)
    if saved:
        unet.load_state_dict(saved.pop("trained"), strict=False)  # the frozen ones stay
        optimizer.load_state_dict(saved.pop("optimizer"))  # popped, so the file is let go
        scaler.load_state_dict(saved["scaler"])

    given = {"reference": reference, "scheduler": pipe.scheduler, "beta": config.beta}
    loss_fn = partial(LOSSES[config.loss], **given)
    batches = partial(micro_batches, data, config)
    steps = train(unet, optimizer, loss_fn, batches, config, done, scaler)
    bar = tqdm(steps, config.loss, initial=done, total=config.steps, **SILENT)
    for metrics in bar:
        done = metrics["step"] + 1
        seen = metrics.keys() & {"loss", "margin", "implicit_acc"}
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in sorted(seen)})
        if RANK == 0:
            log(config, metrics)
        if RANK == 0 and (done % config.checkpoint_every == 0 or done == config.steps):
            state = {"step": done, "trained": trained_weights(unet), "origin": origin}
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            keep(config, pipe, before + sample(pipe, data, config), state)
    if RANK == 0:
        keep_pipeline(config, pipe)
    say(f"DiffusionPipeline.from_pretrained({config.output!r}) loads it; see samples.png there.")


# ====================================== the small print: 5. flags and model

SILENT = {"disable": True} if RANK > 0 else {}  # else TQDM_DISABLE decides
say = partial(print, flush=True) if RANK == 0 else lambda *text: None
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers.utils.import_utils").setLevel("ERROR")  # on torchvision


def path(text: str, folder="") -> Path:
    """Absolute; ~ means home only where no file in the folder has that name."""
    there = os.path.exists(Path(folder, text))
    return Path(folder, text if there else os.path.expanduser(text)).absolute()


def parse(argv=None) -> Config:
    """The flags over the model's recipe; with --resume those of its run."""
    parser = HfArgumentParser(Flags, description="Some defaults differ for tiny and sdxl.")
    unset = Namespace(**dict.fromkeys(vars(Flags())))  # None: not given
    flags = vars(parser.parse_args(argv, unset))
    given = {name: value for name, value in flags.items() if value is not None}
    for name in given.keys() & {"data", "output", "resume"}:
        given[name] = str(path(given[name]))
    if "resume" in given:
        if given.keys() - {"resume", "data", "model"}:
            parser.error("--resume takes its run's flags, but for --data and --model that moved")
        if "model" in given:
            given["model"] = recipe_of(given["model"]).model
        saved = load_checkpoint(given["resume"])["config"]
        return Config(**saved | given | {"output": given["resume"], "note": ""})
    if "data" not in given:
        parser.error("--data is missing, the captions.jsonl of your pictures")
    for name in "steps batch_size grad_accum checkpoint_every lr beta guidance".split():
        if not 0 < given.get(name, 1) < math.inf:
            parser.error(f"--{name.replace('_', '-')} has to be positive, and is {given[name]}")
    if given.get("lora", 0) < 0 or not 0 <= given.get("caption_dropout", 0) <= 1:
        parser.error("--lora has to be 0 or more, and --caption-dropout from 0 to 1")
    cuda = DEVICE.type == "cuda"
    note = ""
    if "model" not in given and not cuda:
        note = "No GPU found: this is the tiny model of lab/, which draws coloured shapes alone. "
    recipe = recipe_of(given.get("model", "sd15" if cuda else "tiny"))
    room = torch.cuda.get_device_properties(DEVICE).total_memory / 1e9 if cuda else math.inf
    if "lora" not in given and room < recipe.memory:
        given["lora"] = 16
        note = f"This GPU has {room:.0f} GB, all weights (--lora 0) need about {recipe.memory}. "
    lora = given.get("lora", 0) > 0
    if lora and not find_spec("peft"):
        sys.exit("LoRA needs peft: pip install peft, or train all weights by --lora 0.")
    own = {"lr": recipe.lora_lr if lora else recipe.lr}
    if given.get("loss") == "sft":
        own |= {"lr": recipe.sft_lora_lr if lora else recipe.sft_lr, "lr_schedule": "linear"}
    return replace(recipe, **own | given | {"model": recipe.model, "note": note})


def recipe_of(model: str) -> Config:
    """Its recipe; that of a folder or a hub name is the one of a model as wide."""
    if model in RECIPES:
        return Config(**RECIPES[model])
    model = str(path(model)) if path(model).exists() else model
    kind = load(DiffusionPipeline.load_config, model).get("_class_name")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        sys.exit(f"{model} cannot be trained: it is a {kind}, not Stable Diffusion 1, 2 or XL.")
    unet = load(UNet2DConditionModel.load_config, model, subfolder="unet")
    vae = load(AutoencoderKL.load_config, model, subfolder="vae")
    side, width = unet.get("sample_size"), unet.get("cross_attention_dim")
    if not isinstance(side, int) or not isinstance(width, int):
        wrong = f"sample_size {side} and cross_attention_dim {width}"
        sys.exit(f"{model} cannot be trained: its UNet has {wrong}.")
    known = "tiny" if width < 768 else "sd15" if width < 2048 else "sdxl"
    size = side * 2 ** (len(vae["block_out_channels"]) - 1)
    return Config(**RECIPES[known] | {"model": model, "size": size})


def load(from_model, model, failure="No pipeline could be loaded", **options):
    try:
        return from_model(model, **options)
    except Exception as error:  # loaders have many names for a broken file
        reason = str(error).strip().split("\n")[0]
        if model.endswith((".safetensors", ".ckpt")):
            reason = "a single file has to become a folder, by from_single_file and save_pretrained"
        elif [*Path(model).glob("*/*.fp16.*")]:
            reason += " (Its files are of a variant: save it anew without one.)"
        sys.exit(f"{failure} from {model}: {reason}")


def load_pipeline(model: str) -> DiffusionPipeline:
    """The pipeline in fp32, on the CPU; exits if it lacks weights or words, or does not fit."""
    options = {"dtype": torch.float32}
    if "safety_checker" in load(DiffusionPipeline.load_config, model):
        options |= {"safety_checker": None, "requires_safety_checker": False}
    pipe = load(DiffusionPipeline.from_pretrained, model, **options)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            # With accelerate a weight that no file has is left without data.
            missing = [weight for weight, p in part.named_parameters() if p.is_meta]
            if missing:
                sys.exit(f"{model} lacks {len(missing)} weights of its {name}: {missing[0]}, ...")
        if name.startswith("tokenizer"):
            encoder = pipe.components[name.replace("tokenizer", "text_encoder")]
            limits = encoder and encoder.config
            whole = part and limits and len(part) >= limits.vocab_size
            if not whole or part.model_max_length > limits.max_position_embeddings:
                sys.exit(f"{model} lacks files of its {name}, or has those of another one.")
    try:
        sudo.add_noise(torch.zeros(1), torch.zeros(1), torch.tensor([0]), pipe.scheduler)
    except ValueError as error:
        sys.exit(f"{model} cannot be trained: {error}")
    return pipe


def laid_out(model):
    """In a GPU's fastest layout, and frozen weights cast once, as autocast would in each pass."""
    for layer in model.modules():
        cast = isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        if HALF and cast and not layer.weight.requires_grad:
            layer.to(HALF)
    return model.to(memory_format=torch.channels_last)


# ------------------------------------------- 6. the data

# A picture may have many pixels, and any text or profile beside them.
PngImagePlugin.MAX_TEXT_CHUNK = 2**30
PngImagePlugin.MAX_TEXT_MEMORY = 2**30
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class Row(NamedTuple):
    file: Path
    text: str
    digest: str  # of the pixels that the model sees


def read_rows(data, image_column, caption_column, size) -> list[Row]:
    file = Path(data, "metadata.jsonl") if os.path.isdir(data) else Path(data)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--data wants a jsonl in UTF-8, or a folder with a metadata.jsonl: {error}")
    rows = []
    faults = []
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, line in lines:
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
            for column in (image_column, caption_column):
                if not isinstance(row, dict) or not isinstance(row.get(column), str):
                    raise ValueError(f"there must be one string under {column!r} (see --help)")
                row[column].encode()  # half of a surrogate pair fails here
            where += f": {row[image_column]}"
            picture = path(row[image_column], file.parent)
            digest = hashlib.sha256(load_picture(picture, size).numpy().tobytes()).hexdigest()
            rows.append(Row(picture, row[caption_column].strip(), digest))
        except Exception as error:  # Pillow has many names for a broken picture
            faults.append(f"{where}: {error}")
    if faults or not rows:
        faults[10:] = [f"{file} has {len(rows)} sound rows and {len(faults)} faulty ones."]
        sys.exit("\n".join(faults))
    return rows


def load_picture(file: Path, size: int) -> Tensor:
    """Turned by its EXIF, flattened on white, cropped at the centre: [3, size, size] in -1..1."""
    with Image.open(file) as picture:
        if picture.mode in ("I", "F"):
            raise ValueError("its 32-bit pixels have no agreed range: save it with 8 or 16 bits")
        # Pillow brings pixels to 8 bits, but not the colour that is transparent.
        if picture.format == "PNG" and "transparency" in picture.info:
            if picture.mode != "P" and picture.tile[0][3] not in ("L", "RGB"):
                raise ValueError("its transparent colour has not 8 bits: save an alpha channel")
        if picture.mode.startswith("I;16"):  # which Pillow would clip to 8 bits
            picture = picture.convert("I").point(lambda v: v * (1 / 256)).convert("L")
        with suppress(Exception):  # the pixels may be sound where EXIF is not
            picture = ImageOps.exif_transpose(picture)
        rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    raw = bytearray(ImageOps.fit(flat, (size, size)).tobytes())
    pixels = torch.frombuffer(raw, dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1) / 127.5 - 1


def number_captions(pipe, rows):
    """Numbers for the captions, by the words that the model sees, and the texts."""
    texts = ["", *(row.text for row in rows)]
    words = [tuple(ids) for ids in pipe.tokenizer(texts, truncation=True).input_ids]
    text_of = dict(zip(words[::-1], texts[::-1]))  # the first with these words
    number = {each: i for i, each in enumerate(dict.fromkeys(words))}
    return [number[each] for each in words[1:]], [text_of[each] for each in number]


def check_losers(pipe, rows):
    caption, _ = number_captions(pipe, rows)
    seen = set(zip((row.digest for row in rows), caption))
    if any(all(p == q or c == d for q, d in seen) for p, c in seen):
        sys.exit("Every row needs a loser: a row with another picture and another caption.")


@torch.no_grad()
def encode(pipe, rows) -> Data:
    """Each caption and picture through its encoder, once and for all."""
    caption, texts = number_captions(pipe, rows)
    limit = pipe.tokenizer.model_max_length
    logging.disable(logging.WARNING)  # the libraries say it too
    cut = sum(len(ids) > limit for ids in pipe.tokenizer([row.text for row in rows]).input_ids)
    if cut:
        say(f"{cut} captions have more than {limit} tokens, and the model sees them cut there.")
    encoders = [part for name, part in pipe.components.items() if "text_encoder" in name]
    one_each = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    prompts = []
    with offload_models(*encoders, device=DEVICE):
        for i in tqdm(range(0, len(texts), 32), "encoding captions", **SILENT):
            prompt = pipe.encode_prompt(texts[i : i + 32], device=DEVICE, **one_each)
            prompts.append([part.half().cpu() for part in prompt if part is not None])
    logging.disable(logging.NOTSET)
    words, *pooled = (torch.cat(parts) for parts in zip(*prompts))
    conditions = {"encoder_hidden_states": words}
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    mean, std = 0.0, 1.0
    if pooled:  # SDXL
        if pipe.config.get("force_zeros_for_empty_prompt"):  # as it was trained
            words[EMPTY] = 0
            pooled[0][EMPTY] = 0
        time_ids = torch.tensor([[size, size, 0, 0, size, size]] * len(texts))  # size, crop, target
        conditions["added_cond_kwargs"] = {"text_embeds": pooled[0], "time_ids": time_ids}
        if pipe.vae.config.latents_mean:  # with which SD does not decode
            mean = torch.tensor(pipe.vae.config.latents_mean).view(-1, 1, 1)
            std = torch.tensor(pipe.vae.config.latents_std).view(-1, 1, 1)
    at_once = 4 if size <= 512 else 1
    latents = []
    with offload_models(pipe.vae, device=DEVICE):
        for i in tqdm(range(0, len(rows), at_once), "encoding pictures", **SILENT):
            pixels = torch.stack([load_picture(row.file, size) for row in rows[i : i + at_once]])
            mode = pipe.vae.encode(pixels.to(DEVICE)).latent_dist.mode().cpu()
            latents.append(((mode - mean) / std * pipe.vae.config.scaling_factor).half())
    order = {row.digest: i for i, row in enumerate(rows)}
    picture = torch.tensor([order[row.digest] for row in rows])
    T = pipe.scheduler.config.num_train_timesteps
    return Data(torch.cat(latents), None, picture, torch.tensor(caption), conditions, texts, T)


def pick(rows: Tensor | slice, values: Tensor | dict) -> Tensor | dict:
    """Rows, in fp32 on the device; pinned, so a GPU reads while it computes."""
    if isinstance(values, dict):
        return {name: pick(rows, tensor) for name, tensor in values.items()}
    picked = values[rows].float() if values.is_floating_point() else values[rows]
    picked = picked.pin_memory() if DEVICE.type == "cuda" else picked
    return picked.to(DEVICE, non_blocking=True)


# ------------------------------------------- 7. what a run leaves

PROMPTS = 8  # pictures in a row of samples.png
SAMPLING_STEPS = 30
LORA_FILE = "pytorch_lora_weights.safetensors"
EDITION = 4  # of what a checkpoint holds


@torch.no_grad()
def sample(pipe, data, config):
    pipe.vae.enable_tiling()  # of pictures over 512 pixels
    pipe.vae.tile_sample_min_size = 512
    pipe.vae.tile_latent_min_size = 512 // pipe.vae_scale_factor
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.forward = half_precision()(pipe.unet.forward)  # not the VAE: SDXL's leaves fp16
    captions = range(1, len(data.texts))[:PROMPTS] or [EMPTY]
    paint = partial(pipe, guidance_scale=config.guidance, num_inference_steps=SAMPLING_STEPS)
    pictures = []
    with offload_models(pipe.vae, device=DEVICE):
        for i, number in enumerate(tqdm(captions, "sampling", leave=False, **SILENT)):
            condition = pick(torch.tensor([number, EMPTY]), data.conditions)
            words, none = condition["encoder_hidden_states"].split(1)
            given = {"prompt_embeds": words, "negative_prompt_embeds": none}
            if "added_cond_kwargs" in condition:
                words, none = condition["added_cond_kwargs"]["text_embeds"].split(1)
                given |= {"pooled_prompt_embeds": words, "negative_pooled_prompt_embeds": none}
            rng = torch.Generator().manual_seed((config.seed + i) % 2**64)
            pictures += paint(**given, generator=rng).images
    del pipe.unet.forward
    return pictures


@contextmanager
def saving(output, name):
    """Where to write; renamed when all is written. A failure ends the run."""
    beside = Path(output, f"{name}.unfinished")
    try:
        yield beside
        if beside.exists():
            os.replace(beside, Path(output, name))
    except (OSError, RuntimeError, SafetensorError) as error:
        steps = sorted(step.name for step in Path(output).glob("step-*") if not step.suffix)
        left = f"Whole in {output}: {', '.join(steps) or 'nothing'}."
        if Path(output, "checkpoint.pt").exists():
            left = f"The checkpoint is whole: make room, and go on by --resume {output}."
        cause = error if isinstance(error, OSError) else error.__context__ or error
        sys.exit(f"{name} could not be written: {cause}. {left}")


def log(config, metrics):
    """Add a row, in the place of those of steps that are taken again."""
    step = metrics["step"]
    file = Path(config.output, "metrics.jsonl")
    # The first row makes the file, or fails where another run has.
    with saving(config.output, file.name), open(file, "ab+" if step else "xb") as rows:
        rows.seek(0)
        for _ in range(step):
            rows.readline()
        rows.truncate()
        rows.write(json.dumps(metrics).encode() + b"\n")
    error = metrics["winner_error"]
    if step == 0 and error > 0.5:
        tqdm.write(f"The model's error is {error:.2f}, where 1 is to know nothing: does it fit?")


def keep(config, pipe, pictures, state):
    with saving(config.output, "samples.png") as file:
        diffusers.utils.make_image_grid(pictures, 2, len(pictures) // 2, 192).save(file, "PNG")
    name = f"step-{state['step']:06d}"  # to go back to if training goes too far
    if state["step"] < config.steps and not Path(config.output, name).exists():
        with saving(config.output, name) as folder:
            keep_trained(config, pipe, folder)
    with saving(config.output, "checkpoint.pt") as beside, open(beside, "wb") as file:
        torch.save(state | {"edition": EDITION, "config": asdict(config)}, file)


def keep_trained(config, pipe, folder):
    if not config.lora:
        return pipe.unet.save_pretrained(folder)
    weights = trained_weights(pipe.unet).items()
    adapters = {name.replace(".default", ""): p.data for name, p in weights}
    pipe.save_lora_weights(folder, unet_lora_layers=adapters)


def keep_pipeline(config, pipe):
    if config.lora:
        with saving(config.output, LORA_FILE):
            keep_trained(config, pipe, config.output)
        # Anew in fp32: weights held in half would round small updates away.
        failure = f"{LORA_FILE} is whole, but its base could not be read again"
        pipe.unet = load(pipe.unet.from_pretrained, config.model, failure, subfolder="unet").float()
        pipe.unet.load_lora_adapter(config.output, weight_name=LORA_FILE, prefix="unet")
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
    with saving(config.output, "the pipeline"):
        pipe.save_pretrained(config.output)


def fingerprint(pipe, rows):
    """What has to be the same where a run is resumed, beside its flags."""
    # A private value is a list that diffusers makes of a set, in any order.
    public = [item for item in sorted(pipe.scheduler.config.items()) if item[0][0] != "_"]
    model = zlib.crc32(repr(public).encode())
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for weight in torch.nn.ModuleList(parts).state_dict().values():
        model = zlib.crc32(weight.flatten().view(torch.uint8).numpy(), model)
    data = zlib.crc32(repr([(row.text, row.digest) for row in rows]).encode())
    return {"data": f"{len(rows)} rows ({data:x})", "model": f"{model:x}", "machine": MACHINE}


def load_checkpoint(output, origin=None):
    mapped = DEVICE.type == "cuda"  # an optimizer on the CPU would keep the file, and its room
    try:
        saved = torch.load(Path(output, "checkpoint.pt"), "cpu", weights_only=True, mmap=mapped)
        if saved["edition"] != EDITION:
            raise ValueError(f"it is of edition {saved['edition']}, not {EDITION}")
    except Exception as error:  # torch has many names for a broken file
        sys.exit(f"{output} holds no checkpoint to resume, or one that is broken: {error!r}")
    for name, now in (origin or {}).items():
        was = saved["origin"][name]
        if was != now:
            sys.exit(f"{output} cannot be resumed: its {name} was {was} and is {now}.")
    return saved


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a Windows console may have no β
    config = parse(argv)
    if WORLD > 1:
        dist.init_process_group()
    output = config.output
    made = False
    if RANK == 0 and not config.resume:
        made = not os.path.exists(output)
        try:
            os.makedirs(output, exist_ok=True)
            if os.listdir(output):
                sys.exit(f"{output} is in use: name another --output, remove it, or --resume it.")
        except OSError as error:
            sys.exit(f"{output} cannot be made: {error}")
    try:
        run(config)
    except torch.OutOfMemoryError:
        sys.exit("Out of GPU memory: --lora 16 or a smaller --batch-size takes less.")
    except FloatingPointError as error:
        sys.exit(f"Stopped, as {error}: begin a new --output with a lower --lr.")
    except KeyboardInterrupt:
        sys.exit(f"Stopped. If {output} has a checkpoint, --resume goes on from there.")
    finally:
        if made:
            with suppress(OSError):  # there is something in it
                os.rmdir(output)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
