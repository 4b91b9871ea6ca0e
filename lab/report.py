"""Tables and figures of what lab/results.json has. A row of a table is one model.

python lab/report.py  # renews the tables of lab/tables.md, and draws two figures
"""

import json
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib.pyplot as plt
from PIL import Image, ImageOps

import world

LAB = Path(__file__).parent
SCALES = ["1", "1.5", "2", "3", "5"]  # of guidance; 1 is without
USES = ["guidance 1", "best above 1", "guidance 5"]  # that compare.py chooses models for
HEADLINES = ["base model", "SFT", "SUDO", "SFT, then SUDO", "SFT, then SUDO without MSE"]
COLOURS = ["0.6", "#0072b2", "#e69f00", "#d55e00", "#009e73"]
MEASURED = [("1", 1), ("3", 1), ("1", 2), ("3", 2), ("1", 3)]  # a name in a cell, and a place there
MEASURED += [("winner_drift", 0), ("loser_drift", 0), ("implicit_acc", 0)]
# 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom.
T_95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


class Row(NamedTuple):
    """One model, and its cells by seed."""

    method: str  # and the base model, where that is not tiny-sd
    sft_lr: float  # of the SFT that came first, 0 where none did
    lr: float
    beta: float
    uses: list[str]  # that it was chosen for
    validation: dict[int, dict]
    test: dict[int, dict]

    def by_seed(self, name: str, place: int = 0, split: str = "test") -> dict[int, float]:
        """One number of each cell; a scale has matches, attributes, spread of places, of sizes."""
        cells = getattr(self, split).items()
        return {seed: cell[name][place] for seed, cell in cells if len(cell.get(name, [])) > place}

    def best(self) -> str:
        """The scale above 1 that did best on the validation captions; "" where none was tried."""
        tried = {scale: self.by_seed(scale, 0, "validation") for scale in SCALES[1:]}
        means = {name: fmean(whole.values()) for name, whole in tried.items() if whole}
        return max(means, key=means.get, default="")


def rows_of(results: dict) -> list[Row]:
    """Every model, from the keys of the cells; first those of the front page."""
    rows = {}
    for key, cell in results["cells"].items():
        base, split, method, *numbers, seed = key.split(" | ")
        method += f", on {base}" * (base != "tiny-sd")
        setting = [float(number.split()[-1]) for number in numbers]
        chosen = results["choices"].get(method, {})
        uses = [use for use in USES if chosen.get(use) == setting]
        row = rows.setdefault((method, *setting), Row(method, *setting, uses, {}, {}))
        lists = {name: each if isinstance(each, list) else [each] for name, each in cell.items()}
        getattr(row, split)[int(seed.split()[-1])] = lists
    return sorted(rows.values(), key=lambda r: ([*HEADLINES, r.method].index(r.method), r[:4]))


# ------------------------------------------- the tables


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval: 0 for fewer than three values, wide for over ten."""
    if len(values) < 3:
        return fmean(values), 0.0
    return fmean(values), T_95[min(len(values), 10) - 2] * stdev(values) / len(values) ** 0.5


def shown(values: list[float], digits: int = 2) -> str:
    """The mean ± half of its interval; "" for no value."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + f" ± {half:.{digits}f}" * (len(values) > 2)


def lead(row: Row, name: str, other: Row, its: str) -> str:
    """How far the row is ahead, paired by seed; bold where the interval excludes 0."""
    own = row.by_seed(name)
    others = other.by_seed(its)
    values = [own[seed] - others[seed] for seed in own if seed in others]
    mean, half = interval(values) if len(values) > 2 else (0.0, 0.0)
    return f"**{shown(values, 3)}**" if abs(mean) > half else shown(values, 3)


def line(row: Row, names: list[tuple[str, int]], digits: int = 2, split: str = "test") -> list[str]:
    """A model, the number of its seeds, and the means of these numbers over them."""
    settings = [f"{number:g}" if number else "" for number in (row.sft_lr, row.lr, row.beta)]
    means = [shown([*row.by_seed(*name, split).values()], digits) for name in names]
    return [row.method, ", ".join(row.uses), *settings, str(len(getattr(row, split))), *means]


def leads(row: Row, other: str, rows: list[Row]) -> list[str]:
    """Over another method: in each column over its model that was chosen for the column's use."""
    nobody = Row(other, 0.0, 0.0, 0.0, [], {}, {})  # where none is chosen yet
    chosen = {use: each for each in rows if each.method == other for use in each.uses}
    free, guided, at_5 = (chosen.get(use, nobody) for use in USES)
    best = guided.best()
    pairs = [("1", free, "1"), (row.best(), guided, best), ("5", at_5, "5"), ("1", guided, best)]
    seeds = dict.fromkeys(str(len(row.test.keys() & each.test)) for each in (free, guided, at_5))
    *model, _ = line(row, [])
    return [*model, ", ".join(seeds), other, *(lead(row, *pair) for pair in pairs)]


def table(head: str, lines: list[list[str]]) -> str:
    """A table in Markdown; the head has its columns between bars."""
    rule = " | ".join("---" for _ in head.split(" | "))
    return "\n".join(f"| {each} |" for each in [head, rule, *map(" | ".join, lines)])


def short(rows: list[Row]) -> str:
    """The front page's table: the chosen models, as a user would type them, without intervals."""
    rows = [row for row in rows if row.uses and row.test and row.method in HEADLINES]
    lines = []
    for row in rows:
        lrs = [other.lr for other in rows if other.method == row.method]
        name = row.method + f" at --lr {row.lr:g}".replace("e-0", "e-") * (len(lrs) > 1)
        name += f" --beta {row.beta:g}" * (lrs.count(row.lr) > 1)
        means = [f"{fmean(row.by_seed(its).values()):.2f}" for its in ("1", "2", "5", row.best())]
        lines.append([name, *means[:3], f"{means[3]} at {row.best()}"])
    return table("whole matches | guidance 1 | guidance 2 | guidance 5 | best above 1", lines)


def tables(results: dict) -> list[str]:
    """The tables of lab/tables.md, in their order there."""
    rows = rows_of(results)
    tested = [row for row in rows if row.test]
    here = [row for row in tested if row.method in results["choices"]]
    ahead = []
    for row in here:
        drawn = row.method.endswith((" on preferred", " on pairs"))
        if row.method not in ("SFT", "SFT on preferred"):
            ahead.append(leads(row, "SFT on preferred" if drawn else "SFT", here))
        if drawn and "SUDO" in row.method:  # which needs no labels
            dpo = "SFT, then DPO on pairs" if row.sft_lr else "DPO on pairs"
            ahead.append(leads(row, dpo, here))
    number = sum("±" in text for texts in ahead for text in texts)

    model = "chosen for | SFT lr | lr | β | seeds"
    head = f"whole matches | {model} | " + " | ".join(f"guidance {scale}" for scale in SCALES)
    whole = [(scale, 0) for scale in SCALES]
    uses = "guidance 1 | best above 1 | guidance 5 | guidance 1, of its best"
    branch = [(scale + " ref", 0) for scale in SCALES]
    branched = [line(row, branch) for row in tested if row.by_seed("5 ref")]
    parts = "attributes at 1 | at 3 | places at 1 | at 3 | sizes at 1 | winners' drift | losers'"
    measured = [line(row, MEASURED, 3) for row in tested]
    tried = [line(row, whole, split="validation") for row in rows if row.validation]
    return [
        short(here),
        table(head, [line(row, whole) for row in here]),
        table(f"whole matches ahead, {number} intervals | {model} | of | {uses}", ahead),
        table(head.replace("matches", "matches with the reference's branch"), branched),
        table(f"other measurements | {model} | {parts} | implicit accuracy", measured),
        table(head.replace("matches", "matches on the validation captions"), tried),
        table(head, [line(row, whole) for row in tested if row not in here]),
    ]


# ------------------------------------------- the figures


def show(rows: dict[str, list[Image.Image]], titles: list[str], judged: bool = True):
    """Named rows of pictures under their titles; red: the judge finds no match with the title."""
    size = (1.6 * len(titles) + 1, 1.55 * len(rows) + 0.5)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size, layout="constrained")
    for row, (name, pictures) in zip(axes, rows.items()):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, picture, title in zip(row, pictures, titles):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            if judged and not world.score(picture, title)[0]:
                axis.spines[:].set(color="red", linewidth=3)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title.replace(" left", "\nleft").replace(" on", "\non"), fontsize=8)
    return figure


def thumbnails(groups: dict[str, list[Image.Image]], texts: list[str]):
    """All pictures of each group; green frame: the judge finds a match with the text, red: none."""
    size = (4 * len(groups), 0.42 * len(texts) / 9 + 0.3)
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, pictures) in zip(axes[0], groups.items()):
        right = [world.score(picture, text)[0] for picture, text in zip(pictures, texts)]
        sheet = Image.new("RGB", (9 * 40, -(-len(texts) // 9) * 40), "white")
        for i, picture in enumerate(pictures):
            tile = ImageOps.expand(picture.resize((32, 32)), 3, "green" if right[i] else "red")
            sheet.paste(tile, (i % 9 * 40 + 1, i // 9 * 40 + 1))
        axis.imshow(sheet, interpolation="nearest")
        axis.set_title(f"{name}: {sum(right)} of {len(texts)}")
        axis.axis("off")
    return figure


def curves(results: dict):
    """Whole matches against the guidance scale, a panel for the models of each use."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), sharey=True, layout="constrained")
    rows = [row for row in rows_of(results) if row.test and row.method in HEADLINES]
    for axis, use in zip(axes, USES):
        for row in rows:
            if use in row.uses:
                spans = [interval([*row.by_seed(scale).values()]) for scale in SCALES]
                style = {"fmt": "o-", "color": COLOURS[HEADLINES.index(row.method)]}
                axis.errorbar([*map(float, SCALES)], *zip(*spans), label=row.method, **style)
        axis.set(title=f"chosen for: {use}", xlabel="guidance scale (1: without guidance)")
    axes[0].set_ylabel("share of whole matches, test captions")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    results = json.loads((LAB / "results.json").read_text(encoding="utf-8"))
    made = iter(tables(results))
    text = (LAB / "tables.md").read_text(encoding="utf-8")
    text = re.sub(r"^\|.*(\n\|.*)*", lambda _: next(made), text, flags=re.MULTILINE)
    (LAB / "tables.md").write_text(text, encoding="utf-8")
    curves(results).savefig(LAB / "compare.png", dpi=120)
    phases = {}
    for phase in ("base", "after SFT", "then SUDO"):
        strip = Image.open(LAB / "strips" / f"{phase}.png")
        side = strip.height
        phases[phase] = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
    thumbnails(phases, world.captions("test")).savefig(LAB / "before-after.png", dpi=100)
    print(f"{LAB} has tables.md, compare.png and before-after.png.")


if __name__ == "__main__":
    main()
