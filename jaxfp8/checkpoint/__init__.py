r"""Checkpoints in safetensors format, read into trees for `update_params` and written from them.

A decoder's files, of any of the formats, into a model whose layers are stacked by `nn.scan` and
whose q, k and v are one layer:

    loaded = load_safetensors(
        "Llama-3-8B-FP8",
        names=[
            (r"model\.layers\.(\d+)\.self_attn\.(\w)_proj\.weight", r"layers/\2/kernel[\1]"),
            (r"model\.layers\.(\d+)\.mlp\.(\w+)_proj\.weight", r"layers/\2/kernel[\1]"),
            (r"model\.layers\.(\d+)\.(\w+)_layernorm\.weight", r"layers/\2_norm/scale[\1]"),
            (r"model\.embed_tokens\.weight", "embed/embedding"),
            (r"model\.norm\.weight", "norm/scale"),
            (r"lm_head\.weight", "lm_head/kernel"),
        ],
        fuse={"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")},
    )
    params = reload_params(params, loaded)

Orbax keeps padded trees as they are, and needs nothing from here. The logical sizes are in the
names of the leaves, so a checkpoint of other sizes is refused:

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, params)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path, jax.eval_shape(model.init, key, x))

A dense checkpoint, as a trainer saved it, is restored as what it is, and then written into the
padded model: `float_model` is the same class with the trainer's `param_dtype`.

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        trained = checkpointer.restore(path, jax.eval_shape(float_model.init, key, x))
    params = update_params(params, trained)
"""

from jaxfp8.checkpoint._load import load_safetensors as load_safetensors
from jaxfp8.checkpoint._save import save_safetensors as save_safetensors
