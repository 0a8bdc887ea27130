"""Every figure, for notebook and benchmark alike."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
COLOURS = {
    "text_encoder": "#E69F00",
    "transformer": "#0072B2",
    "vae_decoder": "#009E73",
    "rest": "#999999",
    "whole": "#56B4E9",
}
_COMPONENT_NAMES = {
    "text_encoder": "text encoder",
    "transformer": "DiT",
    "vae_decoder": "VAE decoder",
    "rest": "rest",
}
_PANELS = {  # column of the table → title, unit, format of the numbers on the bars
    "size_mb": ("Size on disk", "MB", "{:.1f}"),
    "peak_memory_mb": ("Peak memory of the process", "MB", "{:.0f}"),
    "total_s": ("Time for one image", "s", "{:.2f}"),
    "step_ms": ("Time for one step of the DiT", "ms", "{:.0f}"),
    "psnr_db": ("Likeness to {reference} (PSNR)", "dB, more is closer", "{:.1f}"),
    "ssim": ("Likeness to {reference} (SSIM)", "1 is equal", "{:.3f}"),
    "score": ("Score of the images", "mean, more is better", "{:.3g}"),
}


def finished(figure: Figure) -> Figure:
    """Detach a figure from pyplot, which would show it twice, in a size for a notebook's width."""
    plt.close(figure)
    figure.set_dpi(80)
    return figure


def show_images(images: dict[str, Image.Image | np.ndarray]) -> Figure:
    """Images side by side, each under its name; `(H, W, 3)` uint8 arrays work, too."""
    shapes = [np.asarray(image).shape for image in images.values()]
    widths = [width / height for height, width, _ in shapes]  # all are shown in the same height
    figure, axes = plt.subplots(
        ncols=len(images),
        figsize=(12, 12 / sum(widths) + 0.35) if len(images) > 2 else (4 * sum(widths), 4.35),
        width_ratios=widths,
        squeeze=False,
        facecolor="white",
    )
    for ax, (name, image) in zip(axes.flat, images.items(), strict=True):
        ax.imshow(image)
        ax.set_title(name, fontsize=12, wrap=True)
        ax.axis("off")
    figure.tight_layout(pad=0.3)
    return finished(figure)


def add_bars(
    ax: Axes,
    values: pd.Series,
    form: str = "{:.3g}",
    *,
    shares: dict[str, dict[str, float]] | None = None,
    colours: dict[str, str] | None = None,
) -> None:
    """Horizontal bars, one per label, with their numbers; the first one is at the bottom.

    `shares` splits a bar: label → component → number. `colours`: of whole bars, by label. An
    infinite value is a reference, which equals itself.
    """
    finite = values[np.isfinite(values)]
    longest = (float(finite.max()) if len(finite) else 0.0) or 1.0
    for row, (label, value) in enumerate(values.items()):
        if not np.isfinite(value):
            ax.text(0.01 * longest, row, "equal" if value > 0 else "–", va="center", fontsize=9)
            continue
        left = 0.0
        for part, share in (shares[label] if shares else {"whole": value}).items():
            colour = (colours or {}).get(label, COLOURS[part])
            ax.barh(row, share, left=left, color=colour, height=0.7)
            left += share
        number = form.format(value)
        ax.text(max(left, value) + 0.01 * longest, row, number, va="center", fontsize=9)
    ax.set_yticks(range(len(values)), values.index)
    ax.set_xlim(0, 1.18 * longest)
    ax.spines[["top", "right"]].set_visible(False)


def comparison_figure(
    table: pd.DataFrame, shares: dict[str, dict[str, dict[str, float]]], reference: str
) -> Figure:
    """The table of a Comparison as bars; `shares`: column → label → component → number."""
    names = ["size_mb", "peak_memory_mb", "total_s", "step_ms", "psnr_db"]
    names.append("ssim" if table["score"].isna().all() else "score")
    figure, axes = plt.subplots(
        3, 2, figsize=(10, 3 * (1.1 + 0.32 * len(table))), facecolor="white", sharey=True
    )
    for ax, name in zip(axes.flat, names, strict=True):
        title, unit, form = _PANELS[name]
        add_bars(ax, table[name], form, shares=shares.get(name))
        ax.set_title(title.format(reference=reference), loc="left", fontsize=12)
        ax.set_xlabel(unit)
    axes.flat[0].invert_yaxis()  # shared: the first label on top, everywhere
    handles = [Patch(color=COLOURS[part], label=text) for part, text in _COMPONENT_NAMES.items()]
    figure.legend(handles=handles, ncols=4, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return finished(figure)


def differences_figure(
    images: dict[str, list[Image.Image]],
    captions: list[str],
    psnr_db: dict[str, list[float]],
    amplification: float,
) -> Figure:
    """A column per label, the reference first; below each image its difference from that one."""
    labels = list(images)
    references = images[labels[0]]
    aspect = references[0].height / references[0].width
    width = min(3.2, 12 / len(labels))
    figure, axes = plt.subplots(
        2 * len(captions),
        len(labels),
        figsize=(width * len(labels), 2 * len(captions) * (width * aspect + 0.25)),
        facecolor="white",
        squeeze=False,
    )
    for ax in axes.flat:
        ax.axis("off")
    for i, caption in enumerate(captions):
        top, bottom = axes[2 * i], axes[2 * i + 1]
        text = textwrap.fill(caption, int(width * 10))
        bottom[0].text(0.5, 0.95, text, ha="center", va="top", fontsize=10)
        for column, label in enumerate(labels):
            top[column].imshow(images[label][i])
            top[column].set_title(label, fontsize=12)
            if column:
                difference = amplified_difference(images[label][i], references[i], amplification)
                bottom[column].imshow(difference)
                title = f"difference × {amplification:g}, {psnr_db[label][i]:.1f} dB"
                bottom[column].set_title(title, fontsize=10)
    figure.tight_layout()
    return finished(figure)


def amplified_difference(
    image: Image.Image, reference: Image.Image, amplification: float
) -> np.ndarray:
    """`(H, W, 3)` uint8: grey where the two agree."""
    a, b = np.asarray(image, np.float32), np.asarray(reference, np.float32)
    return np.clip(128 + amplification * (a - b), 0, 255).astype(np.uint8)


# ---- a look inside ------------------------------------------------------------------------------


def word_maps_figure(image: Image.Image, maps: dict[str, np.ndarray]) -> Figure:
    """An image, and beside it once per word with the word's attention over it."""
    figure, axes = plt.subplots(
        ncols=1 + len(maps),
        figsize=(12, 12 * image.height / image.width / (1 + len(maps)) + 0.3),
        facecolor="white",
        squeeze=False,
    )
    axes = axes[0]
    axes[0].imshow(image)
    axes[0].set_title("the image", fontsize=12)
    extent = (0, image.width, image.height, 0)
    for ax, (word, values) in zip(axes[1:], maps.items(), strict=True):
        ax.imshow(image)
        ax.imshow(values, extent=extent, alpha=0.65, cmap="inferno", interpolation="bicubic")
        ax.set_title(word, fontsize=12)
    for ax in axes:
        ax.axis("off")
    figure.tight_layout(pad=0.3)
    return finished(figure)


def weight_grid_figure(weights: np.ndarray, group_size: int = 64) -> Figure:
    """One group of weights, of `(outputs, inputs)`, before and after rounding.

    INT8: 255 levels per output channel. INT4: 15 levels per group of weights.
    """
    channel, group = weights[0], weights[0, :group_size]
    grids = {
        "INT8, one scale per output channel": _on_grid(group, np.abs(channel).max() / 127),
        f"INT4, one scale per {group_size} weights": _on_grid(group, np.abs(group).max() / 7),
    }
    figure, axes = plt.subplots(ncols=2, figsize=(10, 3.6), facecolor="white", sharey=True)
    for ax, (title, rounded), colour in zip(
        axes, grids.items(), (COLOURS["transformer"], COLOURS["text_encoder"]), strict=True
    ):
        ax.axline((0, 0), slope=1, color=COLOURS["rest"], linewidth=0.8, zorder=0)
        ax.scatter(group, rounded, s=14, color=colour)
        ax.set_title(f"{title}: {_signal_to_error(group, rounded):.0f} dB", fontsize=12)
        ax.set_xlabel("weight in FP16")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("weight on the grid")
    figure.tight_layout()
    return finished(figure)


def activation_range_figure(values: np.ndarray, low: float, high: float) -> Figure:
    """Activations `(rows, channels)`, their calibrated range, and what one outlier channel does."""
    largest = values.std(axis=0).argmax()
    others = np.delete(np.arange(values.shape[1]), largest)
    outlier = values.copy()
    outlier[:, largest] *= 20
    figure, axes = plt.subplots(ncols=2, figsize=(10, 3.4), facecolor="white")
    for ax, data, (left, right), title in (
        (axes[0], values, (low, high), "measured"),
        (axes[1], outlier, (outlier.min(), outlier.max()), "one channel 20 times larger"),
    ):
        rounded = left + _on_grid(data.clip(left, right) - left, (right - left) / 255)
        levels = len(np.unique(rounded[:, others]))
        quality = _signal_to_error(data[:, others], rounded[:, others])
        ax.hist(data.ravel(), bins=200, color=COLOURS["whole"], log=True)
        for edge in (left, right):
            ax.axvline(edge, color=COLOURS["transformer"], linestyle="--")
        shared = f"{levels} of 256 levels without the largest channel, {quality:.0f} dB"
        ax.set_title(f"{title}:\n{shared}", fontsize=12)
        ax.set_xlabel("activation (dashed: the range of its 256 levels)")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("number of values (log scale)")
    figure.tight_layout()
    return finished(figure)


def _on_grid(values: np.ndarray, step: float) -> np.ndarray:
    return np.round(values / step) * step


def _signal_to_error(values: np.ndarray, rounded: np.ndarray) -> float:
    return float(10 * np.log10(np.square(values).mean() / np.square(values - rounded).mean()))


def evaluations_figure(table: pd.DataFrame) -> Figure:
    """Share of right images against evaluations of the DiT per image, a line per version.

    Columns of `table`: `version`, `evaluations`, and the shares `one_object` and `two_objects` in
    per cent.
    """
    lowest = table[["one_object", "two_objects"]].to_numpy().min()
    figure, axes = plt.subplots(ncols=2, figsize=(10, 3.8), facecolor="white", sharey=True)
    colours = [COLOURS[name] for name in ("transformer", "text_encoder", "vae_decoder", "rest")]
    for ax, column in zip(axes, ("one_object", "two_objects"), strict=True):
        for (version, rows), colour in zip(
            table.groupby("version", sort=False), colours, strict=False
        ):
            rows = rows.sort_values("evaluations")
            ax.plot(rows["evaluations"], rows[column], "o-", color=colour, label=version)
        ax.set_title(column.replace("_", " "), loc="left", fontsize=12)
        ax.set_xlabel("evaluations of the DiT per image")
        ax.set_ylim(10 * (lowest // 10), 101)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("right images, %")
    axes[1].legend(frameon=False, loc="lower right", fontsize=9)
    figure.tight_layout()
    return finished(figure)
