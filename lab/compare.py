"""Does SUDO do here what its paper says? The paper's tables in miniature, on the small world.

    python lab/compare.py               # the cells that lab/results.json lacks
    python lab/compare.py --base clean  # and the headline methods on another base model
    python lab/report.py                # then: tables and figures

Every method fine-tunes lab/tiny-sd by the trainer's own loop, and the world's judge counts what its
samples show. lr and β are chosen from a grid on the validation captions, once for sampling without
guidance and once for sampling with it. Each choice is then trained from several seeds and judged on
two drawings of every test caption. For one seed all methods on the same pictures see the same rows,
noise, timesteps and dropped captions in the same order, and are judged from the same initial noise,
so that their differences can be paired.

Each cell, one training and its judging, is written to lab/results.json as it ends, so the command
can be stopped and started. Whoever changes a method removes its cells.
"""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

LAB = Path(__file__).parent
sys.path.insert(0, str(LAB.parent))

import measure  # noqa: E402
import pairs  # noqa: E402
import sudo  # noqa: E402
import train_tiny  # noqa: E402

RESULTS, STRIPS = LAB / "results.json", LAB / "strips"
SCALES = ("1", "1.5", "2", "3", "5")  # of guidance; 1 is without
TINY = train_tiny.TINY
FIRST = 400  # steps of SFT where it comes first
CHOSEN_ON = (100, 101)  # seeds of the validation cells


# ------------------------------------------- the methods


def official(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Micro-batches of 8 are permuted, as in the paper's run: one pair in 8 is of one image."""
    return torch.cat([part[torch.randperm(len(part), generator=rng)] for part in rows.split(8)])


def grid(lrs: tuple, *more: tuple[float, float], beta: float = 400.0) -> tuple:
    return *((lr, beta) for lr in lrs), *more


TRIED = grid((2e-5, 3e-5, 5e-5), (3e-5, 800.0))  # of each method alike, unless it says more
GENTLER = (1e-5, 400.0), *TRIED
OF_PAIRS = (
    *grid((1e-5, 2e-5, 5e-5, 1e-4, 2e-4)),
    *grid((2e-5, 5e-5), beta=1600.0),
    *grid((2e-5, 5e-5, 1e-4), beta=100.0),
    *grid((5e-5,), beta=25.0),
)
OF_LORA = grid((2e-4, 5e-4, 1e-3))


@dataclass(frozen=True)
class Method:
    name: str
    loss: str = "sudo"
    steps: int = 300
    grid: tuple = TRIED  # pairs of lr and β to choose from
    after: "Method | None" = None  # the SFT that comes first, with the lr that it does best with
    data: str = "captions.jsonl"  # or "preferred" or "pairs", which the base model draws
    lora: int = 0  # rank; 0 trains all weights
    downgrade: str = ""  # an operator of sudo.py that makes the losers
    losers: Callable | None = None  # rows of other losers, preferred against under "" too
    pictures: int = 384  # the first of captions.jsonl
    like: "Method | None" = None  # the method whose lr and β this one takes over
    seeds: int = 5  # on the test captions


BASE = Method("base model", "sft", 0, grid=((0.0, 0.0),), seeds=10)
SFT = Method("SFT", "sft", 800, grid=grid((1e-4, 2e-4, 3e-4, 5e-4), beta=0.0), seeds=10)
SUDO = Method("SUDO", grid=GENTLER, seeds=10)
FROM_SFT = {"steps": 150, "after": SFT}
SFT_SUDO = Method("SFT, then SUDO", grid=GENTLER, seeds=10, **FROM_SFT)
WITHOUT_MSE = Method("SFT, then SUDO without MSE", "dpo", grid=GENTLER, seeds=10, **FROM_SFT)
HEADLINES = [BASE, SFT, SUDO, SFT_SUDO, WITHOUT_MSE]

# What the paper compares, on pairs.py: the base model draws, and the judge prefers.
OF_DRAWN_SFT = grid((5e-5, 1e-4, 2e-4, 3e-4, 5e-4), beta=0.0)
DRAWN_SFT = Method("SFT on preferred", "sft", 800, grid=OF_DRAWN_SFT, data="preferred")
PREFERRED = {"grid": OF_PAIRS, "seeds": 10, "data": "preferred"}
PAIRS = PREFERRED | {"data": "pairs"}
AFTER = {"steps": 150, "after": DRAWN_SFT}
DPO = Method("DPO on pairs", "dpo", **PAIRS)
SFT_DPO = Method("SFT, then DPO on pairs", "dpo", **AFTER, **PAIRS)
AGAINST_LABELS = {  # a method that sees the preferred pictures alone: what it is compared with
    Method("SUDO on preferred", **PREFERRED): DPO,
    Method("SUDO without MSE on preferred", "dpo", **PREFERRED): DPO,
    Method("SFT, then SUDO on preferred", **AFTER, **PREFERRED): SFT_DPO,
    Method("SFT, then SUDO without MSE on preferred", "dpo", **AFTER, **PREFERRED): SFT_DPO,
}
LABELLED = [DRAWN_SFT, DPO, SFT_DPO, *AGAINST_LABELS]
LORA_SFT = Method("SFT by LoRA", "sft", 800, grid=grid((1e-3, 3e-3, 1e-2), beta=0.0), lora=16)
LORA = [
    LORA_SFT,
    Method("SFT, then SUDO, by LoRA", grid=OF_LORA, lora=16, steps=150, after=LORA_SFT),
]
LOSERS = [
    Method("SUDO, the official pairs", losers=official),
    Method("SUDO, loser: blur", downgrade="blur"),
    Method("SUDO, loser: random grid", downgrade="random_grid"),
    Method("SFT, then SUDO, on 32 pictures", pictures=32, like=SFT_SUDO, **FROM_SFT),
]
METHODS = [*HEADLINES, *LABELLED, *LORA, *LOSERS]
ON_OTHER_BASES = [BASE, SFT, SFT_SUDO, WITHOUT_MSE, DPO]


# ------------------------------------------- one cell: train and judge


def train(pipe, data: train_tiny.Data, config: train_tiny.Config, losers: Callable | None = None):
    """The trainer's own loop, with losers of the method's. Returns the model that it began with."""
    # In the layout that it trains in: on a GPU the same weights give other last digits in another.
    began_with = sudo.frozen_copy(pipe.unet).to(memory_format=torch.channels_last)
    unet, reference, optimizer = train_tiny.prepare(pipe, config)
    given = {"reference": reference, "scheduler": pipe.scheduler, "beta": config.beta}
    loss_fn = partial(train_tiny.LOSSES[config.loss], **given)

    def batches(step: int) -> Iterator[dict]:
        (batch,) = train_tiny.micro_batches(data, config, step)
        if losers:
            rows = train_tiny.draw(data, config, step)[0]
            others = losers(rows, train_tiny.generator(config.seed, "compare", step))
            batch["losers"] = train_tiny.pick(others, data.latents)
            batch["pair_weight"] = torch.ones_like(batch["pair_weight"])
        yield batch

    for _ in train_tiny.train(unet, optimizer, loss_fn, batches, config):
        pass
    return began_with


def after_sft(pipe, data: train_tiny.Data, config: train_tiny.Config) -> None:
    """Train pipe.unet by SFT, or take what another cell's same training left in lab/sft."""
    base = Path(config.model, "unet", "diffusion_pytorch_model.safetensors").read_bytes()
    run = repr((config, len(data.picture), zlib.crc32(base)))
    file = LAB / "sft" / f"{zlib.crc32(run.encode()):08x}.pt"
    if not file.exists():
        began_with = train(pipe, data, config)
        if config.lora:  # fused, so that the reference of what follows is the result of SFT
            from peft.utils import get_peft_model_state_dict

            adapters = get_peft_model_state_dict(pipe.unet)
            pipe.unet = began_with  # in fp32, where the weights beneath may be held in bf16
            pipe.unet.load_lora_adapter(adapters, prefix=None)
            pipe.unet.fuse_lora()
            pipe.unet.unload_lora()
        file.parent.mkdir(exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")  # another process may write the same
        torch.save(pipe.unet.state_dict(), beside)
        beside.rename(file)
    pipe.unet.load_state_dict(torch.load(file, weights_only=True))


def data_of(pipe, method: Method, config: train_tiny.Config) -> train_tiny.Data:
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    rows = train_tiny.read_rows(config.data, "file_name", "text", size)[: method.pictures]
    swaps = train_tiny.generator(config.seed, "swaps")
    operators = {"blur": sudo.blur, "random_grid": partial(sudo.random_grid, generator=swaps)}
    data = train_tiny.encode(pipe, rows, operators.get(method.downgrade))
    if method.data == "pairs":
        worse = train_tiny.read_rows(config.data, "loser", "text", size)
        data = data._replace(losers=train_tiny.encode(pipe, worse).latents)
    return data


def cell(model: str, method: Method, split: str, lr: float, beta: float, seed: int, sft_lr: float):
    """Train the method from the model and judge it on "validation" or "test"."""
    torch.set_num_threads(1)  # a process for each core is faster than all cores on one tiny model
    # In fp32 on a GPU too, so that its cells can stand beside those of a CPU.
    train_tiny.BF16 = torch.backends.cudnn.allow_tf32 = False
    pipe = DiffusionPipeline.from_pretrained(model).to(train_tiny.DEVICE)
    data = LAB.parent / method.data if method.data == SFT.data else pairs.drawn(pipe, model)
    recipe = train_tiny.parse(["--data", str(data), "--model", model])
    constant = {"lora": method.lora, "seed": seed, "lr_schedule": "constant"}
    own = {"loss": method.loss, "lr": lr, "beta": beta, "steps": method.steps}
    first = {"loss": "sft", "lr": sft_lr, "beta": 0.0, "steps": FIRST, "lr_schedule": "linear"}
    if method.loss == "sft":
        own["lr_schedule"] = "linear"
    encoded = data_of(pipe, method, replace(recipe, **constant))
    pipe.to(train_tiny.DEVICE)

    # The front page shows what the trainer's own recipe draws, phase by phase.
    of_the_recipe = method in (BASE, SFT_SUDO) and lr in (0.0, recipe.lr)
    pictured = of_the_recipe and (model, split, seed) == (TINY, "test", 0)
    result = {}
    if method.after:
        after_sft(pipe, encoded, replace(recipe, **constant | first))
        if pictured:
            keep("after SFT", measure.judge(pipe, split, "1", seed)[1][0])
    reference = train(pipe, encoded, replace(recipe, **constant | own), method.losers)
    for scale in SCALES:
        result[scale], drawings = measure.judge(pipe, split, scale, seed)
        if split == "test":
            result[scale] += measure.spread(*drawings)  # of places, then of sizes
        if pictured and scale == "1":
            keep("then SUDO" if method.after else "base", drawings[0])
        # Asked where guidance does harm: at the lr that is best without it, on captions.jsonl.
        asked = method.loss != "sft" and method.data == SFT.data and lr == recipe.lr
        if scale != "1" and asked:
            with measure.unconditional_branch_of(reference, pipe):
                result[f"{scale} ref"], _ = measure.judge(pipe, split, scale, seed)
    return result | measure.drift(pipe, reference, split)


def keep(name: str, pictures: list[Image.Image]) -> None:
    STRIPS.mkdir(exist_ok=True)
    make_image_grid(pictures, 1, len(pictures)).save(STRIPS / f"{name}.png", optimize=True)


def kept(name: str) -> list[Image.Image]:
    with Image.open(STRIPS / f"{name}.png") as strip:
        side = strip.height
        return [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]


# ------------------------------------------- lr and β


def key(model: str, method: Method, split: str, lr: float, beta: float, seed: int, *_) -> str:
    return f"{Path(model).name} | {split} | {method.name} | lr {lr:g} | β {beta:g} | seed {seed}"


def validation(method: Method, results: dict) -> dict[tuple[float, float], dict[str, float]]:
    """Whole matches by lr and β, then by name of the scale. KeyError where a cell is missing."""
    jobs = {s: [(TINY, method, "validation", *s, n) for n in CHOSEN_ON] for s in method.grid}
    cells = {setting: [results[key(*job)] for job in jobs[setting]] for setting in jobs}
    return {
        setting: {
            name: fmean(cell[name][0] for cell in cells[setting])
            for name in cells[setting][0]
            if name.removesuffix(" ref") in SCALES
        }
        for setting in cells
    }


def guided(whole: dict[str, float]) -> float:
    return max(whole[scale] for scale in SCALES[1:])


def choices(method: Method, results: dict) -> tuple[tuple, tuple]:
    """(lr, β) for sampling without guidance and for sampling with it, by the validation captions.

    With guidance: the best at any scale above 1, of those that at guidance 5 are not worse than
    SFT on the same pictures; if all are worse, the best at 5. KeyError where a cell is missing.
    """
    tried = validation(method.like or method, results)
    without = max(tried, key=lambda setting: tried[setting]["1"])
    harmless = tried
    if method.loss != "sft":
        sft = SFT if method.data == SFT.data else DRAWN_SFT
        floor = max(validation(sft, results).values(), key=guided)["5"]
        harmless = {setting: whole for setting, whole in tried.items() if whole["5"] >= floor}
    if harmless:
        return without, max(harmless, key=lambda setting: guided(harmless[setting]))
    return without, max(tried, key=lambda setting: tried[setting]["5"])


def sft_lr(method: Method, results: dict) -> float:
    """The lr of the SFT that comes first: SFT's best by the sum of both uses."""
    if not method.after:
        return 0.0
    tried = validation(method.after, results)
    return max(tried, key=lambda s: tried[s]["1"] + max(tried[s]["1"], guided(tried[s])))[0]


# ------------------------------------------- all cells


def plan(results: dict, bases: list[str]) -> Iterator[tuple]:
    """All cells, those of most worth first; some can only be named once others have ended."""
    for methods in (HEADLINES, LABELLED, LORA, LOSERS):
        for method in methods:
            with suppress(KeyError):  # the SFT that comes first has not chosen
                first = sft_lr(method, results)
                for n in () if method.like else CHOSEN_ON:
                    yield from ((TINY, method, "validation", *s, n, first) for s in method.grid)
        yield from tests(methods, TINY, results)
    for base in bases:
        yield from tests(ON_OTHER_BASES, base, results)


def tests(methods: list[Method], model: str, results: dict) -> Iterator[tuple]:
    """Seed after seed, so that a run that is stopped leaves as many seeds of each method."""
    for seed in range(10):
        for method in methods:
            with suppress(KeyError):
                first = sft_lr(method, results)
                if seed < (method.seeds if model == TINY else 5):
                    for setting in dict.fromkeys(choices(method, results)):
                        yield (model, method, "test", *setting, seed, first)


def run(results: dict, bases: list[str]) -> None:
    """Whenever a process is free it takes the first cell of the plan that is not there yet."""
    workers = os.cpu_count()
    if torch.cuda.is_available():  # of whose memory a process takes up to 2 GB
        workers = min(workers, torch.cuda.get_device_properties(0).total_memory // 2_000_000_000)
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # of the workers
    running = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        while True:
            for job in plan(results, bases):
                if len(running) < workers and key(*job) not in {*results, *running.values()}:
                    running[pool.submit(cell, *job)] = key(*job)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                results[name] = future.result()
                print(name, *(f"{results[name][scale][0]:.2f}" for scale in SCALES), flush=True)
                text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False)
                beside = RESULTS.with_suffix(".unfinished")
                beside.write_text(text + "\n", encoding="utf-8")
                beside.rename(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", nargs="*", default=[], help="folders of further base models")
    bases = parser.parse_args().base
    run(json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}, bases)


if __name__ == "__main__":
    main()
