#!/usr/bin/env python3
"""Writes a small MoELoRA adapter for the default model into a folder: random, so that its effect on
an answer shows without any training. Needs nothing but Python.

usage: example_adapter.py FOLDER [SEED]
"""
import array
import json
import os
import random
import struct
import sys

LAYERS, EXPERTS, RANK, TOP_K = 30, 8, 4, 2
D_IN = 576
TARGETS = {"q_proj": 576, "v_proj": 192}  # outputs of each projection


def tensors(rng):
    """(name, shape, values) in the names docs/adapter-format.md gives."""
    def gauss(rows, cols, spread):
        return array.array("f", (rng.gauss(0, spread) for _ in range(rows * cols)))

    for layer in range(LAYERS):
        for projection, d_out in TARGETS.items():
            site = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            yield f"{site}.moe_gate.weight", (EXPERTS, D_IN), gauss(EXPERTS, D_IN, 0.5)
            for e in range(EXPERTS):
                yield f"{site}.experts.{e}.lora_A.weight", (RANK, D_IN), gauss(RANK, D_IN, 0.04)
                yield f"{site}.experts.{e}.lora_B.weight", (d_out, RANK), gauss(d_out, RANK, 0.05)


def write_safetensors(path, named):
    header, data = {}, []
    offset = 0
    for name, shape, values in named:
        size = len(values) * values.itemsize
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        data.append(values)
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for values in data:
            if sys.byteorder == "big":
                values.byteswap()
            out.write(values.tobytes())


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 0
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, "adapter_model.safetensors"), tensors(random.Random(seed)))
    config = {"peft_type": "MOELORA", "r": RANK, "lora_alpha": 8, "num_experts": EXPERTS, "top_k": TOP_K,
              "gate": "topk", "target_modules": list(TARGETS)}
    with open(os.path.join(folder, "adapter_config.json"), "w") as out:
        json.dump(config, out, indent=1)
    print(f"{folder}: {EXPERTS} experts of rank {RANK}, top {TOP_K}, on {', '.join(TARGETS)} of {LAYERS} layers")


if __name__ == "__main__":
    main()
