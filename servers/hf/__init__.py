"""Hugging Face's `model.generate` behind a small web app, run by a Python that has transformers."""
