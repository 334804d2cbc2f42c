"""Fresh adapters, and what /metrics says."""

import io
import json
import re
import tarfile

from server import eventually, pack_multipart

FRESH = {"name": "fresh", "r": 4}


def create(server, **body):
    return server.call("POST", "/v1/adapters", body)


def files_of(server, name):
    reply = server.call("GET", f"/v1/adapters/{name}/download")
    assert reply.status == 200
    with tarfile.open(fileobj=io.BytesIO(reply.body)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


def test_fresh_lora_is_pefts_and_a_no_op(server):
    reply = create(server, name="lora", description="nothing yet", seed=1)
    assert reply.status == 201, reply.body
    info = reply.json()
    assert info["format"] == "peft-lora" and info["rank"] == 8 and info["experts"] == 1
    assert info["description"] == "nothing yet"
    assert reply.headers["ETag"] == f'"{info["version"]}"'
    assert len(info["targets"].split(", ")) == 7

    config = json.loads(files_of(server, "lora")["adapter_config.json"])
    assert config["peft_type"] == "LORA" and config["r"] == 8 and config["lora_alpha"] == 16

    prompt = {"prompt": "Once upon a time", "max_tokens": 12, "logprobs": 3, "seed": 5, "temperature": 1}
    base = server.complete(**prompt)
    with_adapter = server.complete(model="lora", **prompt)
    assert with_adapter["choices"] == base["choices"]


def test_fresh_mixture_is_a_no_op(server):
    reply = create(server, name="moe", r=2, num_experts=4, top_k=2, gate="topk", lora_alpha=6,
                   target_modules=["q_proj", "down_proj"], use_rslora=True)
    assert reply.status == 201, reply.body
    info = reply.json()
    assert (info["format"], info["rank"], info["experts"], info["top_k"]) == ("moelora", 2, 4, 2)
    assert sorted(info["targets"].split(", ")) == ["down_proj", "q_proj"]
    prompt = {"prompt": "The cat", "max_tokens": 12, "logprobs": 3}
    assert server.complete(model="moe", **prompt)["choices"] == server.complete(**prompt)["choices"]


def test_a_fresh_adapter_goes_home_and_comes_back(server):
    assert create(server, name="there", num_experts=2).status == 201
    reply = server.upload("back", files_of(server, "there"), pack_multipart)
    assert reply.status == 201, reply.body
    there = server.call("GET", "/v1/adapters/there").json()
    assert there["version"] == reply.json()["version"]


def test_the_seed_makes_the_adapter(server):
    one, two = (create(server, name=f"seed{i}", seed=7).json()["version"] for i in range(2))
    other = create(server, name="seed2", seed=8).json()["version"]
    assert one == two != other


def test_a_taken_name_is_a_conflict(server):
    assert create(server, name="taken").status == 201
    again = create(server, name="taken")
    assert again.status == 200, "the same request again changes nothing"
    assert len(again.json()["versions"]) == 1
    reply = create(server, name="taken", r=3)
    assert reply.status == 409 and reply.error["param"] == "name"
    assert len(server.call("GET", "/v1/adapters/taken").json()["versions"]) == 1


def test_refusals_name_the_parameter(server):
    for body, param in [({}, "name"), ({"name": "../x"}, "name"), ({"name": server.name}, "name"),
                        ({"name": "x", "r": 0}, "r"), ({"name": "x", "r": 100000}, "r"),
                        ({"name": "x", "num_experts": 1000}, "num_experts"),
                        ({"name": "x", "num_experts": 2, "top_k": 3}, "top_k"),
                        ({"name": "x", "target_modules": ["lm_head"]}, "target_modules"),
                        ({"name": "x", "gate": "threshold"}, "gate"), ({"name": "x", "rank": 4}, "rank"),
                        ({"name": "x", "description": "d" * 2000}, "description"), ({"name": "x", "seed": "a"}, "seed")]:
        reply = server.call("POST", "/v1/adapters", body)
        assert (reply.status, reply.error["param"]) == (400, param), (body, reply.body)
    assert server.call("GET", "/v1/adapters/x").status == 404


def test_metrics_count(server):
    def read():
        reply = server.call("GET", "/metrics")
        assert reply.status == 200 and reply.headers["Content-Type"].startswith("text/plain")
        text = reply.body.decode()
        for line in text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) [a-z_:0-9]+ .+|[a-z_:0-9]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [-+.e0-9]+(inf)?', line,
                                re.I), line
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
                for line in text.splitlines() if not line.startswith("#")}

    before = read()
    server.complete(prompt="One two", max_tokens=3, ignore_eos=True)
    after = read()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:generation_tokens_total"] == 3
    assert grown['vllm:request_success_total{finished_reason="length"}'] == 1
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    assert grown['vllm:time_to_first_token_seconds_bucket{le="+Inf"}'] == 1
    assert after["medley_adapters"] == len(server.call("GET", "/v1/adapters").json()["data"])


def test_metrics_name_the_adapters_of_requests(start):
    """As vLLM's: whose requests run and whose wait, each adapter once."""
    server = start("--max-batch", "2")
    for name in ("busy", "late"):
        assert create(server, name=name, r=2).status == 201

    def lists():
        text = server.call("GET", "/metrics").body.decode()
        return re.search(r'^vllm:lora_requests_info\{max_lora="2",running_lora_adapters="([^"]*)",'
                         r'waiting_lora_adapters="([^"]*)"\} \d+$', text, re.M).groups()

    assert lists() == ("", "")
    assert server.call("POST", "/v1/completions", {"prompt": "a", "model": 'no"\nsuch'}).status == 404
    long = {"prompt": "abc", "max_tokens": 480, "ignore_eos": True}
    running = [server.stream("/v1/completions", model="busy", **long) for _ in range(2)]
    for stream in running:
        next(stream)
    connection = server.connect()
    connection.request("POST", "/v1/completions", json.dumps({**long, "model": "late"}), {"Content-Type": "application/json"})
    eventually(lambda: lists() == ("busy", "late"), "the lists are ('busy', 'late')")
    for stream in running:
        stream.close()
    connection.close()
    eventually(lambda: lists() == ("", ""), "the lists are empty")


def test_serving_counts_who_is_chosen(server):
    assert create(server, name="counted", r=2, num_experts=4, top_k=2, target_modules=["v_proj", "down_proj"]).status == 201
    assert server.call("GET", "/v1/adapters/counted/routing").json()["training"] is None
    prompt = list(range(10, 17))
    server.complete(model="counted", prompt=[prompt], max_tokens=5, ignore_eos=True)
    routing = server.call("GET", "/v1/adapters/counted/routing").json()
    sites = routing["serving"]["sites"]
    assert {s["projection"] for s in sites} == {"v_proj", "down_proj"}
    for site in sites:
        assert site["rows"] == len(prompt) + 5 - 1, "the last token is not read"
        assert abs(sum(site["share"]) - 2) < 1e-3 and abs(sum(site["gate"]) - 1) < 1e-3
    assert create(server, name="uncounted").status == 201
    assert server.call("GET", "/v1/adapters/uncounted/routing").json()["serving"] == {"sites": []}
    assert server.call("GET", "/v1/adapters/nobody/routing").status == 404


def test_openapi_knows_every_call(server):
    spec = server.call("GET", "/v1/openapi.json").json()
    assert spec["openapi"].startswith("3.")
    for path, methods in spec["paths"].items():
        named = path.replace("{name}", "x").replace("{id}", "x")
        for method, call in methods.items():
            assert call["summary"], path
            assert bool(call.get("parameters")) == ("{" in path)
        reply = server.call("DELETE" if "delete" not in methods else "PATCH", named)
        if reply.status == 405:
            assert set(reply.headers["Allow"].lower().split(", ")) - {"head"} == set(methods), path
    assert {"/v1/completions", "/v1/adapters/{name}/train", "/metrics"} <= set(spec["paths"])
    settings = spec["components"]["schemas"]["TrainingSettings"]["properties"]
    assert settings["learning_rate"]["default"] == 0.001 and "constant" in settings["schedule"]["enum"]
