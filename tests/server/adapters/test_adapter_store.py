"""The version store: what comes in is checked first, what is kept is whole, what goes out comes back as the same."""

import json
import os
import stat
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.adapters.errors import AdapterConflictError, AdapterStateError, VersionNotFoundError
from server.adapters.registry import Registry
from server.adapters.store import VersionStore, memory_bytes
from server.adapters.version import VersionRef
from server.engine.lora import load_adapter_files
from server.errors import AdapterError, ServerUnavailableError
from server.storage.database import Database
from tests.server.adapters.make import BASE, WHO, adapter_dir, put_live, store_at
from tests.server.engine.test_lora_files import MODEL, tensors_for, write_adapter

V1 = VersionRef("tools", 1)
FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def registry(sqlite_database: Database) -> Registry:
    return Registry(sqlite_database)


@pytest.fixture(params=["local", "memory"])
def store(registry: Registry, tmp_path: Path, request: pytest.FixtureRequest) -> VersionStore:
    """On a local directory, and behind fsspec."""
    root = tmp_path / "store" if request.param == "local" else f"memory://{request.node.name}-{tmp_path.name}"
    return store_at(registry, root)


@pytest.fixture
def local_store(registry: Registry, tmp_path: Path) -> VersionStore:
    return store_at(registry, tmp_path / "store")


def files_under(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_import_and_load(store: VersionStore, tmp_path: Path) -> None:
    source = adapter_dir(tmp_path / "peft")
    (source / "README.md").write_text("PEFT writes this")
    version, is_new = store.import_version(source, "tools", **WHO)
    expected = load_adapter_files(source, MODEL)  # type: ignore[arg-type]
    assert is_new
    assert (version.ref, version.digest, version.base_digest, version.rank) == (V1, expected.digest, BASE, 2)
    assert version.size_bytes == sum((source / name).stat().st_size for name in FILES)
    assert version.origin == "import of peft"
    loaded = store.load(version)
    assert loaded.digest == version.digest
    for left, right in zip(loaded.projections, expected.projections, strict=True):
        np.testing.assert_array_equal(left.a, right.a)
        np.testing.assert_array_equal(left.b, right.b)
    assert {path.name for path in store.path(version).iterdir()} == FILES


def test_the_memory_that_a_version_takes(tmp_path: Path) -> None:
    weights = load_adapter_files(adapter_dir(tmp_path / "peft"), MODEL)  # type: ignore[arg-type]
    # q_proj: A (2, 8) and B (12, 2); v_proj: A (2, 8) and B (6, 2); rows in panels of 16; three layers.
    assert memory_bytes(weights, is_float=True) == 3 * 2 * 4 * (16 * 8 + 16 * 2)
    # 8-bit: each row is half a block of 32 values and its scale.
    assert memory_bytes(weights, is_float=False) == 3 * 2 * 2 * 16 * (16 + 2)


def test_the_same_content_twice_is_one_version(store: VersionStore, tmp_path: Path) -> None:
    source = adapter_dir(tmp_path / "peft")
    first, _ = store.import_version(source, "tools", **WHO)
    assert store.import_version(source, "tools", **WHO) == (first, False)
    assert store.import_version(source, "other", **WHO)[0].ref == VersionRef("other", 1)
    assert store.import_version(adapter_dir(tmp_path / "b", 2), "tools", **WHO)[0].ref == VersionRef("tools", 2)


def test_two_imports_of_the_same_content_at_once(
    local_store: VersionStore, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = adapter_dir(tmp_path / "peft")
    other = store_at(registry, tmp_path / "store")
    begin = registry.begin_import

    def begin_after_the_other(directory: str) -> None:
        monkeypatch.setattr(registry, "begin_import", begin)
        other.import_version(source, "tools", **WHO)
        begin(directory)

    monkeypatch.setattr(registry, "begin_import", begin_after_the_other)
    version, is_new = local_store.import_version(source, "tools", **WHO)
    assert (version.ref, is_new) == (V1, False)
    assert local_store.load(version).digest == version.digest
    assert local_store.collect_garbage() == []
    assert len(files_under(tmp_path / "store")) == 2


def test_lineage_and_base(store: VersionStore, tmp_path: Path) -> None:
    source = adapter_dir(tmp_path / "peft")
    with pytest.raises(VersionNotFoundError):
        store.import_version(source, "tools", parent=V1, **WHO)
    with pytest.raises(AdapterError, match=r"trained on the base sha256:cc"):
        store.import_version(source, "tools", base_digest="sha256:cc", **WHO)
    store.import_version(source, "tools", base_digest=BASE, **WHO)
    child, _ = store.import_version(adapter_dir(tmp_path / "b", 2), "tools", parent=V1, origin="round 5", **WHO)
    assert (child.parent, child.origin) == ("tools@1", "round 5")


@pytest.mark.parametrize("name", ["base-model", "Tools", "../tools", "a/b", "", "tools@1", "."])
def test_names_that_are_refused(local_store: VersionStore, tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterError, match="name"):
        local_store.import_version(adapter_dir(tmp_path / "peft"), name, **WHO)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", ["directory", "zip"])
def test_export_and_import_again(store: VersionStore, registry: Registry, tmp_path: Path, kind: str) -> None:
    version, _ = store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    target = store.export(V1, tmp_path / ("out.zip" if kind == "zip" else "out"))
    assert store.import_version(target, "tools", **WHO) == (version, False)
    with pytest.raises(AdapterError, match="exists already"):
        store.export(V1, target)
    with pytest.raises(AdapterError, match="No such file"):
        store.export(V1, tmp_path / "nowhere" / "out")
    with pytest.raises(VersionNotFoundError):
        store.export(VersionRef("tools", 2), tmp_path / "two")
    stranger = store_at(registry, tmp_path / "strange", base="sha256:" + "d" * 64)
    with pytest.raises(AdapterError, match=f"trained on the base {BASE}"):
        stranger.import_version(target, "theirs", **WHO)
    assert {path.name for path in tmp_path.iterdir()} & {".out", "out"} <= {"out"}  # nothing half done beside it


def test_an_export_that_was_changed_is_noticed(local_store: VersionStore, tmp_path: Path) -> None:
    local_store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    target = local_store.export(V1, tmp_path / "out")
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    with pytest.raises(AdapterError, match=r"its digest is sha256:.*, sterna.json says sha256:"):
        local_store.import_version(target, "tools", **WHO)


Spoil = Callable[[Path], Any]


def links_out(source: Path) -> None:
    file = source / "adapter_model.safetensors"
    file.rename(source.parent / "elsewhere")
    file.symlink_to(source.parent / "elsewhere")


def nan(source: Path) -> None:
    tensors = tensors_for([(layer, name) for layer in range(3) for name in ("q_proj", "v_proj")])
    tensors[next(iter(tensors))] = (np.full((2, 8), np.nan), "F32")
    write_adapter(source, json.loads((source / "adapter_config.json").read_text()), tensors)


def truncate(source: Path) -> None:
    os.truncate(source / "adapter_model.safetensors", 100)


SPOILED: dict[str, tuple[Spoil, str]] = {
    "pickle beside": (lambda at: (at / "training_args.bin").write_bytes(b"x"), r"training_args\.bin is a pickle"),
    "pickle only": (lambda at: (at / "adapter_model.safetensors").rename(at / "adapter_model.bin"), "pickle"),
    "extra file": (lambda at: (at / "run.sh").write_text("x"), r"run\.sh does not belong"),
    "extra directory": (lambda at: (at / "checkpoint-1").mkdir(), "checkpoint-1 does not belong"),
    "name that is no text": (lambda at: (at / "a\nb\x1b").write_text("x"), r"a\\nb\\x1b does not belong"),
    "link": (links_out, "symbolic link"),
    "dangling link": (lambda at: (at / "sterna.json").symlink_to("nowhere"), "symbolic link"),
    "pipe": (lambda at: os.mkfifo(at / "sterna.json"), "no regular file"),
    "directory for a file": (lambda at: (at / "sterna.json").mkdir(), "no regular file"),
    "no configuration": (lambda at: (at / "adapter_config.json").unlink(), r"adapter_config\.json is missing"),
    "no tensors": (lambda at: (at / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors is missing"),
    "truncated": (truncate, "truncated|does not fit"),
    "nan": (nan, r"layers\.0\.self_attn\.q_proj\.lora_A\.weight holds a value that is not finite"),
    "manifest no JSON": (lambda at: (at / "sterna.json").write_text("{"), r"sterna\.json is not JSON"),
    "manifest a list": (lambda at: (at / "sterna.json").write_text("[]"), "must hold an object"),
    "manifest digest": (lambda at: (at / "sterna.json").write_text('{"base_digest": 5}'), "base_digest is '5'"),
    "manifest other": (lambda at: (at / "sterna.json").write_text('{"base_digest": "sha256:c"}'), "trained on"),
    "manifest too large": (lambda at: (at / "sterna.json").write_text(" " * (1 << 20) + "{}"), "larger than 1048576"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_is_refused_leaves_nothing(
    local_store: VersionStore, registry: Registry, tmp_path: Path, spoiled: str
) -> None:
    source = adapter_dir(tmp_path / "peft")
    spoil, reason = SPOILED[spoiled]
    spoil(source)
    with pytest.raises(AdapterError, match=reason) as caught:
        local_store.import_version(source, "tools", **WHO)
    assert ".staging" not in str(caught.value)
    assert registry.adapters() == []
    assert registry.directories() == set()
    assert files_under(tmp_path / "store") == set()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"use_dora": True}, "use_dora"), ({"r": 3}, "shape"), ({"target_modules": ["k_proj"]}, "not expected"),
     ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"r": 65}, "r is 65")],
)  # fmt: skip
def test_configurations_that_are_refused(
    local_store: VersionStore, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(AdapterError, match=named):
        local_store.import_version(adapter_dir(tmp_path / "peft", **changes), "tools", **WHO)


def test_a_source_that_is_none(local_store: VersionStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(adapter_dir(tmp_path / "peft"))
    (tmp_path / "text").write_text("no zip")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "gone": "No such file", "link": "neither a directory nor", "pipe": "neither", "text": "zip file is damaged",
        "a\0b": "null",
    }.items():  # fmt: skip
        with pytest.raises(AdapterError, match=reason):
            local_store.import_version(tmp_path / name, "tools", **WHO)


def test_a_size_limit_holds_whatever_a_header_says(registry: Registry, tmp_path: Path) -> None:
    source = adapter_dir(tmp_path / "peft")
    size = (source / "adapter_model.safetensors").stat().st_size
    with pytest.raises(AdapterError, match=f"larger than {size - 1} bytes"):
        store_at(registry, tmp_path / "store", max_version_bytes=size - 1).import_version(source, "tools", **WHO)
    store_at(registry, tmp_path / "store", max_version_bytes=size).import_version(source, "tools", **WHO)


def zipped(source: Path, target: Path, change: Callable[[zipfile.ZipFile], object], *, skip: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(source.iterdir()):
            if path.name != skip:
                archive.write(path, path.name)
        change(archive)
    return target


def symlink_entry(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("adapter_model.safetensors")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(entry, "/etc/passwd")


def test_zip_files(store: VersionStore, tmp_path: Path) -> None:
    source = adapter_dir(tmp_path / "peft")
    whole = zipped(source, tmp_path / "whole.zip", lambda archive: None)
    assert store.import_version(whole, "tools", **WHO)[0].ref == V1
    for name in ("../evil", "/etc/evil", "a/../../evil", "tools/adapter_config.json", "x.pkl"):
        spoiled = zipped(source, tmp_path / "spoiled.zip", lambda archive, name=name: archive.writestr(name, "x"))
        with pytest.raises(AdapterError, match=r"does not belong|pickle"):
            store.import_version(spoiled, "evil", **WHO)
    linked = zipped(source, tmp_path / "linked.zip", symlink_entry, skip="adapter_model.safetensors")
    with pytest.raises(AdapterError, match="symbolic link"):
        store.import_version(linked, "evil", **WHO)
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(source, tmp_path / "twice.zip", lambda archive: archive.writestr("adapter_config.json", "{}"))
    with pytest.raises(AdapterError, match="twice"):
        store.import_version(tmp_path / "twice.zip", "evil", **WHO)
    assert [adapter.name for adapter in store.registry.adapters()] == ["tools"]


def test_damaged_zip_files_never_crash(local_store: VersionStore, tmp_path: Path) -> None:
    content = zipped(adapter_dir(tmp_path / "peft"), tmp_path / "whole.zip", lambda archive: None).read_bytes()
    rng = np.random.default_rng(0)
    spoiled = tmp_path / "spoiled.zip"
    num_refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        if rng.integers(4) == 0:
            del damaged[rng.integers(len(content)) :]
        for _ in range(rng.integers(1, 5)):
            if damaged:
                damaged[rng.integers(len(damaged))] = rng.integers(256)
        spoiled.write_bytes(damaged)
        try:
            local_store.import_version(spoiled, "tools", **WHO)
        except AdapterError:
            num_refused += 1
    assert num_refused > 100


def test_a_changed_file_is_not_served(local_store: VersionStore, tmp_path: Path) -> None:
    version, _ = local_store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    config = local_store.path(version) / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    with pytest.raises(AdapterError, match=r"tools@1: its files were changed: digest sha256:.*, not sha256:"):
        local_store.load(version)
    (local_store.path(version) / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"tools@1: .*No such file"):
        local_store.load(version)


def test_a_bad_copy_of_a_remote_version_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    store = store_at(registry, f"memory://{tmp_path.name}-again")
    version, _ = store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    os.truncate(store.path(version) / "adapter_model.safetensors", 50)
    with pytest.raises(AdapterError, match="tools@1"):
        store.load(version)
    assert store.load(version).digest == version.digest


def test_a_version_for_another_base_is_not_served(
    registry: Registry, local_store: VersionStore, tmp_path: Path
) -> None:
    version, _ = local_store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    with pytest.raises(AdapterError, match=f"tools@1 was trained on the base {BASE}"):
        store_at(registry, tmp_path / "store", base="sha256:" + "d" * 64).load(version)


def test_delete(store: VersionStore, tmp_path: Path) -> None:
    version, _ = store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    with pytest.raises(AdapterStateError, match="is candidate"):
        store.delete(V1, **WHO)
    store.registry.reject(V1, **WHO)
    path = store.path(version)
    for _ in range(2):  # twice is once
        assert store.delete(V1, **WHO).is_deleted
    assert not path.exists()
    assert store.collect_garbage() == []
    with pytest.raises(AdapterError):
        store.load(version)
    with pytest.raises(AdapterError, match="was deleted"):
        store.export(V1, tmp_path / "out")
    assert store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)[0].ref == VersionRef("tools", 2)


def test_garbage(registry: Registry, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    store = store_at(registry, tmp_path / "store", clock=lambda: now)
    kept, _ = store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    gone, _ = store.import_version(adapter_dir(tmp_path / "b", 2), "tools", **WHO)
    put_live(registry, kept.ref)
    registry.reject(gone.ref, **WHO)
    registry.mark_deleted(gone.ref, **WHO)  # and killed before the files went
    foreign = adapter_dir(tmp_path / "store" / "mine" / "checkpoint-7", 3)
    half = tmp_path / "store" / ".staging" / "half"
    half.mkdir()
    claimed = tmp_path / "store" / "tools" / "0123456789abcdef-01234567"
    registry.begin_import(f"tools/{claimed.name}")
    adapter_dir(claimed, 4)
    assert store.collect_garbage() == [gone.directory]
    assert half.exists()  # somebody may be at work
    assert claimed.exists()
    now += timedelta(hours=2)
    assert store.collect_garbage() == [f"tools/{claimed.name}"]
    assert not half.exists()
    assert foreign.exists()  # not ours
    assert store.load(kept).digest == kept.digest


def test_an_import_that_was_given_up_meanwhile_fails_cleanly(
    registry: Registry, local_store: VersionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = store_at(registry, tmp_path / "store", clock=lambda: datetime.now(UTC) + timedelta(hours=2))
    publish = local_store._files.publish

    def publish_slowly(staged: Path, directory: str) -> None:
        publish(staged, directory)
        later.collect_garbage()

    monkeypatch.setattr(local_store._files, "publish", publish_slowly)
    with pytest.raises(AdapterConflictError, match="try again"):
        local_store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    monkeypatch.undo()
    version, _ = local_store.import_version(tmp_path / "peft", "tools", **WHO)
    assert local_store.load(version).digest == version.digest


def test_a_staging_directory_that_was_cleaned_away(
    registry: Registry, local_store: VersionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = store_at(registry, tmp_path / "store", clock=lambda: datetime.now(UTC) + timedelta(hours=2))
    begin = registry.begin_import

    def begin_slowly(directory: str) -> None:
        later.collect_garbage()
        begin(directory)

    monkeypatch.setattr(registry, "begin_import", begin_slowly)
    with pytest.raises(ServerUnavailableError, match="the adapter store failed"):
        local_store.import_version(adapter_dir(tmp_path / "peft"), "tools", **WHO)
    assert registry.adapters() == []


def test_a_full_disk(local_store: VersionStore, registry: Registry, tmp_path: Path) -> None:
    source = adapter_dir(tmp_path / "peft")
    local_store.import_version(source, "tools", **WHO)
    target = tmp_path / "store" / ".staging"
    target.rmdir()
    target.symlink_to("/dev/full")  # whatever is written there, the disk is full
    with pytest.raises(ServerUnavailableError, match="the adapter store failed"):
        local_store.import_version(adapter_dir(tmp_path / "b", 2), "tools", **WHO)
    assert len(registry.adapter("tools").versions) == 1


def test_copies_of_what_another_server_deleted_go(registry: Registry, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}-copies"
    ours, theirs = store_at(registry, url), store_at(registry, url)
    gone, _ = ours.import_version(adapter_dir(tmp_path / "one"), "tools", **WHO)
    kept, _ = ours.import_version(adapter_dir(tmp_path / "two", 2), "tools", **WHO)
    copies = [theirs.path(version) for version in (gone, kept)]
    registry.reject(gone.ref, **WHO)
    ours.delete(gone.ref, **WHO)
    assert theirs.collect_garbage() == []
    assert [copy.exists() for copy in copies] == [False, True]
