"""The page served: from the command's arguments to a server that a browser reaches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pathlib
import socket
import tempfile
from collections.abc import Sequence

import PIL.Image

from tokgen import image_models, report
from tokgen.app import bounds, files, gate, offers
from tokgen.errors import UserError

LOCAL = ("127.0.0.1", "::1", "localhost")
# What the framework is told before it is imported: to ask nobody, and to keep to one folder.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def check(checkpoints: Sequence[str], host: str, port: int) -> None:
    """What is refused before anything is loaded."""
    if len(checkpoints) > bounds.MODELS:
        raise UserError(
            f"a page has at most {bounds.MODELS} models; found {len(checkpoints)}: leave some out"
        )
    if not 0 <= port < 2**16:
        raise UserError(f"--port must lie in [0, 65535]; found {port}")
    listening(host, port).close()


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound; UserError where it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, port))
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise UserError(
            f"--host and --port must be free on this machine; found {host} port {port}: "
            f"{error.strerror or error}; another --port may be, or 0, which chooses one"
        ) from error
    return found


def serve(checkpoints: Sequence[str], *, host: str, port: int) -> None:
    """Load models, and serve their page until it is interrupted."""
    os.environ.update(QUIET)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokgen-")))
        folder = folder.resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
        (folder / "uploads").mkdir()
        import uvicorn

        from tokgen.app import desks, page

        models = [image_models.load(path) for path in checkpoints]
        shown = [
            offers.offer(model, title)
            for model, title in zip(models, offers.titles(checkpoints), strict=True)
        ]
        kept = folder / "made"
        kept.mkdir()
        application = mounted(page.page(desks.Desk(models, shown, files.Files(kept))), folder, host)
        config = uvicorn.Config(
            application,
            log_level="error",
            ws="none",
            limit_concurrency=bounds.CONNECTIONS,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=1,
        )
        logging.getLogger("uvicorn.error").addFilter(_meant)
        place = stack.enter_context(contextlib.closing(listening(host, port)))
        place.listen(bounds.CONNECTIONS)  # who comes before the server does waits for it
        name, number = place.getsockname()[:2]
        name = f"[{name}]" if ":" in name else name
        if host not in LOCAL:
            report.say(f"whoever reaches this machine at {host} can use the page")
        report.say(f"open http://{name}:{number} (Ctrl-C ends it)")
        uvicorn.Server(config).run(sockets=[place])


def _meant(record: logging.LogRecord) -> bool:
    """Whether a line is meant for the terminal: not that open pages are cut off in the end."""
    kind = (record.exc_info or (None,))[0]
    cut = kind is not None and issubclass(kind, asyncio.CancelledError)
    return not cut and "graceful shutdown" not in record.getMessage()


def mounted(blocks: object, folder: pathlib.Path, host: str) -> gate.Gate:
    """A page as an application, behind its bounds."""
    import fastapi
    import gradio

    from tokgen.app import page

    # until it is said, files that a request names are copied from anywhere (gradio 6.31)
    blocks.has_launched = True
    blocks.state_session_capacity = bounds.SESSIONS
    PIL.Image.MAX_IMAGE_PIXELS = bounds.PIXELS // 2  # PIL refuses twice as many
    application = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[str(folder / "made")],
        show_error=False,
        max_file_size=bounds.UPLOAD,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=page.theme(),
        css=page.CSS,
        js=page.SEARCH,
    )
    return gate.Gate(application, folder, local=host in LOCAL)
