"""llama.cpp's side of the bench, a process that reads one job a line (JSON) and answers one line: through its own
batch interface, without sampling and without Python between rows.

Fair to it on purpose: threads as ours, flash attention and buffer types as it chooses them, one ubatch for 512 prompt
tokens, caches no longer than what is measured, and no sampler (ours samples in its time).

usage: peer.py MODEL THREADS
"""

import ctypes
import json
import sys
import time

import llama_cpp as ll
import numpy as np

UBATCH = 512
DECODE_S = 20  # a machine that others use can slow its threads a hundredfold: the rate of so long will do


def prompt_token(text, sequence, position):
    return 1000 + (text * 977 + sequence * 131 + position * 37) % 20000


class Peer:
    def __init__(self, path, threads):
        ll.llama_log_set(_QUIET, ctypes.c_void_p(0))
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = ll.llama_model_get_vocab(self.model)
        self.threads = threads
        self.contexts = {}
        self.loras = []

    # ---- jobs ----

    def shape(self):
        m = self.model
        text = ctypes.create_string_buffer(32)
        if ll.llama_model_meta_val_str(m, b"llama.feed_forward_length", text, len(text)) <= 0:
            raise RuntimeError("the model does not say its FFN's width")
        head = ll.llama_model_n_embd(m) // ll.llama_model_n_head(m)
        return {"layers": ll.llama_model_n_layer(m), "embed": ll.llama_model_n_embd(m), "ffn": int(text.value),
                "q": head * ll.llama_model_n_head(m), "kv": head * ll.llama_model_n_head_kv(m),
                "vocab": ll.llama_vocab_n_tokens(self.vocab), "weights": ll.llama_model_n_params(m)}

    def load_lora(self, path):
        adapter = ll.llama_adapter_lora_init(self.model, path.encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.loras.append(adapter)

    def prefill(self, sequences, length, adapters=0):
        """Prompt tokens a second. Rows of different adapters cannot share a batch."""
        context = self._context(sequences, length)
        took = 0.0
        for group in self._groups(sequences, adapters):
            self._use(context, group[0] % adapters if adapters else None)
            took += self._read_prompts(context, group, length)
        ll.llama_free(context)
        return sequences * length / took

    def decode(self, sequences, length, tokens, adapters=0):
        """Generated tokens a second, after prompts of the given length, which are read once. Rows of different
        adapters go one adapter after the other, each to its end, as llama.cpp's server does it."""
        context = self._prompted(sequences, length, length + tokens)
        groups = self._groups(sequences, adapters)
        took, made = 0.0, 0
        for group in groups:
            self._use(context, group[0] % adapters if adapters else None)
            group_s = 0.0
            for t in range(tokens):
                if group_s > DECODE_S / len(groups):
                    break
                group_s += self._decode(context, [(1000 + t, length + t, s, True) for s in group])
                made += len(group)
            took += group_s
        memory = ll.llama_get_memory(context)
        for s in range(sequences):
            ll.llama_memory_seq_rm(memory, s, length, -1)
        return made / took

    def first_token(self, sequences, length, tokens, prompts_first):
        """Seconds until the last of so many requests, each with an adapter of its own, has its first token. Its server
        answers each to the end before the next adapter's turn; prompts_first: if it read all prompts before."""
        context = self._context(sequences, length + tokens)
        took = 0.0
        for s in range(sequences):
            self._use(context, s)
            took += self._read_prompts(context, [s], length)
            if prompts_first or s == sequences - 1:
                continue
            for t in range(tokens - 1):
                took += self._decode(context, [(1000 + t, length + t, s, True)])
        ll.llama_free(context)
        return took

    def tokenize(self, text):
        data = text.encode()
        tokens = (ll.llama_token * (len(data) + 8))()
        count = ll.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), False, False)
        return list(tokens[:count])

    def logprobs(self, tokens):
        """Of every token of a text but the first."""
        context = self._context(1, len(tokens))
        self._decode(context, [(token, i, 0, True) for i, token in enumerate(tokens)])
        size = ll.llama_vocab_n_tokens(self.vocab)
        result = []
        for i, token in enumerate(tokens[1:]):
            row = np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (size,)).astype(np.float64)
            top = row.max()
            result.append(float(row[token] - top - np.log(np.exp(row - top).sum())))
        ll.llama_free(context)
        return result

    # ---- their parts ----

    def _context(self, sequences, length):
        params = ll.llama_context_default_params()
        params.n_ctx = sequences * (-(-length // 256) * 256)
        params.n_batch = params.n_ubatch = UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        context = ll.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context")
        return context

    def _prompted(self, sequences, length, room):
        """A context that has read prompts of this length, kept for the next time."""
        key = sequences, length, room
        if key not in self.contexts:
            context = self._context(sequences, room)
            self._use(context, None)
            for s in range(sequences):
                self._read_prompts(context, [s], length)
            self.contexts[key] = context
        return self.contexts[key]

    def _read_prompts(self, context, sequences, length):
        rows = [(prompt_token(0, s, t), t, s, t == length - 1) for s in sequences for t in range(length)]
        return sum(self._decode(context, rows[i:i + UBATCH]) for i in range(0, len(rows), UBATCH))

    def _decode(self, context, rows):
        """rows: [(token, position, sequence, wants logits)]; seconds"""
        batch = ll.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        begin = time.perf_counter()
        status = ll.llama_decode(context, batch)
        ll.llama_synchronize(context)
        took = time.perf_counter() - begin
        ll.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        return took

    def _use(self, context, lora):
        count = 0 if lora is None else 1
        adapters = (ll.llama_adapter_lora_p_ctypes * 1)(*([] if lora is None else [self.loras[lora]]))
        scales = (ctypes.c_float * 1)(1.0)
        if ll.llama_set_adapters_lora(context, adapters, count, scales):
            raise RuntimeError("llama.cpp cannot use the adapter")

    @staticmethod
    def _groups(sequences, adapters):
        if not adapters:
            return [range(sequences)]
        return [range(a, sequences, adapters) for a in range(min(adapters, sequences))]


@ll.llama_log_callback
def _QUIET(level, text, data):
    pass


def main():
    peer = Peer(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"version": ll.__version__, "built": ll.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            reply = {"value": getattr(peer, job["job"])(*job["arguments"])}
        except Exception as e:  # the job's row fails, the others go on
            reply = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
