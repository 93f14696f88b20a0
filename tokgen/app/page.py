"""The page: a tab for each model, with what it can do, and one for two side by side."""

from __future__ import annotations

import gradio

from tokgen.app import bounds, desks, draw_panel, edit_panel, side_panel, token_panel

FONTS = ["system-ui", "sans-serif"]
CSS = """
.gradio-container > main { max-width: 72rem; margin: 0 auto; width: 100%; }
.small img, .small canvas { image-rendering: pixelated; }
.pictures { min-height: 6rem; }
.pictures .grid-wrap { min-height: 0 !important; max-height: none !important; }
.told p { white-space: pre-line; font-size: .9rem; }
.numbers textarea { font-family: ui-monospace, monospace; font-size: .75rem; white-space: pre; }
.film-bar { display: flex; gap: .75rem; align-items: center; margin: .5rem 0; max-width: 40rem; }
.film-bar input { flex: 1; min-width: 0; accent-color: var(--primary-500); height: 2rem; }
.film-bar button { border: 1px solid var(--border-color-primary); border-radius: .4rem;
  padding: .3rem .9rem; background: var(--button-secondary-background-fill); }
.film output { font-variant-numeric: tabular-nums; }
.seeds { align-items: end; }
@media (max-width: 640px) {
  .gradio-container > main { padding: .6rem !important; }
  .pictures .grid-container { grid-template-columns: 1fr 1fr !important; }
}
"""
# A click into a list that can be searched marks its text, so that typing takes its place.
SEARCH = """() => document.addEventListener("click", (event) => {
  const input = event.target;
  if (input.matches?.("input[role=combobox]") && input.selectionStart === input.selectionEnd)
    input.select();
})"""


def theme() -> gradio.themes.Base:
    """Fonts of the reader's system: none is fetched."""
    return gradio.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])


def page(desk: desks.Desk) -> gradio.Blocks:
    """The page of the models of a desk."""
    drawing = [n for n, offer in enumerate(desk.offers) if offer.draws]
    blocks = gradio.Blocks(
        title="tokgen",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(bounds.SWEEP, bounds.KEPT),
    )
    with blocks:
        gradio.Markdown("# tokgen")
        if len(desk.models) == 1 and not drawing:
            _model(desk, 0)
        else:
            with gradio.Tabs():
                for number, offer in enumerate(desk.offers):
                    with gradio.Tab(offer.title, elem_id=f"model-{number}"):
                        _model(desk, number)
                if drawing:
                    with gradio.Tab("Side by side", elem_id="side"):
                        side_panel.panel(desk, drawing)
    blocks.queue(
        max_size=bounds.WAITING, default_concurrency_limit=4, api_open=False, status_update_rate=2
    )
    return blocks


def _model(desk: desks.Desk, number: int) -> None:
    """What a model can do; what it cannot is said, and not offered."""
    offer, key = desk.offers[number], f"m{number}"
    gradio.Markdown(offer.told, elem_classes="told")
    if not offer.draws:
        gradio.Markdown(offer.why)
        token_panel.panel(desk, number, f"{key}-tokens")
        return
    with gradio.Tabs():
        with gradio.Tab("Draw", elem_id=f"{key}-draw-tab"):
            drawn = draw_panel.panel(desk, number, f"{key}-draw")
        with gradio.Tab("Edit", elem_id=f"{key}-edit-tab"):
            edit_panel.panel(desk, number, f"{key}-edit", drawn)
        with gradio.Tab("Tokens", elem_id=f"{key}-tokens-tab"):
            token_panel.panel(desk, number, f"{key}-tokens")
