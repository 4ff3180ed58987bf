"""Models by name, from a server on this machine that speaks the Hub's protocol for files."""

import shutil
from pathlib import Path

import hub_server
import pytest

from hintsd_jax import hub, policies
from hintsd_jax import main as entry
from hintsd_jax.config import base as base_config
from hintsd_jax.config.build import build
from hintsd_jax.configs import desk_smoke
from hintsd_jax.errors import UserError
from hintsd_jax.runs.workdir import Workdir
from hintsd_jax.session import Session

ROOT = Path(__file__).parents[1]
POLICY = ROOT / "assets" / "desk-policy"
MODEL = "someone/desk-policy"
FILES = {file.name: file.read_bytes() for file in POLICY.iterdir()}
NOT_NEEDED = {
    "pytorch_model.bin": b"weights again",
    "model.gguf": b"and again",
    "consolidated.safetensors": b"and again",
    "onnx/model.onnx": b"and again",
    "original/params.json": b"{}",
    "README.md": b"a card",
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with hub_server.serving() as server:
        hub_server.pointed_at(monkeypatch, server.url, tmp_path / "cache")
        server.commit = server.add(MODEL, FILES | NOT_NEEDED)
        yield server


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fetched(text, **more):
    return hub.fetch(hub.name_of(text), **more)


def test_the_files_that_a_policy_needs_come_once_and_no_others(server):
    name = fetched(MODEL)
    assert name == (MODEL, server.commit) and name.is_pinned
    assert files_of(name.folder) == FILES
    asked = len(server.requests)
    assert fetched(f"{MODEL}@{server.commit}") == name
    assert len(server.requests) == asked  # a commit never changes
    later = server.add(MODEL, {"config.json": FILES["config.json"] + b"\n"})
    assert fetched(MODEL).revision == later and fetched(f"{MODEL}@{server.commit}") == name
    assert server.count("GET", "tokenizer.json") == 1  # the same content is not fetched twice


def test_shards_are_those_of_the_index(server):
    index = b'{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}'
    shards = {"model-1-of-2.safetensors": b"one", "model-2-of-2.safetensors": b"two"}
    others = {name: text for name, text in FILES.items() if name != "model.safetensors"}
    server.add("someone/sharded", others | shards | {"model.safetensors.index.json": index} | NOT_NEEDED)
    folder = fetched("someone/sharded").folder
    assert files_of(folder) == others | shards | {"model.safetensors.index.json": index}


def test_a_plan_needs_the_config_alone_and_does_not_pass_for_the_whole(server):
    from huggingface_hub import constants

    assert files_of(fetched(MODEL, only_config=True).folder) == {"config.json": FILES["config.json"]}
    server.refuses = (503, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetched(MODEL, only_config=True).revision == server.commit
        with pytest.raises(UserError, match="not whole in the cache .* HF_HUB_OFFLINE"):
            fetched(MODEL)
    server.refuses = None
    assert files_of(fetched(MODEL).folder) == FILES


def test_a_download_that_breaks_off_goes_on_where_it_was(server, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # 10 MB, of which only whole ones are kept
    sent, pattern = [], r"(?:GET|HEAD) /cdn/([0-9a-f]+)"
    monkeypatch.setitem(
        hub_server.ROUTES,
        pattern,
        lambda self, *rest: (
            sent.append(self.headers.get("Range")) if self.command == "GET" else None,
            hub_server.Request.cdn(self, *rest),
        ),
    )
    server.cuts = 1000
    with pytest.raises(UserError, match=f"{MODEL}@{server.commit} is no .*The same command fetches what is missing"):
        fetched(MODEL)
    folder = hub.Name(MODEL, server.commit).folder
    assert {path.name for path in folder.iterdir()} == FILES.keys() - {"model.safetensors"}  # whole files stay
    server.cuts = 1
    sent.clear()
    assert files_of(fetched(MODEL).folder) == FILES
    assert sent == [None, f"bytes={len(FILES['model.safetensors']) // 2 // 1000 * 1000}-"]
    assert server.count("GET", "tokenizer.json") == 1
    assert not list(folder.parents[1].glob("blobs/*.incomplete"))


def test_without_the_hub_the_cache_serves_and_says_so(server, monkeypatch, capsys):
    from huggingface_hub import constants

    name = fetched(MODEL)
    server.add(MODEL, {"config.json": b"{}"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched(MODEL) == name
    assert f"taking commit {server.commit}, which is in the cache" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.refuses = (503, "")
    assert fetched(MODEL) == name
    assert "status 503" in capsys.readouterr().err
    assert fetched(f"{MODEL}@{server.commit}") == name
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "text, prepare, says",
    [
        (
            "someone/else",
            None,
            "someone/else is no folder here and no model that the Hub shows: .*log in with .hf auth login",
        ),
        (f"{MODEL}@v2", None, f"{MODEL} has no revision 'v2': give a branch"),
        (MODEL, lambda server: server.gated.add(MODEL), "is gated: accept its terms .* HF_TOKEN"),
        (MODEL, lambda server: setattr(server, "refuses", (403, "")), "cannot be fetched: the Hub .* status 403"),
        ("some--one/a", None, "some--one/a is no folder here and no model"),
        ("someone/bins", None, "has no safetensors weights, the only ones that are read"),
        ("someone/words", None, "has no tokenizer.json"),
        ("someone/index", None, "no weight_map from tensor names to files"),
    ],
)
def test_what_goes_wrong_is_one_line(server, monkeypatch, text, prepare, says):
    server.add("someone/bins", {name: text for name, text in FILES.items() if "safetensors" not in name} | NOT_NEEDED)
    server.add("someone/words", {name: FILES[name] for name in ("config.json", "model.safetensors")})
    server.add("someone/index", FILES | {"model.safetensors.index.json": b"[]"})
    if prepare:
        prepare(server)
    with pytest.raises(UserError, match=says) as caught:
        fetched(text)
    assert len(str(caught.value)) < 700


def test_no_connection_and_no_room(server, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="takes 0.0001[0-9]* GB, .* has room for 1e-06 GB: make room, or let HF_HOME"):
        fetched(MODEL)
    assert not (hub.Name(MODEL, server.commit).folder / "tokenizer.json").exists()
    hub_server.pointed_at(monkeypatch, "http://127.0.0.1:9", hub._cache())
    with pytest.raises(
        UserError, match="someone/a is no folder here, and cannot be fetched: the Hub cannot be reached"
    ):
        fetched("someone/a")


def test_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("/a/b", "./a/b", "../a", "a", "a/b/c", "assets/x", "a/b.json", "gs://a/b", "~/a", "a/..b", "a//b", ""):
        assert hub.name_of(path) is None, path
    assert hub.name_of("Qwen/Qwen3-4B@refs/pr/1") == ("Qwen/Qwen3-4B", "refs/pr/1")
    (tmp_path / "Qwen" / "Qwen3-4B").mkdir(parents=True)
    assert hub.name_of("Qwen/Qwen3-4B") is None and hub.name_of("Qwen/Qwen3-8B") == ("Qwen/Qwen3-8B", "")


def test_the_commands_take_names(server, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    assert (
        entry.main(["plan", "--config=desk_smoke", f"--config.policy.path={MODEL}", "--config.plan.compile=False"]) == 0
    )
    assert capsys.readouterr().err == ""
    assert server.count("GET", ".safetensors") == server.count("GET", "tokenizer.json") == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert entry.main(["check", "--config=desk_smoke", f"--config.policy.path={MODEL}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {MODEL} is no folder here, and not whole in the cache") and said.count("\n") == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    session = Session.open(build(desk_smoke.get_config()).replaced({"policy.path": MODEL}))  # as all others begin
    assert session.config.policy.path == f"{MODEL}@{server.commit}"
    assert session.trained is not None


def test_a_run_continues_with_the_commit_that_it_began_with(server, tmp_path):
    """Whatever the Hub has by then; another revision that is asked for is another policy."""
    config = build({**base_config().to_dict(), "policy": {**base_config().policy.to_dict(), "path": MODEL}})
    begun = policies.pinned(config, str(tmp_path / "run"))
    assert begun.policy.path == f"{MODEL}@{server.commit}"
    assert Path(begun.policy.location) == hub.Name(MODEL, server.commit).folder
    Workdir.open(tmp_path / "run", begun).close()
    later = server.add(MODEL, {"config.json": FILES["config.json"] + b"\n"})
    assert policies.pinned(config, str(tmp_path / "run")).policy.path == begun.policy.path
    assert policies.pinned(config, str(tmp_path / "other")).policy.path == f"{MODEL}@{later}"
    moved = policies.pinned(config.replaced({"policy.path": f"{MODEL}@main"}), str(tmp_path / "run"))
    with pytest.raises(UserError, match=f"belongs to another config: policy.path .there '{begun.policy.path}', now"):
        Workdir.open(tmp_path / "run", moved)


def test_one_process_of_each_host_fetches(server, monkeypatch):
    """All of them with the commit that the first one found."""
    config = build({**base_config().to_dict(), "policy": {**base_config().policy.to_dict(), "path": MODEL}})
    hosts, pinned = ["a", "a", "b", "b"], hub.Name(MODEL, "0" * 40)
    for index, expected in enumerate([[hub.Name(MODEL, "")], [], [pinned], []]):
        asked = []
        answers = {
            "the policy's name": [hub.Name(MODEL, "")] * 4,
            "the policy's hosts": hosts,
            "the policy": [None] * 4,
        }
        answers["the policy's commit"] = [pinned] * 4
        monkeypatch.setattr(policies.processes, "gather", lambda value, what, answers=answers: answers[what])
        monkeypatch.setattr(policies.processes, "index", lambda index=index: index)
        monkeypatch.setattr(policies.hub, "fetch", lambda name, asked=asked, **more: (asked.append(name), pinned)[1])
        assert policies.pinned(config).policy.path == str(pinned)
        assert asked == expected
