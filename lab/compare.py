"""Does SUDO do here what its paper says? The paper's tables in miniature, on the small world.

    python lab/compare.py  # the cells that lab/results.json lacks
    python lab/report.py   # then: tables and figures

A cell is one training of lab/tiny-sd by the trainer's own loop, and what the judge counts in its
samples. lr and β are chosen from a grid on the validation captions, once for each use of a model,
and each choice is trained from several seeds and judged on two drawings of every test caption. For
one seed all methods on the same pictures see the same rows, noise, timesteps and dropped captions,
and are judged from the same initial noise, so that differences can be paired. Each cell is saved as
it ends, so the command can be stopped and started.
"""

import json
import os
import sys
import zlib
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

LAB = Path(__file__).parent
sys.path.insert(0, str(LAB.parent))

import measure  # noqa: E402
import pairs  # noqa: E402
import sudo  # noqa: E402
import train_tiny  # noqa: E402

RESULTS = LAB / "results.json"
SCALES = ("1", "1.5", "2", "3", "5")  # of guidance; 1 is without
USES = {"guidance 1": ("1",), "best above 1": SCALES[1:], "guidance 5": ("5",)}
CHOSEN_ON = (100, 101)  # seeds of the validation cells
HARMFUL = 5e-5  # the lr of SUDO from which on guidance 5 does harm


# ------------------------------------------- the methods

Setting = namedtuple("Setting", "sft_lr lr beta")  # the first of the SFT before, or 0


@dataclass(frozen=True)
class Method:
    name: str
    loss: str  # of train_tiny.LOSSES
    steps: int
    grid: list  # pairs of lr and β to choose from
    after: "Method | None" = None  # the SFT that comes first
    data: str = "captions.jsonl"  # or "preferred" or "pairs", which the base model draws: pairs.py
    seeds: int = 10  # on the test captions
    lr_schedule: str = "constant"


OF_SFT = [(lr, 0.0) for lr in (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 4e-3)]
OF_SUDO = [(lr, 400.0) for lr in (1e-5, 2e-5, 5e-5, 1e-4)]
OF_DRAWN_SFT = [*OF_SFT, (8e-3, 0.0)]  # so that it goes past its best
OF_DRAWN = [(2e-5, 400.0), (5e-5, 400.0), (1e-4, 400.0), (5e-5, 100.0), (1e-4, 100.0)]

# Steps of equal cost: a pair takes 8 forward passes in SUDO, a backward pass as two, and 3 in SFT.
# Where SFT comes first, each of the two has half of its steps.
BASE = Method("base model", "sft", 0, [(0.0, 0.0)])
SFT = Method("SFT", "sft", 800, OF_SFT, lr_schedule="linear")
SUDO = Method("SUDO", "sudo", 300, [*OF_SUDO, (3e-5, 400.0), (3e-5, 800.0)])
SFT_SUDO = Method("SFT, then SUDO", "sudo", 150, OF_SUDO, SFT)
WITHOUT_MSE = Method("SFT, then SUDO without MSE", "dpo", 150, OF_SUDO, SFT)
# SUDO without its preference: it has SUDO's steps, and the lr that is best for that at guidance 1.
MSE_TERM = Method("the MSE term alone", "sft", 300, [], seeds=3)
# What the paper compares: the base model draws each caption twice, and the judge prefers one.
DRAWN_SFT = replace(SFT, name="SFT on preferred", data="preferred", grid=OF_DRAWN_SFT, seeds=5)
drawn = partial(Method, grid=OF_DRAWN, seeds=5)
METHODS = [BASE, SFT, SUDO, SFT_SUDO, WITHOUT_MSE, MSE_TERM, DRAWN_SFT]
METHODS += [
    drawn("DPO on pairs", "dpo", 300, data="pairs"),
    drawn("SFT, then DPO on pairs", "dpo", 150, after=DRAWN_SFT, data="pairs"),
    drawn("SUDO on preferred", "sudo", 300, data="preferred"),
    drawn("SUDO without MSE on preferred", "dpo", 300, data="preferred"),
    drawn("SFT, then SUDO on preferred", "sudo", 150, after=DRAWN_SFT, data="preferred"),
    drawn("SFT, then SUDO without MSE on preferred", "dpo", 150, after=DRAWN_SFT, data="preferred"),
]


# ------------------------------------------- one cell: train and judge


def train(pipe, data: train_tiny.Data, config: train_tiny.Config):
    """Train pipe.unet by the trainer's own loop. Returns the model that it began with."""
    # In the layout that it trains in: on a GPU the same weights give other last digits in another.
    began_with = sudo.frozen_copy(pipe.unet).to(memory_format=torch.channels_last)
    unet, reference, optimizer = train_tiny.prepare(pipe, config)
    given = {"reference": reference, "scheduler": pipe.scheduler, "beta": config.beta}
    loss_fn = partial(train_tiny.LOSSES[config.loss], **given)
    batches = partial(train_tiny.micro_batches, data, config)
    for _ in train_tiny.train(unet, optimizer, loss_fn, batches, config):
        pass
    return began_with


def after_sft(pipe, data: train_tiny.Data, config: train_tiny.Config) -> None:
    """Train pipe.unet by SFT, or take what another cell's same training left in lab/sft."""
    base = Path(config.model, "unet", "diffusion_pytorch_model.safetensors").read_bytes()
    file = LAB / "sft" / f"{zlib.crc32(repr(config).encode() + base):08x}.pt"
    if not file.exists():
        train(pipe, data, config)
        file.parent.mkdir(exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")  # another process may write the same
        torch.save(pipe.unet.state_dict(), beside)
        beside.rename(file)
    pipe.unet.load_state_dict(torch.load(file, weights_only=True))


def encoded(pipe, column: str, config: train_tiny.Config) -> train_tiny.Data:
    return train_tiny.encode(pipe, train_tiny.read_rows(config.data, column, "text", config.size))


def cell(method: Method, split: str, setting: Setting, seed: int) -> dict:
    """Train the method from tiny-sd and judge it on "validation" or "test"."""
    torch.set_num_threads(1)  # a process for each core is faster than all cores on one tiny model
    # In fp32 on a GPU too, so that its cells can stand beside those of a CPU.
    train_tiny.HALF = None
    torch.backends.cudnn.allow_tf32 = False

    pipe = DiffusionPipeline.from_pretrained(train_tiny.TINY).to(train_tiny.DEVICE)
    on_captions = method.data == SFT.data
    file = LAB.parent / SFT.data if on_captions else pairs.folder(train_tiny.TINY)
    flags = ["--data", str(file), "--model", "tiny"]
    recipe = replace(train_tiny.parse(flags), seed=seed)
    sft = replace(train_tiny.parse([*flags, "--loss", "sft"]), seed=seed)
    own = {"lr": setting.lr, "beta": setting.beta, "lr_schedule": method.lr_schedule}
    config = replace(recipe, loss=method.loss, steps=method.steps, **own)
    data = encoded(pipe, "file_name", config)
    if method.data == "pairs":
        data = data._replace(losers=encoded(pipe, "loser", config).latents)
    pipe.to(train_tiny.DEVICE)

    # The front page shows what the trainer's own recipe draws without guidance, phase by phase. It
    # is drawn when the cell is trained: after a change of the recipe take that cell out.
    of_recipe = method == SFT_SUDO and setting == (sft.lr, recipe.lr, recipe.beta)
    pictured = (method == BASE or of_recipe) and split == "test" and seed == 0
    if method.after:
        after_sft(pipe, data, replace(sft, lr=setting.sft_lr, steps=method.after.steps // 2))
        if pictured:
            keep("after SFT", measure.judge(pipe, split, "1", seed)[1][0])
    reference = train(pipe, data, config)

    # The reference's unconditional branch is asked for where guidance begins to do harm.
    asked = split == "test" and method.loss != "sft" and on_captions and setting.lr == HARMFUL
    result = {}
    for scale in SCALES:
        result[scale], drawings = measure.judge(pipe, split, scale, seed)
        if split == "test":
            result[scale] += measure.spread(*drawings)  # of places, then of sizes
        if pictured and scale == "1":
            keep("base" if method == BASE else "then SUDO", drawings[0])
        if asked and scale != "1":
            with measure.unconditional_branch_of(reference, pipe):
                result[f"{scale} ref"], _ = measure.judge(pipe, split, scale, seed)
    return result | measure.drift(pipe, reference, split)


def keep(name: str, pictures: list) -> None:
    make_image_grid(pictures, 1, len(pictures)).save(LAB / "strips" / f"{name}.png", optimize=True)


# ------------------------------------------- all cells


def key(method: Method, split: str, setting: Setting, seed: int) -> str:
    numbers = "SFT lr {:g} | lr {:g} | β {:g}".format(*setting)
    return f"tiny-sd | {split} | {method.name} | {numbers} | seed {seed}"


def settings(method: Method, cells: dict) -> list[Setting]:
    """The grid of a method, after the SFT that was chosen for guidance 1 on the same pictures."""
    sft_lr = choices(method.after, cells)["guidance 1"].lr if method.after else 0.0
    return [Setting(sft_lr, lr, beta) for lr, beta in method.grid]


def choices(method: Method, cells: dict) -> dict[str, Setting]:
    """By use, the setting with the most whole matches on the validation captions.

    A tie goes to the smaller lr, then to the larger β. KeyError while a cell is missing.
    """
    if method == MSE_TERM:
        return {"guidance 1": choices(SUDO, cells)["guidance 1"]._replace(beta=0.0)}
    whole = {}
    for setting in settings(method, cells):
        both = [cells[key(method, "validation", setting, seed)] for seed in CHOSEN_ON]
        whole[setting] = {scale: fmean(cell[scale][0] for cell in both) for scale in SCALES}

    def rank(setting: Setting, scales: tuple) -> tuple:
        best = max(whole[setting][scale] for scale in scales)
        return round(best, 6), -setting.lr, setting.beta  # the last digits of equal counts differ

    return {use: max(whole, key=partial(rank, scales=scales)) for use, scales in USES.items()}


def validations(methods: list[Method], cells: dict) -> list[tuple]:
    tried = [(method, setting) for method in methods for setting in settings(method, cells)]
    return [(method, "validation", setting, n) for method, setting in tried for n in CHOSEN_ON]


def tests(cells: dict) -> list[tuple]:
    """Seed after seed, so that a run that is stopped leaves as many seeds of each method."""
    return [
        (method, "test", setting, seed)
        for seed in range(10)
        for method in METHODS
        for setting in sorted(set(choices(method, cells).values()))
        if seed < method.seeds
    ]


def save(cells: dict) -> None:
    """Write the cells and what they choose beside, then rename: the file is whole at any time."""
    results = {"cells": cells, "choices": {method.name: {} for method in METHODS}}
    for method in METHODS:
        with suppress(KeyError):  # its grid is not complete
            results["choices"][method.name] = choices(method, cells)
    text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False)
    beside = RESULTS.with_suffix(".unfinished")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.rename(RESULTS)


def run(jobs: list[tuple], cells: dict) -> None:
    """Train and judge the cells that are not there yet, in as many processes as there are cores."""
    workers = os.cpu_count()
    if torch.cuda.is_available():  # of whose memory a process takes up to 2 GB
        workers = min(workers, torch.cuda.get_device_properties(0).total_memory // 2_000_000_000)
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        names = {pool.submit(cell, *job): key(*job) for job in jobs if key(*job) not in cells}
        for future in as_completed(names):
            name = names[future]
            cells[name] = future.result()
            save(cells)
            print(name, *(f"{cells[name][scale][0]:.2f}" for scale in SCALES), flush=True)
    finally:  # after an error or Ctrl-C no further cell begins
        pool.shutdown(cancel_futures=True)


def main() -> None:
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # of the processes
    cells = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]
    save(cells)  # with the choices, where cells came by another way
    torch.set_num_threads(1)  # as in every cell
    pairs.draw(train_tiny.TINY)
    run(validations([method for method in METHODS if not method.after], cells), cells)
    run(validations([method for method in METHODS if method.after], cells), cells)
    run(tests(cells), cells)


if __name__ == "__main__":
    main()
