"""wikift: GPT-2 and WikiText, from raw text to a fine-tuned model that writes text."""

__version__ = "0.1.0"
