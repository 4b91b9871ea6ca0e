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
COLOURS = ["0.7", "#0072b2", "#e69f00", "#d55e00", "#009e73"]
T_95 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]  # Student's t, 1 to 9 degrees
MODEL = ["chosen for", "SFT lr", "lr", "β", "seeds"]
WHOLE = {f"guidance {scale}": (scale, 0) for scale in SCALES}  # a name in a cell, and a place
BRANCH = {f"guidance {scale}": (f"{scale} ref", 0) for scale in SCALES[1:]}
MEASURED = {"attributes at 1": ("1", 1), "places at 1": ("1", 2), "places at 3": ("3", 2)}
MEASURED |= {name: (name, 0) for name in ("winner_drift", "loser_drift", "implicit_acc")}


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
        tried = {scale: self.by_seed(scale, 0, "validation").values() for scale in SCALES[1:]}
        return max(tried, key=lambda scale: fmean(tried[scale])) if self.validation else ""

    def described(self, seeds: str) -> list[str]:
        settings = [f"{number:g}" if number else "" for number in self[1:4]]
        return [self.method, ", ".join(self.uses), *settings, seeds]  # under MODEL in a table


def rows_of(results: dict) -> list[Row]:
    """Every model, from the keys of the cells; those of compare.py come first."""
    rows = {}
    for key, cell in results["cells"].items():
        base, split, method, *numbers, seed = key.split(" | ")
        method += f", on {base}" * (base != "tiny-sd")
        setting = [float(number.split()[-1]) for number in numbers]
        uses = [use for use in USES if results["choices"].get(method, {}).get(use) == setting]
        row = rows.setdefault((method, *setting), Row(method, *setting, uses, {}, {}))
        lists = {name: each if isinstance(each, list) else [each] for name, each in cell.items()}
        getattr(row, split)[int(seed.split()[-1])] = lists
    first = [*HEADLINES, *results["choices"]]
    return sorted(rows.values(), key=lambda r: ([*first, r.method].index(r.method), r[:4]))


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
    others = other.by_seed(its)
    values = [own - others[seed] for seed, own in row.by_seed(name).items() if seed in others]
    mean, half = interval(values) if len(values) > 2 else (0.0, 0.0)
    return f"**{shown(values, 3)}**" if abs(mean) > half else shown(values, 3)


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(texts)} |" for texts in [head, ["---"] * len(head), *lines])


def means(title: str, rows: list[Row], columns: dict, split: str = "test", digits: int = 2) -> str:
    """A table of the models that have any of these numbers, with the means over their seeds."""
    lines = []
    for row in rows:
        numbers = [row.by_seed(*place, split) for place in columns.values()]
        texts = [shown([*by_seed.values()], digits) for by_seed in numbers]
        if any(texts):
            lines.append([*row.described(str(len(getattr(row, split)))), *texts])
    return table([title, *MODEL, *columns], lines)


def leads(rows: list[Row]) -> str:
    """A table of how far chosen models are ahead: of SFT, or of DPO where that has its labels."""
    chosen = {(row.method, use): row for row in rows for use in row.uses}
    lines = []
    for row in rows:
        dpo = "SFT, then DPO on pairs" if row.sft_lr else "DPO on pairs"
        rival = dpo if row.method.endswith((" on preferred", " on pairs")) else "SFT"
        its = [chosen[rival, use] for use in USES if (rival, use) in chosen]
        if row.uses and row.test and its and row.method != rival:
            free, guided, at_5 = its
            ahead = [lead(row, "1", free, "1"), lead(row, row.best(), guided, guided.best())]
            ahead += [lead(row, "5", at_5, "5"), lead(row, "1", guided, guided.best())]
            seeds = dict.fromkeys(str(len(row.test.keys() & each.test)) for each in its)
            lines.append([*row.described(", ".join(seeds)), rival, *ahead])
    title = f"whole matches ahead, {str(lines).count('±')} intervals"
    return table([title, *MODEL, "of", *USES, "guidance 1, of its best"], lines)


def short(rows: list[Row]) -> str:
    """The front page's table: the models for guidance 1."""
    lines = []
    for row in rows:
        if "guidance 1" in row.uses:
            lr = f" at --lr {row.lr:.0e}".replace("e-0", "e-") if row.lr else ""
            scales = ["1", "5", row.best()]
            whole = [f"{fmean(row.by_seed(scale).values()):.2f}" for scale in scales]
            lines.append([row.method + lr, *whole])
    return table(["whole matches", "guidance 1", "guidance 5", "best above 1"], lines)


def tables(results: dict) -> list[str]:
    """The tables of lab/tables.md, in their order there."""
    rows = rows_of(results)
    front = [row for row in rows if row.method in HEADLINES and row.uses and row.test]
    return [
        short(front),
        means("whole matches", front, WHOLE),
        means("whole matches", rows, WHOLE),
        leads(rows),
        means("whole matches with the reference's branch", rows, BRANCH),
        means("other measurements", rows, MEASURED, digits=3),
        means("whole matches on the validation captions", rows, WHOLE, "validation"),
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
    for axis, use in zip(axes, USES):
        for row in rows_of(results):
            if row.method in HEADLINES and use in row.uses and row.test:
                spans = [interval([*row.by_seed(scale).values()]) for scale in SCALES]
                style = {"fmt": "o-", "color": COLOURS[HEADLINES.index(row.method)]}
                axis.errorbar([*map(float, SCALES)], *zip(*spans), label=row.method, **style)
        axis.set(title=f"chosen for: {use}", xlabel="guidance scale (1: none); grey: base model")
    axes[0].set_ylabel("share of whole matches, test captions")
    axes[0].legend(handles=axes[0].containers[1:], frameon=False, fontsize=8)  # all but the base
    return figure


if __name__ == "__main__":
    results = json.loads((LAB / "results.json").read_text(encoding="utf-8"))
    made = iter(tables(results))
    text = (LAB / "tables.md").read_text(encoding="utf-8")
    text = re.sub(r"^\|.*(\n\|.*)*", lambda _: next(made), text, flags=re.MULTILINE)
    (LAB / "tables.md").write_text(text, encoding="utf-8")
    curves(results).savefig(LAB / "compare.png", dpi=120)
    phases = {}
    for phase in ("base", "after SFT", "then SUDO"):
        strip = Image.open(LAB / "strips" / f"{phase}.png")
        phases[phase] = [strip.crop((x, 0, x + 32, 32)) for x in range(0, strip.width, 32)]
    thumbnails(phases, world.captions("test")).savefig(LAB / "before-after.png", dpi=100)
    print(f"{LAB} has tables.md, compare.png and before-after.png.")
