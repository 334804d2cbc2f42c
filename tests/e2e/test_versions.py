"""Versions of adapters over HTTP: rollback, pruning, settings, downloads; other servers' adapter calls."""

import io
import os
import pty
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from server import BINARY, FIXTURES, adapter_files, eventually, pack_tar

ONE, TWO, THREE = "lora_gqa_tied", "moe_topk", "moe_dense"
ASK = dict(prompt="abc", max_tokens=12, return_token_ids=True)


def info(server, name):
    reply = server.call("GET", f"/v1/adapters/{name}")
    assert reply.status == 200, reply.body
    assert reply.headers["ETag"] == f'"{reply.json()["version"]}"'
    return reply.json()


@pytest.fixture
def three(server):
    """The adapter "three" with three versions, newest first as [(version, fixture name)]."""
    server.call("DELETE", "/v1/adapters/three")
    found = []
    for fixture in (ONE, TWO, THREE):
        reply = server.upload("three", adapter_files(fixture))
        assert reply.status in (200, 201), reply.body
        found.insert(0, (reply.json()["version"], fixture))
    yield found
    server.call("DELETE", "/v1/adapters/three")


def order(server, name="three"):
    return [v["version"] for v in info(server, name)["versions"]]


def rollback(server, version, headers=None, **more):
    return server.call("POST", "/v1/adapters/three/rollback", {"version": version, **more}, headers)


def test_rollback(server, three):
    (v3, _), (v2, _), (v1, _) = three
    before = server.complete(**ASK, model=f"three@{v1}")["choices"]
    assert server.complete(**ASK, model="three")["choices"] != before
    reply = rollback(server, v1)
    assert reply.status == 200 and reply.json()["version"] == v1
    assert reply.headers["ETag"] == f'"{v1}"'
    assert order(server) == [v1, v3, v2]
    assert server.complete(**ASK, model="three")["choices"] == before
    newest = info(server, "three")["versions"][0]
    assert newest["source"] == "rollback" and newest["current"] and newest["published"] >= newest["created"]
    assert info(server, "three")["versions"][1]["source"] == "upload"

    assert rollback(server, "fffffffff").status == 404
    assert rollback(server, "").error["param"] == "version"
    assert server.call("POST", "/v1/adapters/nobody/rollback", {"version": v1}).status == 404


def test_a_version_goes_by_any_unique_head(server, three):
    (v3, _), (v2, _), _ = three
    full = next(v["hash"] for v in info(server, "three")["versions"] if v["version"] == v2)
    expected = server.complete(**ASK, model=f"three@{v2}")["choices"]
    for head in (full, full[:40], v2[:8]):
        assert server.complete(**ASK, model=f"three@{head}")["choices"] == expected
        assert server.complete(**ASK, adapters=[{"name": "three", "version": head}])["choices"] == expected
    assert server.call("POST", "/v1/completions", {"prompt": "a", "model": f"three@{full[:-1]}x"}).status == 404
    assert rollback(server, full).json()["version"] == v2
    assert rollback(server, v3[:9]).json()["version"] == v3


def test_compare_and_set(server, three):
    (v3, _), (v2, _), (v1, _) = three
    for lost in (rollback(server, v1, {"If-Match": f'"{v2}"'}), rollback(server, v1, expected_version=v2),
                 server.call("DELETE", "/v1/adapters/three", headers={"If-Match": f'"{v2}"'}),
                 server.call("DELETE", f"/v1/adapters/three?expected_version={v2}"),
                 server.upload("three", adapter_files("lora_rslora"), If_Match=f'"{v2}"')):
        assert lost.status == 409 and lost.error["code"] == "version_conflict"
        assert v3 in lost.error["message"]
    assert order(server) == [v3, v2, v1]
    assert rollback(server, v2, {"If-Match": f'"{v3}"'}).status == 200
    assert server.call("DELETE", "/v1/adapters/three", headers={"If-Match": "*"}).status == 400
    assert server.call("DELETE", "/v1/adapters/three", headers={"If-Match": f'"{v2}"'}).status == 200


def test_only_the_last_are_kept(server, three):
    (v3, _), (v2, _), (v1, _) = three
    blobs = server.data / "blobs"
    files = sum(p.is_file() for p in blobs.rglob("*"))
    changed = server.call("PATCH", "/v1/adapters/three", {"keep_versions": 2})
    assert changed.status == 200 and changed.json()["keep_versions"] == 2
    assert order(server) == [v3, v2]
    assert sum(p.is_file() for p in blobs.rglob("*")) < files
    assert rollback(server, v1).status == 404
    assert server.call("GET", f"/v1/adapters/three/download?version={v1}").status == 404
    v4 = server.upload("three", adapter_files(ONE)).json()["version"]
    assert v4 == v1 and order(server) == [v1, v3]
    assert server.call("PATCH", "/v1/adapters/three", {"keep_versions": None}).json()["keep_versions"] is None


def test_settings(server, three):
    changed = server.call("PATCH", "/v1/adapters/three", {"description": "for \"tests\" é", "pinned": True}).json()
    assert changed["description"] == "for \"tests\" é" and changed["pinned"] is True
    assert server.call("PATCH", "/v1/adapters/three", {"pinned": False}).json()["description"] == "for \"tests\" é"
    for wrong in ({"description": 5}, {"pinned": "yes"}, {"keep_versions": 0}, {"keep_versions": 1.5},
                  {"rank": 4}, {"description": "x" * 1025}):
        reply = server.call("PATCH", "/v1/adapters/three", wrong)
        assert reply.status == 400, wrong
        assert reply.error["message"]
    assert server.call("PATCH", "/v1/adapters/nobody", {"pinned": True}).status == 404


def test_settings_and_rollback_last(start, tmp_path):
    first = start("--keep-versions", "2", data=tmp_path / "kept")
    versions = [first.upload("a", adapter_files(f)).json()["version"] for f in (ONE, TWO, THREE)]
    assert order(first, "a") == versions[:0:-1]
    assert first.call("POST", "/v1/adapters/a/rollback", {"version": versions[1]}).status == 200
    assert first.call("PATCH", "/v1/adapters/a", {"description": "kept", "pinned": True}).status == 200
    number = info(first, "a")["id"]
    first.kill()
    second = start(data=tmp_path / "kept")
    again = info(second, "a")
    assert again["version"] == versions[1] and again["versions"][0]["source"] == "rollback"
    assert (again["description"], again["pinned"], again["id"]) == ("kept", True, number)
    # Loaded at start, since it is pinned: nobody has asked for it.
    eventually(lambda: info(second, "a")["versions"][0]["resident"], "the pinned adapter in memory")
    assert not info(second, "a")["versions"][1]["resident"]


# --- downloads ---


def unpack(body):
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_downloads_are_what_was_uploaded(server, three):
    for version, fixture in three:
        reply = server.call("GET", f"/v1/adapters/three/download?version={version}")
        assert reply.status == 200 and reply.headers["Content-Type"] == "application/x-tar"
        assert reply.headers["ETag"] == f'"{version}"'
        assert f"three@{version}.tar" in reply.headers["Content-Disposition"]
        assert unpack(reply.body) == adapter_files(fixture)
    assert unpack(server.call("GET", "/v1/adapters/three/download").body) == adapter_files(THREE)
    assert server.call("HEAD", "/v1/adapters/three/download").status == 200
    assert server.call("GET", "/v1/adapters/nobody/download").status == 404
    # and back: the same version
    body = server.call("GET", "/v1/adapters/three/download").body
    again = server.upload("three", None, lambda _: ("application/x-tar", body))
    assert again.status == 200 and again.json()["version"] == three[0][0]


def test_a_big_download_survives_deletion_and_hang_ups(server):
    """Several pieces, of which the client has read little when the adapter goes."""
    files = adapter_files(ONE)
    files["adapter_model.safetensors"] = padded(files["adapter_model.safetensors"])
    reply = server.upload("big", files)
    assert reply.status == 201, reply.body
    connection, response = server.open("GET", "/v1/adapters/big/download")
    first = response.read(1000)
    gone, _ = server.open("GET", "/v1/adapters/big/download")
    gone.close()
    assert server.call("DELETE", "/v1/adapters/big").status == 200
    assert unpack(first + response.read()) == files
    connection.close()


def padded(tensors, size=6 << 20):
    """safetensors allows spaces at the end of its header."""
    n = int.from_bytes(tensors[:8], "little")
    return (n + size).to_bytes(8, "little") + tensors[8:8 + n] + b" " * size + tensors[8 + n:]


def test_a_gguf_adapter_comes_back_alone(server):
    data = (FIXTURES / "formats" / "gguf_lora" / "adapter.gguf").read_bytes()
    reply = server.upload("gguf", None, lambda _: ("application/octet-stream", data))
    assert reply.status == 201, reply.body
    back = server.call("GET", "/v1/adapters/gguf/download")
    assert back.body == data and ".gguf" in back.headers["Content-Disposition"]
    assert server.call("DELETE", "/v1/adapters/gguf").status == 200


# --- other servers' calls ---


def test_lora_by_number(server, three):
    listed = server.call("GET", "/lora-adapters").json()
    mine = next(a for a in listed if a["path"] == "three")
    assert mine == {"id": info(server, "three")["id"], "path": "three", "scale": 0}
    for scale in (1, 0.5):
        expected = server.complete(**ASK, adapters=[{"name": "three", "weight": scale}])["choices"]
        assert server.complete(**ASK, lora=[{"id": mine["id"], "scale": scale}])["choices"] == expected
    base = server.complete(**ASK)["choices"]
    assert server.complete(**ASK, lora=[])["choices"] == base
    assert server.complete(**ASK, lora=[{"id": mine["id"], "scale": 0}])["choices"] == base
    for lora, status in (([{"id": 999999, "scale": 1}], 404), ([{"id": "three"}], 400), ({"id": 1}, 400),
                         ([{"scale": 1}], 400), ([{"id": mine["id"]}] * 2, 400)):
        reply = server.call("POST", "/v1/completions", {"prompt": "a", "lora": lora})
        assert reply.status == status and reply.error["message"], lora
    both = server.call("POST", "/v1/completions",
                       {"prompt": "a", "lora": [{"id": mine["id"], "scale": 1}], "adapter_id": "other"})
    assert both.status == 400
    assert server.call("POST", "/lora-adapters", [{"id": mine["id"], "scale": 1}]).status == 400


def test_loading_from_disk_is_off(server):
    for call in ("load_lora_adapter", "unload_lora_adapter"):
        reply = server.call("POST", f"/v1/{call}", {"lora_name": "a", "lora_path": "/etc"})
        assert reply.status == 403 and "--adapter-root" in reply.error["message"]


def test_loading_from_disk(start, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(FIXTURES / "adapters" / ONE, root / "some" / "one")
    shutil.copytree(FIXTURES / "adapters" / TWO, tmp_path / "secret")
    (root / "two.tar").write_bytes(pack_tar(adapter_files(TWO))[1])
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "inner").mkdir()
    for name in adapter_files(TWO):
        (root / "inner" / name).symlink_to(tmp_path / "secret" / name)
    server = start("--adapter-root", str(root))

    def load(path, name="a", **more):
        return server.call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})

    reply = load(root / "some" / "one")
    assert reply.status == 200 and reply.body == b"Success: LoRA adapter 'a' added successfully."
    assert reply.headers["Content-Type"] == "text/plain"
    assert unpack(server.call("GET", "/v1/adapters/a/download").body) == adapter_files(ONE)
    again = load("two.tar")
    assert again.status == 400 and "load_inplace" in again.error["message"]
    assert load("two.tar", load_inplace=True).status == 200
    assert unpack(server.call("GET", "/v1/adapters/a/download").body) == adapter_files(TWO)
    assert load("./some//one", "b").status == 200

    for path, status in (("link", 400), ("inner", 400), ("../secret", 400), ("some/../../secret", 400),
                         (tmp_path / "secret", 400), (f"{root}2", 400), ("nothing", 404), ("some", 404), ("", 400),
                         ("x" * 5000, 400)):
        reply = load(path, "c")
        assert reply.status == status and reply.error["message"], path
        assert "c" not in [a["name"] for a in server.call("GET", "/v1/adapters").json()["data"]]

    gone = server.call("POST", "/v1/unload_lora_adapter", {"lora_name": "a"})
    assert gone.status == 200 and gone.body == b"Success: LoRA adapter 'a' removed successfully."
    assert server.call("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}).status == 404


# --- trouble ---


def test_a_full_disk(start, tmp_path):
    shim, flag = tmp_path / "full_disk.so", tmp_path / "full"
    subprocess.run(["cc", "-shared", "-fPIC", "-D_GNU_SOURCE", "-o", str(shim),
                    str(Path(__file__).parent / "full_disk.c")], check=True)
    server = start(env={"LD_PRELOAD": str(shim), "FULL_DISK": str(flag)})
    first = server.upload("a", adapter_files(ONE)).json()["version"]
    second = server.upload("a", adapter_files(TWO)).json()["version"]
    expected = server.complete(**ASK, model="a")["choices"]
    flag.touch()
    for refused in (server.upload("a", adapter_files(THREE)), server.upload("b", adapter_files(THREE), pack_tar),
                    server.call("POST", "/v1/adapters/a/rollback", {"version": first}),
                    server.call("PATCH", "/v1/adapters/a", {"keep_versions": 1}),
                    server.call("DELETE", "/v1/adapters/a")):
        assert refused.status == 507 and refused.error["code"] == "storage_full", refused.body
    assert order(server, "a") == [second, first]
    assert server.complete(**ASK, model="a")["choices"] == expected
    flag.unlink()
    assert server.upload("b", adapter_files(THREE)).status == 201
    assert server.call("POST", "/v1/adapters/a/rollback", {"version": first}).status == 200


# --- the command line ---


def medley(server, *words, key=None):
    env = {k: v for k, v in os.environ.items() if k != "MEDLEY_API_KEY"}
    done = subprocess.run([BINARY, "adapter", *map(str, words), "--server", server.url], text=True, timeout=60,
                          capture_output=True, env={**env, "MEDLEY_API_KEY": key} if key else env)
    return done.returncode, done.stdout, done.stderr


def test_the_command_line(start, tmp_path):
    server = start(env={"MEDLEY_API_KEY": "secret"})
    archive = tmp_path / "two.tar.gz"
    archive.write_bytes(pack_tar(adapter_files(TWO), "gz")[1])
    code, out, err = medley(server, "push", "a", FIXTURES / "adapters" / ONE)
    assert code == 1 and "Authorization" in err and not out

    def run(*words):
        return medley(server, *words, key="secret")

    code, out, err = run("push", "a", FIXTURES / "adapters" / ONE)
    assert code == 0 and "(new)" in out and not err, err
    first = info_with_key(server, "a")
    assert out.startswith(f"a@{first}")
    code, out, _ = run("push", "a", archive, "--expected-version", first)
    second = info_with_key(server, "a")
    assert code == 0 and out.startswith(f"a@{second}") and second != first
    code, out, err = run("push", "a", archive.parent / "two.tar.gz", "--expected-version", first)
    assert code == 0  # the same bytes again
    code, _, err = run("rollback", "a", first, "--expected-version", first)
    assert code == 1 and second in err
    code, out, _ = run("rollback", "a", first[:10])
    assert code == 0 and out == f"a@{first} is current\n"
    code, out, _ = run("list")
    assert code == 0 and out.splitlines()[1].split()[:3] == ["a", first, "peft-lora"]
    code, _, err = run("push", "a", tmp_path / "nothing")
    assert code == 1 and "nothing" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run("push", "a", tmp_path / "empty")
    assert code == 1 and "adapter_config.json" in err
    code, _, err = run("push", "wrong name", archive)
    assert code == 1 and "wrong name" in err
    code, _, err = run("rm", "b")
    assert code == 1 and "no adapter 'b'" in err
    code, out, _ = run("rm", "a")
    assert code == 0 and "a is removed" in out
    assert run("list")[1].count("\n") == 1
    code, _, err = run("rollback", "a")
    assert code == 1 and "medley adapter rollback NAME VERSION" in err


def info_with_key(server, name):
    return server.call("GET", f"/v1/adapters/{name}").json()["version"]


def test_the_command_line_without_a_server(server):
    done = subprocess.run([BINARY, "adapter", "list", "--server", "http://127.0.0.1:1"], text=True, timeout=60,
                          capture_output=True)
    assert done.returncode == 1 and "http://127.0.0.1:1" in done.stderr
    done = subprocess.run([BINARY, "adapter", "list", "--server", "file:///etc"], text=True, timeout=60,
                          capture_output=True)
    assert done.returncode == 1 and "file:" in done.stderr


def test_progress_on_a_terminal(server, tmp_path):
    archive = tmp_path / "one.tar"
    archive.write_bytes(pack_tar(adapter_files(ONE))[1])
    controller, terminal = pty.openpty()
    done = subprocess.run([BINARY, "adapter", "push", "bar", str(archive), "--server", server.url],
                          stdout=subprocess.DEVNULL, stderr=terminal, timeout=60)
    os.close(terminal)
    shown = os.read(controller, 65536).decode()
    os.close(controller)
    assert done.returncode == 0 and "sending [" in shown and "100%" in shown
    assert server.call("DELETE", "/v1/adapters/bar").status == 200
