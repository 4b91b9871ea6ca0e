"""Fine-tune a text-to-image model with SUDO: captions.jsonl in, a diffusers pipeline out.

    python train_tiny.py --data ./captions.jsonl
    torchrun --nproc-per-node 4 train_tiny.py --data ./captions.jsonl
    python train_tiny.py --resume out

The data has one line {"file_name": "picture.png", "text": "its caption"} per picture. The file
reads in the order of a run: the flags; the data, encoded once; the randomness of a step, a function
of (seed, step), so that a resumed run, or one on several processes, takes the steps of one that
never stopped; the model, its reference, the losses and the loop; and what a run leaves behind.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, make_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import torch.distributed as dist
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from filelock import FileLock  # comes with torch
from PIL import Image, ImageOps
from safetensors import SafetensorError  # comes with diffusers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import Adafactor

import sudo

LOGS = (diffusers.utils.logging, transformers.utils.logging)
for log in LOGS:  # what is left to say is said here
    log.set_verbosity_error()
    log.disable_progress_bar()
warnings.simplefilter("error", Image.DecompressionBombWarning)

# This process, as torchrun numbers it.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
BF16 = DEVICE.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
MACHINE = f"{WORLD} x {DEVICE.type} in {'bf16' if BF16 else 'fp32'}"
SILENT = {"disable": True} if RANK > 0 else {}  # else TQDM_DISABLE decides

WARMUP = 0.25  # share of the steps over which lr rises linearly
MAX_GRAD_NORM = 1.0
EMPTY = 0  # index of the empty caption
PROMPTS, SAMPLING_STEPS = 8, 30  # of samples.png
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]  # layers with LoRA
LORA_FILE = "pytorch_lora_weights.safetensors"


# ------------------------------------------- 1. the flags


def number(kind: type, least: float, most: float = 1e12) -> Callable:
    def within(text: str):
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"must be from {least:g} to {most:g}, not {text}")
        return value

    return within


def path(text: str) -> str:
    return str(Path(text).expanduser().absolute())


COUNT, AMOUNT = number(int, 1), number(float, 1e-12)
TINY = str(Path(__file__).parent / "lab" / "tiny-sd")
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
RECIPES = ("tiny", "sd15", "sdxl")
# For each flag its type or choices, what it is where it is not given, perhaps by recipe, and what
# it means. The recipe of tiny was chosen on the validation captions of its world. sd15 has the
# paper's lr and β, and 32 pairs per step where the paper has 2048, so that a run ends within an
# hour on a 24 GB card; sdxl has the paper's 96 and its Adafactor.
FLAGS = {
    "data": (path, None, "a jsonl file, or a folder with a metadata.jsonl"),
    "image_column": (str, "file_name", "column of the pictures' paths, relative to that file"),
    "caption_column": (str, "text", "column of the captions"),
    "model": (str, (TINY, SD15, SDXL), "tiny, sd15, sdxl, a folder or a hub name"),
    "size": (None, (32, 512, 1024), "side of its pictures in pixels"),
    "output": (path, "out", "a new folder"),
    "loss": (("sudo", "dpo", "sft"), "sudo", "dpo: the preference alone; sft: the MSE term alone"),
    "lora": (number(int, 0), 0, "rank of LoRA adapters; 0 trains all weights"),
    "steps": (COUNT, (300, 400, 1000), "updates of the weights"),
    "batch_size": (COUNT, (32, 4, 1), "pairs in a micro-batch of one process"),
    "grad_accum": (COUNT, (1, 8, 96), "micro-batches in a step"),
    "lr": (AMOUNT, (5e-5, 1e-6, 1e-6), "learning rate after the warm-up; for LoRA 10 times this"),
    "sft_lr": (None, (3e-4, 1e-5, 1e-5), "lr of --loss sft, which falls to 0"),
    "lr_schedule": (("constant", "linear"), "constant", "linear falls to 0 at the end"),
    "optimizer": (("adamw", "adafactor"), ("adamw", "adamw", "adafactor"), "of the weights"),
    "beta": (AMOUNT, (400.0, 5000.0, 5000.0), "β; less for a model with larger errors"),
    "caption_dropout": (number(float, 0, 1), 0.2, 'share of the captions replaced by ""'),
    "gradient_checkpointing": (bool, (False, True, True), "less memory for more time"),
    "memory": (None, (0, 21, 33), "GB of a GPU that can train all weights (lab/fit.py)"),
    "guidance": (AMOUNT, (1.0, 7.5, 5.0), "scale of samples.png"),
    "seed": (int, 0, "of everything random"),
    "checkpoint_every": (COUNT, 100, "steps between checkpoints"),
}
Config = make_dataclass("Config", [*FLAGS, "note", "resume"], frozen=True, kw_only=True)


def parse(argv: list[str] | None = None) -> Config:
    """The flags over the recipe of the model; with --resume those of the run that goes on."""
    title = __doc__.split("\n")[0] + " Of three defaults a model has its own: tiny, sd15 or sdxl."
    parser = argparse.ArgumentParser(description=title, argument_default=argparse.SUPPRESS)
    for name, (kind, default, meaning) in FLAGS.items():
        how = {"type": kind} if callable(kind) else {"choices": kind}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        if kind:
            how["help"] = f"{meaning} (default: {default})"
            parser.add_argument("--" + name.replace("_", "-"), **how)
    parser.add_argument("--resume", type=path, help="go on with the run in a folder, by its flags")
    given = vars(parser.parse_args(argv))
    if output := given.pop("resume", None):
        if given:
            parser.error("--resume takes all flags from the run that it resumes: leave out others")
        saved = load_checkpoint(output)["config"]
        return Config(**saved | {"output": output, "resume": True})
    if "data" not in given:
        parser.error("--data is missing, the captions.jsonl of your pictures")

    cuda, note = DEVICE.type == "cuda", ""
    if "model" not in given and not cuda:
        note = "No GPU found: this is the tiny model of lab/, which draws coloured shapes alone. "
    model = given.pop("model", "sd15" if cuda else "tiny")
    known, own = (model, {}) if model in RECIPES else inspect(model)
    column = RECIPES.index(known)
    recipe = {k: v[column] if isinstance(v, tuple) else v for k, (_, v, _) in FLAGS.items()} | own
    if given.get("loss") == "sft":
        recipe |= {"lr": recipe["sft_lr"], "lr_schedule": "linear"}
    size = torch.cuda.get_device_properties(DEVICE).total_memory / 1e9 if cuda else math.inf
    if "lora" not in given and size < recipe["memory"]:
        recipe["lora"], need = 16, recipe["memory"]
        note = f"This GPU has {size:.0f} GB, all weights (--lora 0) need about {need}. "
    if given.get("lora", recipe["lora"]):
        recipe["lr"] *= 10
        if not find_spec("peft"):
            sys.exit("LoRA needs peft: pip install peft, or train all weights by --lora 0.")
    return Config(**{**recipe, "output": path("out"), **given, "note": note, "resume": False})


# ------------------------------------------- 2. the data


def load(from_model: Callable, model: str, **options):
    try:
        return from_model(model, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(
            f"No pipeline could be loaded from {model}: {str(error).strip().splitlines()[0]} (If "
            "all files are of a variant, as *.fp16.safetensors, save it anew without the variant.)"
        )


def inspect(model: str) -> tuple[str, dict]:
    """The recipe that suits a folder or a hub name, by its configuration files, and its own values.

    Exits with the first field that is not what it must be, before anything else is read.
    """
    model = path(model) if os.path.exists(path(model)) else model
    kinds = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "scheduler": DDPMScheduler}
    says = {part: load(kind.load_config, model, subfolder=part) for part, kind in kinds.items()}
    says["pipeline"] = load(DiffusionPipeline.load_config, model)
    added = {"StableDiffusionPipeline": None, "StableDiffusionXLPipeline": "text_time"}
    none = "class_embed_type num_class_embeds encoder_hid_dim time_cond_proj_dim".split()
    channels, whole = says["vae"].get("latent_channels", 4), range(1, 10**5)
    must = {
        "pipeline": {"_class_name": [*added], "text_encoder": [["transformers", "CLIPTextModel"]]},
        "vae": {"_class_name": ["AutoencoderKL"]},
        "unet": {"_class_name": ["UNet2DConditionModel"]}
        | {"addition_embed_type": [added.get(says["pipeline"].get("_class_name"))]}
        | dict.fromkeys(("in_channels", "out_channels"), [channels])
        | dict.fromkeys(("sample_size", "cross_attention_dim"), whole)
        | dict.fromkeys(none, [None]),
        "scheduler": {
            "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
            "prediction_type": ["epsilon", "v_prediction", None],
            "timestep_type": ["discrete", None],
            "use_flow_sigmas": [False, None],
        },
    }
    for part, name in [(part, name) for part, names in must.items() for name in names]:
        if (value := says[part].get(name)) not in (right := must[part][name]):
            right = "a whole number" if right is whole else " or ".join(map(str, right))
            sys.exit(f"{model} cannot be trained: {name} of its {part} is {value}, not {right}.")
    size = says["unet"]["sample_size"] * 2 ** (len(says["vae"]["block_out_channels"]) - 1)
    width = says["unet"]["cross_attention_dim"]
    known = "tiny" if width < 768 else "sd15" if width < 2048 else "sdxl"
    return known, {"model": model, "size": size}


def load_pipeline(model: str) -> DiffusionPipeline:
    """The pipeline in fp32, on the CPU; exits if weights or words are missing from its files."""
    index, parts = load(DiffusionPipeline.load_config, model), {}
    for log in LOGS:  # what the loaders of the parts warn of is for the user
        log.set_verbosity_warning()
    for name in [name for name in index if name in ("vae", "unet") or name.startswith("text_enc")]:
        kind = getattr(sys.modules[index[name][0]], index[name][1])
        given = {"subfolder": name, "dtype": torch.float32, "output_loading_info": True}
        parts[name], info = load(kind.from_pretrained, model, **given)
        if missing := [*info["missing_keys"], *info["mismatched_keys"]]:
            sys.exit(f"{model} lacks {len(missing)} weights of its {name}, such as {missing[0]}.")
    for log in LOGS:
        log.set_verbosity_error()
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    pipe = load(DiffusionPipeline.from_pretrained, model, **parts)
    for name, tokenizer in pipe.components.items():
        if name.startswith("tokenizer"):
            text = parts[name.replace("tokenizer", "text_encoder")].config
            length = getattr(tokenizer, "model_max_length", math.inf)
            if len(tokenizer or ()) < text.vocab_size or length > text.max_position_embeddings:
                sys.exit(f"{model} lacks files of its {name}, or has those of another one.")
    return pipe


class Row(NamedTuple):
    file: Path
    text: str
    digest: str  # of the pixels that the model sees: copies of a picture are one picture


def read_rows(data: str, image_column: str, caption_column: str, size: int) -> list[Row]:
    """The rows of a jsonl, each picture decoded; exits with a line for each faulty row."""
    data = Path(data, "metadata.jsonl") if os.path.isdir(data) else Path(data)
    try:
        lines = data.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"--data wants a jsonl in UTF-8, or a folder with a metadata.jsonl: {error}")
    rows, faults, names = [], [], " (--image-column and --caption-column take other names)"
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                row = json.loads(line)
                for column in (image_column, caption_column):
                    if not isinstance(row, dict) or not isinstance(row.get(column), str):
                        raise ValueError(f"there must be one string under {column!r}{names}")
                    row[column].encode()  # half of a surrogate pair is a ValueError here
                file = data.parent / Path(row[image_column]).expanduser()
                digest = hashlib.sha256(load_picture(file, size).numpy().tobytes()).hexdigest()
                rows.append(Row(file, row[caption_column].strip(), digest))
        except Exception as error:  # Pillow has many names for a broken picture
            faults.append(f"{data}:{number}: {error}")
    if faults or not rows:
        faults[10:] = [f"{data} has {len(rows)} sound rows and {len(faults)} faulty ones."]
        sys.exit("\n".join(faults))
    return rows


def load_picture(file: Path, size: int) -> Tensor:
    """Turned by its EXIF, flattened on white, cropped at the centre: [3, size, size] in -1..1."""
    with Image.open(file) as picture:
        if picture.mode in ("I", "F"):
            raise ValueError("its 32-bit pixels have no agreed range: save it with 8 or 16 bits")
        if picture.mode.startswith("I;16"):  # which Pillow would clip to 8 bits
            picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        with suppress(Exception):  # the pixels may be sound where EXIF is not
            picture = ImageOps.exif_transpose(picture)
        rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    raw = bytearray(ImageOps.fit(flat, (size, size)).tobytes())
    pixels = torch.frombuffer(raw, dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1) / 127.5 - 1


class Data(NamedTuple):
    """Everything the steps read: N rows with M different captions, on the CPU and in fp16."""

    latents: Tensor  # [N, C, h, w], clean and scaled
    losers: Tensor | None  # [N, C, h, w], one for each row; None: drawn from the other rows
    picture: Tensor  # [N], the same number for the same picture
    caption: Tensor  # [N], index into the conditions, the same for the same words
    conditions: dict  # of tensors [1 + M, ...]; SDXL's further ones under "added_cond_kwargs"
    texts: list  # [1 + M], a caption for each condition: "", then in the order of the rows
    num_timesteps: int  # T of the noise schedule


def number_captions(pipe: DiffusionPipeline, rows: list[Row]) -> tuple[list[int], list[str]]:
    """Each row's caption as a number, the same where the model sees the same words, and the texts.

    Tokenizers fold case and spaces and cut what is too long. Number 0, EMPTY, is that of "".
    """
    texts, limit = ["", *(row.text for row in rows)], pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(texts, pipe.tokenizer)).input_ids
    cut = sum(len(each) > limit for each in ids)
    if cut and RANK == 0:
        print(f"{cut} captions have more than {limit} tokens, and the model sees them cut there.")
    words = [(*each[: limit - 1], each[-1]) for each in ids]
    number = {each: i for i, each in enumerate(dict.fromkeys(words))}
    text_of = dict(zip(words[::-1], texts[::-1]))  # the first with these words
    return [number[each] for each in words[1:]], [text_of[each] for each in number]


@torch.no_grad()
def encode(pipe: DiffusionPipeline, rows: list[Row], downgrade: Callable | None = None) -> Data:
    """Each caption through the text encoders and each picture through the VAE, once and for all.

    downgrade makes losers of winners, (B, 3, H, W) pixels in -1..1, as `sudo.blur` does. Without it
    losers are other rows, and this exits if a row finds none.
    """
    caption, texts = number_captions(pipe, rows)
    order = {row.digest: i for i, row in enumerate(rows)}
    picture = [order[row.digest] for row in rows]
    alike, same, both = Counter(picture), Counter(caption), Counter(zip(picture, caption))
    if downgrade is None and len(rows) in (alike[p] + same[c] - both[p, c] for p, c in both):
        sys.exit("Every row needs a loser: a row with other pixels and other words, to the model.")

    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    for encoder in encoders:  # the UNet stays where it is: this has to fit where training does
        encoder.to(DEVICE)
    prompts, one_each = [], {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    for i in tqdm(range(0, len(texts), 32), "encoding captions", **SILENT):
        prompt = pipe.encode_prompt(texts[i : i + 32], device=DEVICE, **one_each)
        prompts.append([part.half().cpu() for part in prompt if part is not None])
    for encoder in encoders:
        encoder.to("cpu")
    words, *pooled = (torch.cat(parts) for parts in zip(*prompts))
    if pipe.config.get("force_zeros_for_empty_prompt"):  # SDXL: so it was trained, and so it guides
        words[EMPTY], pooled[0][EMPTY] = 0, 0
    conditions = {"encoder_hidden_states": words}
    size, vae = pipe.unet.config.sample_size * pipe.vae_scale_factor, pipe.vae.to(DEVICE)
    mean, std, scale = 0.0, 1.0, vae.config.scaling_factor
    if pooled:  # the time ids are original size, crop and target size
        time_ids = torch.tensor([[size, size, 0, 0, size, size]] * len(texts))
        conditions["added_cond_kwargs"] = {"text_embeds": pooled[0], "time_ids": time_ids}
        if vae.config.latents_mean:  # SDXL's pipeline decodes with these, SD's does not
            stats = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=DEVICE)
            mean, std = stats.view(2, 1, -1, 1, 1)

    def to_latents(pixels: Tensor) -> Tensor:
        mode = vae.encode(pixels.to(DEVICE)).latent_dist.mode()
        return ((mode - mean) / std * scale).half().cpu()

    latents, losers, at_once = [], [], 4 if size <= 512 else 1
    for i in tqdm(range(0, len(rows), at_once), "encoding pictures", **SILENT):
        pixels = torch.stack([load_picture(row.file, size) for row in rows[i : i + at_once]])
        latents.append(to_latents(pixels))
        losers += [to_latents(downgrade(pixels))] if downgrade else []
    vae.to("cpu")
    losers, T = torch.cat(losers) if losers else None, pipe.scheduler.config.num_train_timesteps
    picture, caption = torch.tensor(picture), torch.tensor(caption)
    return Data(torch.cat(latents), losers, picture, caption, conditions, texts, T)


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
    losers, unfit = rows.clone(), torch.full((G,), data.losers is None)
    while unfit.any():  # uniform over the rows with another picture and another caption
        losers[unfit] = torch.randint(N, (int(unfit.sum()),), generator=random)
        same_picture = data.picture[losers] == data.picture[rows]
        unfit = same_picture | (data.caption[losers] == data.caption[rows])
    return rows, losers, captions, timesteps, noise


def micro_batches(data: Data, config: Config, step: int) -> Iterator[dict]:
    """What this process passes to the loss, by name, for each micro-batch of a step."""
    rows, losers, captions, timesteps, noise = draw(data, config, step)
    for k in range(config.grad_accum):
        first = (k * WORLD + RANK) * config.batch_size
        mine = slice(first, first + config.batch_size)
        yield {
            "latents": pick(rows[mine], data.latents),
            "losers": pick(losers[mine], data.latents if data.losers is None else data.losers),
            "noise": pick(mine, noise),
            "timesteps": pick(mine, timesteps),
            # An empty caption favours neither image: there is nothing to prefer.
            "pair_weight": pick(mine, (captions != EMPTY).float()),
            **pick(captions[mine], data.conditions),
        }


def pick(rows: Tensor | slice, values: Tensor | dict) -> Tensor | dict:
    """Rows, in fp32 on the device; from pinned memory, which a GPU reads while it computes."""
    if isinstance(values, dict):
        return {name: pick(rows, tensor) for name, tensor in values.items()}
    picked = values[rows].float() if values.is_floating_point() else values[rows]
    picked = picked.pin_memory() if DEVICE.type == "cuda" else picked
    return picked.to(DEVICE, non_blocking=True)


# ------------------------------------------- 4. the model, its reference, the losses and the loop


def half_precision() -> torch.autocast:
    """bf16 autocast on a GPU whose hardware has it; trained weights stay fp32.

    A pass casts each weight where it uses it; a cache would hold bf16 copies of all of them.
    """
    return torch.autocast(DEVICE.type, torch.bfloat16, BF16, cache_enabled=False)


def held_in_bf16(model: torch.nn.Module) -> torch.nn.Module:
    """Frozen weights that autocast casts in each pass anyway: the same numbers in half the room."""
    for layer in model.modules() if BF16 else ():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and not layer.weight.requires_grad:
            layer.bfloat16()
    return model


def add_adapters(unet: UNet2DConditionModel, config: Config) -> Callable:
    """LoRA beside the frozen weights of the UNet; returns the reference, the UNet without them."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    torch.manual_seed(config.seed)
    # With alpha = rank adapters have the scale 1, as loaders assume where a file holds no alpha.
    lora = LoraConfig(r=config.lora, lora_alpha=config.lora, target_modules=ADAPTED)
    unet.requires_grad_(False).add_adapter(lora)
    layers = [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]

    def reference(*inputs, **kwargs):
        try:
            for layer in layers:  # peft's own switch visits every weight: 30 times as slow
                layer._disable_adapters = True
            return unet(*inputs, **kwargs)
        finally:
            for layer in layers:
                layer._disable_adapters = False

    return reference


def prepare(pipe: DiffusionPipeline, config: Config):
    """The UNet to train and its reference (None for SFT), on the device, and the optimizer."""
    # In eval mode, as the reference is: u then starts at exactly 0, see `frozen_copy`.
    unet, place = pipe.unet.eval(), {"device": DEVICE, "memory_format": torch.channels_last}
    reference = add_adapters(unet, config) if config.lora else None
    if not config.lora and config.loss != "sft":
        reference = held_in_bf16(sudo.frozen_copy(unet)).to(**place)
    held_in_bf16(unet).to(**place)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = [p for p in unet.parameters() if p.requires_grad]
    if config.optimizer == "adamw":
        return unet, reference, torch.optim.AdamW(trained, config.lr, weight_decay=1e-2, fused=True)
    fixed_lr = {"scale_parameter": False, "relative_step": False}
    return unet, reference, Adafactor(trained, config.lr, weight_decay=1e-2, **fixed_lr)


def sft_loss(unet, reference, scheduler, latents, noise, timesteps, pair_weight, **conditions):
    """The MSE term of Eq. 9 alone, on all winners: what SUDO is compared with."""
    del conditions["losers"], conditions["beta"]
    noisy = sudo.add_noise(latents, noise, timesteps, scheduler)
    target = sudo.training_target(latents, noise, timesteps, scheduler)
    loss = (unet(noisy, timesteps, **conditions).sample.float() - target).square().mean()
    return loss, {"pairs": torch.ones_like(pair_weight).sum(), "winner_error": loss.detach()}


LOSSES = {
    "sudo": sudo.sudo_loss,
    "dpo": partial(sudo.sudo_loss, dpo_weight=1.0, mse_weight=0.0),
    "sft": sft_loss,
}


def train(
    unet, optimizer, loss_fn: Callable, batches: Callable, config: Config, start: int = 0
) -> Iterator[dict[str, float]]:
    """Train in place: each `next` takes a step and gives its metrics, over all pairs of it.

    loss_fn(policy, **batch) returns (loss, metrics), as `sudo_loss` does. batches(step) yields this
    process's micro-batches. Raises FloatingPointError before an update that is not finite.
    """
    # Views, so that the buckets of gradients are no second copy of them.
    policy = DistributedDataParallel(unet, gradient_as_bucket_view=True) if WORLD > 1 else unet
    warmup = max(1, round(WARMUP * config.steps))
    for step in range(start, config.steps):
        began, sums = time.perf_counter(), 0
        for k, batch in enumerate(batches(step)):
            # Processes average their gradients once per step, in its last backward pass.
            apart = WORLD > 1 and k + 1 < config.grad_accum
            with policy.no_sync() if apart else nullcontext():
                with half_precision():
                    loss, metrics = loss_fn(policy, **batch)
                (loss / config.grad_accum).backward()
            pairs = metrics.pop("pairs")  # the number that the other metrics are means over
            part = loss.detach() / (config.grad_accum * WORLD)
            sums = sums + torch.stack([part, pairs, *(pairs * mean for mean in metrics.values())])
        if WORLD > 1:
            dist.all_reduce(sums)
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
        # The one place in a step that waits for the GPU: nothing infinite may reach the weights.
        loss, pairs, *totals, norm = torch.cat([sums, norm[None]]).tolist()
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"the loss of step {step} is {loss}, its gradient norm {norm}")

        # A linear warm-up; then lr stays (as in the paper) or falls linearly to 0.
        rest = (config.steps - step) / max(1, config.steps - warmup)
        falls = rest if config.lr_schedule == "linear" else 1.0
        lr = config.lr * min(1.0, (step + 1) / warmup, falls)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        row = {"step": step, "lr": lr, "loss": loss, "grad_norm": norm, "pairs": pairs}
        row |= {name: total / max(pairs, 1) for name, total in zip(metrics, totals)}
        yield row | {"seconds": time.perf_counter() - began}


# ------------------------------------------- 5. the run, and what it leaves behind


@contextmanager
def claimed(output: Path, resume: bool) -> Iterator[None]:
    """Hold the folder for this run alone; it goes again if the run ends without a checkpoint."""
    # What a killed run left before its first checkpoint gives way to the next.
    leftovers = {".lock", "metrics.jsonl", "samples.png", "checkpoint.unfinished", "step"}
    try:
        found = {f.name.split("-")[0] for f in output.iterdir()} if output.exists() else set()
        if not resume and found - leftovers:
            sys.exit(f"{output} is in use: name a new --output, or go on by --resume {output}.")
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock")
        lock.acquire(blocking=False)
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        sys.exit(f"{output} cannot be written to, or another run does: {error}")
    try:
        yield
    finally:
        lock.release()
        if not (output / "checkpoint.pt").exists():
            shutil.rmtree(output, ignore_errors=True)


def depends_on(pipe: DiffusionPipeline, rows: list[Row]) -> dict:
    """What the steps depend on beside the flags: a run is resumed only where it is the same."""
    data = zlib.crc32(repr([(row.text, row.digest) for row in rows]).encode())
    model = zlib.crc32(repr(sorted(pipe.scheduler.config.items())).encode())
    for part in (part for part in pipe.components.values() if isinstance(part, torch.nn.Module)):
        for weight in part.state_dict().values():
            model = zlib.crc32(weight.flatten().view(torch.uint8).numpy(), model)
    return {"data": f"{len(rows)} rows ({data:08x})", "model": f"{model:08x}", "machine": MACHINE}


def load_checkpoint(output: str) -> dict:
    try:
        return torch.load(Path(output, "checkpoint.pt"), "cpu", weights_only=True, mmap=True)
    except OSError:
        sys.exit(f"{output} holds no checkpoint to resume.")


def save_checkpoint(output: Path, **state) -> None:
    """Written beside, then renamed: a checkpoint is whole or not there at all."""
    beside = output / "checkpoint.unfinished"
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, output / "checkpoint.pt")


def save_trained(pipe: DiffusionPipeline, config: Config, folder: Path) -> None:
    """What is trained, as diffusers saves it: the LoRA file or the UNet."""
    if not config.lora:
        return pipe.unet.save_pretrained(folder)
    from peft.utils import get_peft_model_state_dict

    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))


def save_pipeline(pipe: DiffusionPipeline, config: Config) -> None:
    """The whole pipeline, with the adapters fused into its UNet and the LoRA file beside it."""
    if config.lora:
        save_trained(pipe, config, config.output)
        # Anew in fp32: in weights that are held in bf16 small updates would be rounded away.
        pipe.unet = UNet2DConditionModel.from_pretrained(config.model, subfolder="unet")
        pipe.unet.load_lora_adapter(config.output, weight_name=LORA_FILE, prefix="unet")
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
    pipe.save_pretrained(config.output)


@torch.no_grad()
def sample(pipe: DiffusionPipeline, data: Data, config: Config) -> list[Image.Image]:
    """A picture for each of the first captions, from fixed seeds, by the UNet as it is held."""
    text = [name for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))]
    drawing, pictures = copy.copy(pipe), []
    drawing.register_modules(**dict.fromkeys(text))  # captions are encoded, so none of these works
    drawing.set_progress_bar_config(desc="sampling", leave=False)
    pipe.vae.to(DEVICE).use_tiling = config.size > 512
    pipe.vae.tile_sample_min_size = 512
    pipe.vae.tile_latent_min_size = 512 // pipe.vae_scale_factor
    for i, number in enumerate(range(1, len(data.texts))[:PROMPTS] or [EMPTY]):
        given = {"guidance_scale": config.guidance, "num_inference_steps": SAMPLING_STEPS}
        for prefix, row in (("", number), ("negative_", EMPTY)):
            condition = pick(torch.tensor([row]), data.conditions)
            given[prefix + "prompt_embeds"] = condition["encoder_hidden_states"]
            if added := condition.get("added_cond_kwargs"):
                given[prefix + "pooled_prompt_embeds"] = added["text_embeds"]
        with half_precision():
            rng = torch.Generator().manual_seed(config.seed + i)
            pictures += drawing(**given, generator=rng).images
    pipe.vae.to("cpu")
    return pictures


def run(config: Config) -> None:
    output, columns = Path(config.output), (config.image_column, config.caption_column)
    rows = read_rows(config.data, *columns, config.size)
    what = f"LoRA of rank {config.lora}" if config.lora else "all weights"
    if RANK == 0:
        print(
            f"{config.note}{config.loss}: {what} of {config.model} on {len(rows)} pictures, "
            f"{config.steps} steps of {config.batch_size * config.grad_accum * WORLD} pairs, "
            f"lr {config.lr:g}, β {config.beta:g}, on {MACHINE}."
        )
    pipe = load_pipeline(config.model)
    this, saved = depends_on(pipe, rows), load_checkpoint(output) if config.resume else {}
    for name, was in saved.get("depends_on", this).items():
        if was != this[name]:
            sys.exit(f"{output} cannot be resumed: its {name} was {was} and is {this[name]}.")
    data = encode(pipe, rows)
    unet, reference, optimizer = prepare(pipe, config)
    before = sample(pipe, data, config) if RANK == 0 else []
    done, log = saved.get("step", 0), output / "metrics.jsonl"
    if saved:
        unet.load_state_dict(saved["trained"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
    if RANK == 0:
        kept = log.read_text().splitlines(keepends=True)[:done] if log.exists() else []
        log.write_text("".join(kept))

    given = {"reference": reference, "scheduler": pipe.scheduler, "beta": config.beta}
    loss_fn, batches = partial(LOSSES[config.loss], **given), partial(micro_batches, data, config)
    steps = train(unet, optimizer, loss_fn, batches, config, done)
    bar = tqdm(steps, config.loss, initial=done, total=config.steps, **SILENT)
    for metrics in bar:
        done = metrics["step"] + 1
        seen = metrics.keys() & {"loss", "margin", "implicit_acc"}
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in sorted(seen)})
        if RANK > 0:
            continue
        with log.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if done % config.checkpoint_every == 0 or done == config.steps:
            pictures = before + sample(pipe, data, config)
            make_image_grid(pictures, 2, len(before), 192).save(output / "samples.png")
            if done < config.steps:  # what one goes back to if training goes too far
                save_trained(pipe, config, output / f"step-{done:06d}")
            trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
            state = {"step": done, "trained": trained, "optimizer": optimizer.state_dict()}
            save_checkpoint(output, **state, config=asdict(config), depends_on=this)
    if RANK == 0:
        save_pipeline(pipe, config)
        print(
            f"DiffusionPipeline.from_pretrained({config.output!r}) loads it; see samples.png there."
        )


def main(argv: list[str] | None = None) -> None:
    config = parse(argv)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    if WORLD > 1:
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    with claimed(Path(config.output), config.resume) if RANK == 0 else nullcontext():
        try:
            run(config)
        except torch.OutOfMemoryError:
            sys.exit("Out of GPU memory: --lora 16 or a smaller --batch-size takes less.")
        except FloatingPointError as error:
            sys.exit(f"Stopped, as {error}: begin a new --output with a lower --lr.")
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = error if isinstance(error, OSError) else error.__context__
            if isinstance(error, RuntimeError) and not isinstance(reason, OSError):
                raise
            Path(config.output, "checkpoint.unfinished").unlink(missing_ok=True)
            sys.exit(
                f"{config.output} could not be written: {reason or error}. If a checkpoint is "
                f"in it, that is whole: make room, and go on by --resume {config.output}."
            )
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
