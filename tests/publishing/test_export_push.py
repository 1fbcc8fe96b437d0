"""An export that goes on to the hub: the real client, and of the hub what one upload asks for.

The hub itself has not been asked: tests have no network.
"""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from export_models import MAX_LENGTH, build
from packaging.version import Version

from mlembed.cli import export as export_command
from mlembed.data import tokenizer
from mlembed.modeling import pretrained
from mlembed.publishing import export as exporting

cards_at_the_endpoint = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2.2"),
    reason="huggingface-hub before 2.2 validates cards at huggingface.co, not at HF_ENDPOINT",
)


class Hub(http.server.BaseHTTPRequestHandler):
    """Of the hub's interface what one upload takes: repositories, and files in one commit."""

    asked: list[tuple[str, str | None, bytes]] = []

    def do_GET(self) -> None:  # noqa: N802
        self.do_POST()

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append((self.path, self.headers.get("authorization"), body))
        status, answer = 200, {}
        if self.path == "/api/repos/create":
            status = 409 if b"taken" in body else 200
            answer = {"url": f"http://{self.headers['host']}/me/small", "name": "me/small"}
        elif self.path == "/api/validate-yaml" and b"license: mine" in body:
            status, answer = 400, {"errors": [{"message": '"license" must be one of ...'}]}
        elif "/preupload/" in self.path:
            listed = [
                {"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]
            ]
            answer = {"files": [{**one, "shouldIgnore": False, "oid": None} for one in listed]}
        elif "/commit/" in self.path:
            answer = {
                "commitUrl": f"http://{self.headers['host']}/me/small/commit/1",
                "commitOid": "1",
            }
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    Hub.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_of_a_test",
        "HF_HUB_OFFLINE": "0",
    }
    server.shutdown()


@pytest.fixture
def model_directory(tmp_path) -> Path:
    path, encoder = tmp_path / "model", build()
    path.mkdir()
    pretrained.save(encoder.model, path)
    tokenizer.save(encoder.tokenizer, path, MAX_LENGTH)
    return path


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlembed", "export", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@cards_at_the_endpoint
def test_push(model_directory, hub, tmp_path):
    out = tmp_path / "small"
    arguments = ("--dim", "5", "--push-to-hub", "me/small", "--private")
    done = command(model_directory, out, *arguments, **hub)
    assert done.returncode == 0, done.stderr
    assert "pushed to http" in done.stdout and "me/small" in done.stdout
    asked = {path.split("?")[0]: (token, body) for path, token, body in Hub.asked}
    token, body = asked["/api/repos/create"]
    assert token == "Bearer hf_of_a_test"
    made = json.loads(body)
    assert made["name"] == "small" and made["organization"] == "me"
    assert made.get("visibility") == "private" or made.get("private") is True
    lines = [json.loads(line) for line in asked["/api/models/me/small/commit/main"][1].splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    assert sent == files(out)
    snippets = (out / "README.md").read_text().split("## How")[0]  # run as they stand on the hub
    assert 'SentenceTransformer("me/small")' in snippets and '"small"' not in snippets


@cards_at_the_endpoint
def test_a_card_that_the_hub_refuses(model_directory, hub, tmp_path):
    out = tmp_path / "small"
    arguments = ("--push-to-hub", "me/small", "--license", "mine")
    done = command(model_directory, out, *arguments, **hub)
    assert done.returncode == 1 and '"license\\" must be one of' in done.stderr
    assert done.stderr.count("\n") == 1 and (out / "modules.json").is_file()
    assert not any("create" in path for path, _, _ in Hub.asked)  # no empty repository is left


@pytest.mark.parametrize("name", ["small", "me/../small"])
def test_names_that_no_repository_has(name, tmp_path):
    with pytest.raises(ValueError, match="small"):  # before anything is read
        export_command.main(str(tmp_path / "none"), tmp_path / "out", push_to_hub=name)


@cards_at_the_endpoint
def test_a_push_that_fails_keeps_the_directory(model_directory, hub, tmp_path):
    # Offline, as all tests are: in this process, by the hub's own client.
    exporting.export(build(), tmp_path / "out", 5, 1, 3)
    before = files(tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"me/small was not uploaded: .*offline.* `hf upload me/small"
    ):
        exporting.push(tmp_path / "out", "me/small", private=False)
    assert files(tmp_path / "out") == before
    done = command(model_directory, tmp_path / "small", "--push-to-hub", "me/taken", **hub)
    assert done.returncode == 1 and "vectors within" in done.stdout
    assert done.stderr.startswith("error: push-to-hub: me/taken") and "409" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "small" / "modules.json").is_file()
    assert not any("commit" in path for path, _, _ in Hub.asked)
