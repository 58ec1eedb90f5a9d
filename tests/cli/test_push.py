"""Model cards, and `lorica push` against a stand-in for the hub on this machine."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

TOKEN = "hf_standin"


class _Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that an upload of small files uses."""

    def _answer(self, data: object, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, server = self.path.partition("?")[0], self.server
        server.calls.append((self.command, path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self._answer({"name": "ada", "type": "user"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            server.created.append(json.loads(body))
            return self._answer({"url": f"{server.address}/ada/first"})
        if "/branch/" in path:
            return self._answer({})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False,
                      "oid": None} for f in files]  # fmt: skip
            return self._answer({"files": modes})
        if "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    server.files.append(entry["value"]["path"])
            return self._answer(
                {"commitUrl": f"{server.address}/ada/first/commit/abc", "commitOid": "abc",
                 "success": True}
            )  # fmt: skip
        if path.startswith("/api/models/ada/first"):
            return self._answer({"id": "ada/first", "sha": "abc", "siblings": []})
        return self._answer({"error": f"not here: {path}"}, 404)

    do_GET = do_POST = _handle

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.calls, server.created, server.files = [], [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.address, raising=False)
    from huggingface_hub import hf_api

    monkeypatch.setattr(hf_api.HfApi, "__init__", _at(server.address, hf_api.HfApi.__init__))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _at(address, original):
    def made(self, *args, **kwargs):
        original(self, *args, **{"endpoint": address, **kwargs})

    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder."""
    from lorica.run.finetune import train
    from lorica.run.options import TrainOptions

    out = tmp_path_factory.mktemp("card") / "first"
    how = {"max_steps": 2, "max_samples": 16, "further": {"eval_strategy": "no"}}
    train(TrainOptions(output_dir=str(out), method="dora+olora", r=2, **how))
    return out


def test_the_card_says_what_it_is_and_how_to_load_it(trained, lorica, tmp_path):
    card = (trained / "adapter" / "README.md").read_text(encoding="utf-8")
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "peft" and "lorica" in metadata["tags"]
    assert "license" not in metadata and "base_model" not in metadata  # no hub id
    assert metadata["pipeline_tag"] == "text-generation"
    for part in (
        "`dora+olora` on `lorica:base`",
        "| r | `2` |",
        "| learning_rate |",
        "2402.09353",
        "2406.01775",
        "lorica.load(model",
        "PeftModel.from_pretrained",
    ):
        assert part in body, part
    assert str(trained.parent) not in card
    out = tmp_path / "merged"
    words = ("--adapter", str(trained / "adapter"), "--output-dir", str(out))
    assert lorica("merge", *words).status == 0
    merged = (out / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM.from_pretrained" in merged and "PeftModel" not in merged
    assert "library_name: transformers" in merged and "| r | `2` |" in merged


def test_a_card_of_somebody_else_stays(tmp_path):
    from lorica.run import card

    (tmp_path / "README.md").write_text("mine")
    assert not card.write(tmp_path, "other")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_uploads_what_a_run_trained(trained, hub, lorica):
    ran = lorica("push", str(trained), "ada/first", "--private", "--revision", "v1", "--json")
    assert ran.status == 0, ran.err
    sent = {p.name for p in (trained / "adapter").iterdir()}
    assert set(hub.files) == sent >= {"README.md", "lorica.json", "adapter_model.safetensors"}
    assert ran.json["commit"] == "abc" and ran.json["revision"] == "v1"
    assert hub.created[0]["name"] == "first" and hub.created[0].get("private", True)
    assert any(path.endswith("/branch/v1") for _, path in hub.calls)


def test_push_refuses_before_it_sends(trained, hub, lorica, tmp_path, monkeypatch):
    for words, told in (
        ((str(tmp_path), "ada/first"), "holds no adapter and no model"),
        ((str(trained), "first"), "`OWNER/NAME` is wanted"),
    ):
        ran = lorica("push", *words)
        assert ran.status == 2 and told in ran.err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    ran = lorica("push", str(trained), "ada/first")
    assert ran.status == 1 and "the token is not valid" in ran.err and "hf_wrong" not in ran.err
    assert not hub.created and not hub.files
    hub.shutdown()
    hub.server_close()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ran = lorica("push", str(trained), "ada/first")
    assert ran.status == 1 and "can't be reached" in ran.err
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    ran = lorica("push", str(trained), "ada/first")
    assert ran.status == 2 and "there is no token" in ran.err


def test_a_hub_adapter_comes_with_its_tokenizer_labels_and_revision(trained, monkeypatch):
    from lorica.formats.safe_files import locate

    asked = {}

    def snapshot(repository, *, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, wanted=allow_patterns)
        return str(trained / "adapter")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert locate("ada/first@v1") == trained / "adapter"
    assert (asked["repository"], asked["revision"]) == ("ada/first", "v1")
    from fnmatch import fnmatch

    for name in ("labels.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert any(fnmatch(name, pattern) for pattern in asked["wanted"]), name
    assert not any(fnmatch("training_args.bin", pattern) for pattern in asked["wanted"])
    locate("ada/first")
    assert asked["revision"] is None
