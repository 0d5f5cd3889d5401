"""Stage 2: codes or latents from noise, a class or nothing."""
