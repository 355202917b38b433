"""``python -m evals.serve``: type a text, see which latents fire, push one. On this machine only.

The server listens on 127.0.0.1 and answers to no other Host (so no web page reaches it by renaming itself), takes
questions as JSON of at most MAX_BODY bytes from its own pages alone, and serves the built site beside them. It needs
the extra ``saescope[serve]``.
"""

import argparse
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.page_text import visible
from evals.pages import SITE, environment
from sae import console, exits
from sae.errors import ArtefactError, ConfigError, MissingExtra, SaescopeError

if TYPE_CHECKING:
    from evals.live import Live

HOSTS = ["127.0.0.1", "localhost"]
MAX_BODY = 16_384
TABLES = ("leaderboard.csv", "leaderboard.md", "leaderboard.parquet")


def _question(body: bytes, names: dict[str, type]) -> dict[str, Any]:
    """The fields of a request. ConfigError says what is wrong with it."""
    try:
        asked = json.loads(body.decode("utf-8", errors="replace"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"the question is no JSON: {type(error).__name__}") from error
    if not isinstance(asked, dict) or set(asked) != set(names):
        raise ConfigError(f"expected an object with {', '.join(names)}")
    for name, kind in names.items():
        value = asked[name]
        fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if not fits or isinstance(value, bool):
            raise ConfigError(f"{name} must be of type {kind.__name__}")
    return asked


def _refuse(status: int, why: str) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": visible(why)}, status_code=status)


def _answer(names: dict[str, type], ask: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """The handler of a question: what it may hold, who may ask, and what it is answered."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    async def handle(request: Request) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{request.headers.get('host')}":
            return _refuse(403, "asked by another site")
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return _refuse(415, "expected application/json")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return _refuse(413, f"a question has at most {MAX_BODY} bytes")
        try:
            return JSONResponse(await run_in_threadpool(ask, **_question(body, names)))
        except SaescopeError as error:
            return _refuse(400, str(error))

    return handle


def make_app(root: Path, live: "Live") -> Any:
    """The Starlette application: ``/`` the page, ``/api/*`` its questions, ``/site`` the built pages."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    page = environment().get_template("serve.html.j2").render(up="/", foot="Local", subjects=live.subjects())

    async def home(_: Request) -> Response:
        return HTMLResponse(page)

    def asset(name: str, kind: str) -> Route:
        async def give(_: Request) -> Response:
            return FileResponse(SITE / name, media_type=kind)

        return Route(f"/{name}", give)

    async def board(_: Request) -> Response:
        return RedirectResponse("/site/index.html")

    def table(name: str) -> Route:
        async def give(_: Request) -> Response:
            return FileResponse(root / name) if (root / name).is_file() else _refuse(404, "not built")

        return Route(f"/{name}", give)

    tokens = _answer({"sae_id": str, "text": str}, live.tokens)
    steer = _answer({"sae_id": str, "text": str, "latent": int, "strength": float}, live.steer)
    return Starlette(
        routes=[
            Route("/", home),
            Route("/index.html", board),
            asset("style.css", "text/css"),
            asset("site.js", "text/javascript"),
            asset("serve.js", "text/javascript"),
            Route("/api/tokens", tokens, methods=["POST"]),
            Route("/api/steer", steer, methods=["POST"]),
            *map(table, TABLES),
            Mount("/site", StaticFiles(directory=root / "site", html=True)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
    )


def _free(port: int) -> None:
    """ConfigError if this port of 127.0.0.1 cannot be listened on."""
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a port just left is free
            trial.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port}: {getattr(error, 'strerror', None) or error}; give another --port") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Door of ``python -m evals.serve``; its exit status: :mod:`sae.exits`, so 130 after Ctrl-C, which ends it."""
    parser = argparse.ArgumentParser("python -m evals.serve", description="Your own text against the SAEs of a run.")
    parser.add_argument("--root", type=Path, default=Path("results"), help="folder of artefacts (default: results)")
    parser.add_argument("--port", type=int, default=8642, help="port on 127.0.0.1 (default: 8642)")
    options = parser.parse_args(arguments)
    console.setup()
    return exits.run(lambda: _run(options), kept="")


def _run(options: argparse.Namespace) -> int:
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise MissingExtra(error.name or "starlette", "serve") from error
    if not (options.root / "site" / "index.html").is_file():
        raise ArtefactError(f"{options.root}/site is not built; run: python -m evals.leaderboard --root {options.root}")
    _free(options.port)
    from evals.live import Live

    app = make_app(options.root, Live(options.root))
    console.say(f"http://127.0.0.1:{options.port}/ (Ctrl-C ends it)")
    # not uvicorn.run, which swallows the interrupt
    uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=options.port, log_level="warning")).run()
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
