"""Time and memory of a training step, beside the least that its UNet passes take.

    python lab/bench.py                # lab/tiny-sd: three minutes on 2 CPU cores
    python lab/bench.py --model sd15   # without a GPU one step, in 20 GB
    python lab/bench.py --model sdxl   # for a GPU
    python lab/bench.py --fit          # what fits which GPU, counted without one

sd15 and sdxl have their public configurations and random weights, which are as much work as trained
ones, so nothing is downloaded. The rows of a table are interleaved: each takes one step per round,
and a ratio is the median over the rounds. Memory is the peak of a process that runs only one row;
without a GPU that includes setting up, where policy and reference are both there.
"""

import argparse
import copy
import gc
import platform
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

LAB = Path(__file__).parent
sys.path.insert(0, str(LAB.parent))

import sudo  # noqa: E402
import train_tiny  # noqa: E402
from compare import table  # noqa: E402

CUDA = torch.cuda.is_available()
PASSES = 4  # micro-batches in a step of sd15 and sdxl; the recipes have more, for the same cost
ROUNDS = 25
# The attention of a CPU, which torch's FLOP counter does not know: the shapes are a GPU's.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
# Dense bf16 TFLOP/s by the data sheets, and the share of it that training reaches: an assumption.
CARDS = {"RTX 3090": 71, "RTX 4090": 165, "A100": 312}
SHARE = 0.4
ARRANGEMENTS = {  # the simplest first
    "--optimizer adamw": {"optimizer": "adamw", "held": True},
    "--optimizer adamw --precompute-reference": {"optimizer": "adamw", "held": False},
    "--optimizer adafactor": {"optimizer": "adafactor", "held": True},
    "--optimizer adafactor --precompute-reference": {"optimizer": "adafactor", "held": False},
}


# ------------------------------------------- models


def parts(model: str):
    """The UNet and the scheduler, by the names that a pipeline has for them; of tiny all parts."""
    if model == "tiny":
        return DiffusionPipeline.from_pretrained(LAB / "tiny-sd")
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if model == "sd15":
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return SimpleNamespace(unet=unet, scheduler=scheduler)
    unet = UNet2DConditionModel(
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
    return SimpleNamespace(unet=unet, scheduler=scheduler)


def encoders() -> tuple[AutoencoderKL, CLIPTextModel]:
    """VAE and text encoder of SD1.5, which only the official arrangement runs in a step."""
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    return vae, CLIPTextModel(text)


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
        self.unet, self.optimizer = train_tiny.prepare(self.pipe, self.config)
        self.scheduler = self.pipe.scheduler
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

        train = partial(
            train_tiny.train, self.unet, self.optimizer, batches=batches, config=self.config
        )
        errors = torch.rand(2 * batch_size, device=train_tiny.DEVICE)
        self.loss = partial(sudo.sudo_loss, scheduler=self.scheduler, beta=self.config.beta)
        self.sudo_steps = train(partial(self.loss, reference=self.reference))
        self.precomputed_steps = train(partial(self.loss, reference=errors))
        self.sft_steps = train(partial(train_tiny.sft_loss, scheduler=self.scheduler))

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
        tiny = self.config.family == "tiny"
        vae, text = (self.pipe.vae, self.pipe.text_encoder) if tiny else encoders()
        frozen = sudo.frozen_copy(policy), vae, text
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
        for _ in range(self.config.grad_accum):
            winners = torch.rand(B, 3, side, side)
            tokens = torch.randint(text_encoder.config.vocab_size, (B, self.words))
            pixels = torch.cat([winners, winners[torch.randperm(B)]]).to(device, vae.dtype)
            with torch.no_grad():
                x_0 = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                words = text_encoder(tokens.to(device))[0]
            pairs = sudo.make_pairs(self.scheduler, *x_0.chunk(2))
            with train_tiny.half_precision():
                errors = sudo.denoising_error(policy, pairs, words)
            with torch.no_grad():
                ref_errors = sudo.denoising_error(reference, pairs, words)
            loss, metrics = sudo.sudo_objective(errors, ref_errors, self.config.beta, 1.0, 0.0)
            (loss / self.config.grad_accum).backward()
            loss.item(), metrics["implicit_acc"].item()
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
    return resident()


def resident() -> float:
    """The most GB that this process has had in memory, since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # it counts in KiB


def alone(function: Callable, *arguments):
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
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            row(bench)
        flops[row] = counter.get_total_flops() / pairs[row]
    for _ in tqdm(range(ROUNDS), "steps in turn"):
        for row in rows:
            times[row].append(seconds(row, bench) / pairs[row])

    rate, floor = matrix_rate(), times[Bench.floor]
    print(f"{batch_size} pairs a pass, {passes} passes a step; matrices: {rate / 1e12:.3g} TFLOP/s")
    lines = []
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
    table(" | ms a pair | × floor | GFLOP a pair | of the matrix rate | peak GB", lines)


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
    lines = []
    for (size, (_, *took)), gigabytes in zip(times.items(), memories):  # the first round warms
        ratio = median(mine / first for mine, first in zip(took, times[sizes[0]][1:]))
        name = f"{size[0]} pairs, latents of {size[1]} x {size[1]}"
        lines.append([name, f"{1e3 * median(took):.3g}", f"{ratio:.2f}", f"{gigabytes:.2f}"])
    table("`train_tiny.py`, a whole step | ms a pair | × the first | peak GB", lines)


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
    return took / pictures, held, resident()


def loader() -> None:
    """The third table: the loader on the sample data and on 10,000 pictures."""
    lines = []
    for pictures in (384, 10_000):
        took, held, peak = alone(encode, pictures)
        lines.append([f"{pictures:,}", f"{1e3 * took:.2g}", f"{held:.2g}", f"{peak:.2f}"])
    table("pictures of 512 x 512, encoded at 32 x 32 | ms a picture | MB held | peak GB", lines)


# ------------------------------------------- what fits which GPU, counted


class Live(TorchDispatchMode):
    """Within it, `now` is the number of bytes in all storages that are alive, and `peak` the most.

    Counted are the outputs of all operations, once for each storage, until it is freed.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.see, result)
        return result

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:  # else a view, or the result of an operation in place
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Within it tensors have a shape and no data, and are cast as by autocast to bf16 on a GPU."""

    def in_fp32(norm: Callable) -> Callable:
        return lambda x, *arguments: norm(x.float(), *arguments)

    norms = {name: in_fp32(getattr(F, name)) for name in ("group_norm", "layer_norm")}
    with (
        FakeTensorMode(),
        mock.patch.object(FakeTensor, "tolist", lambda tensor: [0.0] * tensor.numel()),
        mock.patch.multiple(train_tiny, DEVICE=torch.device("cpu"), BF16=True),
        mock.patch.multiple(F, **norms),  # which autocast leaves in bf16 on a CPU alone
    ):
        yield


def fake_steps(
    model: str,
    batch_size: int,
    grad_accum: int = 2,  # in the second pass there are gradients beside the activations
    loss: str = "sudo",
    optimizer: str = "adamw",
    held: bool = True,  # the reference, or else precomputed
    checkpointing: bool = True,
) -> Iterator[dict]:
    """The trainer's own steps of a model on fake tensors."""
    config = train_tiny.parse(["--data", "none", "--model", model, "--loss", loss])
    config = replace(config, batch_size=batch_size, grad_accum=grad_accum, optimizer=optimizer)
    pipe, B = parts(model), batch_size
    size, width = pipe.unet.config.sample_size, pipe.unet.config.cross_attention_dim
    pipe.unet.to = lambda *_, **__: pipe.unet  # torch cannot move fake weights in place
    unet, optimizer = train_tiny.prepare(pipe, config)
    if not checkpointing:
        unet.disable_gradient_checkpointing()
    latents = torch.randn(B, 4, size, size)
    batch = {"latents": latents, "losers": latents.clone(), "noise": latents.clone()}
    batch |= {"timesteps": torch.zeros(B, dtype=torch.long), "pair_weight": torch.ones(B)}
    batch["encoder_hidden_states"] = torch.randn(B, 77, width)
    if model == "sdxl":
        added = {"text_embeds": torch.randn(B, 1280), "time_ids": torch.zeros(B, 6)}
        batch["added_cond_kwargs"] = added
    loss_fn = partial(train_tiny.sft_loss, scheduler=pipe.scheduler)
    if loss == "sudo":
        loss_fn = partial(sudo.sudo_loss, scheduler=pipe.scheduler, beta=config.beta)
        # Not a `frozen_copy`, which would copy the mode of fake tensors too.
        frozen = parts(model).unet.eval().requires_grad_(False) if held else torch.zeros(2 * B)
        batch["reference"] = frozen
    return train_tiny.train(unet, optimizer, loss_fn, lambda _: [batch] * grad_accum, config)


def counted_peak(model: str, batch_size: int, **arrangement) -> float:
    """GB at the peak of the second step, when the optimizer has its state."""
    with fake_gpu(), Live() as live:
        steps = fake_steps(model, batch_size, **arrangement)
        next(steps), next(steps)
        return live.peak / 1e9


def counted_flop(model: str, **arrangement) -> float:
    """TFLOP of a training step for one pair."""
    with fake_gpu(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        next(fake_steps(model, 1, 1, **arrangement))
        return counter.get_total_flops() / 1e12


def encoding_flop() -> float:
    """TFLOP per pair that the official code adds: it encodes two pictures and a caption."""
    with fake_gpu(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        vae, text_encoder = encoders()
        with torch.no_grad():
            vae.encode(torch.randn(2, 3, 512, 512))
            text_encoder(torch.zeros(1, 77, dtype=torch.long))
        return counter.get_total_flops() / 1e12


def memory(batches: tuple[int, ...] = (1, 2, 4, 8)) -> None:
    """Tables of the memory that a step takes, and of the flags with which it fits a card."""
    rows = list(product(("sd15", "sdxl"), ARRANGEMENTS))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = {
            (model, flags): pool.map(partial(counted_peak, model, **ARRANGEMENTS[flags]), batches)
            for model, flags in rows
        }
        peaks = {row: [*jobs[row]] for row in tqdm(rows, "counting")}
    table(
        f"GB at the peak of a step, counted | {' | '.join(f'--batch-size {B}' for B in batches)}",
        [[f"{m} `{flags}`", *(f"{GB:.1f}" for GB in peaks[m, flags])] for m, flags in rows],
    )

    lines = []
    for gigabytes in (12, 16, 24, 40, 80):
        # A tenth and one GB are left for what is not counted.
        room, line = (gigabytes * 2**30 / 1e9 - 1) / 1.1, [f"{gigabytes} GB"]
        for model in ("sd15", "sdxl"):
            fitting = [
                f"`{flags} --batch-size {max(sizes)}`"
                for flags in ARRANGEMENTS
                if (sizes := [B for B, GB in zip(batches, peaks[model, flags]) if GB < room])
            ]
            line.append(fitting[0] if fitting else "does not fit")
        lines.append(line)
    table("card | sd15 at 512 x 512 | sdxl at 1024 x 1024", lines)


def work() -> None:
    """Tables of the work that a pair takes, and of what follows for the time on some cards."""
    kinds = {
        "SFT": {"loss": "sft"},
        "SUDO": {},
        "SUDO, precomputed reference": {"held": False},
    }
    lines, flop = [], {}
    for model in ("sd15", "sdxl"):
        for name, arrangement in kinds.items():
            for checkpointing in (True, False):
                count = counted_flop(model, checkpointing=checkpointing, **arrangement)
                flop[model, name, checkpointing] = count
            both = [f"{flop[model, name, checkpointing]:.2f}" for checkpointing in (True, False)]
            lines.append([f"{model}, {name}", *both])
    official = flop["sd15", "official arrangement", False] = (
        flop["sd15", "SUDO", False] + encoding_flop()
    )
    lines.append(["sd15, official arrangement", "", f"{official:.2f}"])
    table("TFLOP per pair, counted | with gradient checkpointing | without", lines)

    lines = []
    recipe = train_tiny.RECIPES["sd15"]
    default = recipe["steps"] * recipe["batch_size"] * recipe["grad_accum"]
    for card, rate in CARDS.items():
        for name, checkpointing in (("SUDO", True), ("official arrangement", False)):
            pairs = SHARE * rate / flop["sd15", name, checkpointing]
            hours = [f"{count / pairs / 3600:.3g} h" for count in (default, 2000 * 2048)]
            lines.append([f"{name}, {card} ({rate} TFLOP/s)", f"{pairs:.2g}", *hours])
    head = f"sd15, estimate at {SHARE:.0%} of the card's bf16 rate | pairs per second"
    table(f"{head} | the default run | the paper's run, on one card", lines)
    print(f"The loader delivers {loader_rate():,.0f} pairs of sd15 per second, measured here.")


def loader_rate() -> float:
    """Pairs a second that `micro_batches` cuts out of encoded data as large as SD1.5's."""
    N, B, passes = 2048, 4, 8
    config = train_tiny.parse(["--data", "none", "--model", "sd15"])
    conditions = {"encoder_hidden_states": torch.randn(N + 1, 77, 768).half()}
    index = torch.arange(N)
    latents = torch.randn(N, 4, 64, 64).half()
    data = train_tiny.Data(latents, index, index, conditions, 1000)
    config = replace(config, batch_size=B, grad_accum=passes)
    took = median(
        seconds(lambda step=step: [*train_tiny.micro_batches(data, config, step)])
        for step in range(ROUNDS)
    )
    return B * passes / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("tiny", "sd15", "sdxl"), default="tiny")
    parser.add_argument("--batch-size", type=int, help="pairs a pass; default: the recipe's")
    parser.add_argument("--fit", action="store_true", help="count what fits which GPU, and stop")
    args = parser.parse_args()
    if args.fit:
        memory()
        work()
        return
    tiny = args.model == "tiny"
    batch_size = args.batch_size or train_tiny.RECIPES[args.model]["batch_size"]
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU cores"
    print(
        f"{args.model} on {machine}, {time.strftime('%Y-%m-%d')}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
    if not tiny and not CUDA:
        took = seconds(Bench(args.model, 1, 1).whole_step)
        peak = resident()
        print(f"One step of one pair in fp32: {took:.0f} s and {peak:.1f} GB.")
        return
    steps(args.model, batch_size, 1 if tiny else PASSES)
    gc.collect(), torch.cuda.empty_cache()
    growth(args.model, batch_size)
    if tiny:
        loader()


if __name__ == "__main__":
    main()
