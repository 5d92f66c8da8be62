"""Released checkpoints name by name, damaged ones, and our own folders: whole, interrupted, mixed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcar_fast import checkpoints
from dcar_fast._files import write_all_atomically, write_atomically
from dcar_fast._release import infer_generator_config, infer_tokenizer_config
from dcar_fast.checkpoints import load_folder, load_official_generator, load_official_tokenizer, save_folder
from dcar_fast.config import DCARConfig, DCHTConfig, PipelineConfig, TextEncoderConfig
from dcar_fast.models.dcar import DCAR
from dcar_fast.models.text_encoder import TextEncoder
from dcar_fast.models.tokenizer import DCHT
from tests import tiny_t5
from tests.golden_vectors import (
    error,
    full_size_state,
    generator,
    generator_config,
    released_state,
    text,
    tokenizer,
    tokenizer_config,
    vectors,
)

FILES = {"config.json", "tokenizer.safetensors", "generator.safetensors", "text_encoder.safetensors"}

# Released checkpoints


def test_every_released_name_is_consumed():
    for kind, names, load, default in (
        ("generator", 573, load_official_generator, DCARConfig()),
        ("tokenizer", 339, load_official_tokenizer, DCHTConfig()),
    ):
        state = full_size_state(kind)
        assert len(state) == names
        model = load(state)
        assert model.config == default, "the shapes imply the released configuration"
        ours = model.state_dict()
        assert len(ours) == names, "one tensor of ours for each released one"
        found = sorted(tuple(t.shape) for name, t in ours.items() if name != "position")
        assert found == sorted(tuple(t.shape) for name, t in state.items() if name != "pos_embed")
        assert not model.training


@pytest.mark.parametrize("kind", ["generator", "tokenizer"])
def test_no_released_name_can_be_missing(kind):
    """Leaving one out is noticed, and reported under its released name."""
    state = released_state(kind)
    load, config = (
        (load_official_generator, generator_config())
        if kind == "generator"
        else (load_official_tokenizer, tokenizer_config())
    )
    for name in list(state)[::5]:
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=rf"1 missing: {name.replace('.', '[.]')}$"):
            load(rest, config)


def released_tokenizer_shapes(c: DCHTConfig) -> dict[str, tuple[int, ...]]:
    """The released names and shapes of a tokenizer of any size, written down independently of the loader."""
    shapes: dict[str, tuple[int, ...]] = {"quantize.embedding.weight": (c.codebook_size, c.latent_channels)}

    def conv(name, outputs, inputs, size=3, bias=True):
        shapes[f"{name}.conv.weight"] = (outputs, inputs, size, size)
        if bias:
            shapes[f"{name}.conv.bias"] = (outputs,)

    def norm(name, channels, kind):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)
        if kind == "batch_norm":
            shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (channels,)
            shapes[f"{name}.num_batches_tracked"] = ()

    def block(name, kind, width, norm_kind):
        if kind == "res":
            conv(f"{name}.main.conv1", width, width)
            conv(f"{name}.main.conv2", width, width, bias=False)
            norm(f"{name}.main.conv2.norm", width, norm_kind)
            return
        conv(f"{name}.context_module.main.qkv", 3 * width, width, 1, bias=False)
        conv(f"{name}.context_module.main.proj", width, width, 1, bias=False)
        norm(f"{name}.context_module.main.proj.norm", width, norm_kind)
        local = f"{name}.local_module.main"
        conv(f"{local}.inverted_conv", 8 * width, width, 1)
        conv(f"{local}.depth_conv", 8 * width, 1)
        conv(f"{local}.point_conv", width, 4 * width, 1, bias=False)
        norm(f"{local}.point_conv.norm", width, norm_kind)

    widths, last = c.widths, len(c.widths) - 1
    if c.encoder_depths[0]:
        conv("encoder.project_in", widths[0], 3)
    else:
        conv("encoder.project_in.conv", widths[1] // 4, 3)
    conv("encoder.project_out.main.op_list.0", c.latent_channels, widths[-1])
    conv("decoder.project_in.main", widths[-1], c.latent_channels)
    first = widths[0] if c.decoder_depths[0] else widths[1]
    norm("decoder.project_out.op_list.0", first, "layer_norm")
    if c.decoder_depths[0]:
        conv("decoder.project_out.op_list.2", 3, first)
    else:
        conv("decoder.project_out.op_list.2.conv", 12, first)
    for i in range(last + 1):
        for j in range(c.encoder_depths[i]):
            block(f"encoder.stages.{i}.op_list.{j}", c.blocks[i], widths[i], c.encoder_norm)
        if c.encoder_depths[i] and i < last:
            conv(f"encoder.stages.{i}.op_list.{c.encoder_depths[i]}.main.conv", widths[i + 1] // 4, widths[i])
        up = bool(c.decoder_depths[i]) and i < last
        if up:
            conv(f"decoder.stages.{i}.op_list.0.main.conv", 4 * widths[i], widths[i + 1])
        for j in range(c.decoder_depths[i]):
            block(f"decoder.stages.{i}.op_list.{j + up}", c.blocks[i], widths[i], c.decoder_norms[i])
    return shapes


SMALL = DCHTConfig(
    codebook_size=16,
    latent_channels=4,
    widths=(8, 16, 32),
    encoder_depths=(1, 2, 1),
    decoder_depths=(2, 1, 3),
    blocks=("res", "res", "efficientvit"),
    decoder_norms=("batch_norm", "batch_norm", "layer_norm"),
    decoder_acts=("relu", "relu", "silu"),
)
VARIANTS = {
    "released": DCHTConfig(),
    "blocks in stage 0": SMALL,
    "blocks in the decoder's stage 0": replace(SMALL, encoder_depths=(0, 2, 1)),
    "blocks in the encoder's stage 0": replace(SMALL, decoder_depths=(0, 1, 3)),
    "two stages": DCHTConfig(
        codebook_size=8,
        latent_channels=8,
        widths=(16, 32),
        encoder_depths=(1, 1),
        decoder_depths=(1, 2),
        blocks=("res", "efficientvit"),
        decoder_norms=("batch_norm", "layer_norm"),
        decoder_acts=("relu", "silu"),
    ),
    "layer norms only": replace(SMALL, decoder_norms=("layer_norm",) * 3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_config_of_other_tokenizers(variant):
    config = VARIANTS[variant]
    shapes = released_tokenizer_shapes(config)
    if variant == "released":
        assert shapes == {name: tuple(t.shape) for name, t in full_size_state("tokenizer").items()}
    state = {
        name: torch.empty(shape, device="meta", dtype=torch.float32 if shape else torch.int64)  # () counts batches
        for name, shape in shapes.items()
    }
    model = load_official_tokenizer(state)
    assert model.config == config
    assert len(model.state_dict()) == len(state)


def test_generator_configs_of_other_sizes():
    state = full_size_state("generator")
    smaller = {
        name: t for name, t in state.items() if not name.startswith(("blocks.27.", "diffloss.net.res_blocks.5."))
    }
    smaller = {name: t for name, t in smaller.items() if "q_norm" not in name and "k_norm" not in name}
    smaller["pos_embed"] = torch.empty(1, 64, 1152, device="meta")
    smaller["y_embedder.y_embedding"] = torch.empty(120, 768, device="meta")
    config = infer_generator_config(smaller)
    assert config == replace(DCARConfig(), num_layers=27, head_depth=5, qk_norm=False, num_tokens=64, text_length=120)
    model = load_official_generator(smaller)
    assert model.config == config and len(model.state_dict()) == len(smaller)


def test_recorded_models_from_inferred_configs():
    inferred = infer_tokenizer_config(released_state("tokenizer"))
    assert replace(inferred, widths=(8, *inferred.widths[1:])) == tokenizer_config()
    with torch.no_grad():
        image = load_official_tokenizer(released_state("tokenizer")).decode(vectors("tokenizer")["case/0/features"])
    assert error(image, vectors("tokenizer")["case/0/decoded_hybrid"]) < 1e-4 * 8
    with pytest.raises(ValueError, match="config must be given.*48.*72"):
        load_official_generator(released_state("generator"))


def test_released_tensors_land_where_they_belong():
    """Untouched bits, and a model of its own: later changes to the given tensors do not reach it."""
    state = {name: tensor.clone() for name, tensor in released_state("generator").items()}
    model = load_official_generator(state, generator_config())
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(model.blocks[1].cross_attn.kv.weight, state["blocks.1.cross_attn.kv_linear.weight"])
    assert torch.equal(model.position, state["pos_embed"][0])
    assert torch.equal(model.null_text, state["y_embedder.y_embedding"])
    for tensor in state.values():
        tensor.zero_()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(buffer.requires_grad for buffer in model.buffers())


def test_half_precision_checkpoints_become_float32():
    state = {name: tensor.half() for name, tensor in released_state("generator").items()}
    model = load_official_generator(state, generator_config())
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert torch.equal(model.to_logits.weight, state["final_layer.linear.weight"].float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_are_no_real_numbers(dtype):
    """A quantised file, say: its integers are not the weights."""
    name = "final_layer.linear.weight"
    state = {**released_state("generator"), name: torch.zeros(64, 48, dtype=dtype)}
    with pytest.raises(ValueError, match=f"{name}.*{dtype}"):
        load_official_generator(state, generator_config())


KINDS = {
    "generator": (load_official_generator, generator_config, "x_embedder.weight", "blocks.0.mlp.fc1.bias"),
    "tokenizer": (
        load_official_tokenizer,
        tokenizer_config,
        "quantize.embedding.weight",
        "decoder.stages.2.op_list.1.main.conv1.conv.bias",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_what_does_not_fit(kind):
    load, config, first, second = KINDS[kind]
    state = released_state(kind)
    state["unknown.weight"] = torch.zeros(2)
    state["another.bias"] = torch.zeros(2)
    del state[second]
    state[first] = state[first][:, :-1]
    with pytest.raises(ValueError) as caught:
        load(state, config())
    message = str(caught.value)
    assert f"1 missing: {second}" in message
    assert "2 unexpected: another.bias, unknown.weight" in message
    was = tuple(released_state(kind)[first].shape)
    assert f"1 misshapen: {first}: {(was[0], was[1] - 1)} instead of {was}" in message


def test_long_lists_are_shortened_but_counted():
    state = {name: t for name, t in released_state("generator").items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"18 missing: .*\.\.\. and 6 more"):
        load_official_generator(state, generator_config())


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("generator", "to_logits.weight"),
        ("generator", "position"),
        ("generator", "head.input_proj.weight"),
        ("tokenizer", "decoder.norm.weight"),
        ("tokenizer", "quantizer.embedding.weight"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_second_tensor_for_one_place_is_unexpected(kind, extra, first):
    """Our own name beside the released one: neither may silently win."""
    load, config, *_ = KINDS[kind]
    model = {"generator": generator, "tokenizer": tokenizer}[kind]()
    other = {extra: torch.full_like(model.state_dict()[extra], 7.0)}
    state = {**other, **released_state(kind)} if first else {**released_state(kind), **other}
    with pytest.raises(ValueError, match=extra.replace(".", "[.]")):
        load(state, config())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [True, False])
def test_another_model(kind, given):
    load, config, *_ = KINDS[kind]
    other = "tokenizer" if kind == "generator" else "generator"
    options = {"config": config()} if given else {}
    for state in (released_state(other), {}, {"weight": torch.zeros(3)}, full_size_state(other)):
        with pytest.raises(ValueError, match="missing|not a released"):
            load(state, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "extra",
    [
        {1: torch.zeros(1)},
        {"weight": [1.0]},
        {"encoder.stages.1.foo": torch.zeros(1)},
        {"blocks.1": torch.zeros(1)},
        {"decoder.stages.9.op_list.0.main.conv.conv.weight": torch.zeros(1)},
        {"": torch.zeros(1)},
    ],
    ids=range(6),
)
@pytest.mark.parametrize("given", [True, False])
def test_strange_names_and_values(kind, extra, given):
    load, config, *_ = KINDS[kind]
    with pytest.raises(ValueError):
        load({**released_state(kind), **extra}, **({"config": config()} if given else {}))


def test_one_huge_layer_number_is_not_taken_for_a_depth():
    state = full_size_state("generator")
    state["blocks.2000000000.mlp.fc1.bias"] = torch.empty(1, device="meta")
    assert infer_generator_config(state).num_layers < 100, "this would build two thousand million layers"
    with pytest.raises(ValueError, match="2000000000"):
        load_official_generator(state)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "other.safetensors", "weights.pt"])
def test_files_and_folders(tmp_path, name):
    state, path = released_state("generator"), tmp_path / name
    save_file(state, path) if name.endswith(".safetensors") else torch.save(OrderedDict(state), path)
    sources = [path, str(path)] + ([] if name == "weights.pt" else [tmp_path, str(tmp_path)])
    for source in sources:
        model = load_official_generator(source, generator_config())
        for key, tensor in generator().state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor), key


def test_transformers_style_tokenizer_folder(tmp_path):
    save_file(released_state("tokenizer"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dc_ht", "anything": 1}))
    model = load_official_tokenizer(tmp_path, tokenizer_config())
    assert torch.equal(model.quantizer.embedding.weight, tokenizer().quantizer.embedding.weight)
    for content in ('{"model_type": "t5"}', '{"model_type": null}', "{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json"):
            load_official_tokenizer(tmp_path, tokenizer_config())


def test_paths_that_hold_nothing(tmp_path):
    for load in (load_official_generator, load_official_tokenizer):
        with pytest.raises(ValueError, match="holds no checkpoint"):
            load(tmp_path)
        for name in ("missing.bin", "missing.safetensors", "no/such/folder"):
            with pytest.raises(ValueError, match="does not exist"):
                load(tmp_path / name)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    mark, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    state = {**released_state("generator"), "extra": Payload(mark)}
    if zipped:
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({"extra": Payload(mark)}))
    for load in (load_official_generator, load_official_tokenizer):
        for source in (path, tmp_path):
            with pytest.raises(ValueError, match="no readable PyTorch checkpoint"):
                load(source)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": torch.zeros(1)}}, torch.zeros(3), {"a": 1}, None])
def test_pickles_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="tensors"):
        load_official_generator(tmp_path / "x.bin", generator_config())


def test_non_string_names_in_a_pickle(tmp_path):
    torch.save({**released_state("generator"), 3: torch.zeros(1)}, tmp_path / "x.bin")
    with pytest.raises(ValueError):
        load_official_generator(tmp_path / "x.bin", generator_config())


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch wonders about the pickle protocols it meets
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_and_corrupted_files(tmp_path, kind):
    suffix = ".safetensors" if kind == "safetensors" else ".bin"
    whole, damaged = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    # a small foreign state: what matters is that reading ends in a ValueError
    state = {f"blocks.{i}.weight": torch.arange(7.0) for i in range(4)}
    if kind == "safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
    content, rng = whole.read_bytes(), random.Random(0)
    damages = [content[: rng.randrange(len(content))] for _ in range(60)]
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 6)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        damages.append(bytes(changed))
    damages += [b"", b"\x00" * 100, b"{}", b"PK\x03\x04", rng.randbytes(500)]
    damages += [bytes(rng.choice(b"abcdefghijklmnop(]}\x80\x02.") for _ in range(30)) for _ in range(60)]
    for number, damage in enumerate(damages):
        damaged.write_bytes(damage)
        with pytest.raises(ValueError):  # "does not fit" where the damage left it readable
            load_official_generator(damaged, generator_config())
        assert damaged.exists(), number


# Our own folders


def text_config(**changes) -> TextEncoderConfig:
    sizes = {"vocab_size": 384, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    return TextEncoderConfig(**{"tokenizer": "bytes", "max_length": 12, "attend_pads": False, **sizes, **changes})


def parts(seed: int) -> tuple[dict[str, torch.nn.Module], PipelineConfig]:
    """Three small models with random weights, which differ from seed to seed."""
    config = PipelineConfig(tokenizer_config(), replace(generator_config(), num_layers=1), text_config())
    torch.manual_seed(seed)
    models = {
        "tokenizer": DCHT(config.tokenizer),
        "generator": DCAR(config.generator),
        "text_encoder": TextEncoder(config.text),
    }
    for model in models.values():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            torch.nn.init.uniform_(tensor.data, 0.1, 1.0)
        model.eval()
    return models, config


def same(a: dict[str, torch.nn.Module], b: dict[str, torch.nn.Module]) -> bool:
    """Whether all weights agree bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        first, second = a[name].state_dict(), b[name].state_dict()
        assert first.keys() == second.keys()
        for key in first:
            assert first[key].dtype == second[key].dtype
            if not torch.equal(first[key], second[key]):
                return False
    return True


@pytest.fixture(scope="module")
def first():
    return parts(1)


@pytest.fixture(scope="module")
def second():
    return parts(2)


@pytest.mark.parametrize("trained", [True, False])
def test_round_trip_with_bytes(tmp_path, first, trained):
    models, config = first
    save_folder(tmp_path / "new" / "folder", models, config, trained)
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    loaded, found, was_trained = load_folder(str(tmp_path / "new" / "folder"))
    assert found == config and was_trained is trained
    assert same(loaded, models)
    assert all(not model.training for model in loaded.values())
    assert all(parameter.requires_grad for model in loaded.values() for parameter in model.parameters())
    states, mask = text()
    with torch.no_grad():
        a, b = (m["text_encoder"](["a cat", "dogs"]) for m in (loaded, models))
        assert torch.equal(a.states, b.states) and torch.equal(a.mask, b.mask)
        args = torch.zeros(3, 16, dtype=torch.int64), states, mask, torch.tensor([False, True, False])
        assert torch.equal(loaded["generator"](*args).logits, models["generator"](*args).logits)


def test_shared_weights_stay_shared(tmp_path, first):
    models, config = first
    save_folder(tmp_path, models, config, True)
    t5 = load_folder(tmp_path)[0]["text_encoder"].t5
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    names = set(load_file(tmp_path / "text_encoder.safetensors"))
    assert len(names & {"t5.shared.weight", "t5.encoder.embed_tokens.weight"}) == 1, "stored once"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feed_forward_proj": "gated-gelu"},
        {"relative_attention_num_buckets": 16},
        {"relative_attention_max_distance": 5},
        {"layer_norm_epsilon": 0.1},
    ],
    ids=str,
)
def test_round_trip_with_t5(tmp_path, first, changes):
    """The loaded encoder must give the same states, or saving must say that it cannot."""
    tiny_t5.save(tmp_path / "t5", **changes)
    encoder = TextEncoder.from_t5(tmp_path / "t5", max_length=12)
    config = replace(first[1], text=encoder.config)
    models = {**first[0], "text_encoder": encoder}
    save_folder(tmp_path / "own", models, config, True)
    shutil.rmtree(tmp_path / "t5")
    loaded, found, _ = load_folder(tmp_path / "own")
    assert found == config and same(loaded, models)
    prompts = ["a cat, naïve", "a", "a prompt that is cut"]
    with torch.no_grad():
        a, b = loaded["text_encoder"](prompts), encoder(prompts)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.states, b.states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_in_other_precisions(tmp_path, dtype):
    models, config = parts(3)
    models = {name: model.to(dtype) for name, model in models.items()}
    save_folder(tmp_path, models, config, True)
    loaded, _, _ = load_folder(tmp_path)
    assert same(loaded, models)
    assert loaded["generator"].to_logits.weight.dtype == dtype
    assert loaded["text_encoder"].t5.shared.weight.dtype == dtype
    counter = loaded["tokenizer"].decoder.stages[1][1].norm.num_batches_tracked
    assert counter.dtype == torch.int64


def test_parts_may_differ_in_precision(tmp_path):
    models, config = parts(4)
    models["generator"].bfloat16()
    save_folder(tmp_path, models, config, True)
    assert same(load_folder(tmp_path)[0], models)


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but nobody else's."""


def fail_at(monkeypatch, owner, name: str, number: int, error: BaseException, done: bool = True) -> None:
    """Lets call ``number`` (from 0) of owner.name raise, after its work is done or before."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) - 1 == number:
            if done:
                real(*args, **kwargs)
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


ERRORS = {"interrupt": Interrupted(), "disk full": OSError(28, "No space left on device")}


@pytest.mark.parametrize("reason", ERRORS)
@pytest.mark.parametrize(
    ("owner", "function", "number"),
    [(checkpoints, "save_file", n) for n in range(3)]
    + [(Path, "write_text", 0)]
    + [(os, "fsync", n) for n in range(4)]
    + [(Path, "chmod", 2)],
)
def test_an_interrupted_save_leaves_the_old_folder_whole(
    tmp_path, monkeypatch, first, second, owner, function, number, reason
):
    save_folder(tmp_path, *first, True)
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    fail_at(monkeypatch, owner, function, number, ERRORS[reason])
    with pytest.raises((Interrupted, OSError, ValueError)):
        save_folder(tmp_path, *second, True)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before
    assert same(load_folder(tmp_path)[0], first[0])
    save_folder(tmp_path, *second, True)
    assert same(load_folder(tmp_path)[0], second[0])


@pytest.mark.parametrize(("reason", "done"), [("interrupt", False), ("interrupt", True), ("disk full", False)])
@pytest.mark.parametrize("number", range(4))
def test_a_save_interrupted_while_renaming_leaves_a_whole_folder(
    tmp_path, monkeypatch, first, second, number, reason, done
):
    """Old or new, but never parts of both."""
    save_folder(tmp_path, *first, True)
    before = listing(tmp_path)
    fail_at(monkeypatch, os, "replace", number, ERRORS[reason], done)
    with pytest.raises((Interrupted, OSError, ValueError)):
        save_folder(tmp_path, *second, True)
    monkeypatch.undo()
    loaded = load_folder(tmp_path)[0]
    assert same(loaded, first[0]) or same(loaded, second[0])
    assert listing(tmp_path) == before, "no temporary files"


def test_a_first_save_that_fails_leaves_nothing_to_load(tmp_path, monkeypatch, first):
    fail_at(monkeypatch, checkpoints, "save_file", 1, Interrupted())
    with pytest.raises(Interrupted):
        save_folder(tmp_path / "new", *first, True)
    monkeypatch.undo()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(ValueError, match="config.json does not exist"):
        load_folder(tmp_path / "new")


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("done", [False, True])
def test_a_first_save_interrupted_while_renaming(tmp_path, monkeypatch, first, number, done):
    fail_at(monkeypatch, os, "replace", number, Interrupted(), done)
    with pytest.raises(Interrupted):
        save_folder(tmp_path, *first, True)
    monkeypatch.undo()
    if (tmp_path / "config.json").exists():
        assert same(load_folder(tmp_path)[0], first[0])
    else:
        assert listing(tmp_path) == set()


def test_config_json_is_renamed_last(tmp_path, monkeypatch, first):
    """A machine that stops in the middle of a first save leaves no folder that looks finished."""
    real, renamed = os.replace, []

    def replace_(source, target):
        renamed.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_)
    save_folder(tmp_path, *first, True)
    assert set(renamed) == FILES and renamed[-1] == "config.json"


def test_a_read_only_folder(tmp_path, monkeypatch, first, second):
    save_folder(tmp_path, *first, True)
    before = listing(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(ValueError, match=f"{tmp_path}.*cannot be written: Permission denied"):
        save_folder(tmp_path, *second, True)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="new.*cannot be written: Permission denied"):
        save_folder(tmp_path / "new", *second, True)
    monkeypatch.undo()
    assert listing(tmp_path) == before and same(load_folder(tmp_path)[0], first[0])


def test_a_file_where_the_folder_should_be(tmp_path, first):
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match="file.*cannot be written"):
        save_folder(tmp_path / "file", *first, True)
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_two_saves_do_not_mix(tmp_path, first, name):
    save_folder(tmp_path / "a", *first, True)
    save_folder(tmp_path / "b", *first, True)  # even with the same weights
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(ValueError, match="another save"):
        load_folder(tmp_path / "a")


@pytest.fixture
def saved(tmp_path, first):
    save_folder(tmp_path, *first, True)
    return tmp_path


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_truncated_and_garbled_files(saved, name):
    path = saved / name
    content = path.read_bytes()
    for damage in (content[: len(content) // 2], content[:5], b"", b"\xff" * 64, None):
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(ValueError, match=name.replace(".", "[.]")):
            load_folder(saved)


def change_config(folder: Path, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "diffusers"}, "config.json"),
        ({"format": None}, "config.json"),
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"tokenizer": {"widths": 8}}, "widths"),
        ({"generator": {"layers": 3}}, "unknown fields"),
        ({"generator": None}, "Config|generator"),
        ({"generator": 5}, "Config|generator"),
        ({"text": [1]}, "Config|text"),
        ({"save_id": "0"}, "another save"),
    ],
    ids=str,
)
def test_bad_configs(saved, changes, message):
    change_config(saved, **changes)
    with pytest.raises(ValueError, match=message):
        load_folder(saved)


@pytest.mark.parametrize("key", ["tokenizer", "generator", "text"])
def test_a_config_without_one_of_its_parts(saved, key):
    settings = json.loads((saved / "config.json").read_text())
    del settings[key]
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=key):
        load_folder(saved)


def test_tensors_that_do_not_fit_the_config(saved):
    path = saved / "generator.safetensors"
    state = load_file(path)
    save_id = json.loads((saved / "config.json").read_text())["save_id"]
    state["position"] = state["position"][:, :-1].contiguous()
    state["extra"] = state.pop("to_logits.bias")
    save_file(state, path, metadata={"save_id": save_id})
    with pytest.raises(ValueError) as caught:
        load_folder(saved)
    message = str(caught.value)
    assert "generator.safetensors" in message and "1 missing: to_logits.bias" in message
    assert "1 unexpected: extra" in message and "position: (16, 47) instead of (16, 48)" in message


@pytest.mark.parametrize("damage", ["gone", "empty", "garbled"])
def test_damaged_text_tokenizers(tmp_path, first, damage):
    tiny_t5.save(tmp_path / "t5")
    encoder = TextEncoder.from_t5(tmp_path / "t5", max_length=12)
    save_folder(tmp_path / "own", {**first[0], "text_encoder": encoder}, replace(first[1], text=encoder.config), True)
    folder = tmp_path / "own" / "text_tokenizer"
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        for path in folder.iterdir():
            path.unlink() if damage == "empty" else path.write_text("{")
    with pytest.raises(ValueError, match="text_tokenizer"):
        load_folder(tmp_path / "own")


def test_a_foreign_folder(tmp_path):
    with pytest.raises(ValueError, match="config.json does not exist"):
        load_folder(tmp_path)
    tiny_t5.save(tmp_path)
    with pytest.raises(ValueError, match="config.json"):
        load_folder(tmp_path)


def test_released_loaders_refuse_our_folder_and_say_so(saved):
    for load in (load_official_generator, load_official_tokenizer):
        with pytest.raises(ValueError, match="not a released"):
            load(saved)


# Writing files


def test_write_atomically(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_atomically(path, lambda p: p.write_text("one"))
    assert path.read_text() == "one" and listing(tmp_path) == {"deep", "deep/a.txt"}
    seen = []

    def fail(p: Path) -> None:
        seen.append(p)
        p.write_text("half")
        raise Interrupted

    with pytest.raises(Interrupted):
        write_atomically(path, fail)
    assert seen[0] != path and seen[0].parent == path.parent and seen[0].suffix == ".txt"
    assert path.read_text() == "one" and listing(tmp_path) == {"deep", "deep/a.txt"}


def test_nothing_is_renamed_before_all_is_written(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail(p: Path) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        write_all_atomically({tmp_path / "a": lambda p: p.write_text("new"), tmp_path / "b": fail})
    assert (tmp_path / "a").read_text() == "old" and listing(tmp_path) == {"a"}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", lambda p: p.write_text("x"))
        assert os.umask(mask) == mask, "the umask itself is left as it was"
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
