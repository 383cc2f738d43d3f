"""Quality of rows: from a column, from a language model, from a reward model."""

import json

import numpy as np
import pytest
import torch

from fastsel.errors import InputError, UsageError
from fastsel.features.quality import row_quality
from fastsel.features.row_texts import JudgedText
from fastsel.io import open_pool
from fastsel.models.reward import RewardModel

ROWS = [
    {"instruction": "the cat", "output": "sat on the mat", "s": 3},
    {"instruction": "a dog", "output": "ran", "s": 1.5},
    {"instruction": "a dog", "output": "ran home", "s": None},
    {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "tree"}], "s": 2},
]
WORDS = ["<pad>", "<sep>", "<unk>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "tree", "home"]


def save_reward_model(folder, labels=1, chat_template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", sep_token="<sep>", model_max_length=16
    )
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, num_labels=labels, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    return folder, *save_reward_model(folder)


def quality(rows, source, **options):
    return row_quality(open_pool(rows, score_column="s"), source, **{"progress": "none", **options})


def test_a_score_column_is_read_as_it_is():
    got = quality(ROWS, "score")
    np.testing.assert_array_equal(got.values, [3, 1.5, np.nan, 2])
    assert got.provenance == {"source": "score column", "column": "s"}


def test_a_reward_is_what_the_model_says_of_prompt_and_answer(folder, tmp_path):
    path, model, tokenizer = folder
    pool = open_pool(ROWS)
    got = row_quality(pool, "reward", model=str(path), progress="none", store=tmp_path / "store")
    texts = ["the cat <sep> sat on the mat", "a dog <sep> ran", "a dog <sep> ran home", "the <sep> tree"]
    with torch.no_grad():
        expected = [
            float(model(**tokenizer(t, return_tensors="pt", return_token_type_ids=False)).logits) for t in texts
        ]
    np.testing.assert_allclose(got.values, expected, rtol=1e-5)
    assert (tmp_path / "store" / "quality" / "index.json").exists()
    again = row_quality(pool, "reward", model=str(path), progress="none", store=tmp_path / "store")
    assert again.values.tobytes() == got.values.tobytes()


def test_a_reward_model_reads_the_chat_template_if_it_has_one(tmp_path):
    template = "{% for m in messages %}{{ 'the ' if m.role == 'user' else '<sep> ' }}{{ m.content + ' ' }}{% endfor %}"
    save_reward_model(tmp_path, chat_template=template)
    reward = RewardModel(tmp_path)
    text = JudgedText(reward.tokenizer)
    assert text(open_pool(ROWS).examples([1])[0]) == "the a dog <sep> ran "
    assert text.name.startswith("conversation under the chat template ")


def test_refuses_what_does_not_fit(folder, tmp_path):
    path, *_ = folder
    pool = open_pool(ROWS)
    for source, options, message in [
        ("judge", {}, "quality='judge' is not known"),
        ("score", {}, "carries no scores: name their column with --score-column"),
        ("score", {"model": str(path)}, "runs no model; leave model out"),
        ("reward", {}, "needs a reward model"),
    ]:
        with pytest.raises(UsageError, match=message):
            row_quality(pool, source, **options)
    save_reward_model(tmp_path, labels=2)
    with pytest.raises(InputError, match="has 2 labels; a reward model has one"):
        RewardModel(tmp_path)
    model, _ = save_reward_model(tmp_path)
    model.model.save_pretrained(tmp_path)  # the body alone
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="lacks weights"):
        RewardModel(tmp_path)
