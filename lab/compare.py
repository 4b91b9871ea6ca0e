"""Does SUDO do here what its paper says? The paper's tables in miniature, on the small world.

    python lab/compare.py           # the cells that lab/results.json lacks, then what follows
    python lab/compare.py --tables  # the tables and figures alone, from lab/results.json

Every method fine-tunes lab/tiny-sd on captions.jsonl by the trainer's own loop, and the world's
judge counts what its samples show. The lr and β of a method are chosen from a grid of four on the
validation captions, with two seeds; then the method is trained from several seeds and judged on two
drawings of every test caption. For one seed all methods on the same pictures see the same rows,
noise, timesteps and dropped captions in the same order, and are judged from the same initial noise,
so that their differences can be paired.

Each cell, one training and its judging, is written to lab/results.json as it ends, so the command
can be stopped and started. Whoever changes a method removes its cells.
"""

import argparse
import base64
import io
import json
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor
from tqdm import tqdm

LAB = Path(__file__).parent
sys.path.insert(0, str(LAB.parent))

import sudo  # noqa: E402
import train_tiny  # noqa: E402
import world  # noqa: E402

RESULTS = LAB / "results.json"
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0)
TINY = train_tiny.TINY
VALIDATION_SEEDS = (100, 101)
SEEDS = range(10)  # of the main rows on the test captions; the rest and other bases have half
SHOWN = 8  # test captions whose samples the pictures show


# ------------------------------------------- the methods


def any_image(rows: Tensor, N: int, rng: torch.Generator) -> Tensor:
    """The loser is any image of the data set."""
    return torch.randint(N, rows.shape, generator=rng)


def official(rows: Tensor, N: int, rng: torch.Generator) -> Tensor:
    """Micro-batches of 8 are permuted, as in the paper's run: one pair in 8 is of one image."""
    return torch.cat([part[torch.randperm(len(part), generator=rng)] for part in rows.split(8)])


@dataclass(frozen=True)
class Method:
    name: str
    loss: str = "sudo"
    steps: int = 300
    sft_first: int = 0  # steps of SFT that come before, with falling lr
    losers: Callable | None = None  # rows of other losers, preferred against under "" too
    every: int = 1  # the preference in each so many steps, the MSE term alone in the others
    settings: dict = field(default_factory=dict)  # of the trainer
    pictures: int = 384  # the first of captions.jsonl
    same_as: str = ""  # the method whose lr and β this one takes over

    @property
    def grid(self) -> list[tuple[float, float]]:
        """(lr, β) to choose from: four of each method."""
        if self.loss == "sft":
            return [(lr, 0.0) for lr in (1e-4, 2e-4, 3e-4, 5e-4)] if self.steps else [(0.0, 0.0)]
        return [(2e-5, 400.0), (3e-5, 400.0), (5e-5, 400.0), (3e-5, 800.0)]


BASE = Method("base model", loss="sft", steps=0)
SFT = Method("SFT", "sft", 800, settings={"lr_schedule": "linear"})
SUDO = Method("SUDO")
AFTER_SFT = {"sft_first": 400, "steps": 150}
SFT_THEN_SUDO = Method("SFT, then SUDO", **AFTER_SFT)
WITHOUT_MSE = Method("SFT, then SUDO without MSE", "dpo", **AFTER_SFT)
SFT_BY_ADAFACTOR = replace(
    SFT, name="SFT, by Adafactor", settings={"lr_schedule": "linear", "optimizer": "adafactor"}
)
MAIN = [
    BASE,
    Method("SFT, equal steps", "sft"),
    Method("SFT, constant lr", "sft", 800),
    SFT,
    Method("SUDO, any image", losers=any_image),
    SUDO,
    Method("SFT, then SUDO, any image", losers=any_image, **AFTER_SFT),
    SFT_THEN_SUDO,
    WITHOUT_MSE,
]
REST = [
    Method("SUDO, the official pairs", losers=official),
    Method("SUDO, loser: blur", settings={"downgrade": "blur"}),
    Method("SUDO, loser: random grid", settings={"downgrade": "random_grid"}),
    Method("SUDO, every 2nd step only", every=2),
    Method("SUDO on 32 pictures", pictures=32, same_as=SUDO.name),
    Method("SFT, then SUDO, on 32 pictures", pictures=32, same_as="SFT, then SUDO", **AFTER_SFT),
    SFT_BY_ADAFACTOR,
    Method("SFT, then SUDO, by Adafactor", settings={"optimizer": "adafactor"}, **AFTER_SFT),
]
HEADLINES = [BASE, SFT, SUDO, SFT_THEN_SUDO, WITHOUT_MSE]  # the rows of README.md
TRIED = [
    Method("SFT, then SUDO, lr falling in both", settings={"lr_schedule": "linear"}, **AFTER_SFT)
]


# ------------------------------------------- one cell: train and judge


def train(pipe, data: train_tiny.Data, config: train_tiny.Config, method: Method):
    """The trainer's own loop, with what the method changes. Returns the model it started from."""
    unet, optimizer = train_tiny.prepare(pipe, config)
    reference = sudo.frozen_copy(unet)
    loss_fn = partial(train_tiny.sft_loss, scheduler=pipe.scheduler)
    if method.loss != "sft":
        weights = train_tiny.WEIGHTS[method.loss]
        given = {"reference": reference, "beta": config.beta, **weights}
        loss_fn = partial(sudo.sudo_loss, scheduler=pipe.scheduler, **given)

    def batches(step: int) -> Iterator[dict]:
        (batch,) = train_tiny.micro_batches(data, config, step)
        if method.losers:
            rows = train_tiny.draw(data, config, step)[0]
            rng = train_tiny.generator(config.seed, "compare", step)
            losers = method.losers(rows, len(data.picture), rng)
            batch["losers"] = train_tiny.pick(losers, data.latents)
            batch["pair_weight"] = torch.ones_like(batch["pair_weight"])
        if step % method.every:  # the MSE term alone
            batch["pair_weight"] = torch.zeros_like(batch["pair_weight"])
        yield batch

    for _ in train_tiny.train(unet, optimizer, loss_fn, batches, config):
        pass
    return reference


def unconditional_branch_of(reference, pipe):
    """Within it, the reference answers the unconditional half of guidance, the policy the other."""
    policy = pipe.unet.forward

    def forward(noisy, timestep, encoder_hidden_states, **kwargs):
        (empty, noisy), (none, words) = noisy.chunk(2), encoder_hidden_states.chunk(2)
        unconditional = reference(empty, timestep, none, **kwargs)[0]
        return (torch.cat([unconditional, policy(noisy, timestep, words, **kwargs)[0]]),)

    return mock.patch.object(pipe.unet, "forward", forward)


def spread(first: list[Image.Image], second: list[Image.Image]) -> tuple[float, float]:
    """Standard deviation of positions and of sizes between two pictures of the same caption.

    In picture widths, from the captions for which both pictures show two things.
    """
    both = [
        (a.things, b.things)
        for a, b in zip(map(world.read, first), map(world.read, second))
        if len(a.things) == len(b.things) == 2
    ]
    pairs = [(a, b) for things in both for a, b in zip(*things)]
    places = torch.tensor([(a.x - b.x, a.y - b.y) for a, b in pairs])
    sizes = torch.tensor([a.size - b.size for a, b in pairs])
    return tuple((d.square().mean() / 2).sqrt().item() for d in (places, sizes))


@torch.no_grad()
def drift(pipe, reference, split: str) -> dict:
    """How the errors on held-out pairs differ from the reference's, over four draws of t and ε."""
    texts, rng = world.captions(split), random.Random(0)
    scenes = [world.draw(world.place(text, rng)) for text in texts]
    pixels = pipe.image_processor.preprocess(scenes).to(pipe.device)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    words, _ = pipe.encode_prompt(texts, pipe.device, 1, False)
    generator = train_tiny.generator("held out")
    held_out = [
        {
            "latents": latents,
            "losers": sudo.random_image(latents, generator),
            "encoder_hidden_states": words,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.randint(1000, (len(texts),), generator=generator),
        }
        for _ in range(4)
    ]
    (e_w, e_l), (r_w, r_l) = (
        torch.stack(
            [train_tiny.pair_errors(unet, pipe.scheduler, **pairs) for pairs in held_out]
        ).chunk(2, dim=1)
        for unet in (pipe.unet, reference)
    )
    margin = (e_l - e_w) - (r_l - r_w)
    return {
        "winner_drift": (e_w - r_w).mean().item(),
        "loser_drift": (e_l - r_l).mean().item(),
        "implicit_acc": ((margin > 0).float() + 0.5 * (margin == 0)).mean().item(),
        "typical_difference": (r_l - r_w).abs().median().item(),
    }


def cell(model: str, method: Method, split: str, lr: float, beta: float, seed: int, sft_lr: float):
    """Train the method from the model and judge it on "validation" or "test"."""
    torch.set_num_threads(1)  # a process for each core is faster than all cores on one tiny model
    config = replace(
        train_tiny.parse(["--data", str(LAB.parent / "captions.jsonl"), "--model", model]),
        **{"loss": method.loss, "lr": lr, "beta": beta, "steps": method.steps, "seed": seed},
        **method.settings,
    )
    pipe = DiffusionPipeline.from_pretrained(config.model)
    rows = train_tiny.read_rows(config.data, config.image_column, config.caption_column)
    data = train_tiny.encode(pipe, rows[: method.pictures], config)
    pipe.to(train_tiny.DEVICE)
    result, pictured = {}, split == "test" and seed == 0
    if method.sft_first:
        first = replace(config, loss="sft", beta=0.0, steps=method.sft_first)
        after_sft(pipe, data, replace(first, lr=sft_lr, lr_schedule="linear"))
        if pictured:
            result["samples after SFT"] = packed(judge(pipe, split, 1.0, seed)[1][0])
    reference = train(pipe, data, config, method)
    for guidance in GUIDANCES:
        name = f"{guidance:g}"
        result[name], drawings = judge(pipe, split, guidance, seed)
        if split == "test":
            result[name] += spread(*drawings)  # of places, then of sizes
            if pictured and guidance == 1:
                result["samples"] = packed(drawings[0])
        if guidance > 1 and method.loss != "sft":
            with unconditional_branch_of(reference, pipe):
                result[f"{name} ref"], _ = judge(pipe, split, guidance, seed)
    return result | drift(pipe, reference, split)


def judge(pipe, split: str, guidance: float, seed: int) -> tuple[list[float], tuple]:
    """Shares of whole matches and of attributes in two drawings of each caption, and these."""
    texts = world.captions(split)
    judged = [world.judge(pipe, texts, guidance, again) for again in (seed, seed + 1000)]
    whole, attributes, drawings = zip(*judged)
    return [fmean(whole), fmean(attributes)], drawings


def after_sft(pipe, data: train_tiny.Data, config: train_tiny.Config) -> None:
    """Train pipe.unet by SFT, or take what another cell's same training left in lab/sft."""
    base = Path(config.model, "unet", "diffusion_pytorch_model.safetensors").read_bytes()
    run = repr((config, len(data.picture), zlib.crc32(base)))
    file = LAB / "sft" / f"{zlib.crc32(run.encode()):08x}.pt"
    if not file.exists():
        train(pipe, data, config, SFT)
        file.parent.mkdir(exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")  # another process may write the same
        torch.save(pipe.unet.state_dict(), beside)
        beside.rename(file)
    pipe.unet.load_state_dict(torch.load(file, weights_only=True))


def packed(pictures: list[Image.Image]) -> str:
    """The first pictures in a row, as a PNG in base64."""
    file = io.BytesIO()
    make_image_grid(pictures[:SHOWN], 1, SHOWN).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# ------------------------------------------- all cells


def key(model: str, method: Method, split: str, lr: float, beta: float, seed: int) -> str:
    return f"{Path(model).name} | {split} | {method.name} | lr {lr:g} | β {beta:g} | seed {seed}"


def run(jobs: list[tuple], results: dict, name: str) -> None:
    """Run the jobs that have no result yet, a process for each core, and save each as it ends."""
    jobs = [job for job in jobs if key(*job) not in results]
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # of the workers
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(cell, *job, sft_lr(job[1], results)): job for job in jobs}
        for future in tqdm(as_completed(running), name, total=len(running), disable=False):
            results[key(*running[future])] = future.result()
            beside = RESULTS.with_suffix(".unfinished")
            text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False)
            beside.write_text(text + "\n", encoding="utf-8")
            beside.rename(RESULTS)


def sft_lr(method: Method, results: dict) -> float:
    """The learning rate of the SFT that comes before: that which SFT alone did best with."""
    if not method.sft_first:
        return 0.0
    by_adafactor = method.settings.get("optimizer") == "adafactor"
    return choice(SFT_BY_ADAFACTOR if by_adafactor else SFT, results).lr


def sweep(method: Method) -> list[tuple]:
    tried = [(lr, beta, seed) for lr, beta in method.grid for seed in VALIDATION_SEEDS]
    return [(TINY, method, "validation", lr, beta, seed) for lr, beta, seed in tried]


def tests(methods: list[Method], seeds: int, results: dict, model: str = TINY) -> list[tuple]:
    """Seed after seed, so that a run that is stopped leaves as many seeds of each method."""
    best = [(m, *choice(m, results)[:2]) for m in methods]
    return [(model, m, "test", *pair, seed) for seed in range(seeds) for m, *pair in best]


def worth(result: dict) -> float:
    """What lr and β are chosen by: whole matches at guidance 1 and at the best guidance."""
    whole = [result[f"{guidance:g}"][0] for guidance in GUIDANCES]
    return whole[0] + max(whole)


class Choice(NamedTuple):
    lr: float
    beta: float
    guidance: str  # that did best on the validation captions
    with_reference: str  # the same with the reference's unconditional branch


def choice(method: Method, results: dict) -> Choice:
    """What did best on the validation captions, over its seeds."""
    method = next((m for m in MAIN if m.name == method.same_as), method)
    cells = {}
    for job in sweep(method):
        cells.setdefault(job[3:5], []).append(results[key(*job)])
    lr, beta = max(cells, key=lambda pair: fmean(map(worth, cells[pair])))

    def best(names: list[str]) -> str:
        return max(names, key=lambda name: fmean(cell[name][0] for cell in cells[lr, beta]))

    plain = [f"{guidance:g}" for guidance in GUIDANCES]
    with_reference = [name for name in cells[lr, beta][0] if name.endswith(" ref")]
    return Choice(lr, beta, best(plain), best(with_reference) if with_reference else "")


# ------------------------------------------- tables and pictures


# 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t."""
    if len(values) < 2:
        return values[0], float("nan")
    t = T_95[len(values) - 2]
    return fmean(values), t * stdev(values) / len(values) ** 0.5


def shown(values: list[float], digits: int = 2) -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(head: str, lines: list[list[str]]) -> None:
    """Print a table in Markdown; the head has its columns between bars."""
    rule = " | ".join("---" for _ in head.split(" | "))
    print("\n".join(f"| {line} |" for line in (head, rule, *map(" | ".join, lines))), end="\n\n")


class Row(NamedTuple):
    """A method's cells on the test captions, by seed, with what was chosen for it."""

    method: Method
    choice: Choice
    cells: dict[int, dict]

    def whole(self, name: str) -> list[float]:
        return [cell[name][0] for cell in self.cells.values()]


def row_of(method: Method, results: dict, model: str = TINY) -> Row:
    chosen = choice(method, results)
    keys = {s: key(model, method, "test", chosen.lr, chosen.beta, s) for s in SEEDS}
    return Row(method, chosen, {s: results[k] for s, k in keys.items() if k in results})


def setting(lr: float, beta: float) -> str:
    return f"{lr:g}, {beta:g}" if beta else f"{lr:g}" if lr else ""


def at(row: Row, name: str) -> str:
    return f"{shown(row.whole(name))} at scale {name.removesuffix(' ref')}" if name else ""


def ahead(row: Row, name: str, sft: Row, sft_name: str) -> str:
    """Whole matches that a method has more than SFT, seed by seed, each at its own scale."""
    pairs = [(row.cells[s], sft.cells[s]) for s in row.cells.keys() & sft.cells.keys()]
    return shown([a[name][0] - b[sft_name][0] for a, b in pairs], 3) if name and pairs else ""


def tables(results: dict) -> None:
    """Print what README.md and lab/README.md show: means over the seeds and 95 % intervals."""
    tiny = Path(TINY).name
    models = tiny, *sorted({k.split(" | ")[0] for k in results if "| test |" in k} - {tiny})
    rows = {}
    for model, method in product(models, MAIN + REST):
        with suppress(KeyError):  # its lr and β are not chosen yet
            rows[model, method.name] = row_of(method, results, model)
    rows = {name: row for name, row in rows.items() if row.cells}
    if not {(tiny, method.name) for method in HEADLINES} <= rows.keys():
        sys.exit("lab/results.json lacks the main rows: run `python lab/compare.py` first.")

    head = "whole matches, test captions | without guidance | with guidance"
    lines = []
    for row in (rows[tiny, method.name] for method in HEADLINES):
        best = (at(row, name) for name in row.choice[2:])
        lines.append([row.method.name, shown(row.whole("1")), *best])
    table(f"{head} | with the reference's unconditional branch", lines)

    head = "whole matches ahead of SFT, paired by seed | base | seeds | guidance 1"
    lines = []
    for (model, name), row in rows.items():
        sft = rows.get((model, SFT.name))
        if row.method not in (BASE, SFT) and sft:
            seeds = len(row.cells.keys() & sft.cells.keys())
            best = (ahead(row, mine, sft, sft.choice.guidance) for mine in row.choice[2:])
            lines.append([name, model, str(seeds), ahead(row, "1", sft, "1"), *best])
    table(f"{head} | each at its own best | with the reference's branch", lines)

    names = [f"{g:g}" for g in GUIDANCES]
    scales = " | ".join(f"guidance {name}" for name in names)
    lines, more = [], []
    for (model, name), row in rows.items():
        name += f", {model}" * (model != tiny)
        lr, beta, own_best, with_reference = row.choice
        values = (shown(row.whole(guidance)) for guidance in names)
        best = at(row, with_reference)
        lines.append([name, str(len(row.cells)), setting(lr, beta), *values, best])
        cells = row.cells.values()
        attributes = (shown([cell[guidance][1] for cell in cells]) for guidance in ("1", "3"))
        drifts = (
            shown([cell[who] for cell in cells], 3) for who in ("winner_drift", "loser_drift")
        )
        accuracy = shown([cell["implicit_acc"] for cell in cells])
        more.append([name, ", ".join(attributes), ", ".join(drifts), accuracy])
        for guidance in ("1", own_best):
            measured = [cell[guidance][2:] for cell in cells if cell[guidance][2:]]
            spreads = (shown([values[i] for values in measured], 3) for i in (0, 1))
            more[-1].append(", ".join(spreads) if len(measured) > 1 else "")
    rng = random.Random(0)
    scenes = [world.draw(world.place(text, rng)) for text in world.captions("test") * 2]
    own = ", ".join(f"{value:.3f}" for value in spread(scenes[:108], scenes[108:]))
    more.append(["(the world's own scenes)", "", "", "", own, ""])
    table(f"whole matches | seeds | lr, β | {scales} | best, reference's branch", lines)
    head = " | attributes at guidance 1, 3 | drift of winners, losers | implicit accuracy"
    table(f"{head} | spread of places, sizes at guidance 1 | at its own best", more)

    lines = []
    for method in MAIN + REST + TRIED:
        for lr, beta in () if method.same_as else method.grid:
            keys = [key(TINY, method, "validation", lr, beta, seed) for seed in VALIDATION_SEEDS]
            if all(k in results for k in keys):
                values = (fmean(results[k][name][0] for k in keys) for name in names)
                lines.append([method.name, setting(lr, beta), *(f"{v:.2f}" for v in values)])
    table(f"whole matches, validation captions | lr, β | {scales}", lines)
    base = results[key(TINY, BASE, "validation", 0.0, 0.0, 100)]["typical_difference"]
    print(f"Base model: median |e_w - e_l| {base:.4f}, one unit of u at β = {2 / base:.0f}")


def show(grid: list[list[Image.Image]], names: list[str], texts: list[str]):
    """Rows of pictures, a name beside each row and the captions on top, as a figure.

    A picture that does not match its caption has a red frame.
    """
    import matplotlib.pyplot as plt

    size = 1.7 * len(texts), 1.6 * len(grid) + 0.4
    figure, axes = plt.subplots(len(grid), len(texts), figsize=size, squeeze=False)
    for row, pictures in enumerate(grid):
        axes[row, 0].set_ylabel(names[row], rotation=0, ha="right", va="center")
        for axis, picture, text in zip(axes[row], pictures, texts):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            if not world.score(picture, text)[0]:
                axis.spines[:].set(color="red", linewidth=3)
    for axis, text in zip(axes[0], texts):
        lines = text.replace(" left of ", "\nleft of ").replace(" on a ", "\non a ")
        axis.set_title(lines, fontsize=8)
    figure.tight_layout(pad=0.3, w_pad=0.8, h_pad=0.8)
    return figure


def before_and_after(results: dict):
    """What seed 0 of the recipe drew without guidance for the first of the test captions."""
    base, recipe = (row_of(method, results).cells[0] for method in (BASE, SFT_THEN_SUDO))
    rows = {
        "base": base["samples"],
        "after SFT": recipe["samples after SFT"],
        "then SUDO": recipe["samples"],
    }
    grid = []
    for png in rows.values():
        strip = Image.open(io.BytesIO(base64.b64decode(png)))
        side = strip.height
        grid.append([strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)])
    return show(grid, list(rows), world.captions("test")[:SHOWN])


def curves(results: dict):
    """Whole matches against the guidance scale, with 95 % intervals, as a figure."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    colours = "0.5", "#0072b2", "#e69f00", "#d55e00", "#009e73"
    for i, (method, colour) in enumerate(zip(HEADLINES, colours)):
        row = row_of(method, results)
        for suffix, style in (("", "o-"), (" ref", "o--")):
            scales = [g for g in GUIDANCES if f"{g:g}{suffix}" in row.cells[0]]
            if not scales:
                continue
            matches = [mean_and_interval(row.whole(f"{g:g}{suffix}")) for g in scales]
            means, halves = zip(*matches)
            beside = [scale + 0.02 * i for scale in scales]  # so that no bar hides another
            label = method.name + (", unconditional branch of the reference" if suffix else "")
            bars = {"fmt": style, "ms": 4, "capsize": 3, "color": colour, "label": label}
            axis.errorbar(beside, means, halves, **bars)
    axis.set_xlabel("guidance scale (1: without guidance)")
    axis.set_ylabel("share of whole matches, test captions")
    axis.legend(frameon=False, fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", nargs="*", default=[], help="folders of further base models")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not args.tables:
        few = len(SEEDS) // 2
        run(sweep(BASE) + sweep(SFT) + sweep(SFT_BY_ADAFACTOR), results, "choosing the lr of SFT")
        for methods, seeds in ((HEADLINES, few), (MAIN, len(SEEDS)), (REST, few)):
            own = [method for method in methods if not method.same_as]
            run([job for method in own for job in sweep(method)], results, "choosing")
            run(tests(methods, seeds, results), results, "comparing")
        for model in args.base:
            again = [BASE, SFT, SFT_THEN_SUDO, WITHOUT_MSE]
            run(tests(again, few, results, model), results, f"comparing on {model}")
        run([job for method in TRIED for job in sweep(method)], results, "trying")
    tables(results)
    curves(results).savefig(LAB / "compare.png", dpi=120)
    before_and_after(results).savefig(LAB / "before-after.png", dpi=120)


if __name__ == "__main__":
    main()
