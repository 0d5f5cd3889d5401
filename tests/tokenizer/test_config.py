"""The tokenizer's settings: sizes, overrides, refusals."""

import pytest

from tokenizer.config import (
    TOWERS,
    CnnConfig,
    DiscriminatorConfig,
    QuantizerConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TokenizerModelConfig,
    TowerConfig,
)


def test_presets_name_encoder_then_decoder() -> None:
    assert TokenizerModelConfig(preset="small-large").towers == (TOWERS["small"], TOWERS["large"])


def test_an_override_replaces_one_tower() -> None:
    own = TowerConfig(blocks=1, width=8, heads=2, mlp=16)
    assert TokenizerModelConfig(preset="tiny-tiny", decoder=own).towers == (TOWERS["tiny"], own)


@pytest.mark.parametrize("preset", ["small", "small-huge", "small-small-small", ""])
def test_unknown_presets_are_refused_by_name(preset: str) -> None:
    with pytest.raises(ValueError, match=f"model.preset='{preset}'.*tiny"):
        TokenizerModelConfig(preset=preset)


def test_senseless_values_are_refused() -> None:
    with pytest.raises(ValueError, match="width=10 is not a multiple of heads=3"):
        TowerConfig(blocks=1, width=10, heads=3, mlp=16)
    with pytest.raises(ValueError, match=r"model\.vocab_size=1"):
        TokenizerModelConfig(vocab_size=1)
    with pytest.raises(ValueError, match="revive_after=-1"):
        QuantizerConfig(revive_after=-1)
    with pytest.raises(ValueError, match=r"loss\.commitment=-0\.5"):
        TokenizerLossConfig(commitment=-0.5)
    with pytest.raises(ValueError, match=r"loss\.l2, loss\.l1 and loss\.logit_laplace are all 0"):
        TokenizerLossConfig(l2=0.0)
    with pytest.raises(ValueError, match=r"discriminator\.r1_every=0"):
        DiscriminatorConfig(r1_every=0)
    with pytest.raises(ValueError, match="encode_batch_size=0"):
        TokenizerConfig(encode_batch_size=0)


def test_switches_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.logit_laplace=0\.1 needs model\.output=logit_laplace"):
        TokenizerConfig(loss=TokenizerLossConfig(logit_laplace=0.1))
    with pytest.raises(ValueError, match=r"model\.patch_size=8.*halve the image to 2 pixels"):
        TokenizerModelConfig(architecture="cnn", cnn=CnnConfig(multipliers=(1, 2)))
    model = TokenizerModelConfig(code_dim=2, vocab_size=16)
    with pytest.raises(ValueError, match=r"quantizer\.levels=\[4\].*code_dim=2.*fsq needs code_dim levels"):
        TokenizerConfig(model=model, quantizer=QuantizerConfig(kind="fsq", levels=(4,)))
    with pytest.raises(ValueError, match=r"lfq has a bit per number, so vocab_size must be 2\^code_dim = 4"):
        TokenizerConfig(model=model, quantizer=QuantizerConfig(kind="lfq"))
    with pytest.raises(ValueError, match=r"quantizer\.levels=\[8, 2\]: fsq needs at least 3 levels"):
        TokenizerConfig(model=model, quantizer=QuantizerConfig(kind="fsq", levels=(8, 2)))
    assert TokenizerConfig(model=model, quantizer=QuantizerConfig(kind="fsq", levels=(4, 4)))
    with pytest.raises(ValueError, match=r"tokenizer\.latent_statistics=static has no effect.*encoder_from"):
        TokenizerConfig(latent_statistics="static", encoder_from="runs/a")
    with pytest.raises(ValueError, match=r"quantizer\.update=ema has no effect with quantizer\.kind=kl"):
        TokenizerConfig(quantizer=QuantizerConfig(kind="kl", update="ema"))
    with pytest.raises(ValueError, match=r"loss\.entropy=0\.1: quantizer\.kind=simvq has no entropy loss"):
        TokenizerConfig(quantizer=QuantizerConfig(kind="simvq"), loss=TokenizerLossConfig(entropy=0.1))
