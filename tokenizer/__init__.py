"""Stage 1: pixels to latents to codes and back."""
