"""Random adapters on all seven projections, for measuring speed: a LoRA as llama.cpp's GGUF, which both sides read,
and a MoELoRA in Medley's own format. Values are F16."""

import json
import struct

import numpy as np

LORA_RANK = 16
EXPERTS, EXPERT_RANK, TOP_K = 8, 4, 2

# llama.cpp's name, Hugging Face's name, input, output
PROJECTIONS = [("attn_q", "self_attn.q_proj", "embed", "q"), ("attn_k", "self_attn.k_proj", "embed", "kv"),
               ("attn_v", "self_attn.v_proj", "embed", "kv"), ("attn_output", "self_attn.o_proj", "q", "embed"),
               ("ffn_gate", "mlp.gate_proj", "embed", "ffn"), ("ffn_up", "mlp.up_proj", "embed", "ffn"),
               ("ffn_down", "mlp.down_proj", "ffn", "embed")]


def random_values(generator, count):
    return (generator.random(count, dtype=np.float32) / 8 - 1 / 16).astype(np.float16).tobytes()


def write_lora(path, shape, seed):
    """shape: {"layers", "embed", "ffn", "q", "kv"}"""
    tensors = []
    for layer in range(shape["layers"]):
        for name, _, d_in, d_out in PROJECTIONS:
            tensors.append((f"blk.{layer}.{name}.weight.lora_a", (shape[d_in], LORA_RANK)))
            tensors.append((f"blk.{layer}.{name}.weight.lora_b", (LORA_RANK, shape[d_out])))

    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    string, f32, f16, align = 8, 6, 1, 32
    meta = [("general.architecture", string, text("llama")), ("general.type", string, text("adapter")),
            ("adapter.type", string, text("lora")), ("adapter.lora.alpha", f32, struct.pack("<f", LORA_RANK))]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, kind, value in meta:
        head += text(key) + struct.pack("<I", kind) + value
    offset, generator, data = 0, np.random.default_rng(seed), []
    for name, dims in tensors:
        head += text(name) + struct.pack("<I2QIQ", 2, *dims, f16, offset)
        values = random_values(generator, dims[0] * dims[1])
        values += bytes(-len(values) % align)
        data.append(values)
        offset += len(values)
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % align) + b"".join(data))


def moelora_files(shape, seed):
    """{file name: bytes}, as docs/adapter-format.md says."""
    header, offset, generator, data = {}, 0, np.random.default_rng(seed), []

    def add(name, rows, cols):
        nonlocal offset
        data.append(random_values(generator, rows * cols))
        header[name] = {"dtype": "F16", "shape": [rows, cols], "data_offsets": [offset, offset + len(data[-1])]}
        offset += len(data[-1])

    for layer in range(shape["layers"]):
        for _, name, d_in, d_out in PROJECTIONS:
            site = f"base_model.model.model.layers.{layer}.{name}"
            add(f"{site}.moe_gate.weight", EXPERTS, shape[d_in])
            for e in range(EXPERTS):
                add(f"{site}.experts.{e}.lora_A.weight", EXPERT_RANK, shape[d_in])
                add(f"{site}.experts.{e}.lora_B.weight", shape[d_out], EXPERT_RANK)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    config = {"peft_type": "MOELORA", "r": EXPERT_RANK, "lora_alpha": EXPERT_RANK, "num_experts": EXPERTS,
              "top_k": TOP_K, "gate": "topk", "target_modules": [name.split(".")[1] for _, name, _, _ in PROJECTIONS]}
    return {"adapter_config.json": json.dumps(config).encode(),
            "adapter_model.safetensors": struct.pack("<Q", len(text)) + text + b"".join(data)}
