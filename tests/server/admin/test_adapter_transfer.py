"""Adapter files over HTTP: what is imported, refused and exported, and that nothing of a request stays behind."""

import asyncio
import io
import json
import stat
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from quant.gguf_reader import read_header
from server.adapters.files import LocalFiles
from server.adapters.version import VersionRef
from server.admin.adapter_transfer import EXTRA_BYTES
from tests.server.adapters.make import adapter_dir
from tests.server.admin.adapter_files import WHY, ZIP, act, adapter_zip, error, message, put, upload, zip_of
from tests.server.engine.test_lora_files import BASE_CONFIG, everywhere, module_name, tensors_for, write_adapter
from tests.server.openai.harness import DIGEST, Harness, async_test, serving

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PARTS = {CONFIG, TENSORS}
OTHER_BASE = json.dumps({"base_digest": "sha256:" + "f" * 64}).encode()


def left_behind(h: Harness) -> list[Path]:
    """What requests left in the store's directories for files on their way."""
    assert h.records.versions is not None
    files = h.records.versions._files
    assert isinstance(files, LocalFiles)
    return [path for name in (".staging", ".trash") for path in (files._root / name).rglob("*")]


def parts_of(folder: Path) -> dict[str, bytes]:
    source = adapter_dir(folder / "parts")
    return {name: (source / name).read_bytes() for name in (CONFIG, TENSORS)}


@async_test
async def test_import_and_export_are_inverse(tmp_path: Path) -> None:
    async with serving() as h:
        first = await upload(h.http, adapter_zip(tmp_path), origin="run 7", base_digest=DIGEST)
        assert first.status_code == 201
        assert (first.json()["version"], first.json()["is_new"], first.json()["origin"]) == ("tools@1", True, "run 7")

        exported = await h.http.get("/v1/adapters/tools/versions/1/export")
        assert exported.headers["content-type"] == "application/zip"
        assert exported.headers["content-disposition"] == 'attachment; filename="tools@1.zip"'
        assert int(exported.headers["content-length"]) == len(exported.content)
        with zipfile.ZipFile(io.BytesIO(exported.content)) as archive:
            assert set(archive.namelist()) == PARTS | {"sterna.json"}
            assert json.loads(archive.read("sterna.json"))["digest"] == first.json()["digest"]

        again = await upload(h.http, exported.content)
        assert again.status_code == 200
        assert again.json() == first.json() | {"is_new": False}
        other = await upload(h.http, exported.content, "other", parent="tools@1")
        assert (other.json()["version"], other.json()["parent"]) == ("other@1", "tools@1")
        assert (await h.http.get("/v1/models/other@1")).status_code == 200
        assert left_behind(h) == []


@async_test
async def test_a_download_lives_as_long_as_it_is_read(tmp_path: Path) -> None:
    """Deleting the version meanwhile takes nothing away from it."""
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        before = (await h.http.get("/v1/adapters/tools/versions/1/export")).content
        await act(h.http, "tools/versions/1/reject")
        exported, _ = await asyncio.gather(
            h.http.get("/v1/adapters/tools/versions/1/export"),
            h.http.delete("/v1/adapters/tools/versions/1", params=WHY),
        )
        assert exported.status_code in (200, 409, 503)
        if exported.status_code == 200:
            assert exported.content == before
        assert left_behind(h) == []


def with_entry(parts: dict[str, bytes], name: str) -> bytes:
    return zip_of(parts | {name: b"x"})


def with_link(parts: dict[str, bytes]) -> bytes:
    memory = io.BytesIO(zip_of({CONFIG: parts[CONFIG]}))
    with zipfile.ZipFile(memory, "a") as archive:
        entry = zipfile.ZipInfo(TENSORS)
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/passwd")
    return memory.getvalue()


def with_tensors(folder: Path, change: Any, **config: Any) -> bytes:
    tensors = tensors_for(everywhere("q_proj", "v_proj"))
    change(tensors)
    source = write_adapter(folder / "changed", BASE_CONFIG | config, tensors)
    return zip_of({path.name: path.read_bytes() for path in source.iterdir()})


def spoil(tensors: dict[str, Any]) -> None:
    name = next(iter(tensors))
    values, dtype = tensors[name]
    tensors[name] = (np.where(np.arange(values.size).reshape(values.shape) == 0, np.nan, values), dtype)


BROKEN: list[tuple[str, Any, str]] = [
    ("no zip", lambda folder: b"PK but nothing else", "the zip file is damaged"),
    ("half a zip", lambda folder: adapter_zip(folder)[:-30], "the zip file is damaged"),
    ("no files", lambda folder: zip_of({}), f"{CONFIG} is missing"),
    ("no weights", lambda folder: zip_of({CONFIG: parts_of(folder)[CONFIG]}), f"{TENSORS} is missing"),
    ("a way up", lambda folder: with_entry(parts_of(folder), "../evil"), "../evil does not belong to an adapter"),
    ("an absolute path", lambda folder: with_entry(parts_of(folder), "/etc/cron.d/x"), "does not belong"),
    ("a folder", lambda folder: zip_of({f"peft/{name}": data for name, data in parts_of(folder).items()}),
     "does not belong"),
    ("a pickle", lambda folder: with_entry(parts_of(folder), "adapter_model.bin"), "is a pickle and is never read"),
    ("a link", lambda folder: with_link(parts_of(folder)), f"{TENSORS} is a symbolic link"),
    ("cut weights", lambda folder: zip_of(parts_of(folder) | {TENSORS: parts_of(folder)[TENSORS][:-8]}), TENSORS),
    ("no JSON", lambda folder: zip_of(parts_of(folder) | {CONFIG: b"{"}), "adapter_config.json is not JSON"),
    ("DoRA", lambda folder: adapter_zip(folder, use_dora=True), "use_dora is 'True'; this key is not supported"),
    ("a large rank", lambda folder: adapter_zip(folder, r=65), "r is 65; it must be an integer from 1 to 64"),
    ("a wrong rank", lambda folder: adapter_zip(folder, r=4), "lora_A.weight"),
    ("not a number", lambda folder: with_tensors(folder, spoil), "lora_A.weight"),
    ("a missing half", lambda folder: with_tensors(folder, lambda tensors: tensors.popitem()), "lora_B.weight"),
    ("another base", lambda folder: zip_of(parts_of(folder) | {"sterna.json": OTHER_BASE}),
     "was trained on the base sha256:ff"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
@async_test
async def test_broken_adapters_are_refused_with_the_reason(make: Any, words: str, tmp_path: Path) -> None:
    async with serving() as h:
        response = await upload(h.http, make(tmp_path), origin="my adapter")
        assert error(response) == (400, "invalid_adapter")
        assert words in message(response)
        assert "sterna-harness" not in message(response)  # a path of ours is nobody's business
        assert (await h.http.get("/v1/adapters")).json()["data"] == []
        assert (await h.http.get("/v1/models/tools@1")).status_code == 404
        assert left_behind(h) == []


@async_test
async def test_messages_name_the_file_as_its_sender_does(tmp_path: Path) -> None:
    async with serving() as h:
        response = await upload(h.http, zip_of({}), origin="my adapter")
    assert message(response) == f"my adapter: {CONFIG} is missing"


@pytest.mark.parametrize(
    ("name", "query", "status", "param"),
    [
        ("Tools", {}, 400, None),
        ("to@ols", {}, 400, None),
        ("tiny", {}, 400, None),  # the base's name
        ("tools", {"reason": ""}, 400, "reason"),
        ("tools", {"reason": "\0"}, 400, "reason"),
        ("tools", {"origin": "x" * 2001}, 400, "origin"),
        ("tools", {"base_digest": "x"}, 400, "base_digest"),
        ("tools", {"base_digest": "sha256:" + "f" * 64}, 400, None),
        ("tools", {"parent": "tools"}, 400, "parent"),
        ("tools", {"parent": "tools@9"}, 404, None),
        ("tools", {"adapter": "other"}, 400, "adapter"),
    ],
)
@async_test
async def test_bad_queries(name: str, query: dict[str, str], status: int, param: str | None, tmp_path: Path) -> None:
    async with serving() as h:
        response = await upload(h.http, adapter_zip(tmp_path), name, **query)
        assert response.status_code == status
        assert response.json()["error"]["param"] == param
        missing = await h.http.post("/v1/adapters/tools/versions", content=b"x", headers=ZIP)
        assert missing.json()["error"]["code"] == "missing_required_parameter"
        assert (await h.http.get("/v1/adapters")).json()["data"] == []
        assert left_behind(h) == []


@async_test
async def test_the_type_and_the_size_of_an_upload(tmp_path: Path) -> None:
    async with serving() as h:
        path = "/v1/adapters/tools/versions"
        for content_type in ("application/json", "multipart/form-data; boundary=x", ""):
            response = await h.http.post(path, content=b"{}", params=WHY, headers={"Content-Type": content_type})
            assert error(response)[0] == 415
        assert error(await upload(h.http, b""))[0] == 400

        assert h.records.versions is not None
        h.records.versions.max_version_bytes = 1000  # no test sends two gigabytes
        data = adapter_zip(tmp_path)
        assert len(data) < 1000  # it is what comes out that counts
        assert "adapter_model.safetensors is larger than 1000 bytes" in message(await upload(h.http, data))

        received = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal received
            while True:
                received += 1 << 16
                yield bytes(1 << 16)

        too_large = await h.http.post(path, content=endless(), params=WHY, headers=ZIP)
        assert error(too_large) == (413, "request_too_large")
        assert received <= 1000 + EXTRA_BYTES + (2 << 20)
        declared = httpx.Request("POST", f"http://test{path}", params=WHY, content=b"x", headers=ZIP)
        declared.headers["Content-Length"] = str(10**12)
        assert error(await h.http.send(declared)) == (413, "request_too_large")
        assert left_behind(h) == []


@async_test
async def test_a_client_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    async with serving() as h:
        sent: list[dict[str, Any]] = []
        parts = iter([{"type": "http.request", "body": b"PK", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(parts)

        async def send(event: Any) -> None:
            sent.append(event)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/adapters/tools/versions", "query_string": b"reason=x",
            "headers": [(b"content-type", b"application/zip")], "app": h.app, "scheme": "http",
            "server": ("test", 80), "root_path": "", "http_version": "1.1",
        }  # fmt: skip
        await h.app(scope, receive, send)
        assert sent[0]["status"] == 400
        assert left_behind(h) == []


@async_test
async def test_many_imports_at_once_are_versions_one_by_one(tmp_path: Path) -> None:
    async with serving() as h:
        files = [adapter_zip(tmp_path, content) for content in range(1, 7)] + [adapter_zip(tmp_path, 8)] * 3
        answers = await asyncio.gather(*(upload(h.http, data) for data in files))
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [201] * 7
        assert len({answer.json()["version"] for answer in answers[-3:]}) == 1
        shown = (await h.http.get("/v1/adapters/tools")).json()
        assert {version["number"] for version in shown["versions"]} == set(range(1, 8))
        assert left_behind(h) == []


@async_test
async def test_diff(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1, 2)
        await upload(h.http, adapter_zip(tmp_path, 1, lora_dropout=float("nan"), lora_alpha=12))
        response = await h.http.get("/v1/adapters/tools/versions/1/diff", params={"other": "tools@2"})
        diff = response.json()
        assert (diff["left"]["version"], diff["right"]["version"], diff["config"]) == ("tools@1", "tools@2", {})
        # Content 2 has twice the numbers of both halves: four times the change.
        assert len(diff["projections"]) == 6
        for row in diff["projections"]:
            assert row["right_norm"] == pytest.approx(4 * row["left_norm"])
            assert row["difference_norm"] == pytest.approx(3 * row["left_norm"])

        scaled = (await h.http.get("/v1/adapters/tools/versions/1/diff", params={"other": "tools@3"})).json()
        assert scaled["config"] == {
            "lora_alpha": {"left": 6, "right": 12}, "lora_dropout": {"left": None, "right": "nan"}
        }  # fmt: skip
        assert scaled["projections"][0]["right_norm"] == pytest.approx(2 * scaled["projections"][0]["left_norm"])


@async_test
async def test_a_version_whose_files_are_gone_is_the_server_s_fault(tmp_path: Path) -> None:
    async with serving() as h:
        await put(h.http, tmp_path, 1)
        assert h.records.versions is not None
        store = h.records.versions
        (store.path(store.registry.version(VersionRef("tools", 1))) / TENSORS).unlink()
        response = await h.http.get("/v1/adapters/tools/versions/1/export")
        assert error(response) == (503, "service_unavailable")
        assert "tools@1" in message(response)
        assert "sterna-harness" not in message(response)
        assert left_behind(h) == []


@async_test
async def test_a_version_for_llama_cpp(tmp_path: Path) -> None:
    async with serving() as h:
        version = (await upload(h.http, adapter_zip(tmp_path))).json()
        path = "/v1/adapters/tools/versions/1/export"
        exported = await h.http.get(path, params={"format": "gguf"})
        assert exported.headers["content-type"] == "application/octet-stream"
        assert exported.headers["content-disposition"] == 'attachment; filename="tools@1.gguf"'
        assert int(exported.headers["content-length"]) == len(exported.content)
        header = read_header(exported.content, Path("tools@1.gguf"))
        facts = {"general.name": "tools@1", "sterna.version": "tools@1", "sterna.digest": version["digest"]}
        facts |= {"sterna.base_digest": DIGEST, "adapter.lora.alpha": 6.0}
        assert {name: header.metadata[name] for name in facts} == facts
        kinds = ("attn_q", "attn_v")
        assert {name: one.shape for name, one in header.tensors.items() if name.startswith("blk.2")} == {
            f"blk.2.{kind}.weight.lora_{half}": shape
            for kind, rows in zip(kinds, (12, 6), strict=True)
            for half, shape in (("a", (2, 8)), ("b", (rows, 2)))
        }
        assert (await h.http.get(path, params={"format": "peft"})).headers["content-type"] == "application/zip"
        assert error(await h.http.get(path, params={"format": "GGUF"})) == (400, None)
        assert error(await h.http.get(path, params={"formt": "gguf"})) == (400, "unknown_parameter")
        assert left_behind(h) == []


@async_test
async def test_what_llama_cpp_s_file_cannot_hold(tmp_path: Path) -> None:
    async with serving() as h:
        tensor = f"base_model.model.{module_name(0, 'q_proj')}.lora_B.weight"

        def enlarge(tensors: dict[str, Any]) -> None:
            tensors[tensor] = (tensors[tensor][0] * 1e37, "F32")

        scaled = with_tensors(tmp_path, enlarge, alpha_pattern={"layers.0.self_attn.q_proj": 6000})
        assert (await upload(h.http, scaled)).status_code == 201
        refused = await h.http.get("/v1/adapters/tools/versions/1/export", params={"format": "gguf"})
        assert error(refused) == (400, None)
        assert message(refused) == (
            "tools@1 cannot be written for llama.cpp: blk.0.attn_q.weight.lora_b: its scale 3000 is too far from the "
            "others' to be put into its values as float32"
        )

        assert h.records.versions is not None
        h.records.versions.base = replace(h.records.versions.base, digest="sha256:" + "e" * 64)
        refused = await h.http.get("/v1/adapters/tools/versions/1/export", params={"format": "gguf"})
        assert error(refused) == (400, None)
        assert "was trained on the base sha256:" in message(refused)
        assert left_behind(h) == []
