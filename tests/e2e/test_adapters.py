"""Adapters over HTTP: stored, listed, replaced, deleted; and what they do to the model's answers."""

import json

import pytest

import oracle
from server import FIXTURES, adapter_files, eventually, pack_multipart, pack_tar

USED = ["lora_gqa_tied", "lora_rslora", "moe_topk", "moe_dense", "moe_raw"]


@pytest.fixture(scope="module")
def loaded(server):
    """The server with every adapter of its model."""
    for name in USED:
        assert server.upload(name, adapter_files(name)).status == 201
    return server


def check_against_oracle(server, case_name, folder="logits"):
    """Every prompt token's log-probability, and the first greedy token."""
    case, expected = oracle.cases(folder)[case_name], oracle.logprobs(case_name, folder)
    answer = server.complete(prompt=case["prompt"], max_tokens=1, prompt_logprobs=0, return_token_ids=True,
                             adapters=[{"name": m["adapter"], "weight": m["weight"]} for m in case["set"]])
    [choice] = answer["choices"]
    assert choice["token_ids"] == [oracle.best(expected[-1])]
    seen = choice["prompt_logprobs"]
    assert seen[0] is None and len(seen) == len(case["prompt"])
    for position, entry in enumerate(seen[1:]):
        token = case["prompt"][position + 1]
        # 1e-4 of a logit (tests/unit/test_logits.c), twice: in the logit and in the sum of them all
        assert entry[str(token)]["logprob"] == pytest.approx(expected[position][token], abs=2e-4)


CASES = [name for name, case in oracle.cases().items() if case["model"] == "gqa_tied" and len(case["prompt"]) > 1]


@pytest.mark.parametrize("case_name", CASES)
def test_answers_are_the_oracle_s(loaded, case_name):
    check_against_oracle(loaded, case_name)


@pytest.mark.parametrize("name, format", [
    ("dora", "peft-lora"), ("gguf_lora", "gguf-lora"), ("adamole", "adamole"), ("hydralora", "hydralora"),
    ("mixlora", "mixlora"), ("mixlora_dynamic", "mixlora")])
def test_formats_of_other_projects(server, name, format):
    folder = FIXTURES / "formats" / name
    gguf = folder / "adapter.gguf"
    if gguf.exists():
        reply = server.call("PUT", f"/v1/adapters/{name}", gguf.read_bytes(),
                            {"Content-Type": "application/octet-stream"})
    else:
        reply = server.upload(name, {file.name: file.read_bytes() for file in folder.iterdir()})
    assert reply.status == 201, reply.body
    assert reply.json()["format"] == format
    check_against_oracle(server, name, "formats")
    assert server.call("DELETE", f"/v1/adapters/{name}").status in (200, 204)


def test_ways_to_name_an_adapter(loaded):
    version = loaded.call("GET", "/v1/adapters/moe_topk").json()["version"]
    ask = dict(prompt="abc", max_tokens=12, return_token_ids=True)
    base = loaded.complete(**ask)["choices"]
    expected = loaded.complete(**ask, adapters=[{"name": "moe_topk"}])["choices"]
    assert expected != base
    for way in ({"model": "moe_topk"}, {"model": f"moe_topk@{version}"}, {"model": f"{loaded.name}:moe_topk"},
                {"adapter_id": "moe_topk"}, {"adapters": [{"name": "moe_topk", "version": version, "weight": 1}]},
                {"model": loaded.name, "adapter_id": "moe_topk"}):
        assert loaded.complete(**ask, **way)["choices"] == expected, way
    assert loaded.complete(**ask, adapters=[{"name": "moe_topk", "weight": 0}])["choices"] == base
    assert loaded.complete(**ask, adapters=[])["choices"] == base
    assert loaded.complete(**ask, model=loaded.name)["choices"] == base


def test_the_answer_names_the_version(loaded):
    version = loaded.call("GET", "/v1/adapters/moe_raw").json()["version"]
    reply = loaded.call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, "model": "moe_raw"})
    assert reply.headers["x-adapter-version"] == f"moe_raw@{version}"
    assert reply.headers["x-request-id"]
    base = loaded.call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert base.json()["system_fingerprint"] != reply.json()["system_fingerprint"]


def test_models_lists_adapters(loaded):
    listed = loaded.call("GET", "/v1/models").json()["data"]
    assert [m["id"] for m in listed] == [loaded.name, *sorted(USED)]
    assert all(m["parent"] == loaded.name for m in listed[1:])


@pytest.mark.parametrize("pack", [pack_multipart, pack_tar, lambda f: pack_tar(f, "gz"),
                                  lambda f: pack_tar({f"some/folder/{n}": d for n, d in f.items()})],
                         ids=["multipart", "tar", "tar.gz", "tar with folders"])
def test_an_upload_s_life(server, pack):
    files = adapter_files("lora_gqa_tied")
    reply = server.upload("life", files, pack)
    assert reply.status == 201, reply.body
    first = reply.json()["version"]

    again = server.upload("life", files, pack)
    assert again.status == 200 and again.json()["version"] == first

    info = server.call("GET", "/v1/adapters/life").json()
    assert info["name"] == "life" and info["version"] == first
    assert info["rank"] == 4 and info["experts"] == 1 and info["sites"] == 14
    assert [v["version"] for v in info["versions"]] == [first]
    assert "life" in [a["name"] for a in server.call("GET", "/v1/adapters").json()["data"]]

    other = server.upload("life", adapter_files("moe_dense"), pack)
    assert other.status == 200 and other.json()["version"] != first

    assert server.call("DELETE", "/v1/adapters/life").status == 200
    assert server.call("GET", "/v1/adapters/life").status == 404
    assert server.call("DELETE", "/v1/adapters/life").status == 404
    gone = server.call("POST", "/v1/completions", {"prompt": "a", "model": "life"})
    assert gone.status == 404 and gone.error["param"] == "model"


def test_compare_and_set(server):
    first = server.upload("cas", adapter_files("lora_gqa_tied")).json()["version"]
    lost = server.upload("cas", adapter_files("moe_topk"), If_Match='"0123456789abcdef"')
    assert lost.status == 409 and lost.error["code"] == "version_conflict"
    assert lost.headers["x-should-retry"] == "false"
    assert server.call("GET", "/v1/adapters/cas").json()["version"] == first
    won = server.upload("cas", adapter_files("moe_topk"), If_Match=f'"{first}"')
    assert won.status == 200 and won.json()["version"] != first
    assert server.call("DELETE", "/v1/adapters/cas").status == 200


def edit(files, **changes):
    config = json.loads(files["adapter_config.json"])
    config.update(changes)
    return {**files, "adapter_config.json": json.dumps(config).encode()}


def rejected_uploads():
    moe, lora = adapter_files("moe_topk"), adapter_files("lora_gqa_tied")
    yield "for another model", adapter_files("lora_mha_tied"), "proj"
    yield "an unknown kind", edit(moe, peft_type="MAGIC"), "MAGIC"
    yield "a rank that is not the tensors'", edit(moe, r=5), "lora_A"
    yield "more experts than there are", edit(moe, num_experts=9), "expert"
    yield "top_k over the experts", edit(moe, top_k=9), "top_k"
    yield "an initialisation that changes the base", edit(lora, init_lora_weights="pissa"), "pissa"
    yield "a target that is left out", edit(lora, target_modules=["q_proj"]), "proj"
    yield "broken tensors", {**lora, "adapter_model.safetensors": lora["adapter_model.safetensors"][:-5]}, ""


@pytest.mark.parametrize("files, says", [pytest.param(f, s, id=i) for i, f, s in rejected_uploads()])
def test_a_rejected_upload_leaves_nothing(server, files, says):
    reply = server.upload("bad", files)
    assert reply.status in (400, 422), reply.body
    assert says in reply.error["message"]
    assert server.call("GET", "/v1/adapters/bad").status == 404
    eventually(lambda: not list((server.data / "staging").iterdir()), "what was refused is gone")


def test_a_missing_file(server):
    files = adapter_files("moe_topk")
    for name in files:
        reply = server.upload("half", {name: files[name]})
        assert reply.status in (400, 422), reply.body
        assert reply.error["message"]
        assert server.upload("half", {name: files[name]}, pack_tar).status in (400, 422)


@pytest.mark.parametrize("name", ["-dash", ".dot", "a%20b", "x" * 129, "a%2Fb", "%00"])
def test_a_bad_name(server, name):
    reply = server.upload(name, adapter_files("moe_dense"))
    assert reply.status in (400, 404), reply.body
    assert reply.error


def test_a_restart_keeps_them(start, tmp_path):
    first = start(data=tmp_path / "kept")
    assert first.upload("kept", adapter_files("moe_topk")).status == 201
    assert first.upload("gone", adapter_files("moe_dense")).status == 201
    assert first.call("DELETE", "/v1/adapters/gone").status == 200
    info = first.call("GET", "/v1/adapters/kept").json()
    ask = dict(prompt="abc", max_tokens=12, model="kept", return_token_ids=True)
    expected = first.complete(**ask)["choices"]
    assert first.stop() == 0

    second = start(data=tmp_path / "kept")
    assert [a["name"] for a in second.call("GET", "/v1/adapters").json()["data"]] == ["kept"]
    again = second.call("GET", "/v1/adapters/kept").json()
    assert {k: again[k] for k in ("version", "rank", "experts", "parameters")} == {
        k: info[k] for k in ("version", "rank", "experts", "parameters")}
    assert second.complete(**ask)["choices"] == expected
    second.kill()  # no farewell: what was published is there all the same

    third = start(data=tmp_path / "kept")
    assert third.complete(**ask)["choices"] == expected


def test_one_batch_of_many_sets(loaded):
    """All cases' answers again, asked for at the same time."""
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(len(CASES)) as pool:
        for _ in range(3):
            list(pool.map(lambda name: check_against_oracle(loaded, name), CASES))
