"""Text encoders: T5 as the released model calls it, bytes, masks, truncation, and what is refused."""

from __future__ import annotations

import copy
import logging
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcar_fast.config import TextEncoderConfig
from dcar_fast.models.text_encoder import TextEncoder
from tests import tiny_t5
from tests.golden_vectors import error

PROMPTS = ["a cat", "a much longer prompt", ""]
BYTES = {
    "tokenizer": "bytes",
    "vocab_size": 384,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    tiny_t5.save(path)
    return path


@pytest.fixture(scope="module")
def t5(folder):
    return TextEncoder.from_t5(folder, max_length=30)


def by_bytes(max_length: int = 30, attend_pads: bool = False) -> TextEncoder:
    torch.manual_seed(1)
    encoder = TextEncoder(TextEncoderConfig(**BYTES, max_length=max_length, attend_pads=attend_pads))
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@torch.no_grad()
def encode(encoder: TextEncoder, prompts):
    return encoder(prompts)


def test_released_behaviour_is_t5_without_a_mask(folder, t5):
    from transformers import AutoTokenizer, T5EncoderModel

    model = T5EncoderModel.from_pretrained(str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    encoded = tokenizer(PROMPTS, padding="max_length", max_length=30, return_tensors="pt")
    with torch.no_grad():
        without_mask = model(input_ids=encoded.input_ids).last_hidden_state
        with_mask = model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
    found = encode(t5, PROMPTS)
    longest = len(PROMPTS[1]) + 1  # one token per byte and the end mark
    assert torch.equal(found.states, without_mask[:, :longest])
    assert error(with_mask[0, :6], without_mask[0, :6]) > 1e-2, "pads are attended, and it matters"
    assert found.mask.sum(dim=1).tolist() == [6, longest, 1]
    assert found.mask.dtype == torch.bool and found.mask[0].tolist() == [True] * 6 + [False] * (longest - 6)
    assert t5.config == TextEncoderConfig("t5", 30, True, **tiny_t5.SIZES, feed_forward_proj="relu")
    assert torch.equal(encode(t5, PROMPTS).states, found.states), "no dropout"


@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_both_feed_forwards(tmp_path, projection):
    model = tiny_t5.save(tmp_path, feed_forward_proj=projection)
    encoder = TextEncoder.from_t5(tmp_path, max_length=8)
    assert encoder.config.feed_forward_proj == projection
    ids, _ = encoder.tokenize(["dog"])
    with torch.no_grad():
        assert torch.equal(encode(encoder, ["dog"]).states, model(input_ids=ids).last_hidden_state[:, :4])


def test_attended_pads_make_the_length_matter_and_masked_ones_do_not(folder):
    long, short = (encode(TextEncoder.from_t5(folder, max_length=n), ["a cat"]) for n in (40, 10))
    assert error(long.states, short.states) > 1e-2
    long, short = (encode(by_bytes(n), ["a cat"]) for n in (40, 10))
    assert torch.equal(long.states, short.states)


def test_without_pads_the_batch_does_not_matter():
    encoder = by_bytes()
    together = encode(encoder, PROMPTS)
    assert together.states.shape == (3, len(PROMPTS[1]) + 1, 16)
    for row, prompt in enumerate(PROMPTS):
        alone = encode(encoder, [prompt])
        length = len(prompt) + 1
        assert alone.states.shape[1] == length and alone.mask.all()
        assert error(together.states[row, :length], alone.states[0]) < 1e-5
        assert together.mask[row].sum() == length


def test_bytes_are_utf8_plus_three_and_an_end_mark(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the byte tokenizer needs no files")

    monkeypatch.setattr(socket, "socket", no_network)
    encoder = by_bytes()
    for prompt in ("a cat", "é", "猫 🐈", "\x00\n", "ﬁ\u0301"):
        ids, mask = encoder.tokenize([prompt])
        raw = list(prompt.encode())
        assert ids[0, : len(raw) + 1].tolist() == [byte + 3 for byte in raw] + [1]
        assert mask[0].sum() == len(raw) + 1 and (ids[0, len(raw) + 1 :] == 0).all()
        assert ids.shape == mask.shape == (1, 30) and ids.dtype == torch.int64
        assert encode(encoder, [prompt]).states.isfinite().all()


def test_unicode_through_the_t5_tokenizer(t5):
    prompts = ["猫 🐈", "naïve café"]
    found = encode(t5, prompts)
    assert found.mask.sum(dim=1).tolist() == [len(prompt.encode()) + 1 for prompt in prompts]
    assert error(found.states[0, :4], found.states[1, :4]) > 1e-2


@pytest.mark.parametrize("kind", ["t5", "bytes", "bytes, pads attended"])
def test_long_prompts_are_cut_with_a_warning(kind, t5, caplog):
    encoder = t5 if kind == "t5" else by_bytes(attend_pads="attended" in kind)
    with caplog.at_level(logging.WARNING):
        exact = encode(encoder, ["x" * 29])
        assert not caplog.records, "29 bytes and the end mark just fit"
        found = encode(encoder, ["short", "y" * 10_000])
    assert exact.states.shape[1] == found.states.shape[1] == 30 and exact.mask.all() and found.mask[1].all()
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "a prompt has" in message and "10001" in message and "30" in message and len(message) < 200
    ids, _ = encoder.tokenize(["y" * 10_000])
    assert ids[0, -1] == 1, "the end mark stays"


@pytest.mark.parametrize("kind", ["t5", "bytes"])
def test_a_pad_written_into_a_prompt_costs_no_token(kind, t5):
    """The word <pad> is a pad inside the prompt: not attended, but what follows it is still there."""
    encoder = t5 if kind == "t5" else by_bytes()
    ids, mask = encoder.tokenize(["<pad>ab"])
    if ids[0, 0] == 0:
        assert mask[0, :5].tolist() == [False, True, True, True, False]
    found = encode(encoder, ["<pad>ab"])
    assert found.mask.sum() == mask.sum(), "all tokens of the prompt are kept"
    assert found.states.shape[1] == found.mask.shape[1] == int(mask[0].nonzero().max()) + 1
    assert (found.lengths is None) == (not mask[0, : found.mask.shape[1]].all()), "a hole, if the pad is one"


@pytest.mark.parametrize("kind", ["t5", "bytes", "bytes, pads attended"])
def test_lengths_are_those_of_the_mask(kind, t5):
    encoder = t5 if kind == "t5" else by_bytes(attend_pads="attended" in kind)
    prompts = ["a cat", "", "x" * 10_000, "猫 🐈"]
    found = encode(encoder, prompts)
    assert found.lengths == (6, 1, 30, 9) == tuple(found.mask.sum(dim=1).tolist())
    assert all(type(length) is int for length in found.lengths)


def test_a_pad_in_any_prompt_leaves_no_lengths(t5, monkeypatch):
    tokenize = t5.tokenize

    def with_hole(prompts):
        ids, mask = tokenize(prompts)
        mask[1, 2] = False
        return ids, mask

    monkeypatch.setattr(t5, "tokenize", with_hole)
    assert encode(t5, PROMPTS).lengths is None


@pytest.mark.parametrize("kind", ["t5", "bytes"])
def test_counting_tokens_is_tokenizing_without_a_word(kind, t5, monkeypatch, caplog):
    encoder = t5 if kind == "t5" else by_bytes()
    monkeypatch.setattr("dcar_fast.models.text_encoder.TOKENISED_AT_ONCE", 2)
    prompts = ["a cat", "", "y" * 10_000, "猫 🐈", "x" * 29]
    assert encoder.count_tokens(prompts) == [6, 1, 30, 9, 30] and not caplog.records
    assert tuple(encoder.count_tokens(prompts)) == encode(encoder, prompts).lengths
    with pytest.raises(ValueError, match="prompts.*empty"):
        encoder.count_tokens([])


@pytest.mark.parametrize("kind", ["t5", "bytes"])
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts.*empty"),
        ((), "prompts.*empty"),
        ("a cat", "prompts must be a list of strings, got str"),
        (None, "prompts.*NoneType"),
        (5, "prompts.*int"),
        (iter(["a"]), "prompts.*iterator"),
        ({"a": "b"}, "prompts.*dict"),
        (b"abc", r"prompts"),
        (["a", 5], r"prompts\[1\].*int"),
        (["a", None], r"prompts\[1\].*NoneType"),
        ([b"a"], r"prompts\[0\].*bytes"),
        ([["a"]], r"prompts\[0\].*list"),
        (["a", "\ud800"], r"prompts\[1\]"),  # half a surrogate pair is no text
    ],
    ids=range(13),
)
def test_bad_prompts(kind, prompts, message, t5):
    encoder = t5 if kind == "t5" else by_bytes()
    with pytest.raises(ValueError, match=message):
        encoder(prompts)


def test_other_precision_and_tuples():
    encoder = copy.deepcopy(by_bytes()).bfloat16()
    low, high = encode(encoder, ("a cat",)), encode(by_bytes(), ["a cat"])
    assert low.states.dtype == torch.bfloat16
    assert (low.states.float() - high.states).square().mean().sqrt() < 0.05 * high.states.square().mean().sqrt()


def test_a_t5_vocabulary_needs_its_tokenizer():
    with pytest.raises(ValueError, match="tokenizer is needed"):
        TextEncoder(TextEncoderConfig(max_length=8, **tiny_t5.SIZES))


@pytest.fixture
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "t5")
    return tmp_path / "t5"


def rewrite(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


Q = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.mark.parametrize("damage", ["missing tensor", "misshapen tensor", "truncated", "no weights", "no tokenizer"])
def test_damaged_t5_folders(damage, copied):
    """A tensor that is missing must not be drawn at random."""
    weights = copied / "model.safetensors"
    if damage == "missing tensor":
        rewrite(copied, lambda state: state.pop(Q))
    elif damage == "misshapen tensor":
        rewrite(copied, lambda state: state.update({Q: torch.zeros(3, 24)}))
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no weights":
        weights.unlink()
    else:
        for path in copied.glob("tokenizer*"):
            path.unlink()
    with pytest.raises(ValueError, match="text encoder"):
        TextEncoder.from_t5(copied, max_length=8)


def test_folders_without_a_t5(tmp_path):
    with pytest.raises(ValueError, match="text encoder.*nowhere"):
        TextEncoder.from_t5(tmp_path / "nowhere")
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=259, **sizes)).save_pretrained(tmp_path)
    tiny_t5.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text encoder"):
        TextEncoder.from_t5(tmp_path, max_length=8)


def test_relatives_of_t5_are_refused(copied):
    """umT5 shares the class and the names but not the computation."""
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"model_type": "t5"', '"model_type": "umt5"'))
    with pytest.raises(ValueError, match="text encoder.*umt5"):
        TextEncoder.from_t5(copied, max_length=8)


@pytest.mark.parametrize("length", [0, -1, 2.5])
def test_bad_lengths(folder, length):
    with pytest.raises(ValueError, match="max_length"):
        TextEncoder.from_t5(folder, max_length=length)
