"""The tests' own hub answers as the hub does: status, headers and bodies, as a plain HTTP client sees them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from hub_server import Fault, HubServer, Repository, serving_hub

WEIGHTS = bytes(range(256)) * 100
ID = "owner/name"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving_hub() as running:
        running.accounts = {"hf_let_in": {ID}, "hf_stranger": set()}
        yield running


@pytest.fixture
def model(hub: HubServer) -> Repository:
    return hub.add(ID, {"config.json": b"{}", "model.safetensors": WEIGHTS})


def ask(
    url: str, method: str = "GET", token: str | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """The status, headers and body of one answer."""
    place = urlsplit(url)
    assert place.hostname
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    connection.request(
        method, place.path, headers={**({"Authorization": f"Bearer {token}"} if token else {}), **headers}
    )
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_revisions_and_their_files(hub: HubServer, model: Repository) -> None:
    first = model.revisions["main"]
    model.revisions["v1"] = first
    second = model.commit({"config.json": b"[]"})
    assert first != second
    for revision, commit in (("main", second), ("v1", first), (first, first)):
        status, _, body = ask(f"{hub.url}/api/models/{ID}/revision/{revision}")
        assert (status, json.loads(body)["sha"]) == (200, commit)
    assert [entry["rfilename"] for entry in json.loads(body)["siblings"]] == ["config.json", "model.safetensors"]
    status, _, body = ask(f"{hub.url}/api/models/{ID}/tree/{first}")
    large = json.loads(body)[1]
    assert (status, large["path"], large["size"], large["lfs"]["size"]) == (200, "model.safetensors", 25_600, 25_600)
    assert ask(f"{hub.url}/{ID}/resolve/{first}/config.json")[2] == b"{}"
    assert ask(f"{hub.url}/{ID}/resolve/main/config.json")[2] == b"[]"


def test_what_comes_with_a_file(hub: HubServer, model: Repository) -> None:
    status, headers, body = ask(f"{hub.url}/{ID}/resolve/main/config.json", "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "2")
    assert headers["X-Repo-Commit"] == model.revisions["main"]
    assert headers["ETag"] == '"9e26dfeeb6e641a33dae4961196235bdb965b21b"'  # `printf {} | git hash-object --stdin`
    status, headers, body = ask(f"{hub.url}/{ID}/resolve/main/model.safetensors", "HEAD")
    assert (status, headers["X-Linked-Size"], len(headers["X-Linked-ETag"])) == (302, "25600", 66)
    assert urlsplit(headers["Location"]).hostname != urlsplit(hub.url).hostname
    assert ask(headers["Location"])[::2] == (200, WEIGHTS)
    status, part, body = ask(headers["Location"], Range="bytes=100-")
    assert (status, part["Content-Range"], body) == (206, "bytes 100-25599/25600", WEIGHTS[100:])


def test_refusals(hub: HubServer, model: Repository) -> None:
    info, file = f"{hub.url}/api/models/{ID}/revision/main", f"{hub.url}/{ID}/resolve/main/config.json"

    def refusal(url: str, token: str | None = None) -> tuple[int, str | None]:
        status, headers, body = ask(url, token=token)
        assert status < 400 or json.loads(body)["error"] == headers["X-Error-Message"]
        return status, headers["X-Error-Code"]

    assert refusal(f"{hub.url}/api/models/{ID}/revision/v9") == (404, "RevisionNotFound")
    assert refusal(f"{hub.url}/{ID}/resolve/v9/config.json") == (404, "RevisionNotFound")
    assert refusal(f"{hub.url}/{ID}/resolve/main/absent.json") == (404, "EntryNotFound")
    assert refusal(f"{hub.url}/api/models/owner/other/revision/main") == (401, "RepoNotFound")
    assert refusal(f"{hub.url}/api/models/owner/other/revision/main", "hf_stranger") == (404, "RepoNotFound")
    assert refusal(f"{hub.url}/api/datasets/{ID}") == (401, "RepoNotFound")
    assert refusal(info, "hf_expired") == (401, None)
    model.gated = True
    assert refusal(info) == (200, None)  # that there is such a model is not a secret
    assert refusal(file) == (401, "GatedRepo")
    assert refusal(file, "hf_stranger") == (403, "GatedRepo")
    assert refusal(file, "hf_let_in") == (200, None)
    model.private = True
    assert refusal(info) == (401, "RepoNotFound")
    assert refusal(info, "hf_let_in") == (200, None)


def test_faults_and_the_end(hub: HubServer, model: Repository) -> None:
    info, file = f"{hub.url}/api/models/{ID}/revision/main", f"{hub.url}/{ID}/resolve/main/config.json"
    hub.fault = Fault("/resolve/", status=503, times=1)
    assert [ask(info)[0], ask(file)[0], ask(file)[0]] == [200, 503, 200]
    hub.fault = Fault("/stored/", cut_after=10)
    with pytest.raises(http.client.IncompleteRead, match="10 bytes read"):
        ask(ask(f"{hub.url}/{ID}/resolve/main/model.safetensors")[1]["Location"])
    place = urlsplit(hub.url)
    assert place.hostname
    kept = http.client.HTTPConnection(place.hostname, place.port, timeout=10)

    def ask_again() -> None:
        kept.request("GET", place.path)
        kept.getresponse().read()

    ask_again()
    hub.close()
    with pytest.raises(ConnectionRefusedError):
        ask(info)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask_again()
