"""PyTorch's side of the training bench: the same model, decoded to floats, the same batch, the same adapter.

A LoRA is PEFT's own. A mixture has no library to take it from: here all experts are computed as one product and masked
by their gates, which on a CPU is faster than gathering rows by expert.

    train_peer.py decode MODEL.gguf FOLDER
    train_peer.py FOLDER THREADS EXPERTS RANK TOP_K SEQUENCES LENGTH SCORED VARIANT       speaks as bench_train does

VARIANT: eager | sdpa | sdpa-bf16 (autocast) | sdpa-checkpoint (activations recomputed, as ours)
"""

import contextlib
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE, BALANCE, CONTRAST, TEMPERATURE, PAIRS = 1e-3, 1e-3, 1e-2, 0.1, 256


class Mixture(torch.nn.Module):
    """A linear layer with experts, and their losses of the last pass."""

    def __init__(self, linear, experts, rank, top_k):
        super().__init__()
        self.linear, self.experts, self.rank, self.top_k = linear, experts, rank, top_k
        out, inn = linear.weight.shape
        self.a = torch.nn.Parameter(torch.empty(experts * rank, inn).uniform_(-inn ** -0.5, inn ** -0.5))
        self.b = torch.nn.Parameter(torch.zeros(out, experts * rank))
        self.router = torch.nn.Parameter(torch.randn(experts, inn) * 0.02)
        self.losses = None

    def forward(self, x):
        p = torch.softmax(F.linear(x, self.router), -1)
        top, chosen = p.topk(self.top_k, -1)
        g = torch.zeros_like(p).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
        z = F.linear(x, self.a)
        if self.training:
            self.losses = self.balance(p, g) * BALANCE + self.contrast(z, chosen) * CONTRAST
        gated = z.unflatten(-1, (self.experts, self.rank)) * g[..., None]
        return self.linear(x) + 2 * F.linear(gated.flatten(-2), self.b)

    def balance(self, p, g):
        p, g = p.flatten(0, -2), g.flatten(0, -2)
        return self.experts * ((g > 0).to(p.dtype).mean(0) * p.mean(0)).sum()

    def contrast(self, z, chosen):
        z = z.flatten(0, -2).unflatten(-1, (self.experts, self.rank))
        rows = torch.randperm(len(z))[:PAIRS // self.top_k]
        expert = chosen.flatten(0, -2)[rows]
        picked = z[rows[:, None], expert].flatten(0, 1)
        expert = expert.flatten()
        mixed = picked.new_zeros(len(picked), self.experts, self.rank)
        mixed[torch.arange(len(picked)), expert] = picked
        o = F.normalize(F.linear(mixed.flatten(1), self.b), dim=-1)
        s = (o @ o.T) / TEMPERATURE
        others = ~torch.eye(len(o), dtype=torch.bool)
        same = (expert[:, None] == expert) & others
        log_share = s - torch.logsumexp(s.masked_fill(~others, -torch.inf), -1, keepdim=True)
        count = same.sum(-1)
        return -((log_share * same).sum(-1) / count.clamp(min=1))[count > 0].mean()


def decode(path, folder):
    """The GGUF file as floats, in a form that loads fast."""
    path, folder = Path(path), Path(folder)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.config.quantization_config = None
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "weights.pt")


def load(folder, attention):
    config = AutoConfig.from_pretrained(folder, attn_implementation=attention)
    model = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict(torch.load(Path(folder) / "weights.pt"))
    model.requires_grad_(False)
    return model


def add_adapter(model, experts, rank, top_k):
    if experts == 1:
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank,
                                                target_modules=PROJECTIONS)).base_model.model
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name in PROJECTIONS:
                if hasattr(block, name):
                    setattr(block, name, Mixture(getattr(block, name), experts, rank, top_k))
    return model


class Trainer:
    def __init__(self, model, sequences, length, scored, bf16):
        self.model, self.bf16 = model.train(), bf16
        self.tokens = torch.tensor([[1000 + (s * 131 + t * 37) % 20000 for t in range(length)]
                                    for s in range(sequences)])
        self.first = max(length - scored - 1, 0)  # the logits of these rows and later ones are needed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0, fused=True)

    def loss(self):
        hidden = self.model.model(self.tokens, use_cache=False).last_hidden_state
        logits = self.model.lm_head(hidden[:, self.first:-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, self.first + 1:].flatten())
        extra = [m.losses for m in self.model.modules() if isinstance(m, Mixture)]
        return loss, loss + sum(extra) / len(extra) if extra else loss

    def step(self):
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            loss, total = self.loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin, float(loss.detach())


def main():
    if sys.argv[1] == "decode":
        decode(*sys.argv[2:])
        return
    folder, variant = sys.argv[1], sys.argv[9]
    threads, experts, rank, top_k, sequences, length, scored = map(int, sys.argv[2:9])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = add_adapter(load(folder, variant.split("-")[0]), experts, rank, top_k)
    if variant.endswith("checkpoint"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    trainer = Trainer(model, sequences, length, scored, variant.endswith("bf16"))
    print(f"PyTorch {torch.__version__}, {sum(p.numel() for p in trainer.parameters)} parameters", flush=True)
    for _ in sys.stdin:
        print("%.6f %.5f" % trainer.step(), flush=True)


if __name__ == "__main__":
    main()
