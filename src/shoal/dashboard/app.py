"""The page at /swarm, its JSON at /swarm.json. Inside the gateway, or by itself."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from shoal.dashboard.observer import Observer

STATIC: Final = Path(__file__).with_name("static")


def routes(observer: Observer) -> list[BaseRoute]:
    """The page, what it needs, and its JSON."""

    async def page(request: Request) -> Response:
        return FileResponse(STATIC / "swarm.html")

    async def state(request: Request) -> Response:
        return JSONResponse(await observer.state(), headers={"Cache-Control": "no-store"})

    return [
        Route("/swarm", page, methods=["GET"]),
        Route("/swarm.json", state, methods=["GET"]),
        Mount("/swarm-static", StaticFiles(directory=STATIC)),
    ]


def application(observer: Observer, hosts: Collection[str] | None) -> ASGIApp:
    """The dashboard by itself. `hosts`: names that requests may use; None: any."""

    async def start(request: Request) -> Response:
        return RedirectResponse("/swarm")

    allowed = ["*"] if hosts is None else sorted(hosts)
    return Starlette(
        routes=[Route("/", start, methods=["GET"]), *routes(observer)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)],
    )
