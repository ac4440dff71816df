"""Writes trained weights as Hugging Face folders. Nothing here imports Megatron or needs a process group."""
