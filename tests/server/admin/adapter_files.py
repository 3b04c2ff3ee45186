"""Zip files of small adapters, good and broken, and short ways to the routes."""

import io
import zipfile
from pathlib import Path
from typing import Any

import httpx

from tests.server.adapters.make import adapter_dir

ZIP = {"Content-Type": "application/zip"}
WHY = {"reason": "a test"}


def adapter_zip(folder: Path, content: int = 1, **config: Any) -> bytes:
    """`content` makes its numbers."""
    source = adapter_dir(folder / f"peft-{content}-{len(config)}", content, **config)
    return zip_of({path.name: path.read_bytes() for path in sorted(source.iterdir())})


def zip_of(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return memory.getvalue()


async def upload(http: httpx.AsyncClient, data: bytes, name: str = "tools", **query: str) -> httpx.Response:
    path = f"/v1/adapters/{name}/versions"
    return await http.post(path, content=data, headers=ZIP, params=WHY | query)


async def put(http: httpx.AsyncClient, folder: Path, *contents: int, name: str = "tools") -> None:
    """Versions 1, 2, ... of an adapter."""
    for content in contents:
        response = await upload(http, adapter_zip(folder, content), name)
        assert response.status_code == 201, response.text


async def act(http: httpx.AsyncClient, path: str, **body: Any) -> httpx.Response:
    """`path`: below /v1/adapters/."""
    return await http.post(f"/v1/adapters/{path}", json=WHY | body)


def error(response: httpx.Response) -> tuple[int, str | None]:
    """Status and code."""
    return response.status_code, response.json()["error"]["code"]


def message(response: httpx.Response) -> str:
    text: str = response.json()["error"]["message"]
    return text
