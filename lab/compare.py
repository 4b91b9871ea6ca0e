"""Does SUDO do here what its paper says? The paper's tables in miniature, on the small world.

    python lab/compare.py --seeds 5  # the cells that lab/results.json lacks, then the tables

Every method fine-tunes lab/tiny-sd on captions.jsonl, and the world's exact judge counts what its
samples show. First each method's lr and β are chosen on the validation captions; then it is trained
from several seeds and judged on the test captions. Of a seed all methods on the same pictures see
the same rows, noise, timesteps and dropped captions in the same order, and all are judged from the
same initial noise.

Each cell, one training and its judging, is written to lab/results.json as it ends, so the command
can be stopped and started; who changes a method removes its cells. The tables and lab/compare.png
are made from that file alone.
"""

import argparse
import base64
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
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
SEEN_ROWS = 32  # the rows that every method trains on; their captions are judged apart
SHOWN = 8  # test captions whose samples the figure shows


# ------------------------------------------- the methods


class Step(NamedTuple):
    """What a method may use to change a step."""

    data: train_tiny.Data
    texts: list[str]  # of all rows of data
    rows: Tensor  # [B], the winners of this step
    rng: torch.Generator


def losers_are(step: Step, rows: Tensor) -> dict:
    return {"losers": train_tiny.pick(rows, step.data.latents)}


def ours(step: Step) -> dict:
    """As train_tiny has it: never the winner's picture or caption, no weight where dropped."""
    return {}


def paper(step: Step) -> dict:
    """The loser is any image of the data set; the preference holds under "" too."""
    losers = torch.randint(len(step.texts), step.rows.shape, generator=step.rng)
    return losers_are(step, losers) | {"pair_weight": torch.ones(len(losers))}


def official(step: Step) -> dict:
    """Micro-batches of 8 are permuted, as in the paper's run: one pair in 8 is of one image."""
    losers = [part[torch.randperm(len(part), generator=step.rng)] for part in step.rows.split(8)]
    return losers_are(step, torch.cat(losers)) | {"pair_weight": torch.ones(len(step.rows))}


def without_mse(step: Step) -> dict:
    return {"dpo_weight": 1.0, "mse_weight": 0.0}


def more_mse(step: Step) -> dict:
    return {"mse_weight": 10.0}


def nearest(step: Step) -> dict:
    """The loser's caption is among the nearest: most words are the same in the same places."""
    words = [text.split() for text in step.texts]

    def distance(a: int, b: int) -> float:  # ties are broken at random
        different = sum(x != y for x, y in zip(words[a], words[b]))
        return (different or len(words[a])) + float(torch.rand((), generator=step.rng))

    everything = range(len(words))
    losers = [min(everything, key=lambda b, a=a: distance(a, b)) for a in step.rows.tolist()]
    return losers_are(step, torch.tensor(losers))


class Method(NamedTuple):
    name: str
    grid: list[tuple[float, float]]  # (lr, β) to choose from
    changes: Callable[[Step], dict] = ours  # to the arguments of sudo_loss
    loss: str = "sudo"
    steps: int = 300
    batch_size: int = 32
    pictures: int = 384  # the first of captions.jsonl
    downgrade: str = "random_image"
    loser_gradient: float = 1.0  # its scale; 0: the loser only sets the weight of the winner's
    every: int = 1  # the preference in each so many steps, the MSE alone in the others
    cycle: int | None = None  # after so many steps their draws and reference errors come again

    @property
    def cost(self) -> float:
        """UNet passes for each winner of 300 steps of 32; a backward pass counts as two."""
        reference = 2 * min(1.0, (self.cycle or self.steps) / max(1, self.steps))
        passes = 3 if self.loss == "sft" else 3 + (3 + reference) / self.every
        return passes * self.steps / 300 * self.batch_size / 32


BETAS = [(5e-5, beta) for beta in (100.0, 200.0, 400.0, 800.0, 1600.0)]
RATES = [(lr, 400.0) for lr in (1e-5, 2e-5, 3e-5, 1e-4)]
SOME = [(5e-5, 200.0), (5e-5, 400.0), (5e-5, 800.0), (2e-5, 400.0)]
SMALL = [(5e-5, 400.0), (5e-5, 1600.0), (2e-4, 1600.0)]  # blurred pictures differ by less
SFT = [(1e-4, 0.0), (3e-4, 0.0), (1e-3, 0.0)]

BASE = Method("base model", [(0.0, 0.0)], loss="sft", steps=0)
OURS = Method("SUDO, ours", BETAS + RATES)
TABLE = [
    BASE,
    Method("SFT, equal steps", SFT, loss="sft"),
    Method("SFT, equal compute", SFT, loss="sft", steps=800),
    Method("SUDO, the paper's pairs", SOME, paper),
    Method("SUDO, the official pairs", SOME[1:], official),
    OURS,
    Method("... gentler", [(1e-5, 400.0), (2e-5, 400.0)]),
    Method("... every 2nd step only", [(3e-5, 400.0)], every=2),
    Method("... without the MSE term", SOME[1:], without_mse),
    Method("... loser: blur", SMALL, downgrade="blur"),
    Method("... loser: random grid", SMALL, downgrade="random_grid"),
    Method("... on 128 pictures", [], pictures=128),  # with the choice for all pictures
    Method("... on 32 pictures", [], pictures=32),
]
TRIED = [
    Method("loser: nearest caption", [(3e-5, 400.0)], nearest),
    Method("loser's gradient x 0.5", [(3e-5, 400.0)], loser_gradient=0.5),
    Method("MSE weight x 20", [(2e-4, 1600.0)], more_mse),
    Method("half the pairs a step", [(3e-5, 400.0)], batch_size=16),
    Method("draws again after 60 steps", [(3e-5, 400.0)], cycle=60),
    Method("draws again after 12 steps", [(3e-5, 400.0)], cycle=12),
]


# ------------------------------------------- one cell: train and judge


def train(pipe, data, texts: list[str], config, method: Method) -> None:
    """The trainer's own loop, with what the method changes."""
    unet, scheduler, optimizer = train_tiny.prepare(pipe, config)
    reference, errors = sudo.frozen_copy(unet), {}

    def batches(step: int) -> Iterator[dict]:
        again = step % (method.cycle or method.steps)
        rows = train_tiny.draw(data, config, again)[0]
        (batch,) = train_tiny.micro_batches(data, config, again)
        rng = train_tiny.generator(config.seed, "compare", again)
        if method.loss == "sft" or step % method.every:
            yield batch | {"mse_only": True}
            return
        batch |= method.changes(Step(data, texts, rows, rng))
        if method.cycle and again not in errors:
            errors[again] = train_tiny.pair_errors(reference, scheduler, **batch)
        yield batch | {"reference": errors.get(again, reference)}

    def loss_fn(unet, mse_only: bool = False, **batch) -> tuple[Tensor, dict]:
        if mse_only:
            loss, metrics = train_tiny.sft_loss(unet, scheduler, **batch)
            return (loss / 2 if method.loss == "sudo" else loss), metrics  # λ2

        def policy(*inputs, **kwargs) -> Tensor:
            winners, losers = unet(*inputs, **kwargs).sample.chunk(2)
            return torch.cat([winners, torch.lerp(losers.detach(), losers, method.loser_gradient)])

        return sudo.sudo_loss(policy, scheduler=scheduler, beta=config.beta, **batch)

    for _ in train_tiny.train(unet, optimizer, loss_fn, batches, config):
        pass


@torch.no_grad()
def held_out_pairs(pipe) -> list[dict]:
    """Scenes of the test captions, each with four draws of t and ε; losers are other scenes."""
    texts, rng = world.captions("test"), random.Random(0)
    scenes = [world.draw(world.place(text, rng)) for text in texts]
    raw = torch.frombuffer(bytearray(b"".join(s.tobytes() for s in scenes)), dtype=torch.uint8)
    pixels = raw.view(len(scenes), world.GRID, world.GRID, 3).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    words, _ = pipe.encode_prompt(texts, pipe.device, 1, False)
    generator = train_tiny.generator("held out")
    return [
        {
            "latents": latents,
            "losers": sudo.random_image(latents, generator),
            "encoder_hidden_states": words,
            "noise": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.randint(1000, (len(texts),), generator=generator),
        }
        for _ in range(4)
    ]


def drift(pipe, base) -> dict:
    """How the errors on held-out pairs differ from the base model's."""
    held_out = held_out_pairs(pipe)
    now, before = (
        torch.stack([train_tiny.pair_errors(unet, pipe.scheduler, **pairs) for pairs in held_out])
        for unet in (pipe.unet, base)
    )
    (e_w, e_l), (r_w, r_l) = now.chunk(2, dim=1), before.chunk(2, dim=1)  # each (4, 108)
    margin = (e_l - e_w) - (r_l - r_w)
    return {
        "winner_drift": (e_w - r_w).mean().item(),
        "loser_drift": (e_l - r_l).mean().item(),
        "implicit_acc": ((margin > 0).float() + 0.5 * (margin == 0)).mean().item(),
        "typical_difference": (r_l - r_w).abs().median().item(),
    }


def spread(first: list[Image.Image], second: list[Image.Image]) -> tuple[float, float]:
    """Standard deviation of positions and of sizes between two pictures of the same caption.

    In picture widths, from the captions of whose pictures both show two things.
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


def cell(method: Method, split: str, lr: float, beta: float, seed: int) -> dict:
    """Train the method and judge it on "validation" or "test"."""
    torch.set_num_threads(1)  # a process a core is faster than all cores on so small a model
    config = replace(
        train_tiny.parse(["--data", str(LAB.parent / "captions.jsonl"), "--model", "tiny"]),
        **{"lr": lr, "beta": beta, "seed": seed, "downgrade": method.downgrade},
        **{"steps": method.steps, "batch_size": method.batch_size},
    )
    pipe = DiffusionPipeline.from_pretrained(config.model)
    rows = train_tiny.read_rows(config.data, config.image_column, config.caption_column)
    rows = rows[: method.pictures]
    data = train_tiny.encode(pipe, rows, config)
    pipe.unet.to(memory_format=torch.channels_last)
    base = sudo.frozen_copy(pipe.unet)
    train(pipe, data, [row.text for row in rows], config, method)

    pipe.to(train_tiny.DEVICE)
    result = {}
    for guidance in GUIDANCES:
        texts = world.captions(split)
        *scores, pictures = world.judge(pipe, texts, guidance, seed)
        result[f"{guidance:g}"] = scores
        if split == "test" and guidance in (1.0, 3.0):
            *_, more = world.judge(pipe, texts, guidance, seed + 1000)
            result[f"spread {guidance:g}"] = spread(pictures, more)
            seen = world.judge(pipe, [row.text for row in rows[:SEEN_ROWS]], guidance, seed)
            result[f"seen {guidance:g}"] = seen[:2]
        if split == "test" and guidance == 1.0 and seed == 0:
            result["samples"] = packed(pictures[:SHOWN])
    return result | (drift(pipe.to("cpu"), base) if split == "test" else {})


def packed(pictures: list[Image.Image]) -> str:
    """The pictures in a row, as a PNG in base64."""
    side, file = pictures[0].width, io.BytesIO()
    strip = Image.new("RGB", (side * len(pictures), side))
    for x, picture in enumerate(pictures):
        strip.paste(picture, (x * side, 0))
    strip.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# ------------------------------------------- all cells


def key(method: Method, split: str, lr: float, beta: float, seed: int) -> str:
    return f"{split} | {method.name} | lr {lr:g} | β {beta:g} | seed {seed}"


def run(jobs: list[tuple], results: dict, name: str) -> None:
    """Run the jobs that have no result yet, a process for each core, and save each as it ends."""
    jobs = [job for job in jobs if key(*job) not in results]
    workers = 1 if torch.cuda.is_available() else os.cpu_count()
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # of the workers
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(cell, *job): job for job in jobs}
        for future in tqdm(as_completed(running), name, total=len(running)):
            results[key(*running[future])] = future.result()
            beside = RESULTS.with_suffix(".unfinished")
            beside.write_text(
                json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8"
            )
            beside.rename(RESULTS)


def sweep(methods: list[Method]) -> list[tuple]:
    return [(m, "validation", lr, beta, 0) for m in methods for lr, beta in m.grid]


def worth(result: dict) -> float:
    """What lr and β are chosen by: whole matches at guidance 1 and at the best guidance."""
    whole = [result[f"{guidance:g}"][0] for guidance in GUIDANCES]
    return whole[0] + max(whole)


def choice(method: Method, results: dict) -> tuple[float, float, float]:
    """(lr, β, guidance) that did best on the validation captions."""
    method = method if method.grid else OURS
    jobs = sweep([method])
    best = max(jobs, key=lambda job: worth(results[key(*job)]))
    result = results[key(*best)]
    return *best[2:4], max(GUIDANCES, key=lambda guidance: result[f"{guidance:g}"][0])


# ------------------------------------------- tables and figure


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t."""
    if len(values) < 2:
        return values[0], float("nan")
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(len(values), 10) - 2]
    return fmean(values), t * stdev(values) / len(values) ** 0.5


def shown(values: list[float], digits: int = 2) -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(lines: list[list[str]]) -> None:
    lines[1:1] = [["---"] * len(lines[0])]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), end="\n\n")


def tables(results: dict, seeds: range) -> None:
    """Print what README.md and lab/README.md show: means over the seeds and 95 % intervals."""
    short = [["whole matches, test captions", "passes", "guidance 1", "guidance 3", "own best"]]
    whole = [["whole matches", "lr, β", *(f"guidance {g:g}" for g in GUIDANCES)]]
    more = [["", "attributes at guidance 1, 3", "whole matches of seen captions at 1, 3"]]
    more[0] += ["drift of winners, losers", "implicit accuracy", "spread at 1 of places, sizes"]
    best = {}
    for method in TABLE:
        lr, beta, guidance = choice(method, results)
        cells = [results[key(method, "test", lr, beta, seed)] for seed in seeds]
        matches = {g: [cell[f"{g:g}"][0] for cell in cells] for g in GUIDANCES}
        best[method.name] = matches[guidance]
        line = [method.name, f"{method.cost:.2g}", shown(matches[1.0]), shown(matches[3.0])]
        short.append([*line, f"{shown(matches[guidance])} at {guidance:g}"])
        settings = "" if lr == 0 else f"{lr:g}" if method.loss == "sft" else f"{lr:g}, {beta:g}"
        whole.append([method.name, settings, *(shown(matches[g]) for g in GUIDANCES)])

        def pick(name: str, i: int, cells=cells) -> list[float]:
            return [cell[name][i] for cell in cells]

        drifts = ([cell[f"{who}_drift"] for cell in cells] for who in ("winner", "loser"))
        more.append(
            [
                method.name,
                ", ".join(shown(pick(name, 1)) for name in ("1", "3")),
                ", ".join(shown(pick(f"seen {name}", 0)) for name in ("1", "3")),
                ", ".join(shown(drift, 3) for drift in drifts),
                shown([cell["implicit_acc"] for cell in cells]),
                ", ".join(shown(pick("spread 1", i), 3) for i in (0, 1)),
            ]
        )
    table(short)
    ahead = [a - b for a, b in zip(best[OURS.name], best["SFT, equal compute"])]
    print(f"{OURS.name} less SFT, equal compute, each at its own best: {shown(ahead)}\n")
    base = results[key(BASE, "test", 0.0, 0.0, 0)]["typical_difference"]
    print(f"Base model: median |e_w - e_l| {base:.4f}, one unit of u at β = {2 / base:.0f}\n")
    table(whole)
    rng = random.Random(0)
    scenes = [world.draw(world.place(text, rng)) for text in world.captions("test") * 2]
    own = ", ".join(f"{value:.3f}" for value in spread(scenes[:108], scenes[108:]))
    more.append(["(the world's own scenes)", "", "", "", "", own])
    table(more)
    sweeps = [["validation, one seed: whole matches", "lr, β", *map("{:g}".format, GUIDANCES)]]
    for method in TABLE + TRIED:
        for job in sweep([method]):
            if key(*job) in results:
                values = [f"{results[key(*job)][f'{g:g}'][0]:.2f}" for g in GUIDANCES]
                sweeps.append([method.name, f"{job[2]:g}, {job[3]:g}", *values])
    table(sweeps)


def figure(results: dict, seeds: range) -> None:
    import matplotlib.pyplot as plt

    sizes = {"figsize": (11, 3.8), "width_ratios": (1, 1.1), "layout": "constrained"}
    canvas, (left, right) = plt.subplots(1, 2, **sizes)
    names = ("base model", "SFT, equal compute", "SUDO, the official pairs", "SUDO, ours")
    methods = [next(m for m in TABLE if m.name == name) for name in names]
    strips = []
    for method in methods:
        png = results[key(method, "test", *choice(method, results)[:2], 0)]["samples"]
        strips.append(Image.open(io.BytesIO(base64.b64decode(png))))
    side = strips[0].height
    sheet = Image.new("RGB", (strips[0].width, side * len(strips)))
    for y, strip in enumerate(strips):
        sheet.paste(strip, (0, y * side))
    left.imshow(sheet)
    left.vlines([side * x - 0.5 for x in range(SHOWN + 1)], *left.get_ylim(), "white", lw=3)
    left.hlines([side * y - 0.5 for y in range(len(strips) + 1)], *left.get_xlim(), "white", lw=3)
    left.spines[:].set_visible(False)
    left.set_yticks(
        [side * (y + 0.5) for y in range(len(names))], [n.replace(", ", ",\n") for n in names]
    )
    left.set_xticks([]), left.tick_params(length=0)
    left.set_title("the first eight test captions, guidance 1, seed 0", fontsize=9)

    shades = {"guidance 1": ("0.25", -0.2), "own best guidance": ("0.8", 0.2)}
    for name, (shade, offset) in shades.items():
        for y, method in enumerate(TABLE):
            lr, beta, guidance = choice(method, results)
            guidance = 1.0 if name == "guidance 1" else guidance
            cells = [results[key(method, "test", lr, beta, seed)] for seed in seeds]
            mean, half = mean_and_interval([cell[f"{guidance:g}"][0] for cell in cells])
            label = name if y == 0 else None
            right.barh(y + offset, mean, 0.38, xerr=half, color=shade, edgecolor="k", label=label)
    right.set_yticks(range(len(TABLE)), [method.name for method in TABLE], fontsize=8)
    right.invert_yaxis(), right.set_xlim(0, 1)
    right.set_xlabel(f"share of test pictures that match their caption whole, {len(seeds)} seeds")
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8)
    canvas.savefig(LAB / "compare.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    seeds = range(parser.parse_args().seeds)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    run(sweep(TABLE), results, "choosing")
    chosen = {method.name: choice(method, results)[:2] for method in TABLE}
    run([(m, "test", *chosen[m.name], s) for s in seeds for m in TABLE], results, "comparing")
    run(sweep(TRIED), results, "trying")
    tables(results, seeds)
    figure(results, seeds)


if __name__ == "__main__":
    main()
