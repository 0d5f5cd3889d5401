"""What an exported folder says of its use is what its generator takes."""

from typing import Any

import pytest

from engine.config import to_dict
from generator.condition_config import ConditionConfig, TextConfig
from tokenloom.export import export_usage

TEXT = TextConfig(templates=("{}",), held_out=("see {}", "one {}"))
FROZEN = TextConfig(encoder="clip", path="models/clip", captions="data")


def usage(condition: ConditionConfig, **card: Any) -> str:
    told = {"config": {"condition": to_dict(condition)}, "num_classes": 3, "class_names": ["cat", "dög", 'a "b"']}
    return "\n".join(export_usage({"tokenizer": {}, "diffusion": {**told, **card}}))


@pytest.mark.parametrize(
    ("condition", "card", "call", "remark"),
    [
        (ConditionConfig(), {}, "labels=[0, 1, 2], ", ""),
        (ConditionConfig(), {"num_classes": 0, "class_names": []}, "", ""),
        (ConditionConfig(kind="text", text=TEXT), {}, r'prompts=["see cat", "see dög", "see a \"b\""], ', ""),
        (
            ConditionConfig(kind="text", text=FROZEN),
            {"num_classes": 0, "class_names": []},
            'prompts=["one text", "another one", "a third"], ',
            "Texts are read by the CLIP of `models/clip`, which is not in this folder.",
        ),
        (ConditionConfig(kind="image"), {"low_resolution": 8}, "images=small, ", "uint8 `[3, 3, s, s]`, each 1/8"),
    ],
)
def test_a_call_names_what_the_generator_takes(
    condition: ConditionConfig, card: dict[str, Any], call: str, remark: str
) -> None:
    text = usage(condition, **card)
    assert f'images = tokenloom.sample("this-folder", "diffusion", {call}seeds=[0, 1, 2])' in text and remark in text
    assert bool(remark) == (not text.endswith("```\n"))


def test_a_tokenizer_alone_is_loaded() -> None:
    assert 'tokenloom.load_tokenizer("this-folder")' in "\n".join(export_usage({"tokenizer": {}}))
