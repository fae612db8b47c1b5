"""Draw how many samples a second each contender hands to a rank, by images and loading processes."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ds_moe.monitor.plot import finish_axes
from tools.results import save

COLOURS = ["#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#009E73"]
NAMES = {"this": "this build", "prepared": "this build, prepared", "hf": "datasets + DataLoader"}


def draw(found: dict[str, Any], file: Path) -> None:
    results = found["results"]
    forms, contenders = (list(dict.fromkeys(one[key] for one in results)) for key in ("form", "contender"))
    workers = list(dict.fromkeys(one["workers"] for one in results))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, form in zip(figure.subplots(1, len(forms), sharey=True, squeeze=False)[0], forms, strict=True):
        for number, name in enumerate(contenders):
            its = {one["workers"]: one["median"] for one in results if (one["form"], one["contender"]) == (form, name)}
            places = [place + (number + 0.5) / (len(contenders) + 1) for place in range(len(workers))]
            heights = [its.get(count, 0.0) for count in workers]
            label = NAMES.get(name, f"build {name}")
            axes.bar(places, heights, width=0.9 / (len(contenders) + 1), color=COLOURS[number % 6], label=label)
        axes.set_xticks([place + 0.4 for place in range(len(workers))], [str(count) for count in workers])
        finish_axes(axes, f"{form.upper()} files: samples a second", "loading processes")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7.5, frameon=False
    )
    save(figure, file)
