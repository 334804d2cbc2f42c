"""The files that are measured: the default model in four types, and random models of 1B, all in the user's cache."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medley/models"
DEFAULT = Path(os.environ.get("MEDLEY_TEST_MODEL") or CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf")
TYPES = ["Q4_1", "Q4_0", "Q8_0", "BF16"]
RANDOM_TYPES = ["Q4_0", "Q8_0"]


def smollm2(kind):
    """The default model in another type, by llama.cpp's own quantizer; made on first use."""
    if kind in DEFAULT.stem.split("."):
        return DEFAULT
    path = CACHE / f"{DEFAULT.stem.split('.')[0]}.{kind}-requantized.gguf"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        # In a process of its own: the quantizer prints much, and aborts where it does not like a file.
        done = subprocess.run([sys.executable, __file__, kind, str(DEFAULT), str(part)], capture_output=True, text=True)
        if done.returncode:
            part.unlink(missing_ok=True)
            raise RuntimeError(f"llama.cpp cannot make {path.name}: {done.stderr[-300:]}")
        part.rename(path)
    return path


def random_1b(kind):
    script = Path(__file__).parent / "make_random_model.py"
    done = subprocess.run([sys.executable, str(script), "--type", kind], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name}: {done.stderr[-300:]}")
    path = subprocess.run([sys.executable, str(script), "--type", kind, "--print-path"], capture_output=True,
                          text=True, check=True).stdout.strip()
    return Path(path)


def quantize(kind, source, target):
    import llama_cpp as ll
    params = ll.llama_model_quantize_default_params()
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = len(os.sched_getaffinity(0))
    params.allow_requantize = True
    return ll.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))


if __name__ == "__main__":
    sys.exit(1 if quantize(*sys.argv[1:]) else 0)
