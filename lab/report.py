"""The tables and figures of README.md and lab/evidence.md, from what lab/results.json has.

python lab/report.py  # prints the tables, and draws lab/compare.png and lab/before-after.png
"""

import json
import random
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib.pyplot as plt
from PIL import Image

import compare
import measure
import world
from compare import BASE, HEADLINES, METHODS, SCALES, Method

# 97.5 % quantiles of Student's t with 1 to 9 degrees of freedom.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
TINY = Path(compare.TINY).name
BRANCH = " ref"  # ends the name of a scale whose unconditional branch is the reference's
PHASES, SHOWN = ("base", "after SFT", "then SUDO"), 8  # rows and columns of before-after.png


class Row(NamedTuple):
    """The cells on the test captions, by seed, of a method with one choice of lr and β."""

    name: str
    setting: tuple[float, float]
    use: str  # what lr and β were chosen for: sampling without or with guidance, or both
    tried: dict[str, float]  # whole matches on the validation captions, by scale
    cells: dict[int, dict]

    def best(self, branch: str = "") -> str:
        """The scale above 1 that did best on the validation captions; "" if the row has none."""
        names = [scale + branch for scale in SCALES[1:] if scale + branch in self.tried]
        return max(names, key=self.tried.get, default="") if self.cells else ""

    def whole(self, name: str) -> list[float]:
        return [cell[name][0] for cell in self.cells.values() if name in cell]


def rows_of(results: dict) -> dict[tuple[str, Method], tuple[Row, Row]]:
    """Two rows, without and with guidance, by base model and method; the same if they agree."""
    models = {name.split(" | ")[0] for name in results if "| test |" in name}
    rows = {}
    for model in sorted(models, key=lambda name: (name != TINY, name)):
        for method in METHODS:
            with suppress(KeyError):  # its lr and β are not chosen yet
                chosen = compare.choices(method, results)
                tried = compare.validation(method.like or method, results)
                uses = ("both", "both") if chosen[0] == chosen[1] else ("without", "with")
                name, pair = method.name + f", {model}" * (model != TINY), []
                for its, use in zip(chosen, uses):
                    keys = {n: compare.key(model, method, "test", *its, n) for n in range(10)}
                    cells = {n: results[k] for n, k in keys.items() if k in results}
                    pair.append(Row(name, its, use, tried[its], cells))
                if any(row.cells for row in pair):
                    rows[model, method] = tuple(pair)
    return rows


def every(rows: dict) -> Iterator[Row]:
    for pair in rows.values():
        yield from (row for row in (pair[:1] if pair[0].use == "both" else pair) if row.cells)


# ------------------------------------------- what a table's cell says


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval by Student's t; 0 for a single value."""
    half = T_95[len(values) - 2] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return fmean(values), half


def shown(values: list[float], digits: int = 2) -> str:
    """The mean ± half of the interval; "" for no value, and no interval for one or two."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + f" ± {half:.{digits}f}" * (len(values) > 2)


def at(row: Row, name: str) -> str:
    values = row.whole(name)
    return f"{shown(values)} at scale {name.removesuffix(BRANCH)}" if values else ""


def lead(a: Row, name: str, b: Row, other: str) -> str:
    """Whole matches that a has more than b, paired by seed, each at its own scale."""
    pairs = [(a.cells[n], b.cells[n]) for n in sorted(a.cells.keys() & b.cells.keys())]
    return shown([x[name][0] - y[other][0] for x, y in pairs], 3) if name and other else ""


def setting(lr: float, beta: float) -> str:
    return f"{lr:g}, {beta:g}" if beta else f"{lr:g}" if lr else ""


# ------------------------------------------- the tables


def table(head: str, lines: Iterable[list[str]]) -> None:
    """Print a table in Markdown; the head has its columns between bars."""
    rule = " | ".join("---" for _ in head.split(" | "))
    print("\n".join(f"| {line} |" for line in (head, rule, *map(" | ".join, lines))), end="\n\n")


def by_use(rows: dict, methods: list[Method]) -> Iterator[list[str]]:
    """A line for each method: what it does without guidance, then what it does with guidance."""
    for method in methods:
        if (TINY, method) in rows:
            free, guided = rows[TINY, method]
            line = [method.name, shown(free.whole("1")), at(guided, guided.best())]
            yield [*line, shown(guided.whole("5"))]


def leads(rows: dict) -> Iterator[list[str]]:
    """A line for each two methods that are compared: one with SFT, or with what has labels."""
    for (model, method), pair in rows.items():
        free, guided = pair
        sft = compare.SFT if method.data == compare.SFT.data else compare.DRAWN_SFT
        for other in (sft, compare.AGAINST_LABELS.get(method)):
            if method in (BASE, other) or (model, other) not in rows:
                continue
            its, its_guided = rows[model, other]
            both = ((free, its), (guided, its_guided))
            seeds = ", ".join(str(len(a.cells.keys() & b.cells.keys())) for a, b in both)
            yield [
                *(method.name, other.name, model, seeds),
                lead(free, "1", its, "1"),
                lead(guided, guided.best(), its_guided, its_guided.best()),
                lead(guided, "5", its_guided, "5"),
                lead(free, free.best(BRANCH), its_guided, its_guided.best()),
            ]


def scores(row: Row) -> list[str]:
    line = [row.name, row.use, str(len(row.cells)), setting(*row.setting)]
    return [*line, *(shown(row.whole(name)) for name in SCALES), at(row, row.best(BRANCH))]


def other_measurements(row: Row) -> list[str]:
    cells = list(row.cells.values())
    columns = [
        [(cell["1"][1], cell["3"][1]) for cell in cells],
        [(cell["winner_drift"], cell["loser_drift"]) for cell in cells],
        [(cell["implicit_acc"],) for cell in cells],
        # An older version measured the spread with guidance in few of the cells or in none.
        *([cell[name][2:] for cell in cells if cell[name][2:]] for name in ("1", row.best())),
    ]
    texts = (", ".join(shown([*values], 3) for values in zip(*column)) for column in columns)
    return [row.name, row.use, *texts]


def tried(results: dict) -> Iterator[list[str]]:
    for method in METHODS:
        with suppress(KeyError):
            for its, whole in compare.validation(method, results).items():
                yield [method.name, setting(*its), *(f"{whole[name]:.2f}" for name in SCALES)]


def tables(results: dict) -> None:
    """Print the tables: means over the seeds ± half of a 95 % interval."""
    rows = rows_of(results)
    if not {(TINY, method) for method in HEADLINES} <= rows.keys():
        raise SystemExit("lab/results.json lacks the main rows: run `python lab/compare.py` first.")
    branch = "with the reference's unconditional branch"
    uses = "without guidance | with guidance | at guidance 5"
    table(f"whole matches, test captions | {uses}", by_use(rows, HEADLINES))
    if labelled := [*by_use(rows, compare.LABELLED)]:
        table(f"whole matches, on pictures by the base model | {uses}", labelled)
    table(f"whole matches ahead | of | base | seeds | {uses} | {branch}", leads(rows))

    scales = " | ".join(f"guidance {name}" for name in SCALES)
    head = f"whole matches | chosen for guidance | seeds | lr, β | {scales}"
    table(f"{head} | best, reference's branch", map(scores, every(rows)))
    head = " | chosen for guidance | attributes at guidance 1, 3 | drift of winners, losers"
    head += " | implicit accuracy | spread of places, sizes at guidance 1 | at its best scale"
    rng = random.Random(0)
    drawn = [[world.draw(world.place(t, rng)) for t in world.captions("test")] for _ in range(2)]
    own = ", ".join(f"{value:.3f}" for value in measure.spread(*drawn))
    last = ["(the world's own scenes)", "", "", "", "", own, ""]
    table(head, [*map(other_measurements, every(rows)), last])
    table(f"whole matches, validation captions | lr, β | {scales}", tried(results))
    base = results[compare.key(compare.TINY, BASE, "validation", 0.0, 0.0, 100)]
    median = base["typical_difference"]
    print(f"Base model: median |e_w - e_l| {median:.4f}, one unit of u at β = {2 / median:.0f}")


# ------------------------------------------- the figures


def show(rows: dict[str, list[Image.Image]], titles: list[str], judged: bool = True):
    """Named rows of pictures under their titles; red: the judge finds no match with the title."""
    size = 1.6 * len(titles) + 1, 1.55 * len(rows) + 0.5
    figure, axes = plt.subplots(len(rows), len(titles), figsize=size)
    for row, (name, pictures) in zip(axes, rows.items()):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, picture, title in zip(row, pictures, titles):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            if judged and not world.score(picture, title)[0]:
                axis.spines[:].set(color="red", linewidth=3)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title.replace(" left", "\nleft").replace(" on", "\non"), fontsize=8)
    figure.tight_layout(pad=0.3, w_pad=0.8, h_pad=0.8)
    return figure


def before_and_after():
    """What seed 0 of the recipe drew without guidance: the first captions legible in all phases.

    Legible pictures are right more often, so the count over all test captions stands beside them.
    """
    texts, rows = world.captions("test"), {}
    phases = {name: compare.kept(name) for name in PHASES}
    fit = [i for i, each in enumerate(zip(*phases.values())) if all(map(measure.legible, each))]
    for name, pictures in phases.items():
        right = [world.score(*pair)[0] for pair in zip(pictures, texts)]
        count = f"{sum(right)} of {len(texts)}"
        print(f"{name}: {count} match, {sum(right[i] for i in fit)} of {len(fit)} legible")
        rows[f"{name}\n{count}"] = [pictures[i] for i in fit[:SHOWN]]
    return show(rows, [texts[i] for i in fit[:SHOWN]])


def curves(results: dict):
    """Whole matches against the guidance scale, a panel for each choice of lr and β."""
    rows = rows_of(results)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    colours = "0.5", "#0072b2", "#e69f00", "#d55e00", "#009e73"
    for which, axis in enumerate(axes):
        for i, (method, colour) in enumerate(zip(HEADLINES, colours)):
            row = rows[TINY, method][which]
            for branch, style in (("", "o-"), (BRANCH, "o--")):
                values = {name: row.whole(name + branch) for name in SCALES}
                beside = [float(name) + 0.02 * i for name in SCALES if values[name]]
                if beside:
                    means, halves = zip(*map(interval, filter(None, values.values())))
                    label = method.name + ", reference's branch" * bool(branch)
                    axis.errorbar(beside, means, halves, None, style, color=colour, label=label)
        title = f"chosen for sampling {('without', 'with')[which]} guidance"
        axis.set(title=title, xlabel="guidance scale (1: without guidance)")
    axes[0].set_ylabel("share of whole matches, test captions")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    results = json.loads(compare.RESULTS.read_text(encoding="utf-8"))
    tables(results)
    curves(results).savefig(compare.LAB / "compare.png", dpi=120)
    before_and_after().savefig(compare.LAB / "before-after.png", dpi=120)


if __name__ == "__main__":
    main()
