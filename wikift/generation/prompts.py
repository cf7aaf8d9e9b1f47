"""Where prompts come from: the command line, a file, the five examples. Imports nothing heavy."""

from __future__ import annotations

# Openings of encyclopedia articles, for the model to go on with.
EXAMPLES = (
    (
        "The 2005 Nobel Prize in Physics honoured John L. Hall and Theodor W. Hänsch for precision spectroscopy with "
        "lasers. The optical frequency comb, which both of them developed,"
    ),
    "The Renaissance was a period of European history that began in Florence, where",
    "Maria Skłodowska, known as Marie Curie, was a physicist and chemist, born in Warsaw, who",
    "The Industrial Revolution began in Great Britain in the 18th century, when",
    "The theory of relativity, which Albert Einstein published in 1905 and 1915, describes",
)


def clean(text: str) -> str:
    """`text` without lone surrogates: bytes of an argument that were not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def escapes(text: str) -> str:
    r"""`text` with \n and \t, as they can be typed in any shell, made a new line and a tab."""
    return clean(text).replace("\\n", "\n").replace("\\t", "\t")
