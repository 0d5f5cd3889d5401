"""diffusers' DiT, of the shape of ours or with its very weights: a peer for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generator.denoiser import DiT


def peer_of(network: DiT) -> nn.Module:
    """DiTTransformer2DModel of the same shape, for square latents, with weights of its own.

    Each of its blocks embeds noise level and label anew, so that it has more parameters.
    """
    from diffusers import DiTTransformer2DModel

    channels, side, _ = network.latent_shape
    width, heads = network.labels.embedding_dim, network.blocks[0].attention.heads
    return DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, num_layers=len(network.blocks),
        in_channels=channels, out_channels=network.output.linear.out_features // network.patch_size**2,
        sample_size=side, patch_size=network.patch_size, num_embeds_ada_norm=network.num_classes, norm_eps=1e-6,
    )  # fmt: skip


class Condition(nn.Module):
    """Our embedding of noise level and label behind the call of theirs."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.noise_level, self.labels = network.noise_level, network.labels

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return self.noise_level(timestep) + self.labels(class_labels)


def same_weights(network: DiT) -> nn.Module:
    """The peer with our weights and our embeddings (theirs are of a time step): it must give the same output."""
    peer = peer_of(network)
    with torch.no_grad():
        _copy(peer.pos_embed.proj, network.patches)
        peer.pos_embed.pos_embed.copy_(network.positions[None])
        for theirs, ours in zip(peer.transformer_blocks, network.blocks, strict=True):
            theirs.norm1.emb = Condition(network)
            _copy(theirs.norm1.linear, ours.modulation)
            for index, linear in enumerate((theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)):
                linear.weight.copy_(ours.attention.qkv.weight.chunk(3)[index])
                linear.bias.copy_(ours.attention.qkv.bias.chunk(3)[index])
            _copy(theirs.attn1.to_out[0], ours.attention.out)
            _copy(theirs.ff.net[0].proj, ours.mlp.rise)
            _copy(theirs.ff.net[2], ours.mlp.fall)
        _copy(peer.proj_out_1, network.output.modulation)
        # Our output's channels vary slowest within a patch, theirs fastest.
        area = network.patch_size**2
        for name in ("weight", "bias"):
            rows = getattr(network.output.linear, name).unflatten(0, (-1, area)).transpose(0, 1).flatten(0, 1)
            getattr(peer.proj_out_2, name).copy_(rows)
    return peer


def _copy(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())
