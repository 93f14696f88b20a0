"""How pictures came to be, to be moved through: all frames in one picture, and a slider over it."""

from __future__ import annotations

import html
import io
import json
import math

import numpy as np

from tokgen import image_grid, traces
from tokgen.interfaces import TokenLayout

PLAIN = 2**21  # pixels of a sheet that is kept without loss; above it is a JPEG
SIDE = 2**15  # of a sheet, at most
SHOW = (
    "const f=this.closest('.film'),n=+f.querySelector('input').value;"
    "f.querySelector('img').style.top=(-100*n)+'%';"
    "f.querySelector('output').textContent=JSON.parse(f.dataset.told)[n];"
)
PLAY = (
    "const f=this.closest('.film'),r=f.querySelector('input');clearInterval(f.timer);"
    "if(+r.value==+r.max)r.value=-1;"
    "f.timer=setInterval(()=>{r.value=+r.value+1;r.oninput();"
    "if(+r.value>=+r.max||!f.isConnected)clearInterval(f.timer)},160);"
)


def sheet(trace: traces.Trace) -> tuple[bytes, str, tuple[int, int]]:
    """(file, its ending, (rows, columns) of a frame): frames below each other."""
    columns = math.ceil(math.sqrt(trace.frame_SNHW3.shape[1]))  # two by two: for a phone, too
    frames = [image_grid.grid(frame, columns, gap=1) for frame in trace.frame_SNHW3]
    rows, columns = frames[0].shape[:2]
    most = max(1, SIDE // rows)
    image = image_grid.to_pil(np.concatenate(frames[:most])[None])[0]
    file, plain = io.BytesIO(), image.width * image.height <= PLAIN
    image.save(file, **({"format": "PNG"} if plain else {"format": "JPEG", "quality": 92}))
    return file.getvalue(), "png" if plain else "jpg", (rows, columns)


def told(trace: traces.Trace, layout: TokenLayout) -> list[str]:
    """What each frame shows, in words."""
    steps, grids, found = int(trace.after_S[-1]), layout.grids, []
    for number, after in enumerate(trace.after_S.tolist()):
        if not after:
            found.append("Nothing is drawn yet.")
        elif len(grids) > 1 and len(trace.after_S) == len(grids) + 1:
            rows, columns = grids[number - 1]
            found.append(f"Scale {number} of {len(grids)}: {rows} x {columns} tokens.")
        elif steps == layout.length and len(grids) == 1:
            row, columns = (after - 1) // grids[0][1] + 1, grids[0][1]
            where = f", row {row} of {grids[0][0]}" if grids[0][0] > 1 and columns > 1 else ""
            found.append(f"Token {after} of {steps}{where}.")
        else:
            found.append(f"Step {after} of {steps}.")
    return found


def document(address: str, size: tuple[int, int], words: list[str], *, small: bool) -> str:
    """The slider over the frames of a sheet, which lies at an address: plain HTML."""
    rows, columns = size
    scale = max(1, 400 // rows)
    address, told_ = html.escape(address, quote=True), html.escape(json.dumps(words), quote=True)
    last = len(words) - 1
    return f"""<div class="film" data-told="{told_}">
<div class="film-view" style="position:relative;overflow:hidden;width:100%;
max-width:{columns * scale}px;aspect-ratio:{columns}/{rows}">
<img src="{address}" alt="decode, step by step" style="position:absolute;left:0;width:100%;
max-width:none;margin:0;top:{-100 * last}%{";image-rendering:pixelated" if small else ""}"></div>
<div class="film-bar"><button type="button" onclick="{html.escape(PLAY)}">Play</button>
<input type="range" min="0" max="{last}" value="{last}" step="1" aria-label="decode step"
oninput="{html.escape(SHOW)}"></div>
<output>{html.escape(words[-1])}</output></div>"""
