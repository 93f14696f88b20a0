"""Pages to look at: one HTML file with text, tables, plots and pictures.

No script and nothing from elsewhere: it can be sent to somebody, and read on a phone, light or
dark. Whatever comes from files is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from tokgen import image_grid, records

NAME = "index.html"
SMALLEST, LARGEST = 64, 160  # pixels of a side that is shown
STYLE = """
:root { color-scheme: light dark; --ink: #222; --ground: #fff; --faint: #666; --line: #ddd;
  --best: #dff3e0; --tie: #f0f6ea; --alarm: #fdecd8; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --ground: #16181b; --faint: #999;
  --line: #3a3d42; --best: #1f4526; --tie: #26331f; --alarm: #4a3213; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p { max-width: 44rem; } .faint, figcaption { color: var(--faint); font-size: .9rem; }
.alarm { background: var(--alarm); padding: .5rem .8rem; border-radius: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem .3rem;
  border-bottom: 1px solid var(--line); }
.long td { overflow-wrap: anywhere; min-width: 11rem; font-size: .9rem; }
.notes td:last-child { min-width: 10rem; } .cells td { white-space: pre-line; }
.best { background: var(--best); font-weight: 600; } .tie { background: var(--tie); }
figure { margin: .6rem 0; } img { max-width: 100%; height: auto; display: block; }
"""


def document(title: str, parts: Sequence[str], *, head: str = "") -> str:
    """The whole page of parts that are HTML already; `head` is what else its head holds."""
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n{head}</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def save(file: pathlib.Path, text: str) -> pathlib.Path:
    """Write a file that appears whole or not at all."""
    return records.save(file, text)


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it, HTML already; nothing where there is nothing."""
    parts = [part for part in parts if part]
    return "\n".join([f"<h2>{html.escape(title)}</h2>", *parts]) if parts else ""


def text(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is faint or alarm."""
    return f"<p{_kind(kind)}>{html.escape(words)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence], kind: str = "") -> str:
    """Rows of cells, the first a heading; a cell is text, or (text, kind: best or tie)."""
    lines = []
    if head:
        cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
        lines.append(f"<thead><tr>{cells}</tr></thead>")
    lines.append("<tbody>")
    for first, *rest in rows:
        cells = [(cell, "") if isinstance(cell, str) else cell for cell in rest]
        made = "".join(f"<td{_kind(mark)}>{html.escape(cell)}</td>" for cell, mark in cells)
        lines.append(f'<tr><th scope="row">{html.escape(first)}</th>{made}</tr>')
    rows = "\n".join([*lines, "</tbody>"])
    return f'<div class="wide"><table{_kind(kind)}>\n{rows}\n</table></div>'


def _kind(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def data_uri(image: np.ndarray | bytes) -> str:
    """An image [H, W, 3] as PNG inside an address; bytes are those of a GIF."""
    if isinstance(image, bytes):
        return _address(image, "gif")
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", optimize=True)
    return _address(stream.getvalue())


def file_uri(file: pathlib.Path) -> str:
    """A PNG file inside an address."""
    return _address(file.read_bytes())


def _address(picture: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def picture(address: str, caption: str) -> str:
    """An image with what it shows under it."""
    shown = html.escape(caption)
    return f'<figure><img src="{address}" alt="{shown}"><figcaption>{shown}</figcaption></figure>'


def sheet(image_NHW3: np.ndarray, columns: int) -> str:
    """Images in rows as one address: small ones enlarged by whole pixels, large ones halved."""
    image_NHW3 = np.asarray(image_NHW3)
    while max(image_NHW3.shape[1:3]) > LARGEST:
        rows, across = (2 * (side // 2) for side in image_NHW3.shape[1:3])
        even = image_NHW3[:, :rows, :across].astype(np.uint16)
        total = even[:, ::2, ::2] + even[:, 1::2, ::2] + even[:, ::2, 1::2] + even[:, 1::2, 1::2]
        image_NHW3 = ((total + 2) // 4).astype(np.uint8)
    scale = max(1, SMALLEST // max(image_NHW3.shape[1:3]))
    return data_uri(image_grid.grid(image_NHW3, columns, scale=scale))


def plot(draw: Callable, width: float = 6.0) -> str:
    """What `draw(axis)` draws, as an address."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(width, 4.0), layout="constrained")
    draw(axis)
    axis.grid(alpha=0.25)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return _address(stream.getvalue())


def lines(series: Mapping[str, Sequence[tuple]], across: str, up: str) -> str:
    """A plot of {name: [(x, y, half of an interval)]}."""

    def draw(axis):
        for name, points in series.items():
            x, y, half = zip(*sorted(points), strict=True)
            axis.errorbar(x, y, half, marker="o", markersize=4, capsize=3, label=_plain_text(name))
        axis.set(xlabel=across, ylabel=up)
        axis.legend(fontsize=8)

    return plot(draw)


def points(found: Mapping[str, tuple], across: str, up: str) -> str:
    """A plot of {name: (x, y, half of x's interval, half of y's)}."""

    def draw(axis):
        for name, (x, y, wide, high) in found.items():
            axis.errorbar(
                x, y, high or None, wide or None, marker="o", capsize=3, label=_plain_text(name)
            )
        axis.set(xlabel=across, ylabel=up)
        axis.legend(fontsize=8)

    return plot(draw)


def _plain_text(name: str) -> str:
    """A name that matplotlib takes for neither mathematics nor a name to be left out."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name
