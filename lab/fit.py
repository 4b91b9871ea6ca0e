"""What a run takes: memory, work, and what fits which card.

    python lab/fit.py  # counts without a GPU; on a GPU it measures the memory instead

The trainer's own steps run at full width on meta tensors, which have a shape and no data. They take
the place of a card's: the counter follows which of them are alive. models.py has the models.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from multiprocessing import get_context
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import models
import train_tiny
from report import table

CUDA = train_tiny.DEVICE.type == "cuda"
MODELS = ("sd15", "sdxl")
KINDS = ("--lora 16", "--optimizer adafactor", "--optimizer adamw")  # the least memory first
WAYS = ("--gradient-checkpointing", "--no-gradient-checkpointing")
BATCHES = (1, 2, 4, 8)
CARDS = (8, 12, 16, 24, 40, 80)  # GiB
SPARE = 0.3  # GB that a card must have left beyond the allowance for what is not counted
# Dense bf16 TFLOP/s by the data sheets, and the share of it that training reaches: an assumption.
RATES = {"RTX 3090": 71, "RTX 4090": 165, "A100": 312}
SHARE = 0.4


# ------------------------------------------- the counter


class Live(TorchDispatchMode):
    """Within it, `now` is the number of bytes of the device that are alive, and `peak` the most.

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
        # Of a view, or of the result of an operation in place, the storage is alive already.
        if tensor.device.type == train_tiny.DEVICE.type and key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size

    def lap(self) -> float:
        """GB at the peak since the last lap."""
        peak, self.peak = self.peak, self.now
        return peak / 1e9


@contextmanager
def card(low: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Within it the trainer's device is a card of meta tensors, which has bf16.

    torch's autocast knows no meta tensors, so its casts are made here, to low and to fp32.
    """

    def flash(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:  # masks are text encoders' alone
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def cast(function: Callable, dtype: torch.dtype) -> Callable:
        to = partial(tree_map_only, Tensor, lambda tensor: tensor.to(dtype))
        return lambda *args, **kwargs: function(*to(args), **kwargs)

    full = torch.float32
    dtypes = {"linear": low, "conv2d": low, "group_norm": full, "layer_norm": full}
    functions = {name: cast(getattr(F, name), dtype) for name, dtype in dtypes.items()}
    functions["scaled_dot_product_attention"] = cast(flash, low)
    trainer = {"DEVICE": torch.device("meta"), "BF16": True, "half_precision": nullcontext}
    with (
        mock.patch.multiple(F, **functions),
        mock.patch.multiple(train_tiny, **trainer),
        mock.patch("torch.optim.adam._device_dtype_check_for_fused", lambda _: None),
        mock.patch.object(Tensor, "tolist", lambda tensor: [0.0] * tensor.numel()),
    ):
        yield


# ------------------------------------------- what is counted


class Measured:
    """What `Live` counts, read from torch's allocator on a real GPU."""

    now = property(lambda self: torch.cuda.memory_allocated())

    def lap(self) -> float:
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return peak


@contextmanager
def memory_of(low: torch.dtype = torch.bfloat16) -> Iterator[Live | Measured]:
    """The memory of this machine's GPU, or where it has none that of a card of meta tensors."""
    if CUDA:
        yield Measured()
    else:
        with card(low), Live() as live:
            yield live


@torch.no_grad()
def encoding(model: str) -> dict[str, float]:
    """GB for captions, and then for pictures, as many at once as `train_tiny.encode` takes."""
    size, at_once = (512, 4) if model == "sd15" else (1024, 1)
    with memory_of(torch.float32) as live, train_tiny.DEVICE:
        for encoder in (texts := models.text_encoders(model)):
            encoder(torch.zeros(32, 77, dtype=torch.long), output_hidden_states=True)
        captions = live.lap()
        del texts, encoder
        live.lap()
        models.vae(model).encode(torch.zeros(at_once, 3, size, size)).latent_dist.mode()
        return {"captions encoded": captions, "pictures encoded": live.lap()}


def memory(row: str) -> dict:
    """GB at the peak of each part of a run, of a step by its (way of WAYS, size of BATCHES).

    The optimizer has its state from an earlier step, and the second micro-batch of a step finds the
    gradients of the first. A step that does not fit in the memory of a real GPU has infinity.
    """
    model, *flags = row.split()
    peaks = encoding(model)
    with memory_of() as live:
        run = models.random_run(model, "--grad-accum", "1", *flags)
        peaks["weights arrived"] = live.now / 1e9
        next(run.steps())
        for way, B in product(WAYS, BATCHES):
            live.lap()
            run.checkpoint(way == WAYS[0])
            try:
                next(run.change(batch_size=B, grad_accum=2).steps())
                peaks[way, B] = live.lap()
            except torch.OutOfMemoryError:
                peaks[way, B] = math.inf
                run.optimizer.zero_grad()
        live.lap()
        inputs = run.inputs(2)  # two rows, for guidance
        with torch.no_grad(), train_tiny.half_precision(), train_tiny.DEVICE:
            vae = models.vae(model)
            run.unet(**inputs)
            vae.decode(inputs["sample"][:1])
        return peaks | {"a sample drawn": live.lap()}


def work(row: str) -> float:
    """TFLOP of a training step for one pair."""
    model, *flags = row.split()
    with card(), FlopCounterMode(display=False) as counter:
        run = models.random_run(model, "--batch-size", "1", "--grad-accum", "1", *flags)
        next(run.steps())
        return counter.get_total_flops() / 1e12


@torch.no_grad()
def encoding_work() -> float:
    """TFLOP per pair that the official code has besides: it encodes two pictures and a caption."""
    with card(torch.float32), train_tiny.DEVICE, FlopCounterMode(display=False) as counter:
        models.vae("sd15").encode(torch.zeros(2, 3, 512, 512))
        models.text_encoders("sd15")[0](torch.zeros(1, 77, dtype=torch.long))
        return counter.get_total_flops() / 1e12


# ------------------------------------------- the tables


def needed(peaks: dict, way: str, B: int) -> float:
    """GB of the card on which a whole run fits: a tenth and one GB are for what is not counted."""
    run = [GB for part, GB in peaks.items() if isinstance(part, str) or part == (way, B)]
    return 1.1 * (max(run) + SPARE) + 1


def memories(pool: ProcessPoolExecutor) -> None:
    """What the parts of a run take, and the largest micro-batch that fits a card."""
    rows = [" ".join(row) for row in product(MODELS, KINDS)]
    peaks = dict(zip(rows, tqdm(pool.map(memory, rows), "memory", len(rows))))
    lines = [
        [f"`{row} {way}`", *(f"{peaks[row][way, B]:.1f}".replace("inf", "-") for B in BATCHES)]
        for row, way in product(rows, WAYS)
    ]
    sizes = " | ".join(f"`--batch-size {B}`" for B in BATCHES)
    table(f"GB at the peak of a step | {sizes}", lines)

    rest = [part for part in peaks[rows[0]] if isinstance(part, str)]
    lines = [[f"`{row}`", *(f"{peaks[row][part]:.1f}" for part in rest)] for row in rows]
    table(f"GB at the peak of the rest | {' | '.join(rest)}", lines)

    def largest(row: str, way: str, GB: float) -> str:
        return str(max((B for B in BATCHES if needed(peaks[row], way, B) <= GB), default="-"))

    lines = []
    for card in CARDS:
        fit = [[largest(row, way, card * 2**30 / 1e9) for way in WAYS] for row in rows]
        lines.append([f"{card} GB", *("{} ({})".format(*both) for both in fit)])
    head = " | ".join(f"`{row}`" for row in rows)
    table(f"largest `--batch-size`, in brackets that without checkpointing | {head}", lines)

    for model in MODELS:
        recipe = train_tiny.parse(["--data", "none", "--model", model])
        its = peaks[f"{model} --optimizer {recipe.optimizer}"]
        GB = needed(its, WAYS[0], recipe.batch_size)
        print(f"All weights of {model}, by the flags of its recipe: {GB:.1f} GB.\n")


def works(pool: ProcessPoolExecutor) -> None:
    """The work of a pair, and the time that follows from it on some cards."""
    kinds = [" ".join(kind) for kind in product(MODELS, ("--loss sft", "--loss sudo", "--lora 16"))]
    rows = [f"{kind} {way}" for kind, way in product(kinds, WAYS)]
    TFLOP = dict(zip(rows, tqdm(pool.map(work, rows), "work", len(rows))))
    lines = [[f"`{kind}`", *(f"{TFLOP[f'{kind} {way}']:.2f}" for way in WAYS)] for kind in kinds]
    official = TFLOP[f"sd15 --loss sudo {WAYS[1]}"] + encoding_work()
    lines.append(["sd15, the official arrangement", "", f"{official:.2f}"])
    table("TFLOP per pair | with checkpointing | without", lines)

    each = {f"`{kind}`": TFLOP[f"{kind} {WAYS[0]}"] for kind in kinds[1:3]}
    each["the official arrangement"] = official
    recipe = train_tiny.parse(["--data", "none", "--model", "sd15"])
    runs = recipe.steps * recipe.batch_size * recipe.grad_accum, 2000 * 2048
    lines = []
    for (name, rate), kind in product(RATES.items(), each):
        pairs = SHARE * rate / each[kind]
        hours = [f"{count / pairs / 3600:.3g} h" for count in runs]
        lines.append([f"{kind}, {name} ({rate} TFLOP/s)", f"{pairs:.2g}", *hours])
    head = f"estimate at {SHARE:.0%} of the card's bf16 rate | pairs per second"
    table(f"{head} | the default run | the paper's run, on one card", lines)


def main() -> None:
    spawn = get_context("spawn")
    # What a row leaves in the memory of a GPU goes with its process.
    with ProcessPoolExecutor(1 if CUDA else None, spawn, max_tasks_per_child=1) as pool:
        memories(pool)
    with ProcessPoolExecutor(None, spawn) as pool:
        works(pool)


if __name__ == "__main__":
    main()
