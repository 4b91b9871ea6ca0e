"""Does SUDO do here what its paper says? The paper's tables in miniature, on the small world.

    python lab/compare.py --seeds 5  # the cells that lab/results.json lacks, then the tables

Every method fine-tunes lab/tiny-sd on captions.jsonl, and the world's exact judge counts what its
samples show. First each method's lr and β are chosen on the validation captions; then it is trained
from several seeds and judged on the test captions. For a seed all methods see the same rows, noise,
timesteps and dropped captions in the same order, and all are judged from the same initial noise.

Each cell, one training and its judging, is written to lab/results.json as it ends, so the command
can be stopped and started. The tables and lab/compare.png are made from that file alone.
"""

import argparse
import base64
import io
import json
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
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
SEEN = 32  # the rows that every method trains on; their captions are judged apart
SHOWN = 8  # test captions whose samples the figure shows


# ------------------------------------------- the methods


class Step(NamedTuple):
    """What a method may use to make its losers."""

    data: train_tiny.Data
    texts: list[str]  # of all rows of data
    rows: Tensor  # [B], the winners of this step
    random: torch.Generator


def ours(step: Step) -> dict:
    """As train_tiny has it: never the winner's picture or caption, no weight where dropped."""
    return {}


def paper(step: Step) -> dict:
    """The loser is any image of the data set; the preference holds under "" too."""
    losers = torch.randint(len(step.texts), step.rows.shape, generator=step.random)
    return {"losers": step.data.latents[losers], "pair_weight": None}


def official(step: Step) -> dict:
    """Micro-batches of 8 are permuted, as in the paper's run: one pair in 8 is of one image."""
    losers = [part[torch.randperm(len(part), generator=step.random)] for part in step.rows.split(8)]
    return {"losers": step.data.latents[torch.cat(losers)], "pair_weight": None}


def without_mse(step: Step) -> dict:
    return {"dpo_weight": 1.0, "mse_weight": 0.0}


def nearest(step: Step) -> dict:
    """The loser's caption is among the nearest: most words are the same in the same places."""
    words = [text.split() for text in step.texts]

    def distance(a: int, b: int) -> float:  # ties are broken at random
        different = sum(x != y for x, y in zip(words[a], words[b]))
        return (different or len(words[a])) + float(torch.rand((), generator=step.random))

    everything = range(len(words))
    losers = [min(everything, key=lambda b, a=a: distance(a, b)) for a in step.rows.tolist()]
    return {"losers": step.data.latents[losers]}


class Method(NamedTuple):
    name: str
    grid: list[tuple[float, float]]  # (lr, β) to choose from
    losers: Callable[[Step], dict] = ours  # what differs in the call of sudo_loss
    loss: str = "sudo"
    steps: int = 300
    batch_size: int = 32
    pictures: int = 384  # the first of captions.jsonl
    downgrade: str = "random_image"
    loser_gradient: float = 1.0  # its scale; 0: the loser only sets the weight of the winner's
    every: int = 1  # the preference in each so many steps, the MSE alone in the others
    cycle: int | None = None  # after so many steps their draws and reference errors come again

    @property
    def passes(self) -> float:
        """UNet passes for each winner that the run sees; a backward pass counts as two."""
        reference = min(1.0, (self.cycle or self.steps) / self.steps) * 2
        return 3 if self.loss == "sft" else 3 + (3 + reference) / self.every


BETAS = [(5e-5, beta) for beta in (50.0, 100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0)]
RATES = [(lr, 400.0) for lr in (1e-5, 2e-5, 3e-5, 1e-4)]
SOME = [(5e-5, 200.0), (5e-5, 400.0), (5e-5, 800.0), (2e-5, 400.0), (1e-4, 400.0)]
SMALL = [(5e-5, 400.0), (5e-5, 1600.0), (2e-4, 400.0), (2e-4, 1600.0)]
SFT = [(1e-4, 0.0), (3e-4, 0.0), (1e-3, 0.0)]

BASE = Method("base model", [(0.0, 0.0)], loss="sft", steps=0)
OURS = Method("SUDO, ours", BETAS + RATES)
TABLE = [
    BASE,
    Method("SFT, equal steps", SFT, loss="sft"),
    Method("SFT, equal compute", SFT, loss="sft", steps=800),
    Method("SUDO, the paper's", SOME, paper),
    Method("SUDO, the official code's", SOME, official),
    OURS,
    Method("... without the MSE term", SOME, without_mse),
    Method("... loser: blur", SMALL, downgrade="blur"),
    Method("... loser: random grid", SMALL, downgrade="random_grid"),
    Method("... on 128 pictures", [], pictures=128),  # with the choice for all pictures
    Method("... on 32 pictures", [], pictures=32),
]
TRIED = [
    Method("loser: nearest caption", SOME[1:3], nearest),
    Method("loser's gradient x 0.5", [(5e-5, 400.0), (1e-4, 400.0)], loser_gradient=0.5),
    Method("loser's gradient x 0", [(5e-5, 400.0), (3e-4, 400.0)], loser_gradient=0.0),
    Method("preference every 2nd step", [(5e-5, 400.0), (1e-4, 400.0)], every=2),
    Method("half the pairs a step", [(5e-5, 400.0), (1e-4, 400.0)], batch_size=16),
    Method("draws again after 60 steps", [(5e-5, 400.0)], cycle=60),
    Method("draws again after 12 steps", [(5e-5, 400.0)], cycle=12),
]


# ------------------------------------------- one cell: train and judge


def train(pipe, data, texts: list[str], args, method: Method) -> None:
    """train_tiny's loop without its files, with what the method changes."""
    unet, scheduler = pipe.unet.to(args.device).eval(), pipe.scheduler
    unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), args.lr, weight_decay=1e-2, fused=True)
    reference, table = sudo.frozen_copy(unet), {}

    def policy(*inputs, **kwargs) -> Tensor:
        output = unet(*inputs, **kwargs).sample
        winners, losers = output.chunk(2)
        return torch.cat([winners, torch.lerp(losers.detach(), losers, method.loser_gradient)])

    for step in range(method.steps):
        again = step % (method.cycle or method.steps)
        drawn = train_tiny.draw(data, again, args, scheduler.config.num_train_timesteps)
        (batch,) = train_tiny.micro_batches(data, again, args, scheduler)
        if method.loss == "sft" or step % method.every:
            winners = {k: v for k, v in batch.items() if k not in ("losers", "pair_weight")}
            loss, _ = train_tiny.sft_loss(unet, scheduler, **winners)
            loss = loss / 2 if method.loss == "sudo" else loss  # λ2
        else:
            random = train_tiny.generator(args.seed, "compare", again)
            batch |= method.losers(Step(data, texts, drawn.rows, random))
            if method.cycle and again not in table:
                table[again] = errors(reference, scheduler, batch)
            ref = table.get(again, reference)
            loss, _ = sudo.sudo_loss(policy, ref, scheduler, **batch, beta=args.beta)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), train_tiny.MAX_GRAD_NORM)
        warmth = min(1.0, (step + 1) / (train_tiny.WARMUP * method.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmth
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def errors(unet, scheduler, batch: dict) -> Tensor:
    pairs = sudo.make_pairs(
        scheduler,
        batch["latents"],
        batch["losers"],
        noise=batch["noise"],
        timesteps=batch["timesteps"],
    )
    return sudo.denoising_error(unet, pairs, batch["encoder_hidden_states"])


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
    now, before = (
        torch.stack([errors(unet, pipe.scheduler, pairs) for pairs in held_out_pairs(pipe)])
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
    argv = ["--data", str(LAB.parent / "captions.jsonl"), "--model", "tiny", "--seed", str(seed)]
    args = train_tiny.parse([*argv, "--downgrade", method.downgrade])
    pipe = train_tiny.load_pipeline(args)
    args.lr, args.beta, args.batch_size = lr, beta, method.batch_size
    rows = train_tiny.read_rows(args.data, args.image_column, args.caption_column)[
        : method.pictures
    ]
    data = train_tiny.encode(pipe, rows, args)
    base = sudo.frozen_copy(pipe.unet)
    train(pipe, data, [row.text for row in rows], args, method)

    pipe.to(args.device)
    result = {}
    for guidance in GUIDANCES:
        texts = world.captions(split)
        *scores, pictures = world.judge(pipe, texts, guidance, seed)
        result[f"{guidance:g}"] = scores
        if split == "test" and guidance in (1.0, 3.0):
            *_, more = world.judge(pipe, texts, guidance, seed + 1000)
            result[f"spread {guidance:g}"] = spread(pictures, more)
            seen = world.judge(pipe, [row.text for row in rows[:SEEN]], guidance, seed)
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
            beside.write_text(json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    seeds = range(parser.parse_args().seeds)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    run(sweep(TABLE), results, "choosing")
    chosen = {method: choice(method, results)[:2] for method in TABLE}
    run([(m, "test", *chosen[m], seed) for seed in seeds for m in TABLE], results, "comparing")
    run(sweep(TRIED), results, "trying")


if __name__ == "__main__":
    main()
