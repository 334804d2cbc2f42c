"""llama.cpp's side of the bench, through its own batch interface: no sampling, no Python between rows.

Fair to it on purpose: threads as ours, flash attention and buffer types as it chooses them, one ubatch for 512
prompt tokens, its cache of the measured sequences only, and no sampler (ours samples in its time)."""

import ctypes
import struct
import time

import llama_cpp as ll
import numpy as np

MODEL_PROJECTIONS = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


def write_lora(path, shape, rank, seed):
    """A random LoRA as llama.cpp's GGUF. shape: {"layers", "embed", "ffn", "q", "kv"}."""
    inputs = {p: shape["embed"] for p in MODEL_PROJECTIONS}
    inputs.update(attn_output=shape["q"], ffn_down=shape["ffn"])
    outputs = {"attn_q": shape["q"], "attn_k": shape["kv"], "attn_v": shape["kv"], "attn_output": shape["embed"],
               "ffn_gate": shape["ffn"], "ffn_up": shape["ffn"], "ffn_down": shape["embed"]}
    tensors = []
    for layer in range(shape["layers"]):
        for p in MODEL_PROJECTIONS:
            tensors.append((f"blk.{layer}.{p}.weight.lora_a", (inputs[p], rank)))
            tensors.append((f"blk.{layer}.{p}.weight.lora_b", (rank, outputs[p])))

    def text(s):
        return struct.pack("<Q", len(s)) + s.encode()

    string, f32, f16, align = 8, 6, 1, 32
    meta = [("general.architecture", string, text("llama")), ("general.type", string, text("adapter")),
            ("adapter.type", string, text("lora")), ("adapter.lora.alpha", f32, struct.pack("<f", rank))]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, kind, value in meta:
        head += text(key) + struct.pack("<I", kind) + value
    offset, random, data = 0, np.random.default_rng(seed), []
    for name, dims in tensors:
        head += text(name) + struct.pack("<I2QIQ", 2, *dims, f16, offset)
        values = (random.random(dims[0] * dims[1]) / 8 - 1 / 16).astype(np.float16).tobytes()
        values += bytes(-len(values) % align)
        data.append(values)
        offset += len(values)
    with open(path, "wb") as f:
        f.write(head + bytes(-len(head) % align) + b"".join(data))


class Peer:
    def __init__(self, path, threads):
        ll.llama_log_set(_QUIET, ctypes.c_void_p(0))
        ll.llama_backend_init()
        params = ll.llama_model_default_params()
        self.model = ll.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp cannot load {path}"
        self.threads = threads
        self.contexts = {}
        self.loras = []

    def info(self):
        return ll.llama_print_system_info().decode()

    def shape(self):
        m = self.model
        text = ctypes.create_string_buffer(32)
        assert ll.llama_model_meta_val_str(m, b"llama.feed_forward_length", text, len(text)) > 0
        head = ll.llama_model_n_embd(m) // ll.llama_model_n_head(m)
        return {"layers": ll.llama_model_n_layer(m), "embed": ll.llama_model_n_embd(m), "ffn": int(text.value),
                "q": head * ll.llama_model_n_head(m), "kv": head * ll.llama_model_n_head_kv(m)}

    def load_lora(self, path):
        adapter = ll.llama_adapter_lora_init(self.model, str(path).encode())
        assert adapter, f"llama.cpp cannot load {path}"
        self.loras.append(adapter)

    def _context(self, sequences, length):
        params = ll.llama_context_default_params()
        params.n_ctx = sequences * (-(-length // 256) * 256)
        params.n_batch = max(512, sequences)
        params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        context = ll.llama_init_from_model(self.model, params)
        assert context, "llama.cpp cannot make a context"
        return context

    def _decode(self, context, rows):
        """rows: [(token, position, sequence, wants logits)]"""
        batch = ll.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        begin = time.perf_counter()
        assert ll.llama_decode(context, batch) == 0
        ll.llama_synchronize(context)
        took = time.perf_counter() - begin
        ll.llama_batch_free(batch)
        return took

    def _use(self, context, lora):
        count = 0 if lora is None else 1
        adapters = (ll.llama_adapter_lora_p_ctypes * 1)(*([] if lora is None else [self.loras[lora]]))
        scales = (ctypes.c_float * 1)(1.0)
        assert ll.llama_set_adapters_lora(context, adapters, count, scales) == 0

    def prefill(self, sequences, length, adapters=0):
        """Prompt tokens a second. Rows of different adapters cannot share a batch."""
        context = self._context(sequences, length)
        took = 0.0
        for group in self._groups(sequences, adapters):
            self._use(context, group[0] % adapters if adapters else None)
            rows = [(1000 + (s * 131 + t * 37) % 20000, t, s, t == length - 1) for s in group for t in range(length)]
            for i in range(0, len(rows), 512):
                took += self._decode(context, rows[i:i + 512])
        ll.llama_free(context)
        return sequences * length / took

    @staticmethod
    def _groups(sequences, adapters):
        if not adapters:
            return [range(sequences)]
        return [range(a, sequences, adapters) for a in range(min(adapters, sequences))]

    def decode(self, sequences, length, tokens, adapters=0):
        """Generated tokens a second, after prompts of the given length, which are read once."""
        if sequences not in self.contexts:
            context = self.contexts[sequences] = self._context(sequences, length + tokens)
            self._use(context, None)
            for s in range(sequences):
                self._decode(context, [(1000 + (s * 131 + t * 37) % 20000, t, s, t == length - 1)
                                       for t in range(length)])
        context = self.contexts[sequences]
        memory = ll.llama_get_memory(context)
        groups = self._groups(sequences, adapters)
        took = 0.0
        for t in range(tokens):
            for group in groups:
                if adapters or t == 0:
                    self._use(context, group[0] % adapters if adapters else None)
                took += self._decode(context, [(1000 + t, length + t, s, True) for s in group])
        for s in range(sequences):
            ll.llama_memory_seq_rm(memory, s, length, -1)
        return sequences * tokens / took


@ll.llama_log_callback
def _QUIET(level, text, data):
    pass
