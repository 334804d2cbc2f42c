#!/usr/bin/env python3
"""Writes a GGUF of random weights in the shape of Llama-3.2-1B, for measuring speed.

The tokenizer is the default model's, so the vocabulary is its 49,152 tokens. Blocks are drawn as they lie in the
file, with a scale that keeps activations near unit size: what they say is noise, what they cost is not. The
same type, shape and seed give the same bytes. Written under another name and renamed when whole.

usage: make_random_model.py [--type Q4_0|Q8_0] [--layers N] [--tokenizer FILE.gguf] [--out FILE.gguf] [--print-path]
Default: $XDG_CACHE_HOME/medley/models/random-1b-TYPE.gguf; a file that is there is kept.
"""

import argparse
import os
import sys
from pathlib import Path

import gguf
import numpy as np

EMBED, FFN, HEADS, KV_HEADS, HEAD_DIM = 2048, 8192, 32, 8, 64
LAYERS, CONTEXT, SEED = 16, 8192, 1
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medley/models"
TOKENIZER = os.environ.get("MEDLEY_TEST_MODEL") or CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"

# By type: the quants' bytes of a block of 32 values, and their standard deviation where they are drawn evenly.
QUANTS = {"Q4_0": (16, 4.61), "Q8_0": (32, 73.9)}


def projections(layers):
    """(name, outputs, inputs) of every quantised tensor, in the file's order; the head is tied."""
    kv = KV_HEADS * HEAD_DIM
    yield "token_embd.weight", None, EMBED
    for i in range(layers):
        for name, outputs, inputs in (("attn_q", EMBED, EMBED), ("attn_k", kv, EMBED), ("attn_v", kv, EMBED),
                                      ("attn_output", EMBED, EMBED), ("ffn_gate", FFN, EMBED),
                                      ("ffn_up", FFN, EMBED), ("ffn_down", EMBED, FFN)):
            yield f"blk.{i}.{name}.weight", outputs, inputs


def blocks(random, kind, rows, cols):
    """uint8 (rows, bytes of a row); values have the standard deviation 1 / sqrt(cols)."""
    count, deviation = QUANTS[kind]
    block = np.empty((rows * cols // 32, 2 + count), np.uint8)
    block[:, :2] = np.frombuffer(np.float16(1 / deviation / np.sqrt(cols)).tobytes(), np.uint8)
    block[:, 2:] = np.frombuffer(random.bytes(block[:, 2:].size), np.uint8).reshape(-1, count)
    if kind == "Q8_0":
        block[:, 2:][block[:, 2:] == 0x80] = 0  # -128 is no quant of this type
    return block.reshape(rows, -1)


def copy_tokenizer(writer, path):
    """Returns the vocabulary's size."""
    fields = gguf.GGUFReader(path).fields
    for key, field in fields.items():
        if key.startswith("tokenizer."):
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    return len(fields["tokenizer.ggml.tokens"].data)


def write(path, kind, layers, tokenizer):
    writer = gguf.GGUFWriter(path, "llama")
    vocab = copy_tokenizer(writer, tokenizer)
    writer.add_name(f"Random 1B {kind}")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(EMBED)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)

    matrices = [(name, outputs or vocab, inputs) for name, outputs, inputs in projections(layers)]
    norms = ["output_norm.weight"]
    norms += [f"blk.{i}.{name}_norm.weight" for i in range(layers) for name in ("attn", "ffn")]
    size = gguf.GGMLQuantizationType[kind]
    for name, outputs, inputs in matrices:
        row = inputs // 32 * (2 + QUANTS[kind][0])
        writer.add_tensor_info(name, (outputs, row), np.dtype(np.uint8), outputs * row, size)
    for name in norms:
        writer.add_tensor_info(name, (EMBED,), np.dtype(np.float32), EMBED * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    random = np.random.default_rng(SEED)
    for i, (_, outputs, inputs) in enumerate(matrices):
        writer.write_tensor_data(blocks(random, kind, outputs, inputs))
        if sys.stderr.isatty():
            end = "\n" if i + 1 == len(matrices) else ""
            print(f"\rwriting {path.name} {100 * (i + 1) // len(matrices)}%", end=end, file=sys.stderr, flush=True)
    for _ in norms:
        writer.write_tensor_data(np.ones(EMBED, np.float32))
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", choices=sorted(QUANTS), default="Q4_0")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--tokenizer", type=Path, default=Path(TOKENIZER), help="a GGUF file to take it from")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--print-path", action="store_true", help="print where the file is, and write nothing")
    args = parser.parse_args()
    path = args.out or CACHE / f"random-1b-{args.type}.gguf"
    if args.print_path:
        print(path)
        return
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + f".{os.getpid()}.part")
        try:
            write(temporary, args.type, args.layers, args.tokenizer)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    print(path)


if __name__ == "__main__":
    main()
