"""A store in memory behind gs:// and s3:// addresses: names and bytes, no folders, and a log of what was written."""

import io

import pytest
from etils.epath import backend
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

from hintsd_jax import storage


class Refused(Exception):
    """Of a family of its own, as those of stores' libraries are."""


class Store(AbstractFileSystem):
    """Objects by name. `objects`, `written` and `refuses` are of the class: fsspec makes one instance of it."""

    objects: dict[str, bytes] = {}
    written: list[str] = []
    refuses = False

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).partition("://")[2].strip("/") if "://" in str(path) else str(path).strip("/")

    def ls(self, path, detail=True, **unused):
        self._ask()
        path = self._strip_protocol(path)
        if path in self.objects:
            found = [{"name": path, "size": len(self.objects[path]), "type": "file"}]
        else:
            below = [name[len(path) + 1 :] for name in self.objects if name.startswith(f"{path}/")]
            if not below:
                raise FileNotFoundError(path)
            found = [
                {"name": f"{path}/{first}", "size": len(self.objects.get(f"{path}/{first}", b"")), "type": kind}
                for first, kind in sorted({(n.partition("/")[0], "directory" if "/" in n else "file") for n in below})
            ]
        return found if detail else [entry["name"] for entry in found]

    def info(self, path, **unused):
        path = self._strip_protocol(path)
        found = self.ls(path)
        return found[0] if path in self.objects else {"name": path, "size": 0, "type": "directory"}

    def _open(self, path, mode="rb", **unused):
        self._ask()
        path, store = self._strip_protocol(path), type(self)
        if mode == "rb":
            if path not in self.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(self.objects[path])

        class Sent(io.BytesIO):
            def close(self):
                if not self.closed:
                    store.objects[path] = self.getvalue()
                    store.written.append(path)
                super().close()

        return Sent()

    def _rm(self, path):
        self._ask()
        if self.objects.pop(self._strip_protocol(path), None) is None:
            raise FileNotFoundError(path)

    rm_file = _rm

    def _ask(self):
        if self.refuses:
            raise Refused("no credentials for this bucket")


@pytest.fixture
def store(monkeypatch):
    """The store, empty, in place of both kinds that are known."""
    monkeypatch.setattr(storage, "PACKAGES", {"gs": "fsspec", "s3": "fsspec"})
    for name, value in (("objects", {}), ("written", []), ("refuses", False)):
        monkeypatch.setattr(Store, name, value)
    for name in ("gcs", "gs", "s3"):
        monkeypatch.setitem(_registry, name, Store)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield Store
    backend.fsspec_backend._get_filesystem.cache_clear()
