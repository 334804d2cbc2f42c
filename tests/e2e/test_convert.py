"""`medley adapter convert`, which needs no server."""

import json
import subprocess

from server import BINARY, FIXTURES, model_file

GGUF = FIXTURES / "formats" / "gguf_lora" / "adapter.gguf"
NAMES = {"adapter_config.json", "adapter_model.safetensors"}


def convert(*arguments):
    return subprocess.run([BINARY, "adapter", "convert", *map(str, arguments)], text=True, timeout=60,
                          capture_output=True)


def test_a_gguf_file_needs_the_right_model(tmp_path):
    out = tmp_path / "deep" / "out"
    done = convert(GGUF, out)
    assert done.returncode == 1 and "--model" in done.stderr
    done = convert(GGUF, out, "--model", model_file("mha_tied"))
    assert done.returncode == 1 and "4 heads of 16" in done.stderr
    assert not out.exists()
    done = convert(GGUF, out, "--model", model_file("gqa_tied"))
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == NAMES
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_files_are_replaced_by_force_only(tmp_path):
    mixture, plain = FIXTURES / "adapters" / "moe_topk", FIXTURES / "adapters" / "lora_gqa_tied"
    assert convert(mixture, tmp_path).returncode == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == NAMES and json.loads(before["adapter_config.json"])["peft_type"] == "MOELORA"
    done = convert(plain, tmp_path)
    assert done.returncode == 1 and "--force" in done.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert convert(plain, tmp_path, "--force", "--format", "moelora").returncode == 0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["gate"] == "none"


def test_what_cannot_be_said_is_refused(tmp_path):
    out = tmp_path / "out"
    done = convert(FIXTURES / "adapters" / "moe_topk", out, "--format", "peft")
    assert done.returncode == 1 and "mixture of experts" in done.stderr and not out.exists()
