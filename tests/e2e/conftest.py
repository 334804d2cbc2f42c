from pathlib import Path

import openai
import pytest

from server import SMOLLM2, Server, model_file


@pytest.fixture
def start(tmp_path):
    """start(*options, model=, data=, env=) runs a server of the test's own. What a test does not stop
    is stopped after it, and must end well."""
    servers = []

    def start_one(*options, model="gqa_tied", data=None, env=None):
        servers.append(Server(model if isinstance(model, Path) else model_file(model), data or tmp_path / "data", *options, env=env))
        return servers[-1]

    yield start_one
    codes = [server.stop() for server in servers if server.process.poll() is None]
    assert not any(codes), [server.log for server in servers]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A small random model with an fp32 cache, for all tests of a module."""
    with Server(model_file("gqa_tied"), tmp_path_factory.mktemp("server") / "data",
                "--kv-type", "f32") as running:
        yield running


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    assert SMOLLM2.exists(), f"no model at {SMOLLM2}: run `make model`, or set MEDLEY_TEST_MODEL"
    with Server(SMOLLM2, tmp_path_factory.mktemp("smollm2") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as c:
        yield c
