"""The ViT towers: patches in raster order, shapes, fused attention."""

import pytest
import torch
import torch.nn.functional as F

from tokenizer.config import TowerConfig
from tokenizer.vit import Decoder, Encoder, patchify, unpatchify

TOWER = TowerConfig(blocks=2, width=16, heads=2, mlp=32)


def test_unpatchify_undoes_patchify() -> None:
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), (2, 3), 4), images)


def test_patches_come_in_raster_order() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    patches = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert patchify(image, 2).tolist() == [patches]


def test_towers_map_images_to_vectors_and_back() -> None:
    encoder = Encoder(TOWER, grid=(2, 2), patch_size=4, out_dim=5)
    decoder = Decoder(TOWER, grid=(2, 2), patch_size=4, in_dim=5)
    vectors = encoder(torch.randn(3, 3, 8, 8))
    assert vectors.shape == (3, 4, 5)
    assert decoder(vectors).shape == (3, 3, 8, 8)


def test_a_token_sees_every_patch_and_its_place() -> None:
    encoder = Encoder(TOWER, grid=(2, 2), patch_size=4, out_dim=5)
    images = torch.randn(1, 3, 8, 8)
    changed = images.clone()
    changed[..., 4:, 4:] += 1
    assert not torch.allclose(encoder(images)[:, 0], encoder(changed)[:, 0])
    same = encoder(torch.zeros(1, 3, 8, 8))
    assert not torch.allclose(same[:, 0], same[:, 1])


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Collects the type of the queries of every call of the fused attention."""
    calls: list[torch.dtype] = []
    fused = F.scaled_dot_product_attention

    def watched(query: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(query.dtype)
        return fused(query, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return calls


def test_attention_is_fused_in_float32_and_written_out_in_bf16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused_calls(monkeypatch)
    encoder, images = Encoder(TOWER, grid=(2, 2), patch_size=4, out_dim=5), torch.randn(1, 3, 8, 8)
    exact = encoder(images)
    assert calls == [torch.float32] * TOWER.blocks
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = encoder(images)
    assert len(calls) == TOWER.blocks and rough.dtype == torch.bfloat16
    assert torch.allclose(rough.float(), exact, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_is_fused_in_bf16_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fused_calls(monkeypatch)
    encoder = Encoder(TOWER, grid=(2, 2), patch_size=4, out_dim=5).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        encoder(torch.randn(1, 3, 8, 8, device="cuda"))
    assert calls == [torch.bfloat16] * TOWER.blocks
