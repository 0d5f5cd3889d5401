"""Turns batches and a task into a trained, resumable, logged run; knows nothing about what it drives."""
