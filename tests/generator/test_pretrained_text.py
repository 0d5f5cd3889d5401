"""Frozen CLIP and T5: tokens are what transformers computes; weights stay outside; what is missing is said."""

from __future__ import annotations

import builtins
import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.flops import forward_flops
from generator import pretrained_text
from generator.captions import encode_texts
from generator.condition_config import TextConfig
from generator.pretrained_text import PretrainedText, check_fingerprint, text_fingerprint
from generator.text import build_text_encoder
from generator.text_files import open_folder

transformers = pytest.importorskip("transformers")
LENGTH, WIDTH = 12, 32
TEXTS = ["a cat", "the cat of a dog", "dog"]
ENCODERS = pytest.mark.parametrize("encoder", ["clip", "t5"])


def save_clip(folder: Path, *, whole: bool = False) -> None:
    """A random CLIP, its text half or both, whose words are single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = {word: number for number, word in enumerate(vocabulary)}
    transformers.CLIPTokenizer(vocab=words, merges=[]).save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "projection_dim": 8}
    sizes |= {"num_attention_heads": 2}
    ends = {"bos_token_id": words["<|startoftext|>"], "eos_token_id": words["<|endoftext|>"]}
    text = {**sizes, **ends, "vocab_size": len(words), "max_position_embeddings": 9, "pad_token_id": 1}
    if whole:
        vision = {**sizes, "image_size": 8, "patch_size": 4}
        network = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    else:
        network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
    network.save_pretrained(folder)


def save_t5(folder: Path) -> None:
    """A random T5 whose words are letters."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefghijklmnopqrst")]
    transformers.T5Tokenizer(vocab=letters, extra_ids=0).save_pretrained(folder)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(letters), **sizes)).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("encoders")
    save_clip(base / "clip")
    save_clip(base / "whole", whole=True)
    save_t5(base / "t5")
    return {name: base / name for name in ("clip", "whole", "t5")}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests ask of the hub they may not get."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def config_of(folders: dict[str, Path], encoder: str, **given: Any) -> TextConfig:
    kind: Any = "clip" if encoder == "whole" else encoder
    return TextConfig(encoder=kind, path=str(folders[encoder]), **{"length": LENGTH, **given})


def built(config: TextConfig, seed: int = 1) -> PretrainedText:
    torch.manual_seed(seed)
    encoder = build_text_encoder(config, WIDTH).eval()
    assert isinstance(encoder, PretrainedText)
    return encoder


@pytest.mark.parametrize("encoder", ["clip", "whole", "t5"])
def test_states_are_what_transformers_computes(folders: dict[str, Path], encoder: str) -> None:
    """Each text by itself, as long as it is: nothing of padding, nothing of its neighbours."""
    config = config_of(folders, encoder)
    kind = transformers.T5EncoderModel if encoder == "t5" else transformers.CLIPTextModel
    theirs = kind.from_pretrained(folders[encoder]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[encoder])
    ids = encode_texts(config, TEXTS)
    states = built(config)._states(ids)  # [3, L, 16]
    room = 9 if encoder != "t5" else LENGTH - 1
    for text, row, mine in zip(TEXTS, ids, states, strict=True):
        asked = tokenizer(text, truncation=True, max_length=room, return_tensors="pt")["input_ids"]  # [1, T]
        count = asked.shape[1]
        assert (row[:count] - 1).equal(asked[0]) and not row[count:].any() and 3 <= count <= room
        with torch.no_grad():
            out = theirs(input_ids=asked)
        torch.testing.assert_close(mine[:count], out.last_hidden_state[0], rtol=0, atol=1e-5)
        summary = out.last_hidden_state[0].mean(0) if encoder == "t5" else out.pooler_output[0]
        torch.testing.assert_close(mine[-1], summary, rtol=0, atol=1e-5)
        assert not mine[count:-1].any()


@ENCODERS
def test_tokens_are_mapped_states_and_padding_is_one_vector(folders: dict[str, Path], encoder: str) -> None:
    config = config_of(folders, encoder)
    network = built(config)
    ids = encode_texts(config, [*TEXTS, ""])
    tokens, states = network(ids), network._states(ids)
    assert tokens.shape == (4, LENGTH, WIDTH) and network.num_tokens == LENGTH
    torch.testing.assert_close(tokens[:, 0], network.norm(network.tokens(states[:, 0])))
    torch.testing.assert_close(tokens[:, -1], network.norm(network.summary(states[:, -1])))
    padding = (tokens == network.padding).all(-1)
    assert padding[:, :-1].equal(ids[:, :-1] == 0) and not padding[:, -1].any()
    assert (ids[-1] > 0).any(), "the empty text has its marks"


@ENCODERS
def test_frozen_weights_are_no_part_of_the_network(folders: dict[str, Path], encoder: str) -> None:
    network = built(config_of(folders, encoder))
    names = {"tokens.weight", "tokens.bias", "summary.weight", "summary.bias", "norm.weight", "norm.bias", "padding"}
    assert set(network.state_dict()) == names == {name for name, _ in network.named_parameters()}
    assert len(list(network.modules())) == 4
    twin = copy.deepcopy(network)
    assert twin._states is network._states
    frozen = pretrained_text._network(network._states.files)
    assert not frozen.training and not any(weight.requires_grad for weight in frozen.parameters())


def test_each_text_is_encoded_once_and_its_states_never_depend_on_the_others(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folders, "clip")
    ids = encode_texts(config, ["a", "b", "c", "d", "e", "f", "g", "h", "i"])
    together, alone = built(config)._states, built(config)._states
    encode, calls = type(together)._encoded, []

    def counted(self: Any, chunk: Tensor) -> Tensor:
        calls.append(len(chunk))
        return encode(self, chunk)

    monkeypatch.setattr(type(together), "_encoded", counted)
    first = together(ids)
    assert calls == [8, 8]
    assert together(ids.flip(0)).equal(first.flip(0)) and calls == [8, 8]
    assert alone(ids[3:4])[0].equal(first[3]) and alone(ids[[8, 3]])[0].equal(first[8])
    together.room = 4  # less than one batch needs: nothing but time is lost
    other = encode_texts(config, ["k", "l", "m", "n", "o"])
    assert together(torch.cat([ids, other]))[:9].equal(first) and len(together._known) == 4
    assert together(ids).equal(first)


def test_what_a_preview_meets_first_can_be_trained_on(folders: dict[str, Path]) -> None:
    config = config_of(folders, "t5")
    network, ids = built(config), encode_texts(config, TEXTS)
    with torch.inference_mode():
        network(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(ids).float().square().sum().backward()
    assert network.tokens.weight.grad is not None and network.tokens.weight.grad.abs().sum() > 0
    assert network._states(ids).equal(built(config)._states(ids)), "autocast changes no state"


def test_reading_weights_draws_no_random_numbers(folders: dict[str, Path]) -> None:
    pretrained_text._network.cache_clear()
    network, ids = built(config_of(folders, "clip")), encode_texts(config_of(folders, "clip"), TEXTS)
    before = torch.random.get_rng_state()
    network(ids)
    assert torch.random.get_rng_state().equal(before)


@ENCODERS
def test_it_builds_and_counts_without_reading_weights(folders: dict[str, Path], encoder: str) -> None:
    pretrained_text._network.cache_clear()
    with torch.device("meta"):
        network = build_text_encoder(config_of(folders, encoder), WIDTH)
        assert network(torch.zeros(2, LENGTH, dtype=torch.int64)).shape == (2, LENGTH, WIDTH)
    assert forward_flops(network, torch.zeros(1, LENGTH, dtype=torch.int64)) == 2 * 16 * WIDTH * LENGTH
    assert pretrained_text._network.cache_info().currsize == 0


def test_a_text_that_is_too_long_is_cut_or_refused(folders: dict[str, Path]) -> None:
    config = config_of(folders, "clip", length=6)
    row = encode_texts(config, ["a b c d e f"])[0]
    ends = encode_texts(config, [""])[0, :2]
    assert row[0] == ends[0] and row[4] == ends[1] and row[5] == 0, "begin, three words, end"
    with pytest.raises(ValueError, match=r"'a b c d e f' has 8 tokens, but condition\.text\.length=6 .* room for 5"):
        encode_texts(config, ["a", "a b c d e f"], whole=True)
    with pytest.raises(ValueError, match=r"has 11 tokens, .* leave room for 9"):
        encode_texts(config_of(folders, "clip", length=40), ["a b c d e f g h i"], whole=True)


def test_another_encoder_than_that_of_training_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(folders, "clip")
    recorded = text_fingerprint(config)
    shutil.copytree(folders["clip"], tmp_path / "moved")
    check_fingerprint(config_of({"clip": tmp_path / "moved"}, "clip"), recorded)
    shutil.copytree(folders["clip"], tmp_path / "other")
    save_clip(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"condition\.text\.path=.*other .* trained with {recorded}: bring"):
        check_fingerprint(config_of({"clip": tmp_path / "other"}, "clip"), recorded)
    assert text_fingerprint(TextConfig()) is None


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"encoder=clip needs the transformers library: pip .*tokenloom\[text\]"):
        build_text_encoder(TextConfig(encoder="clip", path="nowhere"), WIDTH)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("./nowhere", r"condition\.text\.path=\./nowhere: no such folder .*hf download openai/clip"),
        ("some/deep/folder", r"condition\.text\.path=some/deep/folder: no such folder"),
        ("no-one/nothing", r"condition\.text\.path=no-one/nothing: no folder .* not to be had from the hub .*FOLDER"),
    ],
)
def test_missing_weights_say_where_they_were_looked_for_and_what_to_do(path: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_text_encoder(TextConfig(encoder="clip", path=path), WIDTH)


def test_a_folder_must_hold_a_text_encoder_of_this_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json with weights .* encoder=bytes needs no weights"):
        open_folder("clip", str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.json describes no CLIP text encoder \(KeyError: 't5'\)"):
        open_folder("clip", str(folders["t5"]))


def test_weights_that_lack_some_are_refused_not_made_up(folders: dict[str, Path], tmp_path: Path) -> None:
    deeper = tmp_path / "deeper"
    shutil.copytree(folders["clip"], deeper)
    told = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(told | {"num_hidden_layers": 3}))
    config = config_of({"clip": deeper}, "clip")
    with pytest.raises(ValueError, match=r"deeper lacks 16 weights of its CLIP text encoder, .*layers\.2"):
        built(config)(encode_texts(config, TEXTS))


def test_damaged_files_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["t5"], broken)
    (broken / "model.safetensors").write_bytes(b"cut")
    (broken / "tokenizer.json").write_text("{")
    config = config_of({"t5": broken}, "t5")
    with pytest.raises(ValueError, match=r"condition\.text\.path: .*broken has no tokenizer that can be read"):
        encode_texts(config, TEXTS)
    shutil.copy(folders["t5"] / "tokenizer.json", broken)
    with pytest.raises(ValueError, match=r"condition\.text\.path: weights of .*broken are unreadable"):
        built(config)(torch.ones(1, LENGTH, dtype=torch.int64))
    assert isinstance(built(config), nn.Module), "they are read when the first text comes"
